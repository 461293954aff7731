// Rounding rows to int8, packed int4 and int2 or 8-bit floats, with the arithmetic of qpass.numerics to the bit: K and V on their
// way into a cache.
#pragma once
#include "weight.h"

// Lowest and highest of a block of values, from `start` on.
struct Range {
  float low, high;
  bool nan = false;
  void see(float x) { low = x < low ? x : low, high = x > high ? x : high, nan |= x != x; }
};

// How a block is rounded: code = nearest(x / scale) + zero, or with a float zero point nearest(x / scale + zero).
struct Rounding {
  float scale = 1.0f, zero = 0.0f, low_code, high_code;
  bool finite = true, nan, float_zero;

  Rounding(const Spec& spec, const Range& r) : nan(r.nan), float_zero(spec.zero_point == 2) {
    float half = float(1 << (spec.bits - 1));
    low_code = spec.zero_point ? -half : 1.0f - half, high_code = half - 1.0f;
    nan &= spec.scale != NO_SCALE;  // which a block shares with its scale
    if (spec.scale == NO_SCALE) return;
    float top = spec.kind == E4M3 ? 448.0f : spec.kind == E5M2 ? 57344.0f : high_code;
    float largest = float_zero ? r.high - r.low : -r.low > r.high ? -r.low : r.high;
    scale = spec.zero_point ? r.high / (2 * half - 1) - r.low / (2 * half - 1) : largest / top;
    float tiny = spec.scale == SCALE_FP16 ? 0x1p-24f : 0x1p-126f;  // the smallest that is stored: qpass.numerics._guard
    scale = spec.scale == SCALE_FP16 ? from_fp16(to_fp16(scale)) : spec.scale == SCALE_BF16 ? from_bf16(to_bf16(scale)) : scale;
    if (largest == 0.0f) scale = 1.0f;
    else if (scale < tiny) scale = tiny;
    finite = scale != INFINITY;
    if (nan) scale = NAN;
    if (float_zero) {
      zero = -half - r.low / scale;
      zero = spec.scale == SCALE_FP16 ? from_fp16(to_fp16(zero)) : spec.scale == SCALE_BF16 ? from_bf16(to_bf16(zero)) : zero;
    } else if (spec.zero_point) {
      zero = std::nearbyintf(-half - r.low / scale);
      zero = zero < -half ? -half : zero > high_code ? high_code : zero;
    }
  }
  int code(float v) const {
    float c = float_zero ? std::nearbyintf(v + zero) : std::nearbyintf(v) + zero;
    c = c < low_code ? low_code : c > high_code ? high_code : c;
    return nan || c != c ? 0 : int(c);
  }
};

// Sets code i of a row that was zero.
INLINE void put_code(uint8_t* row, int64_t i, int bits, int code) {
  if (bits == 8) row[i] = uint8_t(int8_t(code));
  else row[i * bits / 8] |= uint8_t((code + (1 << (bits - 1))) << i * bits % 8);
}

INLINE void put_float(const Spec& spec, uint8_t* stored, int64_t i, float value) {
  if (spec.scale == SCALE_FP32) ((float*)stored)[i] = value;
  else ((uint16_t*)stored)[i] = spec.scale == SCALE_FP16 ? to_fp16(value) : to_bf16(value);
}

INLINE void put_value(const Matrix& m, const Rounding& block, uint8_t* row, int64_t i, float x) {
  float v = x / block.scale;
  if (m.spec->kind == E4M3) row[i] = to_e4m3(v);
  else if (m.spec->kind == E5M2) row[i] = to_e5m2(v);
  else put_code(row, i, m.spec->bits, block.code(v));
}

// Scale and zero point of block g of row r of them.
INLINE void put_block(const Matrix& m, const Rounding& block, int64_t r, int64_t g) {
  const Spec& spec = *m.spec;
  if (spec.scale == NO_SCALE) return;
  put_float(spec, (uint8_t*)m.scale, r * m.blocks + g, block.scale);
  uint8_t* zeros = (uint8_t*)m.zero + r * m.zero_bytes;
  if (spec.zero_point == 2) put_float(spec, zeros, g, block.zero);
  else if (spec.zero_point) put_code(zeros, g, spec.bits, block.nan ? 0 : int(block.zero));
}

// x [k] float32 -> row r of the stored parts. Whether all scales are finite.
static bool quantize_row(const Matrix& m, const float* x, int64_t r) {
  int64_t group = m.blocks == 1 ? m.k : m.spec->group;
  uint8_t* row = (uint8_t*)m.row(r);
  bool finite = true;
  if (m.spec->bits < 8) std::memset(row, 0, m.row_bytes);
  if (m.spec->bits < 8 && m.zero) std::memset((uint8_t*)m.zero + r * m.zero_bytes, 0, m.zero_bytes);
  for (int64_t g = 0; g < m.blocks; g++) {
    int64_t start = g * group, end = least(m.k, start + group);
    Range range = m.spec->zero_point == 2 ? Range{x[start], x[start]} : Range{0.0f, 0.0f};
    for (int64_t i = start; i < end; i++) range.see(x[i]);
    Rounding block(*m.spec, range);
    finite &= block.finite;
    put_block(m, block, r, g);
    for (int64_t i = start; i < end; i++) put_value(m, block, row, i, x[i]);
  }
  return finite;
}

// x [count, k] float32, tokens from row `first` on, which share their scales: group `group` of all.
static bool quantize_tokens(const Matrix& m, const float* x, int64_t first, int64_t count, int64_t group) {
  bool finite = true;
  std::memset((uint8_t*)m.row(first), 0, count * m.row_bytes);
  if (m.zero) std::memset((uint8_t*)m.zero + group * m.zero_bytes, 0, m.zero_bytes);
  for (int64_t k = 0; k < m.k; k++) {
    Range range = m.spec->zero_point == 2 ? Range{x[k], x[k]} : Range{0.0f, 0.0f};
    for (int64_t t = 0; t < count; t++) range.see(x[t * m.k + k]);
    Rounding block(*m.spec, range);
    finite &= block.finite;
    put_block(m, block, group, k);
    for (int64_t t = 0; t < count; t++) put_value(m, block, (uint8_t*)m.row(first + t), k, x[t * m.k + k]);
  }
  return finite;
}
