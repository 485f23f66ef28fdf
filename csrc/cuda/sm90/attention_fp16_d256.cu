#include "cuda/sm90/attention.h"
#include "cuda/sm90/attention_kernel.h"

namespace dhsa::cuda::sm90 {

template <>
cudaError_t attention<__half, 256>(AttentionParams& p, bool use_boxes, cudaStream_t stream) {
  return launch<__half, Config<256, 1, 32, 4>>(p, use_boxes, stream);
}

}  // namespace dhsa::cuda::sm90
