// What an attention has beside queries, keys, values and mask. Shared with binding.cpp.
#pragma once
#include <cstdint>

// How rows of keys or of values are changed before they are stored: rotated, by a symmetric orthogonal matrix [k, k], or divided
// by static scales [heads, k], `heads` of which may be 1. Null: not.
struct Frame {
  const float *rotation, *scale;
  int64_t heads;
};

struct Extras {
  // Tokens that are there as floats [B, key heads, count, columns] beside their stored form: tokens 0 .. firsts - 1, and
  // start .. start + lasts - 1. Null if there are none.
  const float *k_first, *v_first, *k_last, *v_last;
  const float* sinks;  // [heads]: scores without a value, or null
  int64_t firsts, lasts, start;
  float soft_cap;  // 0: none
  Frame keys, values;
};
