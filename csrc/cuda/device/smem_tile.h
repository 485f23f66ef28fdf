// A tile of rows x kHeadDim 16-bit elements in shared memory: panels of 64 columns (128 bytes), each panel rows x 128 B
// with the 16-byte chunks of a row permuted by its number, chunk ^ (row % 8). It is wgmma's 128-byte swizzle (a panel
// starts at a multiple of 1024 bytes), and ldmatrix reads it without bank conflicts. head_dim 96 uses half of its
// second panel.
#pragma once

#include <cstdint>

namespace dhsa::cuda {

template <int kRows, int kHeadDim>
struct SmemTile {
  static constexpr int kPanels = (kHeadDim + 63) / 64;
  static constexpr int kPanelBytes = kRows * 128;
  static constexpr int kBytes = kPanels * kPanelBytes;
  static_assert(kPanelBytes % 1024 == 0, "panels must keep the swizzle's alignment");

  // Byte offset of 16-byte chunk `chunk` (8 columns) of a row.
  static __device__ uint32_t offset(int32_t row, int32_t chunk) {
    return (chunk / 8) * kPanelBytes + row * 128 + (((chunk ^ row) & 7) << 4);
  }

  // The address `rows` rows and `chunks` chunks on from `start`, that of a chunk of a tile: one XOR where both are
  // known at compile time. `chunks` is even and start's chunk the first or second of its panel's, `rows` a multiple
  // of 8.
  static __device__ uint32_t step(uint32_t start, int32_t rows, int32_t chunks) {
    return (start ^ (chunks % 8 << 4)) + (chunks / 8 * kPanelBytes + rows * 128);
  }
};

}  // namespace dhsa::cuda
