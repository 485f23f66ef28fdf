#include "cuda/sm80/attention.h"
#include "cuda/sm80/attention_kernel.h"

namespace dhsa::cuda::sm80 {

template <>
cudaError_t attention<__nv_bfloat16, 256>(AttentionParams& p, int row_tiles, cudaStream_t stream) {
  return row_tiles == 1 ? launch<__nv_bfloat16, 256, 1>(p, stream) : cudaErrorInvalidValue;
}

}  // namespace dhsa::cuda::sm80
