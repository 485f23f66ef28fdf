// Sums of rows of x over tokens and a group of heads, kCols channels at a time: the inner loop of both poolings.
#pragma once

#include <cstdint>

#include "cuda/device/load.h"
#include "cuda/device/scan.h"

namespace dhsa::cuda {

// kCols = 64 channels (32 where head_dim is no multiple of 64) are one piece: 128 bytes of bfloat16, so that pieces of
// one block run in different thread blocks and short calls still fill the GPU.
template <class T, int kCols>
struct RowSum {
  static constexpr int kLanes = kCols / kVec<T>;  // lanes that share one row
  static constexpr int kRows = 32 / kLanes;       // rows a warp reads at once
  static constexpr int kBatch = 8;                // loads in flight a lane
  float sum[kVec<T>] = {};

  // x: [tokens, heads, kCols] at the piece's first channel. Row r is head r % heads of token r / heads; this warp
  // takes kRows rows from `first` on, every `step` rows.
  __device__ void add(const T* x, int64_t stride_token, int64_t stride_head, int tokens, int heads, int first,
                      int step) {
    const int row = first + lane_id() / kLanes;
    x += lane_id() % kLanes * kVec<T>;
    int token = row / heads, head = row % heads;
    const int step_tokens = step / heads, step_heads = step % heads;
    while (token < tokens) {
      uint4 raw[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        raw[i] = token < tokens ? load16(x + token * stride_token + head * stride_head) : make_uint4(0, 0, 0, 0);
        token += step_tokens, head += step_heads;
        if (head >= heads) head -= heads, ++token;
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        float wide[kVec<T>];
        widen<T>(raw[i], wide);
#pragma unroll
        for (int j = 0; j < kVec<T>; ++j) sum[j] += wide[j];
      }
    }
  }

  // Adds up the rows a warp read at once; then lanes [0, kLanes) hold the kCols channels.
  __device__ void fold_lanes() {
#pragma unroll
    for (int step = kLanes; step < 32; step *= 2) {
#pragma unroll
      for (int j = 0; j < kVec<T>; ++j) sum[j] += __shfl_xor_sync(kFullWarp, sum[j], step);
    }
  }

  // Lanes [0, kLanes) write their channels, times `factor`.
  __device__ void store(float* pooled, float factor) const {
    if (lane_id() >= kLanes) return;
#pragma unroll
    for (int j = 0; j < kVec<T>; j += 4) {
      *reinterpret_cast<float4*>(pooled + lane_id() * kVec<T> + j) =
          make_float4(sum[j] * factor, sum[j + 1] * factor, sum[j + 2] * factor, sum[j + 3] * factor);
    }
  }
};

}  // namespace dhsa::cuda
