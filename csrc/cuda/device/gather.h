// Copies rows of K, V or Q into a shared-memory tile with cp.async: the lanes of a warp cover whole 128-byte lines.
#pragma once

#include "cuda/device/attention_work.h"
#include "cuda/device/cp_async.h"
#include "cuda/device/smem_tile.h"

namespace dhsa::cuda {

template <int kHeadDim, int kWarps>
struct GatherShape {
  static constexpr int kLanesPerRow = kHeadDim % 128 == 0 ? 16 : kHeadDim == 96 ? 4 : 8;
  static constexpr int kChunksPerLane = kHeadDim / 8 / kLanesPerRow;
  static constexpr int kRowsPerWarp = 32 / kLanesPerRow;
  static constexpr int kRowsPerStep = kRowsPerWarp * kWarps;
  static_assert(32 % kRowsPerStep == 0 && kLanesPerRow * kChunksPerLane * 8 == kHeadDim, "whole rows, whole slots");
};

// Rows key[..] (RunWalker::keys_at) of `base` into the tile; a key of -1 writes zeros: 0 x what was there might be NaN.
template <class T, int kHeadDim, int kBlockN, int kWarps>
__device__ inline void gather_keys(uint32_t smem, const T* base, int64_t row_stride,
                                   const int32_t (&key)[(kBlockN + 31) / 32], int32_t warp, int32_t lane) {
  using Shape = GatherShape<kHeadDim, kWarps>;
  const int32_t row_in_step = warp * Shape::kRowsPerWarp + lane / Shape::kLanesPerRow;
  const int32_t first_chunk = lane % Shape::kLanesPerRow;
#pragma unroll
  for (int32_t i = 0; i < kBlockN / Shape::kRowsPerStep; ++i) {
    const int32_t row = i * Shape::kRowsPerStep + row_in_step;
    const int32_t row_key = __shfl_sync(0xffffffffu, key[i * Shape::kRowsPerStep / 32], row % 32);
    const T* source = base + int64_t(max(row_key, 0)) * row_stride;
#pragma unroll
    for (int32_t j = 0; j < Shape::kChunksPerLane; ++j) {
      const int32_t chunk = first_chunk + j * Shape::kLanesPerRow;
      cp_async_16(smem + SmemTile<kBlockN, kHeadDim>::offset(row, chunk), source + chunk * 8, row_key >= 0);
    }
  }
}

// The packed query rows of a work item; rows past its end become zeros.
template <class T, int kHeadDim, int kBlockM, int kWarps>
__device__ inline void gather_queries(uint32_t smem, const AttentionParams& p, const WorkItem& item, int32_t warp,
                                      int32_t lane) {
  using Shape = GatherShape<kHeadDim, kWarps>;
  const T* base = static_cast<const T*>(p.q) + item.batch * p.q_stride.batch;
  const int32_t first_chunk = lane % Shape::kLanesPerRow;
#pragma unroll 4
  for (int32_t row = warp * Shape::kRowsPerWarp + lane / Shape::kLanesPerRow; row < kBlockM;
       row += Shape::kRowsPerStep) {
    const bool valid = row < item.num_rows;
    const RowPlace place = row_place(p, item, valid ? row : 0);
    const T* source = base + place.head * p.q_stride.head + place.token * p.q_stride.row;
#pragma unroll
    for (int32_t j = 0; j < Shape::kChunksPerLane; ++j) {
      const int32_t chunk = first_chunk + j * Shape::kLanesPerRow;
      cp_async_16(smem + SmemTile<kBlockM, kHeadDim>::offset(row, chunk), source + chunk * 8, valid);
    }
  }
}

}  // namespace dhsa::cuda
