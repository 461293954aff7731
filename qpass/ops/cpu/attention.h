// Attention of a few queries over a quantized cache: keys and values become floats one block of tokens at a time.
//
// Online softmax (Milakov and Gimelshein 2018) over blocks; the tokens of long caches are split over the threads and the
// parts merged (flash decoding). One split of one key head serves all query heads of its group.
#pragma once
#include "linear.h"

constexpr int64_t BLOCK = 64;     // tokens made floats at a time
constexpr int64_t QUERIES = 32;   // query rows that share them
constexpr int64_t SPLIT = 512;    // least tokens of a split

// Keys or values: [B, H, S, columns], a token's row contiguous, `capacity` tokens between heads in memory.
struct Cache {
  Matrix rows;  // all of them as one matrix: n = B * H * capacity
  int64_t capacity;
};

enum MaskType : int32_t { NO_MASK, MASK_BOOL, MASK_FP32 };

struct Attention {
  const float* q;  // [B, heads, queries, width] float32
  Cache keys, values;
  const void* mask;
  int64_t mask_stride[4];  // of batch, head, query, token, in elements; 0 where it broadcasts
  int32_t mask_type, causal;
  int64_t batch, heads, key_heads, queries, tokens, width, value_width;
  float scale;
  void* out;  // [B, heads, queries, value_width]
  int32_t dtype;
  Extras more;

  int64_t group() const { return heads / key_heads; }
};

// Scales, or zero points that are floats, from number `first` on, and `added` to each.
INLINE void stored_floats(const Spec& spec, const uint8_t* stored, int64_t first, int64_t count, float added, float* out) {
  int32_t dtype = spec.scale == SCALE_FP32 ? X_FP32 : spec.scale == SCALE_FP16 ? X_FP16 : X_BF16;
  from_dtype(stored + first * size_of(dtype), count, dtype, out);
  if (added != 0.0f) SIMD for (int64_t i = 0; i < count; i++) out[i] += added;
}

// The usual case of row_to_float, for rows so short that preparing each of them would cost more than reading it.
template <class Read, bool Zeros> INLINE void plain_rows(const Matrix& m, int64_t first, int64_t count, float* out) {
  int64_t at = 0, numbers = count * m.blocks;
  const float* book = m.spec->codebook;
  int64_t group = m.blocks == 1 ? m.k : m.spec->group;
  F offset = all(offset_of(*m.spec));
  float* scales = scratch<float>(SCALES, 2 * numbers);
  float* zero_points = scales + numbers;
  bool scaled = m.spec->scale != NO_SCALE, floats = Zeros && m.spec->zero_point == 2;
  if (scaled) stored_floats(*m.spec, m.scale, first * m.blocks, numbers, 0.0f, scales);
  if (floats) stored_floats(*m.spec, m.zero, first * m.blocks, numbers, offset_of(*m.spec), zero_points);
  for (int64_t t = 0; t < count; t++, out += m.k) {
    const uint8_t *row = m.row(first + t), *zeros = m.zero + (first + t) * m.zero_bytes;
    for (int64_t start = 0, g = 0; start < m.k; start += group, g++, at++) {
      F s = all(scaled ? scales[at] : 1.0f);
      F zero = Zeros ? all(floats ? zero_points[at] : zero_at(m, zeros, g)) : offset;
      for (int64_t k = start; k < least(m.k, start + group); k += W) {
        F v = Read::at(row, k, book);
        store(out + k, mul(Zeros || Read::offset ? sub(v, zero) : v, s));
      }
    }
  }
}

// Rows whose scales and zero points are those of a column in a group of tokens.
template <class Read> INLINE void rows_of_groups(const Cache& cache, int64_t head, int64_t begin, int64_t count, int64_t padded, float* out) {
  const Matrix& m = cache.rows;
  int64_t whole = m.k / W * W;
  float* scales = scratch<float>(SCALES, 2 * padded);
  float* zeros = scales + padded;
  for (int64_t t = begin; t < begin + count; t++, out += padded) {
    if (t == begin || t % m.spec->tokens == 0) {
      int64_t group = head * m.scale_rows + t / m.spec->tokens;
      stored_floats(*m.spec, m.scale, group * m.k, m.k, 0.0f, scales);
      if (m.spec->zero_point == 2) stored_floats(*m.spec, m.zero, group * m.k, m.k, offset_of(*m.spec), zeros);
      else for (int64_t k = 0; k < m.k; k++) zeros[k] = m.zero ? zero_at(m, m.zero + group * m.zero_bytes, k) : offset_of(*m.spec);
      for (int64_t k = m.k; k < padded; k++) scales[k] = zeros[k] = 0.0f;
    }
    const uint8_t* row = m.row(head * cache.capacity + t);
    for (int64_t k = 0; k < m.k; k += W) {
      F v = k < whole ? Read::at(row, k, m.spec->codebook) : read_tail<Read>(row, m.row_bytes, k, m.spec->codebook);
      store(out + k, mul(sub(v, load(zeros + k)), load(scales + k)));
    }
  }
}

