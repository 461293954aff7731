// What an attention has beside queries, keys, values and mask. Shared with binding.cpp.
#pragma once
#include <cstdint>

struct Extras {
  // Tokens that are there as floats [B, key heads, count, columns] beside their stored form: tokens 0 .. firsts - 1, and
  // start .. start + lasts - 1. Null if there are none.
  const float *k_first, *v_first, *k_last, *v_last;
  const float* sinks;  // [heads]: scores without a value, or null
  int64_t firsts, lasts, start;
  float soft_cap;  // 0: none
};
