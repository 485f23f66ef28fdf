// A kernel that is put on its SMs while the one before it in the stream still runs (sm_90 on, programmatic dependent
// launch): a chain of short kernels then waits for work, not for launches. A launch between two such kernels costs 3 to
// 4 us otherwise.
//
// The contract: every thread of a kernel launched by launch_early calls wait_for_previous() before it reads or writes
// what the kernel before it in the stream touches; what was complete before that one began may be read earlier. What
// that kernel writes is never read by __ldg: the compiler takes such data for constant, and reads it before the wait.
#pragma once

#include <cuda_runtime.h>

namespace dhsa::cuda {

// Until the grid before this one is complete and its writes are seen; at once where there was no early launch.
__device__ inline void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
  cudaGridDependencySynchronize();
#endif
}

// The next grid may take free places on the SMs once every block of this one has come here.
__device__ inline void let_next_begin() {
#if __CUDA_ARCH__ >= 900
  cudaTriggerProgrammaticLaunchCompletion();
#endif
}

template <class... Params>
cudaError_t launch_early(void (*kernel)(Params...), dim3 grid, dim3 block, cudaStream_t stream, Params... params) {
  cudaFuncAttributes about;
  cudaError_t error = cudaFuncGetAttributes(&about, kernel);
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute early = {};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = grid, config.blockDim = block, config.stream = stream;
  // Code compiled for an older architecture has no wait in it, even where it runs on a newer one.
  config.attrs = &early, config.numAttrs = about.ptxVersion >= 90 ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, params...);
}

}  // namespace dhsa::cuda