static void stored_to_float(const Cache& cache, int64_t head, int64_t begin, int64_t count, int64_t padded, float* memory) {
  const Matrix& m = cache.rows;
  int64_t first = head * cache.capacity + begin;
  bool floats = m.spec->scale >= SCALE_FP32 && m.spec->scale <= SCALE_BF16 && m.scale_rows == m.n;
  bool plain = (floats || m.spec->scale == NO_SCALE) && padded == m.k && groups_fit(m);
  with_reader(*m.spec, [&](auto read) {
    using Read = decltype(read);
    if (m.spec->tokens) return rows_of_groups<Read>(cache, head, begin, count, padded, memory);
    if (plain) return m.zero ? plain_rows<Read, true>(m, first, count, memory) : plain_rows<Read, false>(m, first, count, memory);
    float* scales = scratch<float>(SCALES, 2 * m.blocks);
    for (int64_t t = 0; t < count; t++) {
      row_to_float<Read>(m, first + t, memory + t * padded, scales);
      for (int64_t k = m.k; k < padded; k++) memory[t * padded + k] = 0.0f;
    }
  });
}

// Tokens `from` .. from + count - 1 of a cache, as floats.
struct Floats {
  const float* rows;
  int64_t from, count;
};

// Rows [begin, begin + count) of the cache of one head as floats `padded` apart, zeros behind each: in `memory`, or where they are.
static const float* rows_to_float(const Cache& cache, const Frame& frame, Floats firsts, Floats lasts, int64_t head, int64_t begin,
                                  int64_t count, int64_t padded, float* memory) {
  const Matrix& m = cache.rows;
  int64_t end = begin + count;
  bool framed = frame.rotation || frame.scale;
  if (lasts.rows && !framed && begin >= lasts.from && end <= lasts.from + lasts.count && padded == m.k)
    return lasts.rows + (head * lasts.count + begin - lasts.from) * m.k;
  bool there = m.spec->kind == FP32 && padded == m.k;
  for (Floats f : {firsts, lasts}) there &= !f.rows || f.from >= end || f.from + f.count <= begin;
  if (there) return (const float*)m.row(head * cache.capacity + begin);
  stored_to_float(cache, head, begin, count, padded, memory);
  for (Floats f : {firsts, lasts})
    for (int64_t t = most(begin, f.from); f.rows && t < least(end, f.from + f.count); t++)
      into_frame(frame, head, f.rows + (head * f.count + t - f.from) * m.k, m.k, memory + (t - begin) * padded);
  return memory;
}

// What is added to the scores of one query and BLOCK tokens from t0; -inf: not seen. Whether it sees one of them.
static bool mask_row(const Attention& a, int64_t b, int64_t h, int64_t i, int64_t t0, int64_t count, float* added) {
  int64_t end = a.causal ? most(0, least(count, i + 1 - t0)) : count, step = a.mask_stride[3];
  int64_t at = b * a.mask_stride[0] + h * a.mask_stride[1] + i * a.mask_stride[2] + t0 * step;
  const uint8_t* flags = (const uint8_t*)a.mask + at;
  const float* floats = (const float*)a.mask + at;
  bool seen = end > 0;
  if (a.mask_type == NO_MASK || (a.mask_type == MASK_BOOL && step == 1 && !std::memchr(flags, 0, end))) {
    std::memset(added, 0, end * sizeof(float));
  } else {
    seen = false;
    for (int64_t t = 0; t < end; t++) {
      added[t] = a.mask_type == MASK_FP32 ? floats[t * step] : flags[t * step] ? 0.0f : -INFINITY;
      seen |= added[t] != -INFINITY;
    }
  }
  for (int64_t t = end; t < BLOCK; t++) added[t] = -INFINITY;
  return seen;
}

// Scores of one query become weights e^(s - largest); its accumulated values and total are scaled to the new largest.
static void weigh(float* s, const float* added, float* acc, int64_t columns, float* largest, float* total) {
  F tops = all(*largest), sums = zero();
  for (int64_t t = 0; t < BLOCK; t += W) {
    F x = add(load(s + t), load(added + t));
    store(s + t, x);
    tops = larger(x, tops);
  }
  alignas(64) float lanes[W];
  store(lanes, tops);
  float top = *largest;
  for (float x : lanes) top = x > top ? x : top;
  if (top == -INFINITY) {  // nothing seen so far
    for (int64_t t = 0; t < BLOCK; t++) {
      if (std::isnan(s[t])) *largest = 0.0f, *total = NAN;
      s[t] = 0.0f;
    }
    return;
  }
  for (int64_t t = 0; t < BLOCK; t += W) {
    F p = exponential(sub(load(s + t), all(top)));
    store(s + t, p);
    sums = add(sums, p);
  }
  float keep = std::exp(*largest - top);
  if (keep != 1.0f)
    for (int64_t d = 0; d < columns; d++) acc[d] *= keep;
  *total = *total * keep + sum(sums);
  *largest = top;
}

