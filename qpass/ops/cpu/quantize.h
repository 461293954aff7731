// Rounding rows to every format, with the arithmetic of qpass.numerics to the bit: weights, and K and V on their way into a cache.
//
// The loops over elements are plain C++ without branches; `omp simd` turns them into vectors of each instruction set.
#pragma once
#include <type_traits>

#include "weight.h"

// --- ranges -------------------------------------------------------------------------------------------------------

// Whether all values are finite.
INLINE bool is_finite(const float* x, int64_t count) {
  float sum = 0.0f;
  _Pragma("omp simd reduction(+ : sum)")
  for (int64_t i = 0; i < count; i++) sum += x[i] * 0.0f;
  return sum == sum;
}

// Highest of x, or of -x or |x|, and of `start`.
template <class Of> INLINE float highest(const float* x, int64_t count, float start, Of of) {
  int64_t i = 0;
  float top = start;
  if (count >= W) {
    F tops = all(start);
    for (; i + W <= count; i += W) tops = larger(of(load(x + i)), tops);
    top = largest_of(tops);
  }
  for (; i < count; i++) {
    float v = first_of(of(all(x[i])));
    top = v > top ? v : top;
  }
  return top;
}

// Lowest and highest of each group of a row x [k] of finite numbers, with zero among them or not; lowest of symmetric formats is
// the highest, negated.
INLINE void ranges_of(const Spec& spec, const float* x, int64_t k, int64_t group, float* low, float* high) {
  for (int64_t g = 0, start = 0; start < k; g++, start += group) {
    const float* at = x + start;
    int64_t count = least(group, k - start);
    if (!spec.zero_point) {
      high[g] = highest(at, count, 0.0f, [](F v) { return magnitude(v); });
      low[g] = -high[g];
      continue;
    }
    float from = spec.zero_point == 2 ? at[0] : 0.0f;
    high[g] = highest(at, count, from, [](F v) { return v; });
    low[g] = -highest(at, count, -from, [](F v) { return sub(zero(), v); });
  }
}

// --- scales and zero points ---------------------------------------------------------------------------------------

// The largest magnitude of a code.
INLINE float top_of(const Spec& spec) {
  if (spec.kind == E4M3) return 448.0f;
  if (spec.kind == E5M2) return 57344.0f;
  if (spec.kind == CODEBOOK) return spec.codebook[0] == 0.0f ? spec.codebook[7] : spec.codebook[15];
  return float((1 << (spec.bits - 1)) - 1);
}

INLINE float as_stored(int32_t scale, float x) {
  return scale == SCALE_FP16 ? from_fp16(to_fp16(x)) : scale == SCALE_BF16 ? from_bf16(to_bf16(x)) : x;
}

// Scales of floats and zero points (a float like the scale, or the code that zero gets) from ranges. No scale is zero:
// qpass.numerics._guard.
template <int SCALE> INLINE void uniform_scales(const Spec& spec, const float* low, const float* high, int64_t count, float* scales, float* zeros) {
  float half = float(1 << (spec.bits - 1)), top = top_of(spec), tiny = SCALE == SCALE_FP16 ? 0x1p-24f : 0x1p-126f;
  bool symmetric = !spec.zero_point, floats = spec.zero_point == 2;
  float divisor = symmetric ? top : 2 * half - 1;
  SIMD for (int64_t g = 0; g < count; g++) {
    float furthest = -low[g] > high[g] ? -low[g] : high[g], largest = floats ? high[g] - low[g] : furthest;
    float scale = high[g] / divisor - (symmetric ? 0.0f : low[g] / divisor), least = floats ? furthest * 0x1p-15f : 0.0f;
    scale = scale < least ? least : scale;
    scale = as_stored(SCALE, scale);
    scale = scale < tiny ? tiny : scale;
    scales[g] = largest == 0.0f ? 1.0f : scale;
    float zero = -half - low[g] / scales[g], nearest = std::nearbyintf(zero);
    nearest = nearest < -half ? -half : nearest > half - 1 ? half - 1 : nearest;
    zeros[g] = symmetric ? 0.0f : floats ? as_stored(SCALE, zero) : nearest;
  }
}

// Exponent e of x = m 2^e with m in [.5, 1).
INLINE int exponent_of(float x) {
  uint32_t u = bits_as<uint32_t>(x);
  int exponent = int(u >> 23) - 126;
  if (u < 0x00800000) std::frexp(x, &exponent);
  return exponent;
}

// Bits of a power of two: OCP MX v1.0, section 6.3, or the next one that covers the range.
INLINE uint8_t e8m0_of(bool ceil, float top, float largest) {
  float ratio = largest / top;
  int exponent = ceil ? exponent_of(ratio) : exponent_of(largest) - exponent_of(top);
  exponent -= ceil && ratio == std::ldexp(0.5f, exponent);
  exponent = exponent < -127 ? -127 : exponent > 127 ? 127 : exponent;
  return uint8_t(largest == 0.0f ? 127 : 127 + exponent);
}

