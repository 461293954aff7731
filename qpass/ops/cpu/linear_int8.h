// The same product with activations quantized to int8, a scale for each 32: `compute="int8"`, for formats of four bits.
//
// A step takes one vector of packed bytes: its low halves are the even elements, its high halves the odd ones, so inputs are
// kept as all even elements of a step, then all odd ones. Each 32-bit lane of a product holds eight neighbouring elements.
#pragma once
#include "linear.h"

constexpr int64_t INPUT_GROUP = 32;

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
INLINE Bytes products(Bytes start, Bytes low, Bytes high, Bytes even, Bytes odd) {
  return _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(start, low, even), high, odd);
}
#else
constexpr bool WIDE_TABLE = false;
// vpmaddubsw saturates at 2^15: the sum of two pairs fits for unsigned factors below 64 (63 * 127 * 4 < 2^15).
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
INLINE Lanes products(Bytes start, Bytes low, Bytes high, Bytes even, Bytes odd) {
  Lanes r;
  std::memcpy(r.v, start.v, sizeof r.v);
  for (int i = 0; i < BYTES; i++) r.v[i / 4] += int(low.v[i]) * int8_t(even.v[i]) + int(high.v[i]) * int8_t(odd.v[i]);
  return r;
}
INLINE F lanes_to_float(Lanes x) { F r; for (int i = 0; i < W; i++) r.v[i] = float(x.v[i]); return r; }
#endif

// How packed halves become factors: as they are; by a table of unsigned bytes; by a table of signed ones.
enum Codes { PLAIN, TABLE, SIGNED_TABLE };

template <Codes How> INLINE auto multiply(Bytes start, Bytes low, Bytes high, Bytes even, Bytes odd) {
#if !defined(__AVX512VNNI__) && defined(__AVX2__)
  if constexpr (How == SIGNED_TABLE) return signed_products(low, high, even, odd);
  else
#endif
  return products(start, low, high, even, odd);
}

constexpr int64_t STEP = 2 * BYTES;  // elements
constexpr int64_t INPUTS8 = 4;       // inputs that share the unpacking of a weight

// Quantized inputs: codes [count, padded] in step order; for each lane [count, padded / 8] its scale, and the sum of its codes
// times -bias, where products start; for each group of a weight with zero points the sum of its inputs as quantized
// [count, sums_stride].
struct Inputs8 {
  int8_t* codes;
  float* lanes;
  int32_t* starts;
  float* sums;
  int64_t padded, blocks, sums_stride;
  int bias;  // what is too much in the factors of the weight
};

// Whole numbers as int8: all of them, the even and the odd ones apart, and the sum of each eight.
INLINE void to_codes(const float* x, int8_t* all_of_them, int8_t* even, int8_t* odd, int32_t* totals) {
#if defined(__AVX2__)
  auto whole = [&](int i) { return _mm256_cvtps_epi32(_mm256_loadu_ps(x + 8 * i)); };
  __m256i words = _mm256_packs_epi16(_mm256_packs_epi32(whole(0), whole(1)), _mm256_packs_epi32(whole(2), whole(3)));
  __m256i codes = _mm256_permutevar8x32_epi32(words, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
  const __m256i apart = _mm256_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15, 0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15);
  __m256i halves = _mm256_permute4x64_epi64(_mm256_shuffle_epi8(codes, apart), 0xd8);
  __m256i sums = _mm256_madd_epi16(_mm256_maddubs_epi16(_mm256_set1_epi8(1), halves), _mm256_set1_epi16(1));
  _mm256_storeu_si256((__m256i*)all_of_them, codes);
  _mm_storeu_si128((__m128i*)even, _mm256_castsi256_si128(halves));
  _mm_storeu_si128((__m128i*)odd, _mm256_extracti128_si256(halves, 1));
  _mm_storeu_si128((__m128i*)totals, _mm_add_epi32(_mm256_castsi256_si128(sums), _mm256_extracti128_si256(sums, 1)));
#else
  for (int64_t i = 0; i < INPUT_GROUP; i++) all_of_them[i] = int8_t(int32_t(x[i]));
  for (int64_t i = 0; i < INPUT_GROUP / 2; i++) even[i] = all_of_them[2 * i], odd[i] = all_of_them[2 * i + 1];
  for (int64_t i = 0; i < INPUT_GROUP / 8; i++) {
    totals[i] = 0;
    for (int64_t j = 0; j < 8; j++) totals[i] += all_of_them[8 * i + j];
  }
#endif
}

