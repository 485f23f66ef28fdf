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

// base + key * row_bytes in two multiply-adds. Of the same in C++ the compiler makes four instructions: it counts in
// elements first and puts factor and base in afterwards.
__device__ inline const uint8_t* row_address(const uint8_t* base, uint32_t key, uint64_t row_bytes) {
  const uint8_t* row;
  asm("mad.lo.u64 %0, %1, %2, %3;" : "=l"(row) : "l"(uint64_t(key)), "l"(row_bytes), "l"(base));
  return row;
}

// Copies the rows of K and V that `keys`, a list in shared memory, names, into a tile of K and one of V behind it, by
// kWarps warps: a group of lanes takes 2 kPairs consecutive rows, two with each copy_pair(), so that other work can
// stand between. kAbsentKey writes zeros: 0 x what was there might be NaN.
template <class T, int kHeadDim, int kBlockN, int kWarps>
class KeyGather {
 public:
  using Shape = GatherShape<kHeadDim, kWarps>;
  static constexpr int kPairs = kBlockN / Shape::kRowsPerStep / 2;

  __device__ KeyGather(uint32_t smem, const T* k, const T* v, int64_t k_row_stride, int64_t v_row_stride,
                       const int32_t* keys, int32_t warp, int32_t lane)
      : first_chunk_(lane % Shape::kLanesPerRow),
        first_row_((warp * Shape::kRowsPerWarp + lane / Shape::kLanesPerRow) * 2 * kPairs),
        smem_(smem),
        keys_(keys + first_row_),
        k_(reinterpret_cast<const uint8_t*>(k) + first_chunk_ * 16),
        v_(reinterpret_cast<const uint8_t*>(v) + first_chunk_ * 16),
        k_row_bytes_(k_row_stride * sizeof(T)),
        v_row_bytes_(v_row_stride * sizeof(T)) {
    static_assert(kPairs >= 1 && 4 % kPairs == 0, "a group's rows must differ in the low bits only, which swizzle");
  }

  // Rows 2 pair and 2 pair + 1 of the lane's group.
  __device__ void copy_pair(int32_t pair) const {
    const int2 keys = *reinterpret_cast<const int2*>(keys_ + 2 * pair);
    copy_row(2 * pair, keys.x);
    copy_row(2 * pair + 1, keys.y);
  }

 private:
  using Tile = SmemTile<kBlockN, kHeadDim>;

  __device__ void copy_row(int32_t i, int32_t key) const {
    const bool valid = key != kAbsentKey;
    const uint8_t* const k_row = row_address(k_, valid ? key : 0, k_row_bytes_);
    const uint8_t* const v_row = row_address(v_, valid ? key : 0, v_row_bytes_);
#pragma unroll
    for (int32_t j = 0; j < Shape::kChunksPerLane; ++j) {
      const uint32_t chunk = smem_ + Tile::offset(first_row_, first_chunk_ + j * Shape::kLanesPerRow);
      const uint32_t to = (chunk ^ (i << 4)) + i * 128;
      cp_async_16(to, k_row + j * Shape::kLanesPerRow * 16, valid);
      cp_async_16(to + Tile::kBytes, v_row + j * Shape::kLanesPerRow * 16, valid);
    }
  }

  int32_t first_chunk_, first_row_;
  uint32_t smem_;
  const int32_t* keys_;
  const uint8_t *k_, *v_;
  uint64_t k_row_bytes_, v_row_bytes_;
};

// Listed rows of `base` into one tile, by one warp: a group of lanes takes consecutive rows, four keys a load.
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
