// What refine_keys' launches share: the arguments, and the short lists between them.
#pragma once

#include "cuda/device/candidates.h"
#include "cuda/device/sampled_rows.h"
#include "cuda/dispatch.h"

namespace dhsa::cuda {

constexpr int kRefineThreads = 256;

struct RefineParams {
  const void *q, *k;
  int64_t q_batch, q_head, q_token, k_batch, k_head, k_token;
  const float* scores;    // the slab's: [pairs, blocks, C]
  const float* row_lse;   // [B, H, nQ, samples], or null
  const float* q_pooled;  // [B, S, nQ, D], where row_lse is null
  const int *offsets, *num_chunks;
  int *runs, *num_runs;  // [B, S, nQ, R, 2], [B, S, nQ]
  char* scratch;         // one Shortlist for each list of the launch
  int64_t scratch_bytes;
  KeyRules rules;
  SampledRows sampled;
  int refine, capacity, run_capacity, query_blocks, selection_heads, heads, heads_kv;
  int group_heads;      // query heads that share a list and a KV head
  int groups_per_list;  // KV heads that a list's heads read
  int limit;            // the longest short list
  int first_pair, first_block, blocks;
  int first_list;  // of the slab
  float scale, softcap;
};

struct Shortlist {
  int* positions;            // [limit], rising
  float* scores;             // [limit]
  uint32_t *kept, *follows;  // [limit / 32 + 1]: is kept; the next entry's key is this one's neighbour
  int* count;                // entries; -1: the block keeps every candidate, and its runs are written

  static int64_t words(int64_t limit) { return limit / 32 + 1; }
  static int64_t bytes(int64_t limit) { return ceil_div(8 * (limit + words(limit)) + 4, 256) * 256; }
  __device__ explicit Shortlist(const RefineParams& p)
      : positions(reinterpret_cast<int*>(p.scratch + blockIdx.x * p.scratch_bytes)),
        scores(reinterpret_cast<float*>(positions + p.limit)),
        kept(reinterpret_cast<uint32_t*>(scores + p.limit)),
        follows(kept + p.limit / 32 + 1),
        count(reinterpret_cast<int*>(follows + p.limit / 32 + 1)) {}
};

// The list that a thread block works on.
struct List {
  int item;  // of the slab
  int pair, block, batch, s;
  int64_t row;

  __device__ explicit List(const RefineParams& p)
      : item(p.first_list + static_cast<int>(blockIdx.x)),
        pair(p.first_pair + item / p.blocks),
        block(p.first_block + item % p.blocks),
        batch(pair / p.selection_heads),
        s(pair % p.selection_heads),
        row(static_cast<int64_t>(pair) * p.query_blocks + block) {}
};

// Scores of the short lists of `lists` thread blocks' lists (refine_score.cu).
cudaError_t run_refine_score(const RefineParams&, DType, int64_t head_dim, int64_t lists, cudaStream_t);

}  // namespace dhsa::cuda
