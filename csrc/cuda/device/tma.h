// Copies to shared memory by one instruction (TMA, sm_90): boxes of a tensor by its map, or consecutive bytes. What has
// landed counts on a barrier.
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

// Starts the copy of `bytes`; they and both addresses are multiples of 16.
__device__ inline void bulk_copy(uint32_t smem, const void* global, uint32_t bytes, uint32_t barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(smem),
               "l"(global), "r"(bytes), "r"(barrier)
               : "memory");
}

}  // namespace dhsa::cuda
