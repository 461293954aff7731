// The same product with activations quantized to int8, a scale for each 32: `compute="int8"`.
#include "factors.h"
#include "linear.h"

constexpr int64_t INPUT_GROUP = 32;
constexpr int64_t INPUTS8 = 4;       // inputs that share the unpacking of a weight

// Quantized inputs: codes [count, padded] in the order of a step; for each lane [count, padded / lane] its scale, and the sum of
// its codes times -bias, where products start; for each group of a weight with zero points the sum of its inputs as quantized
// [count, sums_stride].
struct Inputs8 {
  int8_t* codes;
  float* lanes;
  int32_t* starts;
  float* sums;
  int64_t padded, blocks, sums_stride;
  int64_t lane;  // elements
  int bias;      // what is too much in the factors of the weight
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
  float* lanes = to.lanes + m * to.padded / to.lane;
  int32_t* starts = to.starts + m * to.padded / to.lane;
  int64_t step = W * to.lane;
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
    int8_t q[INPUT_GROUP], *even = codes + start / step * step + start % step / 2, apart[INPUT_GROUP];
    int32_t totals[INPUT_GROUP / 8];
    bool in_halves = to.lane == 8;
    for (int64_t i = 0; i < INPUT_GROUP; i += W) store(rounded + i, finite ? nearest(mul(load(values + i), all(inverse))) : zero());
    to_codes(rounded, q, in_halves ? even : apart, in_halves ? even + BYTES : apart + INPUT_GROUP / 2, totals);
    if (!in_halves) std::memcpy(codes + start, q, INPUT_GROUP);
    for (int64_t lane = 0; lane < INPUT_GROUP / to.lane; lane++) {
      int32_t total = in_halves ? totals[lane] : q[4 * lane] + q[4 * lane + 1] + q[4 * lane + 2] + q[4 * lane + 3];
      lanes[start / to.lane + lane] = scale;
      starts[start / to.lane + lane] = -to.bias * total;
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

  Scales(const Matrix& w, int64_t step, int64_t all_steps) : lane{} {
    int64_t group = w.blocks == 1 ? all_steps * step : w.spec->group;
    whole = group % step == 0;
    steps = whole ? group / step : 0;
    per_step = step % group == 0 ? step / group : W;  // groups that straddle steps: the scales are spread beforehand
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
template <int R, int M, class Factors, bool Steps>
INLINE void dot_int8(const Row8* rows, const Scales& groups, int64_t whole_steps, int64_t steps, Bytes book, const Inputs8& in,
                     int64_t m0, float* out) {
  F acc[M][R];
  UNROLL for (int i = 0; i < M * R; i++) acc[i / R][i % R] = zero();
  const int8_t* codes = in.codes + m0 * in.padded;
  constexpr int64_t size = Factors::bytes, elements = W * Factors::lane;
  const float* lanes = in.lanes + m0 * in.padded / Factors::lane;
  const int32_t* starts = in.starts + m0 * in.padded / Factors::lane;
  I scale_of_lane = indices(groups.lane);
  auto one = [&](int64_t step, const F* whole_scales, auto&& packed) __attribute__((always_inline)) {
    Factors factors[R];
    F scales[R];
    UNROLL for (int r = 0; r < R; r++) {
      factors[r] = Factors::of(packed(rows[r]), book);
      scales[r] = Steps ? whole_scales[r] : pick(load(rows[r].scales + step * groups.per_step), scale_of_lane);
    }
    UNROLL for (int m = 0; m < M; m++) {
      int64_t lane = m * (in.padded / Factors::lane) + step * W;
      UNROLL for (int r = 0; r < R; r++) {
        auto sums = factors[r].times(load_bytes(starts + lane), codes + m * in.padded + step * elements);
        acc[m][r] = fma(lanes_to_float(sums), mul(scales[r], load(lanes + lane)), acc[m][r]);
      }
    }
  };
  auto stored = [&](int64_t step) __attribute__((always_inline)) {
    return [=](const Row8& row) __attribute__((always_inline)) {
      prefetch(row.bytes + step * size);
      return row.bytes + step * size;
    };
  };
  auto tail = [](const Row8& row) __attribute__((always_inline)) { return (const uint8_t*)row.tail; };
  int64_t step = 0;
  if constexpr (Steps) {
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
  UNROLL for (int m = 0; m < M; m++) {
    const float* sums = in.sums + (m0 + m) * in.sums_stride;
    UNROLL for (int r = 0; r < R; r++) {
      for (int64_t g = 0; g < in.sums_stride; g += W) acc[m][r] = sub(acc[m][r], mul(load(rows[r].shift + g), load(sums + g)));
      if (R != 4) out[m * R + r] = sum(acc[m][r]);
    }
    if constexpr (R == 4) sum4(acc[m], out + m * R);
  }
}

// Scales of row r, and shifts of integer zero points, in whole vectors padded with zeros. Not near the end of the matrix: what is
// read beyond the row is that of the next ones. Gives whether it could.
INLINE bool prepare_in_vectors(const Matrix& w, int64_t r, int64_t padded, float* scales, float* shift) {
  const Spec& s = *w.spec;
  bool halves = s.scale == SCALE_FP16 || s.scale == SCALE_BF16, zeros = w.zero && s.zero_point == 1 && s.kind == CODES;
  if (w.scale_rows == 1 || !(halves || s.scale == SCALE_FP32) || bool(w.zero) != zeros) return false;
  if ((w.n - r) * w.blocks < padded || (zeros && (w.n - r) * w.zero_bytes < padded * s.bits / 8)) return false;
  const uint8_t *stored = w.scale + r * w.blocks * (halves ? 2 : 4), *codes = w.zero + r * w.zero_bytes;
  F bias = all(offset_of(s));
  for (int64_t g = 0; g < padded; g += W) {
    F scale = s.scale == SCALE_FP16 ? load_fp16(stored + 2 * g) : halves ? load_bf16(stored + 2 * g) : load((const float*)stored + g);
    scale = first_lanes(scale, least(W, w.blocks - g));
    store(scales + g, scale);
    auto shift_by = [&](I zero) __attribute__((always_inline)) { store(shift + g, mul(scale, sub(to_float(zero), bias))); };
    if (!zeros) continue;
    switch (s.bits) {
      case 2: shift_by(load_codes<2>(codes + g / 4)); break;
      case 3: shift_by(load_codes<3>(codes + g * 3 / 8)); break;
      case 4: shift_by(load_codes<4>(codes + g / 2)); break;
      case 5: shift_by(load_codes<5>(codes + g * 5 / 8)); break;
      default: shift_by(load_codes<6>(codes + g * 6 / 8));
    }
  }
  return true;
}

// Fills `row` for row r of w; what it points to is in `memory`, padded with zeros, or in w.
template <class Factors>
INLINE void prepare_row(const Matrix& w, int64_t r, const Scales& groups, int64_t lanes, float* memory, Row8& row) {
  int64_t blocks = w.blocks, padded = round_up(blocks, W), whole = w.row_bytes / Factors::bytes * Factors::bytes;
  float *scales = memory, *zeros = scales + padded + W, *spread = zeros + padded;
  row.bytes = w.row(r);
  if (whole < w.row_bytes) std::memcpy(row.tail, row.bytes + whole, w.row_bytes - whole);
  row.shift = zeros;
  if ((w.zero || !groups.whole) && groups.per_step != W && prepare_in_vectors(w, r, padded, scales, zeros)) {
    row.scales = scales;
    return;
  }
  row.scales = scales_of(w, r, scales);
  if (w.zero || !groups.whole) {
    if (row.scales != scales) std::memcpy(scales, row.scales, blocks * sizeof(float));
    std::memset(scales + blocks, 0, (padded + W - blocks) * sizeof(float));
    row.scales = scales;
  }
  if (w.zero) {
    zeros_of(w, r, zeros);
    for (int64_t g = blocks; g < padded; g++) zeros[g] = 0.0f;
    F bias = all(offset_of(*w.spec));
    for (int64_t g = 0; g < padded; g += W) store(zeros + g, mul(load(scales + g), sub(load(zeros + g), bias)));
  }
  if (!groups.whole && groups.per_step == W) {
    for (int64_t lane = 0; lane < lanes; lane++) {
      int64_t g = lane * Factors::lane / w.spec->group;
      spread[lane] = g < blocks ? scales[g] : 0.0f;
    }
    row.scales = spread;
  }
}

// Rows [n, n + R) of the weight by inputs [m_begin, m_end). One input: row after row, as one stream, which the hardware sees
// and fetches ahead (rows side by side reach two thirds of the bandwidth); but of short rows, which end soon, four share the
// reading of the input and their sums. More inputs: two rows share the reading of inputs.
template <int R, int M, class Factors, bool Steps>
INLINE int64_t some_rows(const Matrix& w, const Row8* rows, int64_t n, const Inputs8& in, int64_t m, int64_t m_end, Bytes book,
                         const Scales& groups, const Products& out) {
  float y[M * R];
  for (; m + M <= m_end; m += M) {
    dot_int8<R, M, Factors, Steps>(rows, groups, w.row_bytes / Factors::bytes, in.padded / (W * Factors::lane), book, in, m, y);
    for (int i = 0; i < M * R; i++) out.at(m + i / R, n + i % R) = y[i] * w.spec->unit;
  }
  return m;
}

template <class Factors, bool Steps>
static void linear_int8_rows(const Matrix& w, const Inputs8& in, int64_t m_begin, int64_t m_end, int64_t begin, int64_t end,
                             const Table& table, const Scales& groups, const Products& out) {
  int64_t lanes = in.padded / Factors::lane, each = 2 * round_up(w.blocks, W) + lanes + 2 * W;
  float* memory = scratch<float>(SCALES, ROWS_AT_ONCE * each);
  Row8 rows[ROWS_AT_ONCE] = {};
  Bytes book = table_of(table.bytes);
  auto prepare = [&](int64_t n, int count) __attribute__((always_inline)) {
    for (int r = 0; r < count; r++) prepare_row<Factors>(w, n + r, groups, lanes, memory + r * each, rows[r]);
  };
  bool many = m_end - m_begin >= INPUTS8, short_rows = w.row_bytes <= SHORT_ROW;
  int64_t n = begin;
  if constexpr (SHORT_ROW > 0)
    for (; !many && short_rows && n + ROWS_AT_ONCE <= end; n += ROWS_AT_ONCE) {
      prepare(n, ROWS_AT_ONCE);
      some_rows<ROWS_AT_ONCE, 1, Factors, Steps>(w, rows, n, in, m_begin, m_end, book, groups, out);
    }
  for (; many && n + 2 <= end; n += 2) {
    prepare(n, 2);
    int64_t m = some_rows<2, INPUTS8, Factors, Steps>(w, rows, n, in, m_begin, m_end, book, groups, out);
    for (int r = 0; r < 2; r++) some_rows<1, 1, Factors, Steps>(w, rows + r, n + r, in, m, m_end, book, groups, out);
  }
  for (; n < end; n++) {
    prepare(n, 1);
    int64_t m = some_rows<1, INPUTS8, Factors, Steps>(w, rows, n, in, m_begin, m_end, book, groups, out);
    some_rows<1, 1, Factors, Steps>(w, rows, n, in, m, m_end, book, groups, out);
  }
}

static void linear_int8_inputs(const Matrix& w, const Input& x, int64_t count, const Output& out, int threads) {
  Table table(*w.spec);
  with_factors(*w.spec, table.how, [&](auto factors) {
    using Factors = decltype(factors);
    constexpr int64_t step = W * Factors::lane, inputs = 64;  // with their scales so many stay in the second-level cache
    int64_t padded = round_up(w.k, step), blocks = w.blocks, lanes = padded / Factors::lane, sums = w.zero ? round_up(blocks, W) : 0;
    float* memory = scratch<float>(INPUT, count * (2 * lanes + sums + padded / 4));
    float* after = memory + count * 2 * lanes;
    Inputs8 in{(int8_t*)(after + count * sums), memory, (int32_t*)(memory + count * lanes), after, padded, blocks, sums, Factors::lane, table.bias};
    parallel(count, 8, threads, [&](int64_t begin, int64_t end) {
      float* row = scratch<float>(ROWS, w.k);
      for (int64_t m = begin; m < end; m++) {
        x.row(m, row);
        quantize_input(row, w.k, blocks == 1 ? w.k : w.spec->group, m, in);
      }
    });
    Scales groups(w, step, padded / step);
    in_pieces(w.n, piece_of(w, threads), count, out, threads, [&](int64_t begin, int64_t end, const Products& to) {
      for (int64_t m = 0; m < count; m += inputs) {
        int64_t m_end = least(count, m + inputs);
        if (groups.whole) linear_int8_rows<Factors, true>(w, in, m, m_end, begin, end, table, groups, to);
        else linear_int8_rows<Factors, false>(w, in, m, m_end, begin, end, table, groups, to);
      }
    });
  });
}

// For integers and codebooks with one scale a row, or groups of a multiple of eight. Some inputs at a time: they are kept as int8.
void linear_int8(const Matrix& w, const Input& x, int64_t count, const Output& out, int threads) {
  constexpr int64_t some = 512;
  for (int64_t m = 0; m < count; m += some) linear_int8_inputs(w, x.from(m), least(some, count - m), out.from(m), threads);
}
