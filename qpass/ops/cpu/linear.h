// y[m, n] = sum_k x[m, k] * w[n, k] + bias[n]. Each of the two ways is a file of its own: they take the longest to compile.
#pragma once
#include "around.h"

constexpr int INPUTS_AT_ONCE = W == 16 ? 4 : 2;  // inputs that share the reading of the weight, as registers allow
#if defined(__AVX2__)
constexpr int64_t SHORT_ROW = 1024;  // bytes
#else
constexpr int64_t SHORT_ROW = 0;  // nothing is gained, and compiling takes twice as long
#endif

// In float32, exact but for rounding (`compute="float"`), and with inputs as int8 (`compute="int8"`).
void linear_float(const Matrix& w, const Input& x, int64_t count, const Output& out, int threads) HIDDEN;
void linear_int8(const Matrix& w, const Input& x, int64_t count, const Output& out, int threads) HIDDEN;

// Rows that a thread takes at a time.
static int64_t piece_of(const Matrix& w, int threads) {
  return round_up(most(1, least(w.n / (4 * threads), (1 << 18) / most(1, w.row_bytes))), ROWS_AT_ONCE);
}

// out[m * ROWS_AT_ONCE + r] = w[r] . x[m]: rows of floats `w_stride` apart, inputs `x_stride` apart, both padded to a multiple of W.
template <int M>
INLINE void dot_floats(const float* const* w, const float* x, int64_t x_stride, int64_t k_padded, float* out) {
  F acc[M][ROWS_AT_ONCE];
  for (auto& row : acc) for (F& a : row) a = zero();
  for (int64_t k = 0; k < k_padded; k += W) {
    F v[ROWS_AT_ONCE];
    UNROLL for (int r = 0; r < ROWS_AT_ONCE; r++) v[r] = load(w[r] + k);
    UNROLL for (int m = 0; m < M; m++) {
      F xs = load(x + m * x_stride + k);
      UNROLL for (int r = 0; r < ROWS_AT_ONCE; r++) acc[m][r] = fma(v[r], xs, acc[m][r]);
    }
  }
  for (int m = 0; m < M; m++) sum4(acc[m], out + m * ROWS_AT_ONCE);
}

// Four rows of floats by `count` inputs: put(r, m, value) for each pair.
template <class Put>
INLINE void dot_all(const float* const* w, const float* x, int64_t count, int64_t x_stride, int64_t k_padded, Put&& put) {
  float out[ROWS_AT_ONCE * INPUTS_AT_ONCE];
  int64_t m = 0;
  for (; m + INPUTS_AT_ONCE <= count; m += INPUTS_AT_ONCE) {
    dot_floats<INPUTS_AT_ONCE>(w, x + m * x_stride, x_stride, k_padded, out);
    for (int r = 0; r < ROWS_AT_ONCE; r++)
      for (int i = 0; i < INPUTS_AT_ONCE; i++) put(r, m + i, out[i * ROWS_AT_ONCE + r]);
  }
  for (; m < count; m++) {
    dot_floats<1>(w, x + m * x_stride, x_stride, k_padded, out);
    for (int r = 0; r < ROWS_AT_ONCE; r++) put(r, m, out[r]);
  }
}
