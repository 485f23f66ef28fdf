#include "cuda/sm80/attention.h"
#include "cuda/sm80/attention_kernel.h"

namespace dhsa::cuda::sm80 {

template <>
cudaError_t attention<__half, 64>(AttentionParams& p, int row_tiles, cudaStream_t stream) {
  return row_tiles == 1 ? launch<__half, 64, 1>(p, stream) : launch<__half, 64, 2>(p, stream);
}

}  // namespace dhsa::cuda::sm80
