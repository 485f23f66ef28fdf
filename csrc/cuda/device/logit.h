// Products as logits in log2 units, for the router's estimates: one fast exponential each.
#pragma once

#include <cuda_runtime.h>

namespace dhsa::cuda {

constexpr float kLog2OfE = 1.44269504088896341f;

__device__ inline float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// The lesser, or NaN where one of them is.
__device__ inline float min_or_nan(float a, float b) {
  float c;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(c) : "f"(a), "f"(b));
  return c;
}

// softcap * tanh(s / softcap) = softcap * (1 - 2 / (1 + exp(2 s / softcap))), to softcap * 2e-7 absolute: what counts
// for a logit. 0: no cap.
__device__ inline float softcapped2(float s, float softcap) {
  return softcap * kLog2OfE * (1.0f - __fdividef(2.0f, 1.0f + exp2_approx(2.0f * kLog2OfE / softcap * s)));
}

__device__ inline float logit2(float product, float scale, float softcap) {
  const float s = product * scale;
  return softcap > 0 ? softcapped2(s, softcap) : s * kLog2OfE;
}

}  // namespace dhsa::cuda
