// Stored parts of a quantized matrix (see qpass.quantized.Quantized), and its rows as floats.
#pragma once
#include <vector>

#include "extras.h"
#include "vec.h"

enum Kind : int32_t { FP32, BF16, FP16, E4M3, E5M2, INT8, CODES, CODEBOOK };
enum ScaleType : int32_t { NO_SCALE, SCALE_FP32, SCALE_FP16, SCALE_BF16, SCALE_E8M0, SCALE_E4M3, SCALE_UINT8 };
enum Dtype : int32_t { X_FP32, X_BF16, X_FP16 };

// What a spec says; made once for each by Python.
struct Spec {
  int32_t kind, bits;
  int32_t group;   // elements that share a scale; 0: the whole row
  int32_t tokens;  // rows whose elements of one column share a scale; 0: rows have their own
  int32_t scale;   // a ScaleType
  int32_t zero_point;  // 0: none; 1: integers stored as the codes are; 2: floats stored as the scales are
  int32_t ceil;        // E8M0 scales cover the range: they are rounded up
  float unit;  // a codebook's values are, nearly for nf4, these integers times this, for int8 products
  float codebook[16];
  int8_t integers[16];
};

// Bytes of a packed row: rows are padded to whole units (qpass.packing).
INLINE int64_t packed_bytes(int64_t count, int64_t bits) {
  if (bits >= 8) return count * bits / 8;
  int64_t per_unit = bits == 4 ? 2 : bits == 2 || bits == 6 ? 4 : 8;
  return (count + per_unit - 1) / per_unit * per_unit * bits / 8;
}

struct Matrix {
  const Spec* spec;
  const uint8_t *data, *scale, *zero;
  const float* outer;
  int64_t n, k;
  int64_t scale_rows, outer_rows;  // n, or 1 where all rows share them; groups of tokens in a head
  int64_t blocks, row_bytes, zero_bytes;

  Matrix(const Spec* spec, const uint8_t* data, const uint8_t* scale, const uint8_t* zero, const float* outer, int64_t n, int64_t k,
         int64_t scale_rows, int64_t outer_rows)
      : spec(spec), data(data), scale(scale), zero(zero), outer(outer), n(n), k(k), scale_rows(scale_rows), outer_rows(outer_rows),
        blocks(spec->tokens ? k : spec->group ? (k + spec->group - 1) / spec->group : 1), row_bytes(packed_bytes(k, spec->bits)),
        zero_bytes(spec->zero_point == 2 ? blocks * (spec->scale == SCALE_FP32 ? 4 : 2) : packed_bytes(blocks, spec->bits)) {}

  const uint8_t* row(int64_t r) const { return data + r * row_bytes; }
};

INLINE uint32_t code_at(const uint8_t* row, int64_t i, int bits) {
  int64_t bit = i * bits;
  uint32_t word = row[bit >> 3];
  if ((bit & 7) + bits > 8) word |= uint32_t(row[(bit >> 3) + 1]) << 8;
  return (word >> (bit & 7)) & ((1u << bits) - 1);
}

INLINE void from_dtype(const void* x, int64_t count, int32_t dtype, float* out) {
  if (dtype == X_FP32) std::memcpy(out, x, count * sizeof(float));
  else {
    const uint16_t* halves = (const uint16_t*)x;
    int64_t i = 0;
    for (; i + W <= count; i += W) store(out + i, dtype == X_BF16 ? load_bf16(halves + i) : load_fp16(halves + i));
    if (i < count && count >= W) i = count - W, store(out + i, dtype == X_BF16 ? load_bf16(halves + i) : load_fp16(halves + i)), i = count;
    for (; i < count; i++) out[i] = dtype == X_BF16 ? from_bf16(halves[i]) : from_fp16(halves[i]);
  }
}

// --- scales and zero points of a row ------------------------------------------------------------------------------

// Number i of scales, or of zero points, that are floats.
INLINE float float_at(const Spec& spec, const uint8_t* stored, int64_t i) {
  if (spec.scale == SCALE_FP32) return ((const float*)stored)[i];
  uint16_t half = ((const uint16_t*)stored)[i];
  return spec.scale == SCALE_FP16 ? from_fp16(half) : from_bf16(half);
}

// What is added to codes when they are stored as unsigned numbers.
INLINE float offset_of(const Spec& spec) { return spec.kind == CODES ? float(1 << (spec.bits - 1)) : 0.0f; }