// Codes of B bits in bytes -> one stream of bits (qpass.packing). `codes` is zero up to a multiple of eight.
INLINE void pack_codes(const uint8_t* codes, int64_t count, int bits, uint8_t* row, int64_t row_bytes) {
  if (bits == 8) {
    std::memcpy(row, codes, count);
    return;
  }
  for (int64_t i = 0, at = 0; i < count; i += 8, at += bits) {
    uint64_t x = read<uint64_t>(codes + i);
    x = (x & 0x00ff00ff00ff00ff) | (x & 0xff00ff00ff00ff00) >> (8 - bits);
    x = (x & 0x0000ffff0000ffff) | (x & 0xffff0000ffff0000) >> (16 - 2 * bits);
    x = (x & 0x00000000ffffffff) | (x & 0xffffffff00000000) >> (32 - 4 * bits);
    if (at + 8 <= row_bytes) std::memcpy(row + at, &x, 8);  // what is too much the next ones write over
    else std::memcpy(row + at, &x, least(bits, row_bytes - at));
  }
}

// `count` floats that are scales, or zero points, into a row of them.
INLINE void put_floats(const Spec& spec, const float* x, int64_t count, uint8_t* row) {
  if (spec.scale == SCALE_FP32) std::memcpy(row, x, count * sizeof(float));
  else if (spec.scale == SCALE_FP16) SIMD for (int64_t i = 0; i < count; i++) ((uint16_t*)row)[i] = to_fp16(x[i]);
  else SIMD for (int64_t i = 0; i < count; i++) ((uint16_t*)row)[i] = to_bf16(x[i]);
}

// Scales, and zero points, of row r of them.
INLINE void put_uniform(const Matrix& m, const float* scales, const float* zeros, int64_t r) {
  const Spec& spec = *m.spec;
  put_floats(spec, scales, m.blocks, (uint8_t*)m.scale + r * m.blocks * (spec.scale == SCALE_FP32 ? 4 : 2));
  uint8_t* row = (uint8_t*)m.zero + r * m.zero_bytes;
  if (spec.zero_point == 2) put_floats(spec, zeros, m.blocks, row);
  if (spec.zero_point != 1) return;
  uint8_t* codes = scratch<uint8_t>(SCORES, round_up(m.blocks, 8));
  int offset = int(offset_of(spec));
  std::memset(codes, 0, round_up(m.blocks, 8));
  SIMD for (int64_t g = 0; g < m.blocks; g++) codes[g] = uint8_t(int32_t(zeros[g]) + offset);
  pack_codes(codes, m.blocks, spec.bits, row, m.zero_bytes);
}

// Scales and zero points of row r from ranges, as they are stored and as numbers. Whether all scales are finite.
static bool put_scales(const Matrix& m, const float* low, const float* high, int64_t r, float* scales, float* zeros) {
  const Spec& spec = *m.spec;
  float top = top_of(spec), outer = m.outer ? m.outer[m.outer_rows == 1 ? 0 : r] : 1.0f;
  uint8_t* bytes = (uint8_t*)m.scale + r * m.blocks;
  switch (spec.scale) {
    case SCALE_FP32: uniform_scales<SCALE_FP32>(spec, low, high, m.blocks, scales, zeros); break;
    case SCALE_FP16: uniform_scales<SCALE_FP16>(spec, low, high, m.blocks, scales, zeros); break;
    case SCALE_BF16: uniform_scales<SCALE_BF16>(spec, low, high, m.blocks, scales, zeros); break;
    case SCALE_E8M0:
      for (int64_t g = 0; g < m.blocks; g++) bytes[g] = e8m0_of(spec.ceil, top, high[g]);
      break;
    case SCALE_E4M3:
      SIMD for (int64_t g = 0; g < m.blocks; g++) {
        float scale = high[g] / top / outer;
        bytes[g] = to_e4m3(scale < 0x1p-9f ? 0x1p-9f : scale);
      }
      break;
    case SCALE_UINT8: {
      float unit = 0.0f;
      for (int64_t g = 0; g < m.blocks; g++) unit = high[g] / top > unit ? high[g] / top : unit;
      unit /= 255;
      unit = unit == 0.0f ? 1.0f : unit;
      ((float*)m.outer)[r] = unit;
      for (int64_t g = 0; g < m.blocks; g++) {
        float code = std::nearbyintf(high[g] / top / unit);
        bytes[g] = uint8_t(code < 1.0f ? 1.0f : code > 255.0f ? 255.0f : code);
      }
    }
  }
  if (spec.scale > SCALE_BF16) {
    const float* found = scales_of(m, r, scales);
    if (found != scales) std::memcpy(scales, found, m.blocks * sizeof(float));
    return true;
  }
  put_uniform(m, scales, zeros, r);
  return is_finite(scales, m.blocks);
}

