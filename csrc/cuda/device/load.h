// Reads of q, k and v: 16 bytes a lane, widened to float32 in registers.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace dhsa::cuda {

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__half x) { return __half2float(x); }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

__device__ inline void from_float(float x, float* y) { *y = x; }
__device__ inline void from_float(float x, __half* y) { *y = __float2half_rn(x); }
__device__ inline void from_float(float x, __nv_bfloat16* y) { *y = __float2bfloat16_rn(x); }

// Elements of T in 16 bytes: 4 or 8.
template <class T>
constexpr int kVec = 16 / static_cast<int>(sizeof(T));

__device__ inline void widen(uint4 raw, float (&x)[4]) {
  x[0] = __uint_as_float(raw.x), x[1] = __uint_as_float(raw.y);
  x[2] = __uint_as_float(raw.z), x[3] = __uint_as_float(raw.w);
}

template <class T>
__device__ inline void widen_pair(uint32_t raw, float* x);

template <>
__device__ inline void widen_pair<__half>(uint32_t raw, float* x) {
  __half2 pair;
  memcpy(&pair, &raw, 4);
  const float2 wide = __half22float2(pair);
  x[0] = wide.x, x[1] = wide.y;
}

// A bfloat16 is the upper half of a float32: two integer operations a pair.
template <>
__device__ inline void widen_pair<__nv_bfloat16>(uint32_t raw, float* x) {
  x[0] = __uint_as_float(raw << 16), x[1] = __uint_as_float(raw & 0xffff0000u);
}

template <class T>
__device__ inline void widen(uint4 raw, float (&x)[kVec<T>]) {
  if constexpr (sizeof(T) == 4) {
    widen(raw, x);
  } else {
    widen_pair<T>(raw.x, x), widen_pair<T>(raw.y, x + 2);
    widen_pair<T>(raw.z, x + 4), widen_pair<T>(raw.w, x + 6);
  }
}

// 16 bytes that this launch does not write.
template <class T>
__device__ inline uint4 load16(const T* p) {
  return __ldg(reinterpret_cast<const uint4*>(p));
}

// Four neighbouring elements.
template <class T>
__device__ inline float4 load4(const T* p) {
  if constexpr (sizeof(T) == 4) {
    return __ldg(reinterpret_cast<const float4*>(p));
  } else {
    const uint2 raw = __ldg(reinterpret_cast<const uint2*>(p));
    float x[4];
    widen_pair<T>(raw.x, x), widen_pair<T>(raw.y, x + 2);
    return make_float4(x[0], x[1], x[2], x[3]);
  }
}

}  // namespace dhsa::cuda
