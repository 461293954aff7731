// Codes of a weight as bytes that are multiplied with inputs in int8, for every width.
#pragma once
#include "weight.h"

#if defined(__AVX512F__) && defined(__AVX512BW__)
constexpr int64_t BYTES = 64;
using Bytes = __m512i;
INLINE Bytes load_bytes(const void* p) { return _mm512_loadu_si512(p); }
INLINE Bytes low_half(Bytes x) { return _mm512_and_si512(x, _mm512_set1_epi8(15)); }
INLINE Bytes high_half(Bytes x) { return low_half(_mm512_srli_epi16(x, 4)); }
INLINE Bytes table_of(const int8_t* t) { return _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)t)); }
INLINE Bytes look_up_bytes(Bytes table, Bytes codes) { return _mm512_shuffle_epi8(table, codes); }
INLINE F lanes_to_float(Bytes x) { return _mm512_cvtepi32_ps(x); }
#if defined(__AVX512VNNI__)
constexpr bool WIDE_TABLE = true;  // unsigned bytes up to 255
INLINE Bytes products(Bytes start, Bytes w, Bytes x) { return _mm512_dpbusd_epi32(start, w, x); }
INLINE Bytes products(Bytes start, Bytes low, Bytes high, Bytes even, Bytes odd) { return products(products(start, low, even), high, odd); }
#else
constexpr bool WIDE_TABLE = false;
// vpmaddubsw saturates at 2^15: the sum of two pairs fits for unsigned factors below 64 (63 * 127 * 4 < 2^15).
INLINE Bytes products(Bytes start, Bytes w, Bytes x) {
  return _mm512_add_epi32(start, _mm512_madd_epi16(_mm512_maddubs_epi16(w, x), _mm512_set1_epi16(1)));
}
INLINE Bytes products(Bytes start, Bytes low, Bytes high, Bytes even, Bytes odd) {
  Bytes pairs = _mm512_add_epi16(_mm512_maddubs_epi16(low, even), _mm512_maddubs_epi16(high, odd));
  return _mm512_add_epi32(start, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
}
INLINE Bytes signed_pairs(Bytes w, Bytes x) {
  Bytes flipped = _mm512_mask_sub_epi8(x, _mm512_movepi8_mask(w), _mm512_setzero_si512(), x);
  return _mm512_madd_epi16(_mm512_maddubs_epi16(_mm512_abs_epi8(w), flipped), _mm512_set1_epi16(1));
}
INLINE Bytes signed_products(Bytes low, Bytes high, Bytes even, Bytes odd) {
  return _mm512_add_epi32(signed_pairs(low, even), signed_pairs(high, odd));
}
#endif
#elif defined(__AVX2__)
constexpr int64_t BYTES = 32;
using Bytes = __m256i;
INLINE Bytes load_bytes(const void* p) { return _mm256_loadu_si256((const __m256i*)p); }
INLINE Bytes low_half(Bytes x) { return _mm256_and_si256(x, _mm256_set1_epi8(15)); }
INLINE Bytes high_half(Bytes x) { return low_half(_mm256_srli_epi16(x, 4)); }
INLINE Bytes table_of(const int8_t* t) { return _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)t)); }
INLINE Bytes look_up_bytes(Bytes table, Bytes codes) { return _mm256_shuffle_epi8(table, codes); }
INLINE F lanes_to_float(Bytes x) { return _mm256_cvtepi32_ps(x); }
constexpr bool WIDE_TABLE = false;
INLINE Bytes products(Bytes start, Bytes w, Bytes x) {
  return _mm256_add_epi32(start, _mm256_madd_epi16(_mm256_maddubs_epi16(w, x), _mm256_set1_epi16(1)));
}
INLINE Bytes products(Bytes start, Bytes low, Bytes high, Bytes even, Bytes odd) {
  Bytes pairs = _mm256_add_epi16(_mm256_maddubs_epi16(low, even), _mm256_maddubs_epi16(high, odd));
  return _mm256_add_epi32(start, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
INLINE Bytes signed_pairs(Bytes w, Bytes x) {
  return _mm256_madd_epi16(_mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(x, w)), _mm256_set1_epi16(1));
}
INLINE Bytes signed_products(Bytes low, Bytes high, Bytes even, Bytes odd) {
  return _mm256_add_epi32(signed_pairs(low, even), signed_pairs(high, odd));
}
#else
constexpr int64_t BYTES = 32;
struct Bytes { uint8_t v[BYTES]; };
INLINE Bytes load_bytes(const void* p) { Bytes r; std::memcpy(r.v, p, BYTES); return r; }
INLINE Bytes low_half(Bytes x) { for (auto& b : x.v) b &= 15; return x; }
INLINE Bytes high_half(Bytes x) { for (auto& b : x.v) b >>= 4; return x; }
INLINE Bytes table_of(const int8_t* t) { Bytes r; for (int i = 0; i < BYTES; i++) r.v[i] = uint8_t(t[i % 16]); return r; }
INLINE Bytes look_up_bytes(Bytes table, Bytes codes) { for (auto& b : codes.v) b = table.v[b]; return codes; }
constexpr bool WIDE_TABLE = true;
struct Lanes { int32_t v[W]; };
INLINE Lanes products(Bytes start, Bytes w, Bytes x) {
  Lanes r;
  std::memcpy(r.v, start.v, sizeof r.v);
  for (int i = 0; i < BYTES; i++) r.v[i / 4] += int(w.v[i]) * int8_t(x.v[i]);
  return r;
}
INLINE Lanes products(Bytes start, Bytes low, Bytes high, Bytes even, Bytes odd) {
  Lanes r;
  std::memcpy(r.v, start.v, sizeof r.v);
  for (int i = 0; i < BYTES; i++) r.v[i / 4] += int(low.v[i]) * int8_t(even.v[i]) + int(high.v[i]) * int8_t(odd.v[i]);
  return r;
}
INLINE F lanes_to_float(Lanes x) { F r; for (int i = 0; i < W; i++) r.v[i] = float(x.v[i]); return r; }
#endif

// --- codes of other widths as bytes ---------------------------------------------------------------------------------

// N bytes, and none behind them.
#if defined(__AVX2__)
template <int N> INLINE __m128i load_first(const uint8_t* p) {
  uint64_t low = 0, high = 0;
  std::memcpy(&low, p, N < 8 ? N : 8);
  if (N > 8) std::memcpy(&high, p + 8, N > 8 ? N - 8 : 0);
  return _mm_set_epi64x(int64_t(high), int64_t(low));
}

// Where the codes of 16 lie: the two bytes that hold each of the first eight, and of the second, and the factor that moves it up
// to the end of its 16 bits.
template <int B> struct Places {
  alignas(32) uint8_t first[32], second[32];
  alignas(32) uint16_t up[16];
  constexpr Places() : first{}, second{}, up{} {
    for (int lane = 0; lane < 2; lane++)
      for (int i = 0; i < 8; i++) {
        int at = 16 * lane + 2 * i, byte = i * B / 8;
        first[at] = uint8_t(byte), first[at + 1] = uint8_t(byte + 1);
        second[at] = uint8_t(byte + B), second[at + 1] = uint8_t(byte + B + 1);
        up[8 * lane + i] = uint16_t(1 << (16 - B - i * B % 8));
      }
  }
};
template <int B> constexpr Places<B> PLACES{};

template <int B> INLINE __m256i unpack_32(const uint8_t* p) {
  __m256i packed = _mm256_set_m128i(load_first<2 * B>(p + 2 * B), load_first<2 * B>(p));
  auto part = [&](const uint8_t* places) __attribute__((always_inline)) {
    __m256i words = _mm256_shuffle_epi8(packed, _mm256_load_si256((const __m256i*)places));
    return _mm256_srli_epi16(_mm256_mullo_epi16(words, _mm256_load_si256((const __m256i*)PLACES<B>.up)), 16 - B);
  };
  return _mm256_packus_epi16(part(PLACES<B>.first), part(PLACES<B>.second));
}
#endif

// BYTES codes of B bits.
#if defined(__AVX512VBMI__)
template <int B> struct Gather {  // byte i of the codes of each eight, and the bit at which code i begins
  alignas(64) uint8_t bytes[64], bits[64];
  constexpr Gather() : bytes{}, bits{} {
    for (int i = 0; i < 64; i++) bytes[i] = uint8_t(i / 8 * B + (i % 8 < B ? i % 8 : 0)), bits[i] = uint8_t(i % 8 * B);
  }
};
template <int B> constexpr Gather<B> GATHER{};
template <int B> INLINE Bytes unpack(const uint8_t* p) {
  Bytes packed = _mm512_maskz_loadu_epi8((uint64_t(1) << 8 * B) - 1, p);
  Bytes eights = _mm512_permutexvar_epi8(_mm512_load_si512(GATHER<B>.bytes), packed);
  return _mm512_and_si512(_mm512_multishift_epi64_epi8(_mm512_load_si512(GATHER<B>.bits), eights), _mm512_set1_epi8((1 << B) - 1));
}
#elif defined(__AVX512F__) && defined(__AVX512BW__)
template <int B> INLINE Bytes unpack(const uint8_t* p) {
  return _mm512_inserti64x4(_mm512_castsi256_si512(unpack_32<B>(p)), unpack_32<B>(p + 4 * B), 1);
}
#elif defined(__AVX2__)
template <int B> INLINE Bytes unpack(const uint8_t* p) { return unpack_32<B>(p); }
#else
template <int B> INLINE Bytes unpack(const uint8_t* p) {
  Bytes r;
  for (int i = 0; i < BYTES; i++) r.v[i] = uint8_t(code_at(p, i, B));
  return r;
}
#endif

// --- a step of a row as factors -------------------------------------------------------------------------------------

// Each takes `bytes` of a row, which are W * `lane` elements, and multiplies them by as many inputs: 32-bit lane i holds the sum
// over elements i * lane and following. Factors are unsigned, too large by bias_of.

// Four bits. Low halves are the even elements of a step, high halves the odd ones; so are the inputs.
enum Codes { PLAIN, TABLE, SIGNED_TABLE };  // as they are; by a table of unsigned bytes; by one of signed ones
template <Codes How> struct Halves {
  static constexpr int64_t lane = 8, bytes = BYTES;
  Bytes low, high;
  INLINE Halves<How> of(const uint8_t* p, Bytes table) {
    Bytes both = load_bytes(p), a = low_half(both), b = high_half(both);
    if constexpr (How == PLAIN) return {a, b};
    else return {look_up_bytes(table, a), look_up_bytes(table, b)};
  }
  __attribute__((always_inline)) auto times(Bytes start, const int8_t* x) const {
#if !defined(__AVX512VNNI__) && defined(__AVX2__)
    if constexpr (How == SIGNED_TABLE) return signed_products(low, high, load_bytes(x), load_bytes(x + BYTES));
    else
#endif
    return products(start, low, high, load_bytes(x), load_bytes(x + BYTES));
  }
};

// Two, three, five, six bits.
template <int B> struct Packed {
  static constexpr int64_t lane = 4, bytes = BYTES * B / 8;
  Bytes codes;
  INLINE Packed of(const uint8_t* p, Bytes) { return {unpack<B>(p)}; }
  __attribute__((always_inline)) auto times(Bytes start, const int8_t* x) const { return products(start, codes, load_bytes(x)); }
};

// Eight bits, stored as signed numbers.
struct Whole {
  static constexpr int64_t lane = 4, bytes = BYTES;
  Bytes codes;
#if defined(__AVX512VNNI__)
  static constexpr int bias = 128;
  INLINE Whole of(const uint8_t* p, Bytes) { return {_mm512_xor_si512(load_bytes(p), _mm512_set1_epi8(-128))}; }
  __attribute__((always_inline)) auto times(Bytes start, const int8_t* x) const { return products(start, codes, load_bytes(x)); }
#elif defined(__AVX2__)
  static constexpr int bias = 0;
  INLINE Whole of(const uint8_t* p, Bytes) { return {load_bytes(p)}; }
  __attribute__((always_inline)) auto times(Bytes, const int8_t* x) const { return signed_pairs(codes, load_bytes(x)); }
#else
  static constexpr int bias = 128;
  INLINE Whole of(const uint8_t* p, Bytes) {
    Bytes r = load_bytes(p);
    for (auto& b : r.v) b ^= 128;
    return {r};
  }
  auto times(Bytes start, const int8_t* x) const { return products(start, codes, load_bytes(x)); }
#endif
};

// The table of a codebook as factors, and what is too much in all factors.
struct Table {
  int8_t bytes[16];
  int bias;
  Codes how;

  explicit Table(const Spec& spec) : bytes{}, bias(spec.kind == INT8 ? Whole::bias : 1 << (spec.bits - 1)), how(PLAIN) {
    if (spec.kind != CODEBOOK) return;
    int low = 0, high = 0;
    for (int8_t v : spec.integers) low = v < low ? v : low, high = v > high ? v : high;
    bool narrow = high - low < 64;
    how = narrow || WIDE_TABLE ? TABLE : SIGNED_TABLE;
    bias = narrow ? -low : WIDE_TABLE ? 128 : 0;
    for (int i = 0; i < 16; i++) bytes[i] = int8_t(spec.integers[i] + bias);
  }
};

// Calls f with the factors of the format, as a value whose type says which.
template <class Function> INLINE void with_factors(const Spec& spec, Codes how, Function&& f) {
  if (spec.kind == INT8) return f(Whole{});
  if (spec.kind == CODEBOOK) return how == TABLE ? f(Halves<TABLE>{}) : f(Halves<SIGNED_TABLE>{});
  switch (spec.bits) {
    case 2: return f(Packed<2>{});
    case 3: return f(Packed<3>{});
    case 4: return f(Halves<PLAIN>{});
    case 5: return f(Packed<5>{});
    default: return f(Packed<6>{});
  }
}
