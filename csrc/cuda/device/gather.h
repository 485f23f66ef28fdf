// Copies rows of K, V or Q into a shared-memory tile with cp.async: the lanes of a warp cover whole 128-byte lines.
#pragma once

#include "cuda/device/attention_work.h"
#include "cuda/device/cp_async.h"
#include "cuda/device/run_walker.h"
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

// Rows key[..] (RunWalker::keys_at) of `base` into the tile; kAbsentKey writes zeros: 0 x what was there might be NaN.
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
    const bool valid = row_key != kAbsentKey;
    const T* source = base + (valid ? row_key * row_stride : 0);
#pragma unroll
    for (int32_t j = 0; j < Shape::kChunksPerLane; ++j) {
      const int32_t chunk = first_chunk + j * Shape::kLanesPerRow;
      cp_async_16(smem + SmemTile<kBlockN, kHeadDim>::offset(row, chunk), source + chunk * 8, valid);
    }
  }
}

// The same by one warp, for keys listed in shared memory: a group of lanes takes consecutive rows, four keys a load.
// kWhole: none is kAbsentKey.
template <class T, int kHeadDim, int kBlockN, bool kWhole>
__device__ inline void copy_listed_rows(uint32_t smem, const T* base, int64_t row_stride, const int32_t* keys,
                                        int32_t lane) {
  using Shape = GatherShape<kHeadDim, 1>;
  constexpr int kRows = kBlockN / Shape::kRowsPerWarp;  // consecutive rows of a lane group
  static_assert(kRows % 8 == 0, "a group's rows must begin at a multiple of the swizzle's 8");
  const int32_t first_row = lane / Shape::kLanesPerRow * kRows, first_chunk = lane % Shape::kLanesPerRow;
#pragma unroll 2
  for (int32_t i = 0; i < kRows; i += 4) {
    const int4 four = *reinterpret_cast<const int4*>(keys + first_row + i);
    const int32_t key[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
    for (int32_t r = 0; r < 4; ++r) {
      const bool valid = kWhole || key[r] != kAbsentKey;
      const T* source = base + (valid ? key[r] * row_stride : 0) + first_chunk * 8;
#pragma unroll
      for (int32_t j = 0; j < Shape::kChunksPerLane; ++j) {
        const int32_t chunk = first_chunk + j * Shape::kLanesPerRow;
        cp_async_16(smem + SmemTile<kBlockN, kHeadDim>::offset(first_row + i + r, chunk),
                    source + j * Shape::kLanesPerRow * 8, valid);
      }
    }
  }
}

// Packed query rows [first_row, first_row + kRows) of a work item's tile; rows past its end become zeros.
template <class T, int kHeadDim, int kBlockM, int kRows, int kWarps>
__device__ inline void gather_queries(uint32_t smem, const AttentionParams& p, const WorkItem& item, int32_t first_row,
                                      int32_t warp, int32_t lane) {
  using Shape = GatherShape<kHeadDim, kWarps>;
  const T* base = static_cast<const T*>(p.q) + item.batch * p.q_stride.batch +
                  int64_t(item.group) * p.group * p.q_stride.head + int64_t(item.block) * p.q_block * p.q_stride.row;
  const int32_t first_chunk = lane % Shape::kLanesPerRow;
  int32_t row = first_row + warp * Shape::kRowsPerWarp + lane / Shape::kLanesPerRow;
  int32_t token = (item.first_row + row) / p.group, head = (item.first_row + row) % p.group;
  const int32_t token_step = Shape::kRowsPerStep / p.group, head_step = Shape::kRowsPerStep % p.group;
#pragma unroll 4
  for (int32_t i = 0; i < kRows / Shape::kRowsPerStep; ++i) {
    const bool valid = row < item.num_rows;
    const T* source = base + (valid ? head * p.q_stride.head + token * p.q_stride.row : 0) + first_chunk * 8;
#pragma unroll
    for (int32_t j = 0; j < Shape::kChunksPerLane; ++j) {
      const int32_t chunk = first_chunk + j * Shape::kLanesPerRow;
      cp_async_16(smem + SmemTile<kBlockM, kHeadDim>::offset(row, chunk), source + j * Shape::kLanesPerRow * 8, valid);
    }
    row += Shape::kRowsPerStep, token += token_step, head += head_step;
    if (head >= p.group) head -= p.group, ++token;
  }
}

}  // namespace dhsa::cuda