// float32 numbers that multiply the codes of row r; `scratch` holds blocks of them where they are stored otherwise.
INLINE const float* scales_of(const Matrix& m, int64_t r, float* scratch) {
  static const float one[1] = {1.0f};
  int64_t blocks = m.blocks, at = m.scale_rows == 1 ? 0 : r * blocks;
  float outer = m.outer ? m.outer[m.outer_rows == 1 ? 0 : r] : 1.0f;
  switch (m.spec->scale) {
    case NO_SCALE: return one;
    case SCALE_FP32: return (const float*)m.scale + at;
    case SCALE_FP16: from_dtype(m.scale + 2 * at, blocks, X_FP16, scratch); break;
    case SCALE_BF16: from_dtype(m.scale + 2 * at, blocks, X_BF16, scratch); break;
    case SCALE_E8M0: SIMD for (int64_t i = 0; i < blocks; i++) scratch[i] = from_e8m0(m.scale[at + i]); break;
    case SCALE_E4M3: {
      int64_t i = 0;
      for (; i + W <= blocks; i += W) store(scratch + i, mul(load_e4m3(m.scale + at + i), all(outer)));
      for (; i < blocks; i++) scratch[i] = from_e4m3(m.scale[at + i]) * outer;
      break;
    }
    case SCALE_UINT8: SIMD for (int64_t i = 0; i < blocks; i++) scratch[i] = float(m.scale[at + i]) * outer; break;
  }
  return scratch;
}

// Zero point g of a row of them, as codes are stored.
INLINE float zero_at(const Matrix& m, const uint8_t* row, int64_t g) {
  if (m.spec->zero_point == 2) return float_at(*m.spec, row, g) + offset_of(*m.spec);
  return m.spec->kind == INT8 ? float(int8_t(row[g])) : float(code_at(row, g, m.spec->bits));
}

// What is subtracted from the codes of row r, as they are stored: zero point and the offset of unsigned storage.
INLINE const float* zeros_of(const Matrix& m, int64_t r, float* scratch) {
  int64_t blocks = m.blocks;
  if (!m.zero) {
    for (int64_t i = 0; i < blocks; i++) scratch[i] = offset_of(*m.spec);
    return scratch;
  }
  const uint8_t* row = m.zero + (m.scale_rows == 1 ? 0 : r * m.zero_bytes);
  int64_t done = 0;
  auto packed = [&](auto bits) __attribute__((always_inline)) {
    constexpr int B = decltype(bits)::value;
    for (; done + W <= blocks; done += W) store(scratch + done, to_float(load_codes<B>(row + done * B / 8)));
  };
  if (m.spec->kind == CODES && m.spec->zero_point == 1) {
    if (m.spec->bits == 4) packed(std::integral_constant<int, 4>());
    if (m.spec->bits == 5) packed(std::integral_constant<int, 5>());
    if (m.spec->bits == 6) packed(std::integral_constant<int, 6>());
  }
  for (int64_t i = done; i < blocks; i++) scratch[i] = zero_at(m, row, i);
  return scratch;
}

// --- codes as floats ----------------------------------------------------------------------------------------------

// Each reads W elements from element k of a row (a multiple of 8), or twice as many.
template <class Read, int B> struct Plain {
  static constexpr int bits = B;
  static constexpr bool offset = false;
  INLINE void two(const uint8_t* row, int64_t k, const float* book, F& a, F& b) { a = Read::at(row, k, book), b = Read::at(row, k + W, book); }
};
struct ReadFp32 : Plain<ReadFp32, 32> { INLINE F at(const uint8_t* row, int64_t k, const float*) { return load((const float*)row + k); } };
struct ReadBf16 : Plain<ReadBf16, 16> { INLINE F at(const uint8_t* row, int64_t k, const float*) { return load_bf16(row + 2 * k); } };
struct ReadFp16 : Plain<ReadFp16, 16> { INLINE F at(const uint8_t* row, int64_t k, const float*) { return load_fp16(row + 2 * k); } };
struct ReadE4m3 : Plain<ReadE4m3, 8> {
  INLINE F at(const uint8_t* row, int64_t k, const float*) { return load_e4m3(row + k); }
  INLINE void two(const uint8_t* row, int64_t k, const float*, F& a, F& b) { load_two_e4m3(row + k, a, b); }
};
struct ReadE5m2 : Plain<ReadE5m2, 8> { INLINE F at(const uint8_t* row, int64_t k, const float*) { return load_e5m2(row + k); } };
struct ReadInt8 : Plain<ReadInt8, 8> { INLINE F at(const uint8_t* row, int64_t k, const float*) { return load_i8(row + k); } };
template <int B> struct ReadCodes : Plain<ReadCodes<B>, B> {
  static constexpr bool offset = true;  // stored as unsigned numbers
  INLINE F at(const uint8_t* row, int64_t k, const float*) { return to_float(load_codes<B>(row + k * B / 8)); }
};
struct ReadCodebook : Plain<ReadCodebook, 4> {
  INLINE F at(const uint8_t* row, int64_t k, const float* book) { return look_up(book, load_codes<4>(row + k / 2)); }
};

// Calls f with the reader of the matrix's format.
template <class Function> INLINE void with_reader(const Spec& spec, Function&& f) {
  switch (spec.kind) {
    case FP32: return f(ReadFp32());
    case BF16: return f(ReadBf16());
    case FP16: return f(ReadFp16());
    case E4M3: return f(ReadE4m3());
    case E5M2: return f(ReadE5m2());
    case INT8: return f(ReadInt8());
    case CODEBOOK: return f(ReadCodebook());
    default:
      switch (spec.bits) {
        case 2: return f(ReadCodes<2>());
        case 3: return f(ReadCodes<3>());
        case 4: return f(ReadCodes<4>());
        case 5: return f(ReadCodes<5>());
        default: return f(ReadCodes<6>());
      }
  }
}

