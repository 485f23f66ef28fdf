#include "cuda/sm80/attention.h"
#include "cuda/sm80/attention_kernel.h"

namespace dhsa::cuda::sm80 {

template <>
cudaError_t attention<__nv_bfloat16, 96>(AttentionParams& p, int row_tiles, cudaStream_t stream) {
  return row_tiles == 1 ? launch<__nv_bfloat16, 96, 1>(p, stream) : launch<__nv_bfloat16, 96, 2>(p, stream);
}

}  // namespace dhsa::cuda::sm80
