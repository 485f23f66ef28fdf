#include "cuda/sm90/attention.h"
#include "cuda/sm90/attention_kernel.h"

namespace dhsa::cuda::sm90 {

template <>
cudaError_t attention<__half, 64>(AttentionParams& p, bool use_boxes, cudaStream_t stream) {
  if (p.q_block * p.group <= 128) return launch<__half, Config<64, 1, 128, 6>>(p, use_boxes, stream);
  return launch<__half, Config<64, 2, 128, 4>>(p, use_boxes, stream);
}

}  // namespace dhsa::cuda::sm90