// --- codes --------------------------------------------------------------------------------------------------------

// Zero points of row r as numbers, from where they are stored.
INLINE void number_zeros(const Matrix& m, int64_t r, float* zeros) {
  float offset = offset_of(*m.spec);
  const float* found = zeros_of(m, r, zeros);
  if (m.spec->zero_point == 2) {
    const uint8_t* row = m.zero + (m.scale_rows == 1 ? 0 : r * m.zero_bytes);
    for (int64_t g = 0; g < m.blocks; g++) zeros[g] = float_at(*m.spec, row, g);
  } else {
    for (int64_t g = 0; g < m.blocks; g++) zeros[g] = found[g] - offset;
  }
}

// Of how many of `middles` x lies above: a tie goes to the even code.
template <int N> INLINE int steps(float x, const float* middles) {
  if constexpr (N == 0) return 0;
  else return steps<N - 1>(x, middles) + (N % 2 ? x > middles[N - 1] : x >= middles[N - 1]);
}

// Each gives the code of x / scale as a byte: signed of 8 bits, otherwise as it is packed.
struct ToE4m3 {
  ToE4m3(const Spec&) {}
  INLINE uint8_t of(const ToE4m3&, float v, float) { return to_e4m3(v); }
};
struct ToE5m2 {
  ToE5m2(const Spec&) {}
  INLINE uint8_t of(const ToE5m2&, float v, float) { return to_e5m2(v); }
};
struct ToCodebook {
  float middles[15];
  ToCodebook(const Spec& spec) {
    for (int i = 0; i < 15; i++) middles[i] = (spec.codebook[i + 1] + spec.codebook[i]) / 2;
  }
  INLINE uint8_t of(const ToCodebook& to, float v, float) { return uint8_t(steps<15>(v, to.middles)); }
};
struct ToSignAndMagnitude : ToCodebook {
  using ToCodebook::ToCodebook;
  INLINE uint8_t of(const ToSignAndMagnitude& to, float v, float) {
    return uint8_t(steps<7>(std::fabs(v), to.middles) + (bits_as<int32_t>(v) < 0 ? 8 : 0));
  }
};
template <bool FLOAT_ZERO> struct ToUniform {
  float low, high;
  int offset;
  ToUniform(const Spec& spec) : high(float((1 << (spec.bits - 1)) - 1)), offset(spec.bits == 8 ? 0 : 1 << (spec.bits - 1)) {
    low = spec.zero_point ? -high - 1 : -high;
  }
  INLINE uint8_t of(const ToUniform& to, float v, float zero) {
    float c = FLOAT_ZERO ? std::nearbyintf(v + zero) : std::nearbyintf(v) + zero;
    c = c < to.low ? to.low : c > to.high ? to.high : c;
    return uint8_t(int32_t(c) + to.offset);
  }
};

// Calls f with what gives the codes of the format.
template <class Function> INLINE void with_encoder(const Spec& spec, Function&& f) {
  if (spec.kind == E4M3) f(ToE4m3(spec));
  else if (spec.kind == E5M2) f(ToE5m2(spec));
  else if (spec.kind == CODEBOOK && spec.codebook[0] == 0.0f) f(ToSignAndMagnitude(spec));
  else if (spec.kind == CODEBOOK) f(ToCodebook(spec));
  else if (spec.zero_point == 2) f(ToUniform<true>(spec));
  else f(ToUniform<false>(spec));
}

template <int N> using Count = std::integral_constant<int64_t, N>;

// --- rows ---------------------------------------------------------------------------------------------------------

// x [k] of finite numbers -> the codes of row r, by the scales of its groups.
INLINE void put_codes(const Matrix& m, const float* x, int64_t r, const float* scales, const float* zeros) {
  const Spec& spec = *m.spec;
  int64_t group = m.blocks == 1 ? m.k : spec.group, padded = round_up(m.k, 8);
  uint8_t* codes = spec.bits == 8 ? (uint8_t*)m.row(r) : scratch<uint8_t>(SCORES, padded);
  with_encoder(spec, [&](auto to) {
    auto encode = [&](int64_t g, auto count) {
      const float* from = x + g * group;
      uint8_t* into = codes + g * group;
      float scale = scales[g], zero = zeros[g];
      SIMD for (int64_t i = 0; i < count; i++) into[i] = decltype(to)::of(to, from[i] / scale, zero);
    };
    int64_t whole = m.k / group;
    for (int64_t g = 0; g < whole; g++) {
      if (group == 32) encode(g, Count<32>());  // a loop of known length
      else if (group == 16) encode(g, Count<16>());
      else encode(g, group);
    }
    if (whole * group < m.k) encode(whole, m.k - whole * group);
  });
  if (spec.bits == 8) return;
  std::memset(codes + m.k, 0, padded - m.k);
  pack_codes(codes, m.k, spec.bits, (uint8_t*)m.row(r), m.row_bytes);
}

