// A vector of W floats and the few operations on it that the kernels need: AVX-512, AVX2, or plain C++ for everything else.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

#define SIMD _Pragma("omp simd")
#define INLINE static inline __attribute__((always_inline))
#define HIDDEN __attribute__((visibility("hidden")))  // libraries for several instruction sets may be loaded at once
#if defined(__clang__)
#define UNROLL _Pragma("unroll")
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif

template <class To, class From> INLINE To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

// --- numbers of 16 and 8 bits, one at a time ----------------------------------------------------------------------

INLINE float from_bf16(uint16_t x) { return bits_as<float>(uint32_t(x) << 16); }

INLINE uint16_t to_bf16(float x) {  // to nearest, ties to even
  uint32_t u = bits_as<uint32_t>(x);
  if ((u & 0x7fffffff) > 0x7f800000) return 0x7fc0;
  return uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}

INLINE float from_fp16(uint16_t x) {
  uint32_t sign = uint32_t(x & 0x8000) << 16, exponent = x & 0x7c00, u = uint32_t(x & 0x7fff) << 13;
  if (exponent == 0x7c00) u |= 0x7f800000;
  else if (exponent == 0) u = bits_as<uint32_t>(float(x & 0x3ff) * 0x1p-24f);  // right with flushed subnormals too
  else u += 112u << 23;
  return bits_as<float>(sign | u);
}

// Nearest number with `mantissa` bits and this exponent bias, ties to even; subnormals are multiples of `least`. Gives the
// bit pattern without sign: `x` is finite and not negative.
INLINE uint32_t to_small_float(float x, int mantissa, int bias, float least) {
  uint32_t u = bits_as<uint32_t>(x);
  int drop = 23 - mantissa;
  u += (1u << (drop - 1)) - 1 + ((u >> drop) & 1);
  uint32_t normal = (u >> drop) - (uint32_t(127 - bias) << mantissa);
  float bound = least * float(1 << mantissa), small = x < bound ? x : bound;
  uint32_t subnormal = uint32_t(int32_t(std::nearbyintf(small / least)));
  return x < bound ? subnormal : normal;
}

INLINE uint16_t to_fp16(float x) {
  uint32_t u = bits_as<uint32_t>(x);
  uint16_t sign = uint16_t(u >> 16 & 0x8000);
  u &= 0x7fffffff;
  if (u > 0x7f800000) return sign | 0x7e00;
  if (u >= 0x477ff000) return sign | 0x7c00;  // 65520 and more round to infinity
  return sign | uint16_t(to_small_float(bits_as<float>(u), 10, 15, 0x1p-24f));
}

INLINE uint8_t to_e4m3(float x) {  // saturates; NaN stays NaN
  uint8_t sign = uint8_t(bits_as<uint32_t>(x) >> 24 & 0x80);
  float a = std::fabs(x);
  uint32_t code = to_small_float(a < 448.0f ? a : 448.0f, 3, 7, 0x1p-9f);
  return sign | uint8_t(x == x ? code : 0x7f);
}

INLINE uint8_t to_e5m2(float x) {
  uint8_t sign = uint8_t(bits_as<uint32_t>(x) >> 24 & 0x80);
  float a = std::fabs(x);
  uint32_t code = to_small_float(a < 57344.0f ? a : 57344.0f, 2, 15, 0x1p-16f);
  return sign | uint8_t(x == x ? code : 0x7f);
}

INLINE float from_e5m2(uint8_t x) { return from_fp16(uint16_t(x << 8)); }

INLINE float from_e4m3(uint8_t x) {
  if ((x & 0x7f) == 0x7f) return NAN;
  return from_fp16(uint16_t((x & 0x80) << 8 | (x & 0x7f) << 7)) * 256.0f;  // bias 15 instead of 7
}

INLINE float from_e8m0(uint8_t x) {
  float value = x ? bits_as<float>(uint32_t(x) << 23) : 0x1p-127f;
  return x == 255 ? NAN : value;
}

template <class T> INLINE T read(const void* p) {
  T x;
  std::memcpy(&x, p, sizeof x);
  return x;
}

// Eight codes of B bits: B bytes, and no byte behind them.
template <int B> INLINE uint64_t eight_codes(const uint8_t* p) {
  if constexpr (B == 2) return read<uint16_t>(p);
  if constexpr (B == 3) return read<uint16_t>(p) | uint64_t(p[2]) << 16;
  if constexpr (B == 4) return read<uint32_t>(p);
  if constexpr (B == 5) return read<uint32_t>(p) | uint64_t(p[4]) << 32;
  return read<uint32_t>(p) | uint64_t(read<uint16_t>(p + 4)) << 32;
}

// --- vectors ------------------------------------------------------------------------------------------------------