// acc[r] += sum_t p[r, t] * v[t], for R rows and C vectors of columns at once.
template <int R, int C> INLINE void add_columns(const float* p, const float* v, int64_t count, int64_t padded, float* acc) {
  F sum[R][C];
  UNROLL for (int r = 0; r < R; r++) UNROLL for (int c = 0; c < C; c++) sum[r][c] = load(acc + r * padded + c * W);
  for (int64_t t = 0; t < count; t++) {
    F x[C];
    UNROLL for (int c = 0; c < C; c++) x[c] = load(v + t * padded + c * W);
    UNROLL for (int r = 0; r < R; r++) {
      F weight = all(p[r * BLOCK + t]);
      UNROLL for (int c = 0; c < C; c++) sum[r][c] = fma(weight, x[c], sum[r][c]);
    }
  }
  UNROLL for (int r = 0; r < R; r++) UNROLL for (int c = 0; c < C; c++) store(acc + r * padded + c * W, sum[r][c]);
}

template <int R> INLINE void add_values(const float* p, const float* v, int64_t count, int64_t padded, float* acc) {
  constexpr int C = R == 1 ? 4 : 2;
  int64_t d = 0;
  for (; d + C * W <= padded; d += C * W) add_columns<R, C>(p, v + d, count, padded, acc + d);
  for (; d < padded; d += W) add_columns<R, 1>(p, v + d, count, padded, acc + d);
}

// Query rows [q_begin, q_end) of a key head's group against tokens [begin, end): acc [rows, padded values], largest and sum.
// Row r is query r % queries of head r / queries of the group.
static void attend(const Attention& a, int64_t b, int64_t key_head, int64_t q_begin, int64_t q_end, int64_t begin, int64_t end,
                   float* acc, float* largest, float* total) {
  int64_t rows = q_end - q_begin, kp = round_up(a.width, W), vp = round_up(a.value_width, W);
  int64_t head = b * a.key_heads + key_head, first = key_head * a.group();
  float* keys = scratch<float>(KEYS, BLOCK * kp + rows * kp);
  float* queries = keys + BLOCK * kp;
  float* values = scratch<float>(VALUES, BLOCK * vp);
  float* scores = scratch<float>(SCORES, 2 * rows * BLOCK);
  float* added = scores + rows * BLOCK;
  for (int64_t r = 0; r < rows; r++) {
    int64_t row = q_begin + r, h = first + row / a.queries, i = row % a.queries;
    const float* q = a.q + ((b * a.heads + h) * a.queries + i) * a.width;
    const Frame& frame = a.more.keys;  // (q R) . (k R) = q . k, and (q * s) . (k / s)
    float* out = queries + r * kp;
    if (frame.rotation) rotate_row(frame.rotation, q, a.width, out);
    else std::memcpy(out, q, a.width * sizeof(float));
    if (frame.scale) for (int64_t k = 0; k < a.width; k++) out[k] *= frame.scale[key_head % frame.heads * a.width + k];
    for (int64_t k = 0; k < kp; k++) out[k] = k < a.width ? out[k] * a.scale : 0.0f;
    largest[r] = -INFINITY, total[r] = 0.0f;
  }
  std::memset(acc, 0, rows * vp * sizeof(float));
  for (int64_t t0 = begin; t0 < end; t0 += BLOCK) {
    int64_t count = least(BLOCK, end - t0);
    bool seen = false, shared = a.mask_stride[1] == 0;  // one mask for all heads
    for (int64_t r = 0; r < rows; r++) {
      int64_t row = q_begin + r;
      if (shared && r >= a.queries) std::memcpy(added + r * BLOCK, added + (r - a.queries) * BLOCK, BLOCK * sizeof(float));
      else seen |= mask_row(a, b, first + row / a.queries, row % a.queries, t0, count, added + r * BLOCK);
    }
    if (!seen) continue;  // an unused end of a static cache is not read
    const Extras& e = a.more;
    const float* k = rows_to_float(a.keys, e.keys, {e.k_first, 0, e.firsts}, {e.k_last, e.start, e.lasts}, head, t0, count, kp, keys);
    for (int64_t t = 0; t < count; t += ROWS_AT_ONCE) {
      const float* w[ROWS_AT_ONCE];
      for (int i = 0; i < ROWS_AT_ONCE; i++) w[i] = k + least(t + i, count - 1) * kp;
      dot_all(w, queries, rows, kp, kp, [&](int i, int64_t r, float s) { scores[r * BLOCK + t + i] = s; });
    }
    for (int64_t i = 0; e.soft_cap && i < rows * BLOCK; i++) scores[i] = e.soft_cap * std::tanh(scores[i] / e.soft_cap);
    for (int64_t r = 0; r < rows; r++) {
      for (int64_t t = round_up(count, ROWS_AT_ONCE); t < BLOCK; t++) scores[r * BLOCK + t] = 0.0f;
      weigh(scores + r * BLOCK, added + r * BLOCK, acc + r * vp, vp, largest + r, total + r);
    }
    const float* v = rows_to_float(a.values, e.values, {e.v_first, 0, e.firsts}, {e.v_last, e.start, e.lasts}, head, t0, count, vp, values);
    int64_t r = 0;
    for (; r + 4 <= rows; r += 4) add_values<4>(scores + r * BLOCK, v, count, vp, acc + r * vp);
    for (; r < rows; r++) add_values<1>(scores + r * BLOCK, v, count, vp, acc + r * vp);
  }
}

