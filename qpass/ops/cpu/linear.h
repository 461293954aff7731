// y[m, n] = sum_k x[m, k] * w[n, k] + bias[n] in float32: exact but for rounding. `compute="float"`.
#pragma once
#include "weight.h"

constexpr int ROWS_AT_ONCE = 4;  // weight rows that share the reading of x
constexpr int64_t COLUMNS_AT_ONCE = 1024;   // of rows and inputs that stay in the first-level cache
constexpr int INPUTS_AT_ONCE = W == 16 ? 4 : 2;  // inputs that share the reading of the weight, as registers allow

// Four rows of a weight in its stored form by one input. `x` is padded with zeros to a multiple of W.
template <class Read, bool Grouped, bool Zeros>
INLINE void dot_stored(const Matrix& m, const int64_t* rows, const float* x, float* scales, float* out) {
  const uint8_t* p[ROWS_AT_ONCE];
  const float *s[ROWS_AT_ONCE], *z[ROWS_AT_ONCE];
  int64_t blocks = m.blocks, whole = m.k / W * W;
  for (int r = 0; r < ROWS_AT_ONCE; r++) {
    p[r] = m.row(rows[r]);
    s[r] = scales_of(m, rows[r], scales + 2 * r * blocks);
    z[r] = Zeros ? zeros_of(m, rows[r], scales + (2 * r + 1) * blocks) : nullptr;
  }
  F acc[ROWS_AT_ONCE];
  for (F& a : acc) a = zero();
  const float* book = m.spec->codebook;
  int64_t group = Grouped ? m.spec->group : m.k;
  for (int64_t start = 0, g = 0; start < m.k; start += group, g++) {
    int64_t end = least(m.k, start + group), vectors = least(end, whole), k = start;
    F scale[ROWS_AT_ONCE], zeros[ROWS_AT_ONCE];
    UNROLL for (int r = 0; r < ROWS_AT_ONCE; r++) {
      scale[r] = Grouped ? all(s[r][g]) : zero();
      zeros[r] = Zeros ? all(z[r][g]) : zero();
    }
    auto add_row = [&](int r, F v, F xs) __attribute__((always_inline)) {
      if constexpr (Zeros) v = sub(v, zeros[r]);
      if constexpr (Grouped) v = mul(v, scale[r]);
      acc[r] = fma(v, xs, acc[r]);
    };
    constexpr int64_t line = 64 * 8 / Read::bits / W * W;  // elements in a cache line
    for (; k + line <= vectors; k += line) {
      UNROLL for (int r = 0; r < ROWS_AT_ONCE; r++) prefetch(p[r] + k * Read::bits / 8);
      UNROLL for (int64_t i = 0; i < line; i += W) {
        F xs = load(x + k + i);
        UNROLL for (int r = 0; r < ROWS_AT_ONCE; r++) add_row(r, Read::at(p[r], k + i, book), xs);
      }
    }
    for (; k < vectors; k += W) {
      F xs = load(x + k);
      UNROLL for (int r = 0; r < ROWS_AT_ONCE; r++) add_row(r, Read::at(p[r], k, book), xs);
    }
    if (k < end)
      for (int r = 0; r < ROWS_AT_ONCE; r++) add_row(r, read_tail<Read>(p[r], m.row_bytes, k, book), load(x + k));
  }
  sum4(acc, out);
  if (!Grouped) for (int r = 0; r < ROWS_AT_ONCE; r++) out[r] *= s[r][0];
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

// A result on its way out: y[m, n] = value + bias[n], in y's dtype.
struct Output {
  void* y;
  const void* bias;
  int32_t dtype, bias_dtype;
  int64_t n;
  INLINE float bias_at(const Output& o, int64_t column) {
    float b;
    from_dtype((const char*)o.bias + column * size_of(o.bias_dtype), 1, o.bias_dtype, &b);
    return b;
  }
  void put(int64_t m, int64_t column, float value) const {
    if (bias) value += bias_at(*this, column);
    to_dtype(&value, 1, dtype, (char*)y + (m * n + column) * size_of(dtype));
  }
};

// x [count, k] of any dtype -> float32 rows padded with zeros.
static float* padded_inputs(const void* x, int64_t count, int64_t k, int32_t dtype, float* out) {
  int64_t padded = round_up(k, W);
  for (int64_t m = 0; m < count; m++) {
    from_dtype((const char*)x + m * k * size_of(dtype), k, dtype, out + m * padded);
    for (int64_t i = k; i < padded; i++) out[m * padded + i] = 0.0f;
  }
  return out;
}

// Indices of the rows from `row` on, the last repeated past `end`.
INLINE void next_rows(int64_t row, int64_t end, int64_t* rows) {
  for (int r = 0; r < ROWS_AT_ONCE; r++) rows[r] = least(row + r, end - 1);
}

template <class Read>
static void linear_rows(const Matrix& w, const float* x, int64_t count, int64_t begin, int64_t end, const Output& out) {
  int64_t padded = round_up(w.k, W), blocks = w.blocks;
  float* scales = scratch<float>(SCALES, 2 * ROWS_AT_ONCE * blocks);
  bool stored = count == 1 && groups_fit(w), zeros = needs_zeros(*w.spec);
  float* floats = stored ? nullptr : scratch<float>(ROWS, ROWS_AT_ONCE * padded);
  int64_t rows[ROWS_AT_ONCE];
  for (int64_t n = begin; n < end; n += ROWS_AT_ONCE) {
    next_rows(n, end, rows);
    int64_t here = least(ROWS_AT_ONCE, end - n);
    if (stored) {
      float y[ROWS_AT_ONCE];
      if (blocks > 1 && zeros) dot_stored<Read, true, true>(w, rows, x, scales, y);
      else if (blocks > 1) dot_stored<Read, true, false>(w, rows, x, scales, y);
      else if (zeros) dot_stored<Read, false, true>(w, rows, x, scales, y);
      else dot_stored<Read, false, false>(w, rows, x, scales, y);
      for (int r = 0; r < here; r++) out.put(0, n + r, y[r]);
      continue;
    }
    const float* p[ROWS_AT_ONCE];
    for (int r = 0; r < ROWS_AT_ONCE; r++) {
      p[r] = floats + r * padded;
      row_to_float<Read>(w, rows[r], floats + r * padded, scales);
      for (int64_t k = w.k; k < padded; k++) floats[r * padded + k] = 0.0f;
    }
    float* sums = scratch<float>(SUMS, ROWS_AT_ONCE * count);
    std::memset(sums, 0, ROWS_AT_ONCE * count * sizeof(float));
    for (int64_t k = 0; k < padded; k += COLUMNS_AT_ONCE) {
      dot_all(p, x + k, count, padded, least(COLUMNS_AT_ONCE, padded - k), [&](int r, int64_t m, float y) { sums[r * count + m] += y; });
      for (const float*& row : p) row += COLUMNS_AT_ONCE;
    }
    for (int r = 0; r < here; r++) for (int64_t m = 0; m < count; m++) out.put(m, n + r, sums[r * count + m]);
  }
}

// Rows that a thread takes at a time.
static int64_t piece_of(const Matrix& w, int threads) {
  return round_up(most(1, least(w.n / (4 * threads), (1 << 18) / most(1, w.row_bytes))), ROWS_AT_ONCE);
}

static void linear_float(const Matrix& w, const void* x, int32_t dtype, int64_t count, const Output& out, int threads) {
  int64_t padded = round_up(w.k, W);
  const float* inputs = (const float*)x;
  if (dtype != X_FP32 || padded != w.k) inputs = padded_inputs(x, count, w.k, dtype, scratch<float>(INPUT, count * padded));
  parallel(w.n, piece_of(w, threads), threads, [&](int64_t begin, int64_t end) {
    with_reader(*w.spec, [&](auto read) { linear_rows<decltype(read)>(w, inputs, count, begin, end, out); });
  });
}
