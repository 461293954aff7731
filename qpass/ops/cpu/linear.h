// y[m, n] = sum_k x[m, k] * w[n, k] + bias[n] in float32: exact but for rounding. `compute="float"`.
#pragma once
#include "weight.h"

constexpr int ROWS_AT_ONCE = 4;  // weight rows that share the reading of x
constexpr int64_t COLUMNS_AT_ONCE = 1024;   // of rows and inputs that stay in the first-level cache
constexpr int INPUTS_AT_ONCE = W == 16 ? 4 : 2;  // inputs that share the reading of the weight, as registers allow

// One row of a weight in its stored form by one input, padded with zeros to a multiple of W. Row after row is one stream,
// which the hardware sees and fetches ahead; rows side by side reach two thirds of the bandwidth.
template <class Read, bool Zeros> INLINE float dot_stored(const Matrix& m, int64_t row, const float* x, float* scales) {
  constexpr int LANES = 4;  // sums side by side, for the latency of fma
  const uint8_t* p = m.row(row);
  const float *s = scales_of(m, row, scales), *z = Zeros ? zeros_of(m, row, scales + m.blocks) : nullptr;
  const float* book = m.spec->codebook;
  int64_t whole = m.k / W * W, group = m.blocks > 1 ? m.spec->group : m.k;
  F total = zero();
  for (int64_t k = 0, g = 0; k < m.k; g++) {
    int64_t end = least(m.k, k + group), vectors = least(end, whole);
    F zeros = Zeros ? all(z[g]) : zero(), acc[LANES];
    UNROLL for (F& a : acc) a = zero();
    auto code = [&](F v) __attribute__((always_inline)) { return Zeros ? sub(v, zeros) : v; };
    auto add_vector = [&](F v, int64_t i, F& sum) __attribute__((always_inline)) { sum = fma(code(v), load(x + i), sum); };
    constexpr int64_t line = 64 * 8 / Read::bits;  // elements in a cache line
    for (; k + line <= vectors; k += line) {
      prefetch(p + k * Read::bits / 8);
      UNROLL for (int64_t i = 0; i < line; i += 2 * W) {
        F a, b;
        Read::two(p, k + i, book, a, b);
        add_vector(a, k + i, acc[i / W % LANES]), add_vector(b, k + i + W, acc[(i / W + 1) % LANES]);
      }
    }
    for (; k + LANES * W <= vectors; k += LANES * W)
      UNROLL for (int i = 0; i < LANES; i++) add_vector(Read::at(p, k + i * W, book), k + i * W, acc[i]);
    for (; k < vectors; k += W) add_vector(Read::at(p, k, book), k, acc[0]);
    if (k < end) add_vector(read_tail<Read>(p, m.row_bytes, k, book), k, acc[1]);
    k = end;
    total = fma(add(add(acc[0], acc[1]), add(acc[2], acc[3])), all(s[g]), total);
  }
  return sum(total);
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
  __attribute__((always_inline)) void put(int64_t m, int64_t column, float value) const {
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

template <class Read>
static void linear_rows(const Matrix& w, const float* x, int64_t count, int64_t begin, int64_t end, const Output& out) {
  int64_t padded = round_up(w.k, W), blocks = w.blocks;
  float* scales = scratch<float>(SCALES, 2 * blocks);
  bool stored = count == 1 && groups_fit(w), zeros = needs_zeros(*w.spec);
  float* floats = stored ? nullptr : scratch<float>(ROWS, ROWS_AT_ONCE * padded);
  int64_t half = (end - begin + 1) / 2;
  for (int64_t i = 0; stored && i < end - begin; i++) {  // two halves by turns: two streams are fetched further ahead than one
    int64_t n = begin + i / 2 + i % 2 * half;
    out.put(0, n, zeros ? dot_stored<Read, true>(w, n, x, scales) : dot_stored<Read, false>(w, n, x, scales));
  }
  for (int64_t n = begin; !stored && n < end; n += ROWS_AT_ONCE) {
    int64_t here = least(ROWS_AT_ONCE, end - n);
    const float* p[ROWS_AT_ONCE];
    for (int r = 0; r < ROWS_AT_ONCE; r++) {  // the last is repeated past the end
      p[r] = floats + r * padded;
      row_to_float<Read>(w, least(n + r, end - 1), floats + r * padded, scales);
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