#if defined(__AVX512F__)

constexpr int W = 16;
using F = __m512;
INLINE F zero() { return _mm512_setzero_ps(); }
INLINE F all(float x) { return _mm512_set1_ps(x); }
INLINE F load(const float* p) { return _mm512_loadu_ps(p); }
INLINE void store(float* p, F x) { _mm512_storeu_ps(p, x); }
INLINE F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
INLINE F mul(F a, F b) { return _mm512_mul_ps(a, b); }
INLINE F add(F a, F b) { return _mm512_add_ps(a, b); }
INLINE F sub(F a, F b) { return _mm512_sub_ps(a, b); }
INLINE F magnitude(F x) { return _mm512_abs_ps(x); }
INLINE float first_of(F x) { return _mm512_cvtss_f32(x); }
INLINE float sum(F x) { return _mm512_reduce_add_ps(x); }
INLINE __m128 sums_of(F a, F b, F c, F d) {
  auto fold = [](F x) { return _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1)); };
  __m256 s = _mm256_hadd_ps(_mm256_hadd_ps(fold(a), fold(b)), _mm256_hadd_ps(fold(c), fold(d)));
  return _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
}
INLINE F load_i8(const void* p) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p))); }
INLINE F load_bf16(const void* p) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16));
}
INLINE F load_fp16(const void* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
INLINE F load_e5m2(const void* p) {
  return _mm512_cvtph_ps(_mm256_slli_epi16(_mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)p)), 8));
}
INLINE F load_e4m3(const void* p) {
  __m256i x = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)p));
  __m256i h = _mm256_and_si256(_mm256_slli_epi16(x, 7), _mm256_set1_epi16((short)0xbf80));
  __m256i nan = _mm256_set1_epi16(0x3f80);
  nan = _mm256_and_si256(_mm256_cmpeq_epi16(_mm256_and_si256(h, nan), nan), _mm256_set1_epi16(0x7c00));
  return mul(_mm512_cvtph_ps(_mm256_or_si256(h, nan)), all(256.0f));
}
INLINE void load_two_e4m3(const uint8_t* p, F& a, F& b) { a = load_e4m3(p), b = load_e4m3(p + W); }
using I = __m512i;  // W unsigned codes
template <int B> INLINE I load_codes(const uint8_t* p) {
  uint64_t low = eight_codes<B>(p), high = eight_codes<B>(p + B);
  __m512i words, shifts;
  if constexpr (B <= 4) {
    words = _mm512_inserti64x4(_mm512_set1_epi32((int)low), _mm256_set1_epi32((int)high), 1);
    shifts = _mm512_setr_epi32(0, B, 2 * B, 3 * B, 4 * B, 5 * B, 6 * B, 7 * B, 0, B, 2 * B, 3 * B, 4 * B, 5 * B, 6 * B, 7 * B);
  } else {
    __m256i a = _mm256_set_m128i(_mm_set1_epi32(int(low >> 4 * B)), _mm_set1_epi32((int)low));
    __m256i b = _mm256_set_m128i(_mm_set1_epi32(int(high >> 4 * B)), _mm_set1_epi32((int)high));
    words = _mm512_inserti64x4(_mm512_castsi256_si512(a), b, 1);
    shifts = _mm512_setr_epi32(0, B, 2 * B, 3 * B, 0, B, 2 * B, 3 * B, 0, B, 2 * B, 3 * B, 0, B, 2 * B, 3 * B);
  }
  return _mm512_and_si512(_mm512_srlv_epi32(words, shifts), _mm512_set1_epi32((1 << B) - 1));
}
INLINE F to_float(I x) { return _mm512_cvtepi32_ps(x); }
INLINE F look_up(const float* table, I codes) { return _mm512_permutexvar_ps(codes, load(table)); }
INLINE I indices(const uint32_t* p) { return _mm512_loadu_si512(p); }
INLINE F first_lanes(F x, int64_t n) { return _mm512_maskz_mov_ps(__mmask16((1u << n) - 1), x); }  // zeros behind them
INLINE F pick(F from, I lanes) { return _mm512_permutexvar_ps(lanes, from); }
INLINE F larger(F a, F b) { return _mm512_max_ps(a, b); }  // b where one is NaN
INLINE F nearest(F x) { return _mm512_roundscale_ps(x, 8); }
INLINE F power_of_two(F n) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127)), 23)); }
INLINE F zero_below(F x, float bound, F value) { return _mm512_mask_mov_ps(value, _mm512_cmp_ps_mask(x, all(bound), _CMP_LT_OQ), zero()); }

#elif defined(__AVX2__)

