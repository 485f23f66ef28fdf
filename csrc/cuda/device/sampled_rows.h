// The rows by which a query block is known: its last query and every q_stride-th before it, for each query head of a
// group, or the means of the queries that end there (row_means.cu). Row u of a group of heads is sample u % samples of
// head u / samples; samples = ceil(q_block / q_stride).
#pragma once

#include <algorithm>
#include <cstdint>

namespace dhsa::cuda {

struct SampledRows {
  int seqlen_q, q_block, q_stride, samples;
  bool means = false;  // rows are those of a tensor [B, H, nQ * samples, D]

  __host__ __device__ int last_query(int block) const {
    return (block + 1) * q_block < seqlen_q ? (block + 1) * q_block - 1 : seqlen_q - 1;
  }
  // The query of a sample of a block; below the block's first query: the block is short and the entry unused.
  __host__ __device__ int query(int block, int sample) const { return last_query(block) - sample * q_stride; }
  __host__ __device__ bool used(int block, int sample) const { return query(block, sample) >= block * q_block; }
  // Samples that a block uses.
  __host__ __device__ int count(int block) const { return (last_query(block) - block * q_block + q_stride) / q_stride; }
  // Where a used sample lies along the third dimension of q, or of the means.
  __host__ __device__ int row(int block, int sample) const {
    return means ? block * samples + sample : query(block, sample);
  }
};

inline SampledRows sampled_rows(int64_t seqlen_q, int64_t q_block, int64_t q_stride) {
  const auto clamp = [](int64_t n) { return static_cast<int>(std::min<int64_t>(n, INT32_MAX / 2)); };
  return {clamp(seqlen_q), clamp(q_block), clamp(q_stride), clamp((q_block + q_stride - 1) / q_stride)};
}

// Makes a kernel's arguments read the means instead of q.
template <class Params>
void read_row_means(Params& p, const void* rows, int64_t heads, int64_t query_blocks, int64_t head_dim) {
  p.sampled.means = true;
  p.q = rows, p.q_token = head_dim, p.q_head = query_blocks * p.sampled.samples * head_dim;
  p.q_batch = heads * p.q_head;
}

}  // namespace dhsa::cuda
