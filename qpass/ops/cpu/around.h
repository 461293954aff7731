// What a linear does beside the product: its input is normalized and scaled on the way in, its result gated and added to on the
// way out. A decode step of a small model spends as long on calls as on products.
#pragma once
#include "extras.h"
#include "weight.h"

constexpr int ROWS_AT_ONCE = 4;  // weight rows that share the reading of an input

// Rows x [count, k] as floats: x / sqrt(mean(x^2) + eps) * norm * columns.
struct Input {
  const void* x;
  int64_t k;
  int32_t dtype;
  bool normalizes;
  float eps;
  const float *norm, *columns;

  Input(const void* x, int64_t k, int32_t dtype, const Around& around)
      : x(x), k(k), dtype(dtype), normalizes(around.normalizes), eps(around.eps), norm((const float*)around.norm), columns(around.columns) {
    if (!norm || around.norm_dtype == X_FP32) return;
    float* floats = scratch<float>(NORM, k);
    from_dtype(around.norm, k, around.norm_dtype, floats);
    norm = floats;
  }
  bool is_float() const { return dtype == X_FP32 && !normalizes && !norm && !columns; }
  Input from(int64_t m) const {
    Input rest = *this;
    rest.x = (const char*)x + m * k * size_of(dtype);
    return rest;
  }
  void row(int64_t m, float* out) const {
    from_dtype((const char*)x + m * k * size_of(dtype), k, dtype, out);
    if (normalizes) {
      int64_t i = 0;
      F squares = zero();
      for (; i + W <= k; i += W) squares = fma(load(out + i), load(out + i), squares);
      float total = sum(squares);
      for (; i < k; i++) total += out[i] * out[i];
      float factor = 1.0f / std::sqrt(total / float(k) + eps);
      for (i = 0; i < k; i++) out[i] *= factor;
    }
    for (const float* factors : {norm, columns})
      if (factors) for (int64_t i = 0; i < k; i++) out[i] *= factors[i];
  }
};

// Products of some rows of the weight: that of row n with input m is values[m * stride + n].
struct Products {
  float* values;
  int64_t stride;

  float& at(int64_t m, int64_t n) const { return values[m * stride + n]; }
};

// A result on its way out: y[m, column] = value + bias[column] + residual[m, column], in y's dtype; rows of y have n columns.
struct Output {
  void* y;
  const void *bias, *residual;
  int32_t dtype, bias_dtype, gate;
  int64_t n;

  Output from(int64_t m) const {
    Output rest = *this;
    rest.y = (char*)y + m * n * size_of(dtype);
    if (residual) rest.residual = (const char*)residual + m * n * size_of(dtype);
    return rest;
  }
  // values[i] += numbers[from + i]
  static void add(const void* numbers, int32_t dtype, int64_t from, float* values, int64_t count) {
    float* floats = scratch<float>(ADDED, count);
    const float* added = dtype == X_FP32 ? (const float*)numbers + from : floats;
    if (added == floats) from_dtype((const char*)numbers + from * size_of(dtype), count, dtype, floats);
    SIMD for (int64_t i = 0; i < count; i++) values[i] += added[i];
  }
  // `values` may be where they are put.
  void put(int64_t m, int64_t column, float* values, int64_t count) const {
    if (bias) add(bias, bias_dtype, column, values, count);
    if (residual) add(residual, dtype, m * n + column, values, count);
    void* to = (char*)y + (m * n + column) * size_of(dtype);
    if (to != values) to_dtype(values, count, dtype, to);
  }
};

// x / (1 + e^-t); the exponential is taken of a number below zero.
INLINE F times_sigmoid(F x, F t) {
  float v[W], at[W], small[W];
  store(v, x), store(at, t), store(small, exponential(sub(zero(), magnitude(t))));
  for (int i = 0; i < W; i++) v[i] *= (at[i] < 0 ? small[i] : 1.0f) / (1.0f + small[i]);
  return load(v);
}

// first[i] <- gate(first[i]) * second[i]
static void apply_gate(int32_t gate, float* first, const float* second, int64_t count) {
  int64_t i = 0;
  if (gate == GELU) {
    for (; i < count; i++) first[i] *= 0.5f * (1.0f + std::erf(first[i] * 0.70710678f)) * second[i];
    return;
  }
  auto some = [&](F x) __attribute__((always_inline)) {
    if (gate == SILU) return times_sigmoid(x, x);
    F cube = mul(mul(x, x), x);  // gelu(x) ~ x sigmoid(2 sqrt(2/pi) (x + .044715 x^3)), https://arxiv.org/abs/1606.08415
    return times_sigmoid(x, mul(all(1.5957691f), fma(all(0.044715f), cube, x)));
  };
  for (; i + W <= count; i += W) store(first + i, mul(some(load(first + i)), load(second + i)));
  if (i == count) return;
  float a[W] = {}, b[W] = {};
  std::memcpy(a, first + i, (count - i) * sizeof(float));
  std::memcpy(b, second + i, (count - i) * sizeof(float));
  store(a, mul(some(load(a)), load(b)));
  std::memcpy(first + i, a, (count - i) * sizeof(float));
}

// rows(begin, end, products) for pieces of the weight's n rows. With a gate for pieces of its halves: y = gate(first) * second.
template <class Rows> INLINE void in_pieces(int64_t n, int64_t piece, int64_t count, const Output& out, int threads, Rows&& rows) {
  int64_t half = n / 2;
  if (out.gate) n = half, piece = round_up((piece + 1) / 2, ROWS_AT_ONCE);
  parallel(n, piece, threads, [&](int64_t begin, int64_t end) {
    int64_t width = end - begin;
    Products found{(float*)out.y, out.n};
    if (out.gate || out.dtype != X_FP32) found = {scratch<float>(PAIRS, (out.gate ? 2 : 1) * count * width) - begin, width};
    Output rest = out;
    if (out.gate) {
      Products second{found.values + count * width - half, width};
      rows(begin, end, found), rows(half + begin, half + end, second);
      for (int64_t m = 0; m < count && out.bias; m++) {
        Output::add(out.bias, out.bias_dtype, begin, &found.at(m, begin), width);
        Output::add(out.bias, out.bias_dtype, half + begin, &second.at(m, half + begin), width);
      }
      apply_gate(out.gate, &found.at(0, begin), &second.at(0, half + begin), count * width);
      rest.bias = nullptr;
    } else {
      rows(begin, end, found);
    }
    for (int64_t m = 0; m < count; m++) rest.put(m, begin, &found.at(m, begin), width);
  });
}
