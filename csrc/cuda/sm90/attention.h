// Launchers of the sm_90a kernels, one translation unit per type and head_dim.
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/device/attention_work.h"

namespace dhsa::cuda::sm90 {

// Fills in the params' tile fields.
template <class T, int kHeadDim>
cudaError_t attention(AttentionParams&, cudaStream_t);

}  // namespace dhsa::cuda::sm90
