// Tensor maps on the device (TMA, sm_90): boxes of a tensor copied to shared memory by one instruction.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace dhsa::cuda {

// Starts the copy of the box at (column, row, head, batch) of a 4-D map; its bytes count on the barrier as they land.
__device__ inline void load_box(uint32_t smem, const CUtensorMap* map, uint32_t barrier, int32_t column, int32_t row,
                                int32_t head, int32_t batch) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], "
      "[%2];" ::"r"(smem),
      "l"(map), "r"(barrier), "r"(column), "r"(row), "r"(head), "r"(batch)
      : "memory");
}

}  // namespace dhsa::cuda
