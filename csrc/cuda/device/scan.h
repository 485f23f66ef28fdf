// Prefix sums of a warp and of a block. Every thread of the block calls the block functions; the scratch is free again
// after the next __syncthreads().
#pragma once

namespace dhsa::cuda {

constexpr unsigned kFullWarp = 0xffffffffu;

__device__ inline int lane_id() { return threadIdx.x & 31; }
__device__ inline int warp_id() { return threadIdx.x >> 5; }

__device__ inline int warp_inclusive_sum(int x) {
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const int below = __shfl_up_sync(kFullWarp, x, step);
    if (lane_id() >= step) x += below;
  }
  return x;
}

__device__ inline float warp_sum(float x) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(kFullWarp, x, step);
  return x;
}

template <int kThreads>
struct BlockScan {
  static constexpr int kWarps = kThreads / 32;
  static_assert(kWarps <= 32, "one warp sums the warps");
  int warp_total[kWarps];

  // The sum of x over lower threads; total: over all. Starts and ends with a barrier's worth of ordering: callers may
  // reuse the scratch for the next scan at once.
  __device__ int exclusive_sum(int x, int* total) {
    const int inclusive = warp_inclusive_sum(x);
    __syncthreads();
    if (lane_id() == 31) warp_total[warp_id()] = inclusive;
    __syncthreads();
    const int mine = lane_id() < kWarps ? warp_total[lane_id()] : 0;
    const int warps = warp_inclusive_sum(mine);
    *total = __shfl_sync(kFullWarp, warps, 31);
    const int before = __shfl_sync(kFullWarp, warps - mine, warp_id());
    return before + inclusive - x;
  }
};

}  // namespace dhsa::cuda