static void attention(const Attention& a, int threads) {
  int64_t rows = a.group() * a.queries, vp = round_up(a.value_width, W), heads = a.batch * a.key_heads;
  int64_t row_blocks = (rows + QUERIES - 1) / QUERIES;
  int64_t wanted = most(1, 4 * threads / most(1, heads * row_blocks));
  int64_t splits = most(1, least(wanted, a.tokens / SPLIT));
  int64_t split = round_up((a.tokens + splits - 1) / splits, BLOCK), per_row = vp + 2;
  float* parts = scratch<float>(SUMS, heads * splits * rows * per_row);
  parallel(heads * row_blocks * splits, 1, threads, [&](int64_t item, int64_t) {
    int64_t s = item % splits, block = item / splits % row_blocks, head = item / splits / row_blocks;
    int64_t begin = block * QUERIES, end = least(rows, begin + QUERIES);
    float* acc = parts + ((head * splits + s) * rows + begin) * vp;
    float* stats = parts + heads * splits * rows * vp + ((head * splits + s) * rows + begin) * 2;
    attend(a, head / a.key_heads, head % a.key_heads, begin, end, least(a.tokens, s * split), least(a.tokens, (s + 1) * split),
           acc, stats, stats + (end - begin));
  });
  parallel(heads * rows, 16, threads, [&](int64_t from, int64_t to) {
    float* y = scratch<float>(SCORES, 2 * vp);
    float* turned = y + vp;
    for (int64_t item = from; item < to; item++) {
      int64_t head = item / rows, row = item % rows, begin = row / QUERIES * QUERIES, width = least(QUERIES, rows - begin);
      auto stats = [&](int64_t s) { return parts + heads * splits * rows * vp + ((head * splits + s) * rows + begin) * 2 + row - begin; };
      int64_t b = head / a.key_heads, h = head % a.key_heads * a.group() + row / a.queries;
      float top = a.more.sinks ? a.more.sinks[h] : -INFINITY;
      for (int64_t s = 0; s < splits; s++) top = *stats(s) > top || std::isnan(*stats(s)) ? *stats(s) : top;
      float total = a.more.sinks ? std::exp(a.more.sinks[h] - top) : 0.0f;
      for (int64_t d = 0; d < vp; d++) y[d] = 0.0f;
      for (int64_t s = 0; s < splits; s++) {
        float weight = *stats(s) == -INFINITY ? 0.0f : std::exp(*stats(s) - top);
        total += weight * stats(s)[width];
        const float* acc = parts + ((head * splits + s) * rows + row) * vp;
        if (weight != 0.0f) for (int64_t d = 0; d < vp; d++) y[d] += weight * acc[d];
      }
      float inverse = total == 0.0f ? 0.0f : 1.0f / total;  // a query that sees nothing: zeros, as torch gives
      for (int64_t d = 0; d < vp; d++) y[d] *= inverse;
      const Frame& frame = a.more.values;
      if (frame.scale) for (int64_t d = 0; d < a.value_width; d++) y[d] *= frame.scale[head % a.key_heads % frame.heads * a.value_width + d];
      if (frame.rotation) rotate_row(frame.rotation, y, a.value_width, turned);
      int64_t at = ((b * a.heads + h) * a.queries + row % a.queries) * a.value_width;
      to_dtype(frame.rotation ? turned : y, a.value_width, a.dtype, (char*)a.out + at * size_of(a.dtype));
    }
  });
}
