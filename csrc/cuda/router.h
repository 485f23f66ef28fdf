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
// early: only the kernel before this one in the stream writes the scores, and it writes no other input.
cudaError_t run_select_keys(const SelectKeys& x, const Slab&, cudaStream_t, bool early = false);

// chunk_mass over the slab: x.scores' data is the slab's, its shape the whole's, x.row_lse the whole's. strict_k: k
// [B, Hkv, Lk, D] where the chunk that holds p1 counts as if it ended there, else null. run_mass_means comes first,
// once a call; on sm_90a it takes the logsumexp of all rows too. Scores of chunks that hold no candidate of any block
// near by may be left unwritten.
int64_t mass_means_bytes(const ChunkMass& x, bool strict = false);
const void* mass_row_means(const ChunkMass& x, void* means);  // the rows of QueryRows::kMean there, or null
cudaError_t run_mass_means(const ChunkMass& x, void* means, cudaStream_t stream, const Tensor* strict_k = nullptr);
int64_t mass_scratch_bytes(const ChunkMass& x, const Slab&, bool strict);
cudaError_t run_chunk_mass(const ChunkMass& x, const Tensor* strict_k, void* means, void* scratch, const Slab&,
                           cudaStream_t stream);

// refine_keys over the slab, in the same way; q_pooled [B, S, nQ, D] where x.row_lse is not given, row_means for
// QueryRows::kMean where it is. Its scratch serves slabs of up to `lists` lists.
int64_t refine_scratch_bytes(const RefineKeys& x, int64_t lists);
cudaError_t run_refine_keys(const RefineKeys& x, const float* q_pooled, const void* row_means, void* scratch,
                            const Slab&, cudaStream_t);

// rows [B, H, nQ, ceil(q_block / q_stride), D] of q's type: QueryRows::kMean.
int64_t row_means_bytes(const Tensor& q, int64_t q_block, int64_t q_stride);
cudaError_t run_row_means(const Tensor& q, int64_t q_block, int64_t q_stride, void* rows, cudaStream_t);

}  // namespace dhsa::cuda
