// The CPU kernels of torch.ops.qpass, behind a C interface. Compiled at first use for the instruction set of the machine.
#include <atomic>

#include "attention.h"
#include "quantize.h"

// The arguments of a matrix: stored parts, n, k and how many rows the scales and the outer scales have.
#define MATRIX(p) const Spec *p##spec, const uint8_t *p##data, const uint8_t *p##scale, const uint8_t *p##zero, const float *p##outer, int64_t p##n, int64_t p##k, int64_t p##scale_rows, int64_t p##outer_rows
#define AS_MATRIX(p) Matrix{p##spec, p##data, p##scale, p##zero, p##outer, p##n, p##k, p##scale_rows, p##outer_rows}

extern "C" {

int64_t qpass_spec_bytes() { return sizeof(Spec); }

// x [count, k] -> y [count, n], or [count, n / 2] with a gate, both of `dtype`.
void qpass_linear(MATRIX(w_), const void* x, const void* bias, void* y, int64_t count, int32_t dtype, int32_t bias_dtype, int32_t int8,
                  const Around* around, int32_t threads) {
  Matrix w = AS_MATRIX(w_);
  Input input(x, w.k, dtype, *around);
  Output out{y, bias, around->residual, dtype, bias_dtype, around->gate, around->gate ? w.n / 2 : w.n};
  if (int8) linear_int8(w, input, count, out, threads);
  else linear_float(w, input, count, out, threads);
}
int64_t qpass_around_bytes() { return sizeof(Around); }

// Rows `first`, first + 1, .. of a matrix, or those that `indices` names, as y [count, k] of `dtype`. Gives the position of an
// index that names no row, or -1.
int64_t qpass_rows(MATRIX(w_), const int64_t* indices, int64_t first, int64_t count, void* y, int32_t dtype, int32_t threads) {
  Matrix w = AS_MATRIX(w_);
  for (int64_t i = 0; indices && i < count; i++)
    if (indices[i] < 0 || indices[i] >= w.n) return i;
  if (w.k * count < 1 << 15) threads = 1;
  parallel(count, most(1, (1 << 14) / most(1, w.k)), threads, [&](int64_t begin, int64_t end) {
    float* row = scratch<float>(ROWS, round_up(w.k, W));
    float* scales = scratch<float>(SCALES, 2 * w.blocks);
    with_reader(*w.spec, [&](auto read) {
      for (int64_t i = begin; i < end; i++) {
        row_to_float<decltype(read)>(w, indices ? indices[i] : first + i, row, scales);
        to_dtype(row, w.k, dtype, (char*)y + i * w.k * size_of(dtype));
      }
    });
  });
  return -1;
}

// x [n, k] of `dtype` -> the stored parts, which are written. `tokens`: rows of a head, where groups of them share scales or heads
// have static ones. Gives whether a number, or a scale, is not finite, if there are scales.
int64_t qpass_quantize(MATRIX(w_), const void* x, int64_t tokens, int32_t dtype, const Frame* frame, int32_t threads) {
  Matrix w = AS_MATRIX(w_);
  auto rows_of = [&](int64_t first, int64_t count) {
    float* rows = scratch<float>(ROWS, count * w.k);
    from_dtype((const char*)x + first * w.k * size_of(dtype), count * w.k, dtype, rows);
    if (!frame->rotation && !frame->scale) return rows;
    float* turned = scratch<float>(TURNED, count * w.k);
    for (int64_t i = 0; i < count; i++) into_frame(*frame, (first + i) / tokens, rows + i * w.k, w.k, turned + i * w.k);
    return turned;
  };
  if (w.k * w.n < 1 << 15) threads = 1;
  std::atomic<int64_t> trouble{0};
  auto is_fine = [&](const float* rows, int64_t count) { return w.spec->scale == NO_SCALE || is_finite(rows, count * w.k); };
  if (w.spec->tokens) {
    parallel(w.n / tokens * w.scale_rows, 1, threads, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) {
        int64_t head = i / w.scale_rows, first = i % w.scale_rows * w.spec->tokens, count = least(w.spec->tokens, tokens - first);
        const float* rows = rows_of(head * tokens + first, count);
        if (!is_fine(rows, count) || !quantize_tokens(w, rows, head * tokens + first, count, i)) trouble = 1;
      }
    });
    return trouble;
  }
  parallel(w.n, most(1, (1 << 14) / most(1, w.k)), threads, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; r++) {
      const float* row = rows_of(r, 1);
      if (!is_fine(row, 1) || !quantize_row(w, row, r)) trouble = 1;
    }
  });
  return trouble;
}

// A weight x [n, k] of `dtype` -> the stored parts, which are written as far as `work` says. `columns`: [k], by which it is divided
// first, or none. `power` [n, 2]: of each row sum x^2 and sum (x - x')^2. Gives what is wrong: bits of Trouble.
int64_t qpass_quantize_weight(MATRIX(w_), const void* x, int32_t dtype, const float* columns, int32_t work, double* power,
                              int32_t threads) {
  Matrix w = AS_MATRIX(w_);
  std::atomic<int64_t> trouble{0};
  with_reader(*w.spec, [&](auto reader) {
    parallel(w.n, most(1, (1 << 16) / most(1, w.k)), threads, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; r++) {
        const float* row = (const float*)x + r * w.k;
        if (dtype != X_FP32) {
          float* converted = scratch<float>(ROWS, w.k);
          from_dtype((const char*)x + r * w.k * size_of(dtype), w.k, dtype, converted);
          row = converted;
        }
        trouble |= quantize_weight_row<decltype(reader)>(w, row, columns, r, Work(work), power + 2 * r);
      }
    });
  });
  return trouble;
}

// q [batch, heads, queries, k_k] float32; `sizes`: batch, heads, key heads, queries, tokens, capacities of keys and values,
// strides of the mask.
void qpass_attention(MATRIX(k_), MATRIX(v_), const float* q, const void* mask, const int64_t* sizes, int32_t mask_type, int32_t causal,
                     float scale, void* out, int32_t dtype, const Extras* more, int32_t threads) {
  Attention a{q, Cache{AS_MATRIX(k_), sizes[5]}, Cache{AS_MATRIX(v_), sizes[6]}, mask, {sizes[7], sizes[8], sizes[9], sizes[10]},
              mask_type, causal, sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], k_k, v_k, scale, out, dtype, *more};
  attention(a, threads);
}
}
