// Launchers of the sm_80 kernels, one translation unit per type and head_dim.
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/device/attention_work.h"

namespace dhsa::cuda::sm80 {

// row_tiles 1: 64 rows to a thread block; 2: 128 (head_dim up to 128). Fills in the params' tile fields.
template <class T, int kHeadDim>
cudaError_t attention(AttentionParams&, int row_tiles, cudaStream_t);

// Merges the partial answers of split lists (attention_combine.cu). Every row of the tail blocks has a warp.
template <class T, int kHeadDim>
cudaError_t attention_combine(const AttentionParams&, cudaStream_t);

// float32, for correctness only: a warp per query row, no tensor cores.
template <int kHeadDim>
cudaError_t attention_float32(const AttentionParams&, cudaStream_t);

}  // namespace dhsa::cuda::sm80
