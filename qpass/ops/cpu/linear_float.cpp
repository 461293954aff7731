// y[m, n] = sum_k x[m, k] * w[n, k] + bias[n] in float32: exact but for rounding. `compute="float"`.
#include "linear.h"

constexpr int64_t COLUMNS_AT_ONCE = 1024;  // of rows and inputs that stay in the first-level cache
constexpr int64_t SHORT_GROUP = 32;  // elements of a group as most specs have it
constexpr int64_t FEW_INPUTS = 8;  // so many at most that each weight is made a float anew for some of them, and not kept

// R rows of a weight in their stored form by M inputs `x_stride` apart, padded with zeros to a multiple of W: out[r * M + j].
// `memory`: 2 * blocks floats for each row.
template <class Read, bool Zeros, int R, int M>
INLINE void dot_stored(const Matrix& m, int64_t row, const float* x, int64_t x_stride, float* memory, float* out) {
  constexpr int LANES = R * M == 1 ? 4 : 2;  // sums side by side, for the latency of fma
  const float* book = m.spec->codebook;
  const uint8_t* p[R];
  const float *s[R], *z[R];
  F total[R][M];
  UNROLL for (int r = 0; r < R; r++) {
    float* scales = memory + r * 2 * m.blocks;
    p[r] = m.row(row + r);
    s[r] = scales_of(m, row + r, scales);
    z[r] = Zeros ? zeros_of(m, row + r, scales + m.blocks) : nullptr;
    UNROLL for (F& t : total[r]) t = zero();
  }
  int64_t whole = m.k / W * W, group = m.blocks > 1 ? m.spec->group : m.k;
  int64_t k = 0, g = 0;
  if (group == SHORT_GROUP) {  // one sum each, which the next does not wait for
    F other[R][M];
    UNROLL for (int i = 0; i < R * M; i++) other[i / M][i % M] = zero();
    auto add_group = [&](F(*to)[M]) __attribute__((always_inline)) {
      UNROLL for (int r = 0; r < R; r++) {
        F zeros = Zeros ? all(z[r][g]) : zero(), scale = all(s[r][g]), sum[M];
        prefetch(p[r] + k * Read::bits / 8);
        UNROLL for (int i = 0; i < SHORT_GROUP; i += W) {
          F v = Read::at(p[r], k + i, book);
          if (Zeros) v = sub(v, zeros);
          UNROLL for (int j = 0; j < M; j++) {
            F xs = load(x + j * x_stride + k + i);
            sum[j] = i ? fma(v, xs, sum[j]) : mul(v, xs);
          }
        }
        UNROLL for (int j = 0; j < M; j++) to[r][j] = fma(sum[j], scale, to[r][j]);
      }
      k += SHORT_GROUP, g++;
    };
    while (k + 2 * SHORT_GROUP <= m.k) add_group(total), add_group(other);
    UNROLL for (int i = 0; i < R * M; i++) total[i / M][i % M] = add(total[i / M][i % M], other[i / M][i % M]);
  }
  for (; k < m.k; g++) {
    int64_t end = least(m.k, k + group), vectors = least(end, whole);
    F zeros[R], acc[R][M][LANES];
    UNROLL for (int r = 0; r < R; r++) {
      zeros[r] = Zeros ? all(z[r][g]) : zero();
      for (auto& lanes : acc[r]) UNROLL for (F& a : lanes) a = zero();
    }
    auto add_vector = [&](int r, F v, int64_t i, int lane) __attribute__((always_inline)) {
      if (Zeros) v = sub(v, zeros[r]);
      UNROLL for (int j = 0; j < M; j++) acc[r][j][lane] = fma(v, load(x + j * x_stride + i), acc[r][j][lane]);
    };
    constexpr int64_t line = 512 / Read::bits < 2 * W ? 2 * W : 512 / Read::bits;  // elements in a cache line, or two vectors
    for (; k + line <= vectors; k += line) UNROLL for (int r = 0; r < R; r++) {
      prefetch(p[r] + k * Read::bits / 8);
      UNROLL for (int64_t i = 0; i < line; i += 2 * W) {
        F a, b;
        Read::two(p[r], k + i, book, a, b);
        add_vector(r, a, k + i, i / W % LANES), add_vector(r, b, k + i + W, (i / W + 1) % LANES);
      }
    }
    for (; k < vectors; k += W) UNROLL for (int r = 0; r < R; r++) add_vector(r, Read::at(p[r], k, book), k, 0);
    if (k < end) UNROLL for (int r = 0; r < R; r++) add_vector(r, read_tail<Read>(p[r], m.row_bytes, k, book), k, 1);
    k = end;
    UNROLL for (int i = 0; i < R * M; i++) {
      F* lanes = acc[i / M][i % M];
      F sum = add(lanes[0], lanes[1]);
      if (LANES == 4) sum = add(sum, add(lanes[LANES - 2], lanes[LANES - 1]));
      total[i / M][i % M] = fma(sum, all(s[i / M][g]), total[i / M][i % M]);
    }
  }
  if constexpr (R == 4 && M == 1) sum4(&total[0][0], out);
  else UNROLL for (int i = 0; i < R * M; i++) out[i] = sum(total[i / M][i % M]);
}