constexpr int W = 8;
using F = __m256;
INLINE F zero() { return _mm256_setzero_ps(); }
INLINE F all(float x) { return _mm256_set1_ps(x); }
INLINE F load(const float* p) { return _mm256_loadu_ps(p); }
INLINE void store(float* p, F x) { _mm256_storeu_ps(p, x); }
INLINE F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
INLINE F mul(F a, F b) { return _mm256_mul_ps(a, b); }
INLINE F add(F a, F b) { return _mm256_add_ps(a, b); }
INLINE F sub(F a, F b) { return _mm256_sub_ps(a, b); }
INLINE F magnitude(F x) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), x); }
INLINE float first_of(F x) { return _mm256_cvtss_f32(x); }
INLINE float sum(F x) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
INLINE __m128 sums_of(F a, F b, F c, F d) {
  __m256 s = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
  return _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
}
INLINE F load_i8(const void* p) { return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p))); }
INLINE F load_bf16(const void* p) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16));
}
INLINE F load_fp16(const void* p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
INLINE F load_e5m2(const void* p) {
  return _mm256_cvtph_ps(_mm_slli_epi16(_mm_cvtepu8_epi16(_mm_loadl_epi64((const __m128i*)p)), 8));
}
// Eight or sixteen bit patterns, sign-extended to 16 bits, as the numbers of fp16 that are 256 times smaller; NaN as NaN.
INLINE __m256i e4m3_as_fp16(__m256i x) {
  __m256i magnitude = _mm256_set1_epi16(0x7f), nan = _mm256_cmpeq_epi16(_mm256_and_si256(x, magnitude), magnitude);
  return _mm256_or_si256(_mm256_and_si256(_mm256_slli_epi16(x, 7), _mm256_set1_epi16((short)0xbf80)), nan);
}
INLINE void load_two_e4m3(const uint8_t* p, F& a, F& b) {
  __m256i h = e4m3_as_fp16(_mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)p)));
  a = mul(_mm256_cvtph_ps(_mm256_castsi256_si128(h)), all(256.0f));
  b = mul(_mm256_cvtph_ps(_mm256_extracti128_si256(h, 1)), all(256.0f));
}
INLINE F load_e4m3(const void* p) {
  __m256i h = e4m3_as_fp16(_mm256_castsi128_si256(_mm_cvtepi8_epi16(_mm_loadl_epi64((const __m128i*)p))));
  return mul(_mm256_cvtph_ps(_mm256_castsi256_si128(h)), all(256.0f));
}
using I = __m256i;
template <int B> INLINE I load_codes(const uint8_t* p) {
  uint64_t word = eight_codes<B>(p);
  __m256i words, shifts;
  if constexpr (B <= 4) {
    words = _mm256_set1_epi32((int)word);
    shifts = _mm256_setr_epi32(0, B, 2 * B, 3 * B, 4 * B, 5 * B, 6 * B, 7 * B);
  } else {
    words = _mm256_set_m128i(_mm_set1_epi32(int(word >> 4 * B)), _mm_set1_epi32((int)word));
    shifts = _mm256_setr_epi32(0, B, 2 * B, 3 * B, 0, B, 2 * B, 3 * B);
  }
  return _mm256_and_si256(_mm256_srlv_epi32(words, shifts), _mm256_set1_epi32((1 << B) - 1));
}
INLINE F to_float(I x) { return _mm256_cvtepi32_ps(x); }
INLINE F look_up(const float* table, I codes) {
  F low = _mm256_permutevar8x32_ps(load(table), codes), high = _mm256_permutevar8x32_ps(load(table + 8), codes);
  return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(codes, 28)));
}
INLINE I indices(const uint32_t* p) { return _mm256_loadu_si256((const __m256i*)p); }
INLINE F first_lanes(F x, int64_t n) {
  __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return _mm256_and_ps(x, _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32(int(n)), lanes)));
}
INLINE F pick(F from, I lanes) { return _mm256_permutevar8x32_ps(from, lanes); }
INLINE F larger(F a, F b) { return _mm256_max_ps(a, b); }  // b where one is NaN
INLINE F nearest(F x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
INLINE F power_of_two(F n) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23)); }
INLINE F zero_below(F x, float bound, F value) { return _mm256_andnot_ps(_mm256_cmp_ps(x, all(bound), _CMP_LT_OQ), value); }

#else