static void quantize_input(const float* x, int64_t k, int64_t group, int64_t m, const Inputs8& to) {
  int8_t* codes = to.codes + m * to.padded;
  float* lanes = to.lanes + m * to.padded / 8;
  int32_t* starts = to.starts + m * to.padded / 8;
  float* sums = to.sums + m * to.sums_stride;
  for (int64_t g = 0; g < to.sums_stride; g++) sums[g] = 0.0f;
  for (int64_t start = 0; start < to.padded; start += INPUT_GROUP) {
    int64_t here = most(0, least(INPUT_GROUP, k - start));
    float padded[INPUT_GROUP] = {}, rounded[INPUT_GROUP];
    if (here < INPUT_GROUP) std::memcpy(padded, x + start, here * sizeof(float));
    const float* values = here < INPUT_GROUP ? padded : x + start;
    F tops = zero(), nothing = zero();
    for (int64_t i = 0; i < INPUT_GROUP; i += W) {
      F v = load(values + i);
      tops = larger(larger(v, sub(zero(), v)), tops);
      nothing = fma(v, zero(), nothing);  // NaN if one is NaN or infinite
    }
    bool finite = sum(nothing) == 0.0f;
    float scale = finite ? largest_of(tops) / 127.0f : NAN, inverse = scale > 0 ? 1.0f / scale : 0.0f;
    if (!(inverse < INFINITY)) inverse = 0.0f, scale = 0.0f;  // numbers below 1e-36: zero
    int8_t q[INPUT_GROUP], *even = codes + start / STEP * STEP + start % STEP / 2;
    int32_t totals[INPUT_GROUP / 8];
    for (int64_t i = 0; i < INPUT_GROUP; i += W) store(rounded + i, finite ? nearest(mul(load(values + i), all(inverse))) : zero());
    to_codes(rounded, q, even, even + BYTES, totals);
    for (int64_t lane = 0; lane < INPUT_GROUP / 8; lane++) {
      lanes[start / 8 + lane] = scale;
      starts[start / 8 + lane] = -to.bias * totals[lane];
    }
    if (!to.sums_stride) continue;
    if (group % INPUT_GROUP == 0 || to.blocks == 1) {
      int total = 0;
      for (int32_t t : totals) total += t;
      if (here > 0) sums[to.blocks == 1 ? 0 : start / group] += float(total) * scale;
    } else {
      for (int64_t i = 0; i < here; i++) sums[(start + i) / group] += float(q[i]) * scale;
    }
  }
}

// How the scales of a weight's groups reach the lanes of a step: one for whole steps, several picked for each step.
struct Scales {
  bool whole;          // a group is one step or more
  int64_t steps;       // of a group, if so
  int64_t per_step;    // otherwise
  uint32_t lane[W];    // which of them belongs to each lane

  Scales(const Matrix& w, int64_t all_steps) : lane{} {
    int64_t group = w.blocks == 1 ? all_steps * STEP : w.spec->group;
    whole = group % STEP == 0;
    steps = whole ? group / STEP : 0;
    per_step = STEP % group == 0 ? STEP / group : W;  // groups that straddle steps: the scales are spread beforehand
    for (int i = 0; i < W; i++) lane[i] = uint32_t(i * per_step / W);
  }
};

// What one weight row brings to its products: packed bytes, the last partial step of them padded with zeros; of each group its
// scale (spread over lanes if Scales says so), and that times what the zero point differs from the table's bias.
struct Row8 {
  const uint8_t* bytes;
  uint8_t tail[BYTES];
  const float *scales, *shift;
};

