// What sparse_prefill and sparse_decode share with the public stages: chunk scores and key selection over part of the
// query blocks, so that no [nQ, C] matrix is needed at once.
#pragma once

#include <cuda_runtime_api.h>

#include "dhsa.h"

namespace dhsa::cuda {

// Query blocks [first_block, first_block + blocks) of the (batch, selection head) pairs [first_pair, first_pair +
// pairs). The scores of a slab are contiguous: [pairs, blocks, C].
struct Slab {
  int64_t first_pair = 0, pairs = 0, first_block = 0, blocks = 0;
};

// Where the query blocks sit, for score tiles that no query can reach; offsets null: compute every score.
struct Reach {
  const int *offsets = nullptr, *num_chunks = nullptr;
  int64_t seqlen_q = 0, seqlen_k = 0, q_block = 1;
};

// scores = q_pooled . k_pooled over the slab. Scores of chunks that begin after a tile's last query, or past
// num_chunks, may be left unwritten.
cudaError_t run_chunk_scores(const Tensor& q_pooled, const Tensor& k_pooled, float* scores, const Slab&, const Reach&,
                             cudaStream_t);

// select_keys over the slab: x.chunk_scores' data is the slab's, its shape the whole's. Reads no score of a chunk that
// begins after the block's last query.
cudaError_t run_select_keys(const SelectKeys& x, const Slab&, cudaStream_t);

}  // namespace dhsa::cuda