constexpr int W = 8;
struct F { float v[W]; };
struct I { uint32_t v[W]; };
#define EACH(expression) F r; for (int i = 0; i < W; i++) r.v[i] = (expression); return r
INLINE F zero() { return F{}; }
INLINE F all(float x) { EACH(x); }
INLINE F load(const float* p) { EACH(p[i]); }
INLINE void store(float* p, F x) { std::memcpy(p, x.v, sizeof x.v); }
INLINE F fma(F a, F b, F c) { EACH(a.v[i] * b.v[i] + c.v[i]); }
INLINE F mul(F a, F b) { EACH(a.v[i] * b.v[i]); }
INLINE F add(F a, F b) { EACH(a.v[i] + b.v[i]); }
INLINE F sub(F a, F b) { EACH(a.v[i] - b.v[i]); }
INLINE F magnitude(F x) { EACH(std::fabs(x.v[i])); }
INLINE float first_of(F x) { return x.v[0]; }
INLINE float sum(F x) {
  for (int half = W / 2; half; half /= 2)
    for (int i = 0; i < half; i++) x.v[i] += x.v[i + half];
  return x.v[0];
}
INLINE F load_i8(const void* p) { EACH(float(((const int8_t*)p)[i])); }
INLINE F load_bf16(const void* p) { EACH(from_bf16(((const uint16_t*)p)[i])); }
INLINE F load_fp16(const void* p) { EACH(from_fp16(((const uint16_t*)p)[i])); }
INLINE F load_e5m2(const void* p) { EACH(from_e5m2(((const uint8_t*)p)[i])); }
INLINE F load_e4m3(const void* p) { EACH(from_e4m3(((const uint8_t*)p)[i])); }
INLINE void load_two_e4m3(const uint8_t* p, F& a, F& b) { a = load_e4m3(p), b = load_e4m3(p + W); }
template <int B> INLINE I load_codes(const uint8_t* p) {
  uint64_t word = eight_codes<B>(p);
  I r;
  for (int i = 0; i < W; i++) r.v[i] = uint32_t(word >> i * B) & ((1u << B) - 1);
  return r;
}
INLINE F to_float(I x) { EACH(float(x.v[i])); }
INLINE F look_up(const float* table, I codes) { EACH(table[codes.v[i]]); }
INLINE I indices(const uint32_t* p) { I r; std::memcpy(r.v, p, sizeof r.v); return r; }
INLINE F first_lanes(F x, int64_t n) { EACH(i < n ? x.v[i] : 0.0f); }
INLINE F pick(F from, I lanes) { EACH(from.v[lanes.v[i]]); }
INLINE F larger(F a, F b) { EACH(a.v[i] > b.v[i] ? a.v[i] : b.v[i]); }  // b where one is NaN
INLINE F nearest(F x) { EACH(std::nearbyintf(x.v[i])); }
INLINE F power_of_two(F n) { EACH(std::isnan(n.v[i]) ? n.v[i] : bits_as<float>(uint32_t(int32_t(n.v[i]) + 127) << 23)); }
INLINE F zero_below(F x, float bound, F value) { EACH(x.v[i] < bound ? 0.0f : value.v[i]); }
#undef EACH

#endif

INLINE float largest_of(F x) {  // of numbers
  alignas(64) float lanes[W];
  store(lanes, x);
#if defined(__AVX2__)
  __m256 y = _mm256_load_ps(lanes);
  if constexpr (W == 16) y = _mm256_max_ps(y, _mm256_load_ps(lanes + W / 2));
  __m128 z = _mm_max_ps(_mm256_castps256_ps128(y), _mm256_extractf128_ps(y, 1));
  z = _mm_max_ps(z, _mm_movehl_ps(z, z));
  return _mm_cvtss_f32(_mm_max_ss(z, _mm_movehdup_ps(z)));
#else
  float top = lanes[0];
  for (float lane : lanes) top = lane > top ? lane : top;
  return top;
#endif
}

// Sums of four vectors.
INLINE void sum4(const F* x, float* out) {
#if defined(__AVX2__)
  _mm_storeu_ps(out, sums_of(x[0], x[1], x[2], x[3]));
#else
  for (int i = 0; i < 4; i++) out[i] = sum(x[i]);
#endif
}

// What comes next is asked for beforehand, and as read once only: the hardware fetches ahead too, but not far enough for loops
// that compute.
constexpr int64_t AHEAD = 8192;  // bytes
INLINE void prefetch(const uint8_t* p) { __builtin_prefetch(p + AHEAD, 0, 0); }

// e^x for x <= 0, to 2 ulp; NaN stays NaN. 2^n * p(r) with r = x - n log 2 in two parts; p: the Taylor series to r^6.
INLINE F exponential(F x) {
  F bounded = larger(all(-87.0f), x), n = nearest(mul(bounded, all(1.44269504f)));
  F r = fma(n, all(1.42860677e-6f), fma(n, all(-0.693148613f), bounded));
  F p = all(1.0f / 720);
  for (float c : {1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) p = fma(p, r, all(c));
  return zero_below(x, -87.0f, mul(p, power_of_two(n)));
}
