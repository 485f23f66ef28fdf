// The sampled rows of a query block: its last query and every q_stride-th before it, for each query head of a group.
// Row u of a group of heads is sample u % samples of head u / samples; samples = ceil(q_block / q_stride).
#pragma once

#include <cstdint>

namespace dhsa::cuda {

struct SampledRows {
  int seqlen_q, q_block, q_stride, samples;

  __host__ __device__ int last_query(int block) const {
    return (block + 1) * q_block < seqlen_q ? (block + 1) * q_block - 1 : seqlen_q - 1;
  }
  // The query of a sample of a block; below the block's first query: the block is short and the entry unused.
  __host__ __device__ int query(int block, int sample) const { return last_query(block) - sample * q_stride; }
  __host__ __device__ bool used(int block, int sample) const { return query(block, sample) >= block * q_block; }
};

}  // namespace dhsa::cuda