// x [k] of finite numbers -> row r of the stored parts. Whether all scales are finite.
static bool quantize_row(const Matrix& m, const float* x, int64_t r) {
  float *scales = scratch<float>(SCALES, 4 * m.blocks), *zeros = scales + m.blocks, *low = zeros + m.blocks, *high = low + m.blocks;
  bool finite = true;
  scales[0] = 1.0f, zeros[0] = 0.0f;
  if (m.spec->scale != NO_SCALE) {
    ranges_of(*m.spec, x, m.k, m.blocks == 1 ? m.k : m.spec->group, low, high);
    finite = put_scales(m, low, high, r, scales, zeros);
  }
  put_codes(m, x, r, scales, zeros);
  return finite;
}

// x [count, k] of finite numbers, tokens from row `first` on, which share their scales: group `group` of all.
static bool quantize_tokens(const Matrix& m, const float* x, int64_t first, int64_t count, int64_t group) {
  const Spec& spec = *m.spec;
  int64_t padded = round_up(m.k, 8);
  float *scales = scratch<float>(SCALES, 4 * m.k), *zeros = scales + m.k, *low = zeros + m.k, *high = low + m.k;
  for (int64_t k = 0; k < m.k; k++) low[k] = high[k] = spec.zero_point == 2 ? x[k] : 0.0f;
  for (int64_t t = 0; t < count; t++) {
    const float* row = x + t * m.k;
    SIMD for (int64_t k = 0; k < m.k; k++) low[k] = row[k] < low[k] ? row[k] : low[k], high[k] = row[k] > high[k] ? row[k] : high[k];
  }
  if (!spec.zero_point)
    for (int64_t k = 0; k < m.k; k++) high[k] = -low[k] > high[k] ? -low[k] : high[k], low[k] = -high[k];
  bool finite = put_scales(m, low, high, group, scales, zeros);
  uint8_t* codes = scratch<uint8_t>(SCORES, padded);
  std::memset(codes, 0, padded);
  with_encoder(spec, [&](auto to) {
    for (int64_t t = 0; t < count; t++) {
      const float* row = x + t * m.k;
      SIMD for (int64_t k = 0; k < m.k; k++) codes[k] = decltype(to)::of(to, row[k] / scales[k], zeros[k]);
      pack_codes(codes, m.k, spec.bits, (uint8_t*)m.row(first + t), m.row_bytes);
    }
  });
  return finite;
}

// --- weights ------------------------------------------------------------------------------------------------------

// What of a weight is done: scales and codes; codes by the scales that are there; nothing, it is only compared.
enum Work : int32_t { SCALES_AND_CODES, CODES_ONLY, COMPARE };
enum Trouble : int64_t { INFINITE_SCALE = 1, NOT_FINITE = 2 };

// Row r of a weight, x [k], which is divided by `columns` first, -> stored parts. `power`: sum x^2, and of (x - x')^2. Gives bits
// of Trouble.
template <class Read> static int64_t quantize_weight_row(const Matrix& m, const float* x, const float* columns, int64_t r, Work work, double* power) {
  if (!is_finite(x, m.k)) return NOT_FINITE;
  float* turned = scratch<float>(TURNED, round_up(m.k, W));
  if (work != COMPARE) {
    const float* divided = x;
    if (columns) {
      SIMD for (int64_t i = 0; i < m.k; i++) turned[i] = x[i] / columns[i];
      divided = turned;
    }
    if (work == SCALES_AND_CODES && !quantize_row(m, divided, r)) return INFINITE_SCALE;
    if (work == CODES_ONLY) {
      float* room = scratch<float>(SCALES, 2 * m.blocks);
      const float* scales = scales_of(m, r, room);
      float* zeros = room + m.blocks;
      number_zeros(m, r, zeros);
      put_codes(m, divided, r, scales, zeros);
    }
  }
  row_to_float<Read>(m, r, turned, scratch<float>(SCALES, 2 * m.blocks));
  if (columns) {
    SIMD for (int64_t i = 0; i < m.k; i++) turned[i] *= columns[i];
  }
  float signal = 0.0f, noise = 0.0f;
  _Pragma("omp simd reduction(+ : signal, noise)")
  for (int64_t i = 0; i < m.k; i++) {
    float error = turned[i] - x[i];
    signal += x[i] * x[i], noise += error * error;
  }
  power[0] = signal, power[1] = noise;
  return 0;
}
