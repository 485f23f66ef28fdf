#include "cuda/sm90/attention.h"
#include "cuda/sm90/attention_kernel.h"

namespace dhsa::cuda::sm90 {

template <>
cudaError_t attention<__half, 128>(AttentionParams& p, bool use_boxes, cudaStream_t stream) {
  if (p.q_block * p.group <= 128) return launch<__half, Config<128, 1, 64, 5>>(p, use_boxes, stream);
  return launch<__half, Config<128, 2, 64, 4>>(p, use_boxes, stream);
}

}  // namespace dhsa::cuda::sm90
