// Launchers of the sm_90a kernels, one translation unit per type and head_dim.
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/device/attention_work.h"

namespace dhsa::cuda::sm90 {

// Fills in the params' tile fields. use_boxes: tiles of neighbouring keys come by TMA where tensor maps can be made.
template <class T, int kHeadDim>
cudaError_t attention(AttentionParams&, bool use_boxes, cudaStream_t);

}  // namespace dhsa::cuda::sm90
