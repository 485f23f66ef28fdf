// The total order of scores as unsigned integers: a larger key is a better score. NaN counts as -inf, -0 equals +0.
#pragma once

#include <cstdint>

namespace dhsa::cuda {

__device__ inline uint32_t order_key(float score) {
  const uint32_t bits = __float_as_uint(isnan(score) ? -INFINITY : score + 0.0f);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

constexpr uint32_t kZeroKey = 0x80000000u;

// The score of a key; +0 for both zeros.
__device__ inline float score_of(uint32_t key) { return __uint_as_float(key & 0x80000000u ? key ^ 0x80000000u : ~key); }

// No score has this key: nothing is better than "none".
constexpr uint32_t kNoKey = 0xffffffffu;

}  // namespace dhsa::cuda
