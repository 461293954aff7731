// Rounding rows to int8, packed int4 or 8-bit floats, with the arithmetic of qpass.numerics to the bit: K and V on their way
// into a cache.
#pragma once
#include "weight.h"

// x [rows, k] float32 -> data, float32 scales and zero points of `m`, which points to the outputs.
// Whether all scales are finite.
static bool quantize_row(const Matrix& m, const float* x, int64_t r) {
  const Spec& spec = *m.spec;
  int64_t blocks = m.blocks, group = blocks == 1 ? m.k : spec.group, zero_bytes = m.zero_bytes;
  uint8_t* data = (uint8_t*)m.row(r);
  float* scales = spec.scale == NO_SCALE ? nullptr : (float*)m.scale + r * blocks;
  uint8_t* zeros = m.zero ? (uint8_t*)m.zero + r * zero_bytes : nullptr;
  float half = float(1 << (spec.bits - 1)), low_code = m.zero ? -half : 1.0f - half, high_code = half - 1.0f;
  float top = spec.kind == E4M3 ? 448.0f : spec.kind == E5M2 ? 57344.0f : high_code;
  bool nibbles = spec.bits == 4;
  bool finite = true;
  if (nibbles) std::memset(data, 0, m.row_bytes);
  if (nibbles && zeros) std::memset(zeros, 0, zero_bytes);
  for (int64_t g = 0; g < blocks; g++) {
    int64_t start = g * group, end = least(m.k, start + group);
    float low = 0.0f, high = 0.0f;
    bool nan = false;
    for (int64_t i = start; i < end; i++) {
      low = x[i] < low ? x[i] : low;
      high = x[i] > high ? x[i] : high;
      nan |= x[i] != x[i];
    }
    float scale = 1.0f, zero = 0.0f;
    if (scales) {
      float largest = nan ? NAN : (-low > high ? -low : high);
      scale = m.zero ? high / (2 * half - 1) - low / (2 * half - 1) : largest / top;
      if (largest == 0.0f) scale = 1.0f;
      else if (scale < 0x1p-126f) scale = 0x1p-126f;
      finite &= scale != INFINITY;
      if (nan) scale = NAN;
      scales[g] = scale;
      if (zeros) {
        zero = std::nearbyintf(-half - low / scale);
        zero = zero < -half ? -half : zero > high_code ? high_code : zero;
        int code = nan ? 0 : int(zero);
        if (nibbles) zeros[g / 2] |= uint8_t((code + 8) << g % 2 * 4);
        else zeros[g] = uint8_t(int8_t(code));
      }
    }
    for (int64_t i = start; i < end; i++) {
      float v = x[i] / scale;
      if (spec.kind == E4M3) data[i] = to_e4m3(v);
      else if (spec.kind == E5M2) data[i] = to_e5m2(v);
      else {
        float code = std::nearbyintf(v) + zero;
        code = code < low_code ? low_code : code > high_code ? high_code : code;
        int q = nan ? 0 : int(code);
        if (nibbles) data[i / 2] |= uint8_t((q + 8) << i % 2 * 4);
        else data[i] = uint8_t(int8_t(q));
      }
    }
  }
  return finite;
}