// The W elements from k where fewer than W are left in the row: nothing past its end is read.
template <class Read> INLINE F read_tail(const uint8_t* row, int64_t row_bytes, int64_t k, const float* book) {
  uint8_t buffer[W * 4] = {};
  int64_t at = k * Read::bits / 8;
  std::memcpy(buffer, row + at, row_bytes - at);
  return Read::at(buffer, 0, book);
}

INLINE bool needs_zeros(const Spec& spec) { return spec.kind == CODES || spec.zero_point; }

// Whether groups begin where vectors begin; one group a row does.
INLINE bool groups_fit(const Matrix& m) { return m.spec->group % W == 0 || m.spec->group >= m.k; }

// Row r as floats: (code - zero) * scale. `out` has room for k rounded up to W; `scratch` for 2 * blocks.
template <class Read> void row_to_float(const Matrix& m, int64_t r, float* out, float* scratch) {
  const uint8_t* row = m.row(r);
  const float* scale = scales_of(m, r, scratch);
  const float* zeros = needs_zeros(*m.spec) ? zeros_of(m, r, scratch + m.blocks) : nullptr;
  const float* book = m.spec->codebook;
  int64_t whole = m.k / W * W;
  bool direct = groups_fit(m);
  int64_t group = direct && m.blocks > 1 ? m.spec->group : m.k;
  for (int64_t start = 0, g = 0; start < m.k; start += group, g++) {
    int64_t end = start + group < m.k ? start + group : m.k;
    F s = direct ? all(scale[g]) : all(1.0f), z = direct && zeros ? all(zeros[g]) : zero();
    for (int64_t k = start; k < end; k += W) {
      F v = k < whole ? Read::at(row, k, book) : read_tail<Read>(row, m.row_bytes, k, book);
      store(out + k, mul(zeros ? sub(v, z) : v, s));
    }
  }
  if (direct) return;
  for (int64_t k = 0; k < m.k; k++) {
    int64_t g = k / m.spec->group;
    out[k] = (zeros ? out[k] - zeros[g] : out[k]) * scale[g];
  }
}

INLINE void to_dtype(const float* x, int64_t count, int32_t dtype, void* out) {
  if (dtype == X_FP32) std::memcpy(out, x, count * sizeof(float));
  else if (dtype == X_BF16) for (int64_t i = 0; i < count; i++) ((uint16_t*)out)[i] = to_bf16(x[i]);
  else for (int64_t i = 0; i < count; i++) ((uint16_t*)out)[i] = to_fp16(x[i]);
}

INLINE int64_t size_of(int32_t dtype) { return dtype == X_FP32 ? 4 : 2; }
INLINE int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }
INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

// out = x R, of k columns.
INLINE void rotate_row(const float* rotation, const float* x, int64_t k, float* out) {
  int64_t i = 0;
  for (; i + W <= k; i += W) {
    F sum = zero();
    for (int64_t j = 0; j < k; j++) sum = fma(all(x[j]), load(rotation + j * k + i), sum);
    store(out + i, sum);
  }
  for (; i < k; i++) {
    out[i] = 0.0f;
    for (int64_t j = 0; j < k; j++) out[i] += x[j] * rotation[j * k + i];
  }
}

// A row of keys or values as it is stored, but for rounding.
INLINE void into_frame(const Frame& frame, int64_t head, const float* x, int64_t k, float* out) {
  if (frame.rotation) rotate_row(frame.rotation, x, k, out);
  else std::memcpy(out, x, k * sizeof(float));
  if (frame.scale) for (int64_t i = 0; i < k; i++) out[i] /= frame.scale[head % frame.heads * k + i];
}

// Memory of a thread that outlives the call; its contents do not. A slot for each use that may be live with others.
enum Slot { ROWS, TURNED, SCALES, INPUT, SCORES, KEYS, VALUES, SUMS, NORM, PAIRS, ADDED, SLOTS };

template <class T> INLINE T* scratch(Slot slot, int64_t count) {
  static thread_local std::vector<uint64_t> memory[SLOTS];
  size_t words = (count * sizeof(T) + 7) / 8;
  if (memory[slot].size() < words) memory[slot].resize(words);
  return (T*)memory[slot].data();
}

// body(begin, end) for pieces of [0, count), on `threads` threads that take the next piece when done with one.
template <class Body> INLINE void parallel(int64_t count, int64_t piece, int threads, Body&& body) {
  int64_t pieces = (count + piece - 1) / piece;
#ifdef _OPENMP
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1 && pieces > 1)
#endif
  for (int64_t i = 0; i < pieces; i++) body(i * piece, least(count, (i + 1) * piece));
}