// Inputs as float32 rows padded with zeros.
static const float* padded_inputs(const Input& x, int64_t count, int threads) {
  int64_t padded = round_up(x.k, W);
  if (x.is_float() && padded == x.k) return (const float*)x.x;
  float* out = scratch<float>(INPUT, count * padded);
  parallel(count, 8, threads, [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; m++) {
      x.row(m, out + m * padded);
      for (int64_t i = x.k; i < padded; i++) out[m * padded + i] = 0.0f;
    }
  });
  return out;
}

// Rows [begin, end) of the weight as they are stored, by few inputs. Row after row is one stream, which the hardware sees and
// fetches ahead, better than rows side by side; but of short rows, which end soon, four share what is done once a row.
template <class Read, bool Zeros>
static void linear_stored(const Matrix& w, const float* x, int64_t count, int64_t padded, int64_t begin, int64_t end, const Products& out) {
  float* memory = scratch<float>(SCALES, ROWS_AT_ONCE * 2 * w.blocks);
  if constexpr (SHORT_ROW > 0 && Read::bits == 8)  // of fewer bits they are multiplied as integers, unless told otherwise
    for (; count == 1 && w.row_bytes <= SHORT_ROW && begin + ROWS_AT_ONCE <= end; begin += ROWS_AT_ONCE)
      dot_stored<Read, Zeros, ROWS_AT_ONCE, 1>(w, begin, x, padded, memory, &out.at(0, begin));
  int64_t half = (end - begin + 1) / 2;
  for (int64_t i = 0; i < end - begin; i++) {  // two halves by turns: two streams are fetched further ahead than one
    int64_t n = begin + i / 2 + i % 2 * half, m = 0;
    float y[INPUTS_AT_ONCE];
    for (; m + INPUTS_AT_ONCE <= count; m += INPUTS_AT_ONCE) {
      dot_stored<Read, Zeros, 1, INPUTS_AT_ONCE>(w, n, x + m * padded, padded, memory, y);
      for (int64_t j = 0; j < INPUTS_AT_ONCE; j++) out.at(m + j, n) = y[j];
    }
    for (; m < count; m++) dot_stored<Read, Zeros, 1, 1>(w, n, x + m * padded, padded, memory, &out.at(m, n));
  }
}

template <class Read>
static void linear_rows(const Matrix& w, const float* x, int64_t count, int64_t begin, int64_t end, const Products& out) {
  int64_t padded = round_up(w.k, W), blocks = w.blocks;
  bool long_groups = blocks == 1 || w.spec->group >= 128;  // each group ends in a sum for each input
  if (groups_fit(w) && (count == 1 || (count <= FEW_INPUTS && long_groups))) {
    if (needs_zeros(*w.spec)) return linear_stored<Read, true>(w, x, count, padded, begin, end, out);
    return linear_stored<Read, false>(w, x, count, padded, begin, end, out);
  }
  float *scales = scratch<float>(SCALES, 2 * blocks), *floats = scratch<float>(ROWS, ROWS_AT_ONCE * padded);
  for (int64_t n = begin; n < end; n += ROWS_AT_ONCE) {
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
    for (int r = 0; r < here; r++) for (int64_t m = 0; m < count; m++) out.at(m, n + r) = sums[r * count + m];
  }
}

void linear_float(const Matrix& w, const Input& x, int64_t count, const Output& out, int threads) {
  const float* inputs = padded_inputs(x, count, threads);
  in_pieces(w.n, piece_of(w, threads), count, out, threads, [&](int64_t begin, int64_t end, const Products& to) {
    with_reader(*w.spec, [&](auto read) { linear_rows<decltype(read)>(w, inputs, count, begin, end, to); });
  });
}
