// cp.async: 16-byte copies from global to shared memory that no register passes through.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace dhsa::cuda {

__device__ inline uint32_t smem_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Writes zeros, and reads nothing, when `valid` is false.
__device__ inline void cp_async_16(uint32_t smem, const void* global, bool valid) {
  const int32_t bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(smem), "l"(global), "r"(bytes)
               : "memory");
}

__device__ inline void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Until at most kPending of this thread's groups are under way.
template <int kPending>
__device__ inline void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

}  // namespace dhsa::cuda
