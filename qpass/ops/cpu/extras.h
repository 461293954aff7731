// What operators are given beside stored matrices and their input. Shared with binding.cpp.
#pragma once
#include <cstdint>

enum Gate { NO_GATE, SILU, GELU, GELU_TANH };

// What a linear does beside the product: see `linear` in schemas.py. Null, and 0: nothing.
struct Around {
  const void* norm;       // [k] of `norm_dtype`
  const float* columns;   // [k]
  const void* residual;   // like the result
  float eps;
  int32_t normalizes, norm_dtype, gate;
};

// How rows of keys or of values are changed before they are stored: rotated, by a symmetric orthogonal matrix [k, k], or divided
// by static scales [heads, k], `heads` of which may be 1. Null: not.
struct Frame {
  const float *rotation, *scale;
  int64_t heads;
};

// What an attention has beside queries, keys, values and mask.
struct Extras {
  // Tokens that are there as floats [B, key heads, count, columns] beside their stored form: tokens 0 .. firsts - 1, and
  // start .. start + lasts - 1. Null if there are none.
  const float *k_first, *v_first, *k_last, *v_last;
  const float* sinks;  // [heads]: scores without a value, or null
  int64_t firsts, lasts, start;
  float soft_cap;  // 0: none
  Frame keys, values;
};