// R weight rows by M inputs: out[m * R + r].
template <int R, int M, Codes How, bool Whole>
INLINE void dot_int8(const Row8* rows, const Scales& groups, int64_t whole_steps, int64_t steps, Bytes book, const Inputs8& in,
                     int64_t m0, float* out) {
  F acc[M][R];
  UNROLL for (int i = 0; i < M * R; i++) acc[i / R][i % R] = zero();
  const int8_t* codes = in.codes + m0 * in.padded;
  const float* lanes = in.lanes + m0 * in.padded / 8;
  const int32_t* starts = in.starts + m0 * in.padded / 8;
  I scale_of_lane = indices(groups.lane);
  auto one = [&](int64_t step, const F* whole_scales, auto&& packed) __attribute__((always_inline)) {
    Bytes low[R], high[R];
    F scales[R];
    UNROLL for (int r = 0; r < R; r++) {
      Bytes bytes = packed(rows[r]);
      low[r] = low_half(bytes), high[r] = high_half(bytes);
      if constexpr (How != PLAIN) low[r] = look_up_bytes(book, low[r]), high[r] = look_up_bytes(book, high[r]);
      scales[r] = Whole ? whole_scales[r] : pick(load(rows[r].scales + step * groups.per_step), scale_of_lane);
    }
    UNROLL for (int m = 0; m < M; m++) {
      const int8_t* q = codes + m * in.padded + step * STEP;
      int64_t lane = m * (in.padded / 8) + step * W;
      UNROLL for (int r = 0; r < R; r++) {
        auto products = multiply<How>(load_bytes(starts + lane), low[r], high[r], load_bytes(q), load_bytes(q + BYTES));
        acc[m][r] = fma(lanes_to_float(products), mul(scales[r], load(lanes + lane)), acc[m][r]);
      }
    }
  };
  auto stored = [&](int64_t step) __attribute__((always_inline)) {
    return [=](const Row8& row) __attribute__((always_inline)) {
      prefetch(row.bytes + step * BYTES);
      return load_bytes(row.bytes + step * BYTES);
    };
  };
  auto tail = [](const Row8& row) __attribute__((always_inline)) { return load_bytes(row.tail); };
  int64_t step = 0;
  if constexpr (Whole) {
    for (int64_t g = 0; step < steps; g++) {
      F scales[R];
      UNROLL for (int r = 0; r < R; r++) scales[r] = all(rows[r].scales[g]);
      int64_t end = least(steps, step + groups.steps);
      for (; step < least(end, whole_steps); step++) one(step, scales, stored(step));
      if (step < end) one(step++, scales, tail);
    }
  } else {
    for (; step < whole_steps; step++) one(step, nullptr, stored(step));
    if (step < steps) one(step, nullptr, tail);
  }
  UNROLL for (int m = 0; m < M; m++) UNROLL for (int r = 0; r < R; r++) out[m * R + r] = sum(acc[m][r]);
}

// The table of a codebook as factors, and what is added to the values of codes to make them unsigned.
struct Table {
  int8_t bytes[16];
  int bias;
  Codes how;

  explicit Table(const Spec& spec) : bytes{}, bias(8), how(PLAIN) {
    if (spec.kind != CODEBOOK) return;
    int low = 0, high = 0;
    for (int8_t v : spec.integers) low = v < low ? v : low, high = v > high ? v : high;
    bool narrow = high - low < 64;
    how = narrow || WIDE_TABLE ? TABLE : SIGNED_TABLE;
    bias = narrow ? -low : WIDE_TABLE ? 128 : 0;
    for (int i = 0; i < 16; i++) bytes[i] = int8_t(spec.integers[i] + bias);
  }
};

// Fills `row` for row r of w; what it points to is in `memory`, padded with zeros, or in w.
INLINE void prepare_row(const Matrix& w, int64_t r, const Scales& groups, const Table& table, int64_t lanes, float* memory, Row8& row) {
  int64_t blocks = w.blocks, padded = round_up(blocks, W), whole = w.row_bytes / BYTES * BYTES;
  float *scales = memory, *zeros = scales + padded + W, *spread = zeros + padded;
  row.bytes = w.row(r);
  std::memcpy(row.tail, row.bytes + whole, w.row_bytes - whole);
  row.scales = scales_of(w, r, scales);
  row.shift = zeros;
  if (w.zero || !groups.whole) {
    if (row.scales != scales) std::memcpy(scales, row.scales, blocks * sizeof(float));
    std::memset(scales + blocks, 0, (padded + W - blocks) * sizeof(float));
    row.scales = scales;
  }
  if (w.zero) {
    zeros_of(w, r, zeros);
    for (int64_t g = blocks; g < padded; g++) zeros[g] = 0.0f;
    F bias = all(float(table.bias));
    for (int64_t g = 0; g < padded; g += W) store(zeros + g, mul(load(scales + g), sub(load(zeros + g), bias)));
  }
  if (!groups.whole && groups.per_step == W) {
    for (int64_t lane = 0; lane < lanes; lane++) {
      int64_t g = lane * 8 / w.spec->group;
      spread[lane] = g < blocks ? scales[g] : 0.0f;
    }
    row.scales = spread;
  }
}

