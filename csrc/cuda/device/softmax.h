// Online softmax over tiles of logits held as accumulators (mma.h's layout, which wgmma shares): s[4 j + c] is column
// block j; c = 0, 1 belong to this lane's first row, 2, 3 to its second. Four lanes, a quad, share a row.
//
// Exponents are base 2: p = 2^(factor * s - factor * row_max) with factor = scale * log2(e), one FFMA and one EX2 each.
// row_max starts finite, so that a row with no key yet gives 2^(-inf) = 0 and never inf - inf. It follows the true
// maximum lazily: while a tile's P sum to no more than kMostTileSum in each lane, the old one still scales P, O and
// row_sum alike and O needs no pass of products; the answer and lse do not depend on which value was used.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/device/mma.h"

namespace dhsa::cuda {

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;
constexpr float kNoMax = -1e30f;
constexpr float kMostTileSum = 4096.0f;  // so P stays below 2^12, far from float16's 65504

__device__ inline float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ inline float reciprocal_fast(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// How products become logits: base-2 logits are `factor` times what transform() leaves in s. kPlain: known at compile
// time that there is no softcap and that scale is positive, so that transform() has nothing to do.
__host__ __device__ inline bool plain_logits(float scale, float softcap) { return softcap <= 0.0f && scale > 0.0f; }

template <bool kPlain>
struct LogitRule {
  float scale, softcap, factor;

  __device__ LogitRule(float softmax_scale, float softmax_cap)
      : scale(softmax_scale), softcap(softmax_cap), factor(direct() ? softmax_scale * kLog2E : kLog2E) {}
  __device__ bool direct() const { return kPlain || plain_logits(scale, softcap); }

  // tanh(x) = 1 - 2 / (1 + e^2x), within 1e-6 absolute; tanh.approx (5e-4) would move logits by 0.02 at a cap of 50.
  template <int kCount>
  __device__ void transform(float (&s)[kCount]) const {
    if (direct()) return;
    if (softcap <= 0.0f) {
#pragma unroll
      for (int32_t i = 0; i < kCount; ++i) s[i] *= scale;
    } else {
      const float inner = 2.0f * kLog2E * scale / softcap;
#pragma unroll
      for (int32_t i = 0; i < kCount; ++i) {
        const float e = exp2_fast(s[i] * inner);
        s[i] = fmaf(-2.0f * softcap, reciprocal_fast(1.0f + e), softcap);
      }
    }
  }
};

// Sets to -inf the logits of keys that the lane's two rows, at position[0] and [1], must not see. `keys` is the tile's
// list of original key indices in shared memory; kAbsentKey lies behind every position.
template <int kCount>
__device__ inline void mask_tile(float (&s)[kCount], const int32_t* keys, const int32_t (&position)[2], int32_t window,
                                 int32_t lane) {
  // A key is seen at distances 0 to reach - 1; as unsigned, the distance of a later key is 2^31 or more.
  const uint32_t reach = window > 0 ? window : 0x80000000u;
#pragma unroll
  for (int32_t j = 0; j < kCount / 4; ++j) {
    const int2 key = *reinterpret_cast<const int2*>(keys + 8 * j + 2 * (lane % 4));
#pragma unroll
    for (int32_t r = 0; r < 2; ++r) {
      if (uint32_t(position[r] - key.x) >= reach) s[4 * j + 2 * r] = -INFINITY;
      if (uint32_t(position[r] - key.y) >= reach) s[4 * j + 2 * r + 1] = -INFINITY;
    }
  }
}

// Running maximum and sum of the lane's two rows. The sum is the lane's own share until total().
struct OnlineSoftmax {
  float row_max[2] = {kNoMax, kNoMax};
  float row_sum[2] = {0.0f, 0.0f};

  // Takes in a tile of logits: prob becomes P, rounded to T, laid out as the A operand of P V. True: O must be
  // multiplied by `rescale` before P V is added to it; the answer is the same for the whole warp.
  //
  // Exponentials start at once, from the old maximum; only where a lane's sum of them shows that it has been outgrown
  // (in the first tile, then rarely) are the maxima found and the exponentials taken again. A tile's 32 comparisons and
  // 4 shuffles are saved, and their latency: 534 -> 560 TFLOP/s at head_dim 128.
  template <class T, int kCount>
  __device__ bool update(uint32_t (&prob)[kCount / 8][4], const float (&s)[kCount], float factor, float (&rescale)[2]) {
    float sum[2];
    exponentials<T>(prob, s, factor, sum);
    const bool outgrown = !(sum[0] <= kMostTileSum && sum[1] <= kMostTileSum);  // NaN too
    const bool grew = __any_sync(0xffffffffu, outgrown);
    if (grew) {
      raise_max(s, factor, rescale);
      exponentials<T>(prob, s, factor, sum);
    }
    row_sum[0] += sum[0];
    row_sum[1] += sum[1];
    return grew;
  }

  // The whole row's sum, in all four lanes.
  __device__ void total() {
#pragma unroll
    for (int32_t r = 0; r < 2; ++r) {
      row_sum[r] += __shfl_xor_sync(0xffffffffu, row_sum[r], 1);
      row_sum[r] += __shfl_xor_sync(0xffffffffu, row_sum[r], 2);
    }
  }

  // Natural log of the sum of exponentials; -inf for a row with no key.
  __device__ float lse(int32_t r, float factor) const {
    return row_sum[r] > 0.0f ? kLn2 * (row_max[r] * factor + __log2f(row_sum[r])) : -INFINITY;
  }
  __device__ float inverse_sum(int32_t r) const { return row_sum[r] > 0.0f ? 1.0f / row_sum[r] : 0.0f; }

 private:
  template <class T, int kCount>
  __device__ void exponentials(uint32_t (&prob)[kCount / 8][4], const float (&s)[kCount], float factor,
                               float (&sum)[2]) const {
    const float offset[2] = {row_max[0] * factor, row_max[1] * factor};
    sum[0] = sum[1] = 0.0f;
#pragma unroll
    for (int32_t j = 0; j < kCount / 4; ++j) {
      float p[4];
#pragma unroll
      for (int32_t c = 0; c < 4; ++c) p[c] = exp2_fast(fmaf(s[4 * j + c], factor, -offset[c / 2]));
      sum[0] += p[0] + p[1];
      sum[1] += p[2] + p[3];
      prob[j / 2][j % 2 * 2] = pack<T>(p[0], p[1]);
      prob[j / 2][j % 2 * 2 + 1] = pack<T>(p[2], p[3]);
    }
  }

  // row_max takes in the tile's logits, of the whole row; row_sum and `rescale` follow.
  template <int kCount>
  __device__ void raise_max(const float (&s)[kCount], float factor, float (&rescale)[2]) {
#pragma unroll
    for (int32_t r = 0; r < 2; ++r) {
      float new_max = row_max[r];
#pragma unroll
      for (int32_t j = 0; j < kCount / 4; ++j) new_max = fmaxf(new_max, fmaxf(s[4 * j + 2 * r], s[4 * j + 2 * r + 1]));
      new_max = fmaxf(new_max, __shfl_xor_sync(0xffffffffu, new_max, 1));
      new_max = fmaxf(new_max, __shfl_xor_sync(0xffffffffu, new_max, 2));
      rescale[r] = exp2_fast((row_max[r] - new_max) * factor);
      row_sum[r] *= rescale[r];
      row_max[r] = new_max;
    }
  }
};

template <int kCount>
__device__ inline void scale_rows(float (&o)[kCount], const float (&by)[2]) {
#pragma unroll
  for (int32_t j = 0; j < kCount / 4; ++j) {
#pragma unroll
    for (int32_t c = 0; c < 4; ++c) o[4 * j + c] *= by[c / 2];
  }
}

}  // namespace dhsa::cuda