// Rows [n, n + R) of the weight by inputs [m_begin, m_end). One input: row after row, as one stream, which the hardware sees
// and fetches ahead (rows side by side reach two thirds of the bandwidth). More inputs: two rows share the reading of inputs.
template <int R, int M, Codes How, bool Whole>
INLINE int64_t some_rows(const Matrix& w, const Row8* rows, int64_t n, const Inputs8& in, int64_t m, int64_t m_end, Bytes book,
                         const Scales& groups, const Output& out) {
  float y[M * R];
  for (; m + M <= m_end; m += M) {
    dot_int8<R, M, How, Whole>(rows, groups, w.row_bytes / BYTES, in.padded / STEP, book, in, m, y);
    for (int i = 0; i < M * R; i++) {
      F zeros = zero();
      const float *sums = in.sums + (m + i / R) * in.sums_stride, *shift = rows[i % R].shift;
      for (int64_t g = 0; g < in.sums_stride; g += W) zeros = fma(load(shift + g), load(sums + g), zeros);
      out.put(m + i / R, n + i % R, (in.sums_stride ? y[i] - sum(zeros) : y[i]) * w.spec->unit);
    }
  }
  return m;
}

template <Codes How, bool Whole>
static void linear_int8_rows(const Matrix& w, const Inputs8& in, int64_t m_begin, int64_t m_end, int64_t begin, int64_t end,
                             const Table& table, const Scales& groups, const Output& out) {
  int64_t lanes = in.padded / 8, each = 2 * round_up(w.blocks, W) + lanes + 2 * W;
  float* memory = scratch<float>(SCALES, 2 * each);
  Row8 rows[2] = {};
  Bytes book = table_of(table.bytes);
  for (int64_t n = begin; n < end;) {
    bool pair = m_end - m_begin >= INPUTS8 && n + 2 <= end;
    for (int r = 0; r < (pair ? 2 : 1); r++) prepare_row(w, n + r, groups, table, lanes, memory + r * each, rows[r]);
    int64_t m = m_begin;
    if (pair) m = some_rows<2, INPUTS8, How, Whole>(w, rows, n, in, m, m_end, book, groups, out);
    else m = some_rows<1, INPUTS8, How, Whole>(w, rows, n, in, m, m_end, book, groups, out);
    some_rows<1, 1, How, Whole>(w, rows, n, in, m, m_end, book, groups, out);
    if (pair) some_rows<1, 1, How, Whole>(w, rows + 1, n + 1, in, m, m_end, book, groups, out);
    n += pair ? 2 : 1;
  }
}

template <Codes How> static void linear_int8_as(const Matrix& w, const Inputs8& in, int64_t count, const Table& table, const Output& out, int threads) {
  Scales groups(w, in.padded / STEP);
  int64_t inputs = 64;  // with their scales they stay in the second-level cache
  parallel(w.n, piece_of(w, threads), threads, [&](int64_t begin, int64_t end) {
    for (int64_t m = 0; m < count; m += inputs) {
      int64_t m_end = least(count, m + inputs);
      if (groups.whole) linear_int8_rows<How, true>(w, in, m, m_end, begin, end, table, groups, out);
      else linear_int8_rows<How, false>(w, in, m, m_end, begin, end, table, groups, out);
    }
  });
}

static void linear_int8_inputs(const Matrix& w, const void* x, int32_t dtype, int64_t count, const Output& out, int threads) {
  Table table(*w.spec);
  int64_t padded = round_up(w.k, STEP), blocks = w.blocks, lanes = padded / 8, sums = w.zero ? round_up(blocks, W) : 0;
  float* memory = scratch<float>(INPUT, count * (2 * lanes + sums + padded / 4));
  float* after = memory + count * 2 * lanes;
  Inputs8 in{(int8_t*)(after + count * sums), memory, (int32_t*)(memory + count * lanes), after, padded, blocks, sums, table.bias};
  parallel(count, 8, threads, [&](int64_t begin, int64_t end) {
    float* row = scratch<float>(ROWS, w.k);
    for (int64_t m = begin; m < end; m++) {
      from_dtype((const char*)x + m * w.k * size_of(dtype), w.k, dtype, row);
      quantize_input(row, w.k, blocks == 1 ? w.k : w.spec->group, m, in);
    }
  });
  if (table.how == PLAIN) linear_int8_as<PLAIN>(w, in, count, table, out, threads);
  else if (table.how == TABLE) linear_int8_as<TABLE>(w, in, count, table, out, threads);
  else linear_int8_as<SIGNED_TABLE>(w, in, count, table, out, threads);
}

// For four-bit formats with one scale a row, or groups of a multiple of eight. Some inputs at a time: they are kept as int8.
static void linear_int8(const Matrix& w, const void* x, int32_t dtype, int64_t count, const Output& out, int threads) {
  constexpr int64_t some = 512;
  for (int64_t m = 0; m < count; m += some) {
    Output part = out;
    part.y = (char*)out.y + m * out.n * size_of(dtype);
    linear_int8_inputs(w, (const char*)x + m * w.k * size_of(dtype), dtype, least(some, count - m), part, threads);
  }
}
