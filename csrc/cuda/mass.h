// What the parts of chunk_mass share: the estimate's inputs over a slab of query blocks, and which kernels take it.
// The tensor cores' kernels are two families: chunk_mass_wgmma.cu on sm_90a, chunk_mass_tiles.cu elsewhere.
#pragma once

#include "cuda/device/sampled_rows.h"
#include "cuda/dispatch.h"
#include "cuda/router.h"

namespace dhsa::cuda {

// Each block's chunk that holds p1, ended at p1 + 1 (sparse_prefill's strict); null: not strict. Of the slab, and of
// the call for chunk_mass_wgmma.cu.
struct MassCut {
  const int2* chunks = nullptr;   // [pairs, blocks] (chunk or -1, tokens)
  const float* logits = nullptr;  // [pairs, blocks, rows] log2 units, without the chunk's length
};

// Arguments of every kernel of the stage. Row u of a list is sample u % samples of its head u / samples.
struct MassParams {
  const void* q;
  int64_t q_batch, q_head, q_token;
  const int *offsets, *num_chunks;
  float* scores;   // the slab's: [pairs, blocks, C]
  float* row_lse;  // [B, H, nQ, samples]
  MassCut cut;
  SampledRows sampled;
  const int* cache_seqlens;  // [B], or null
  int seqlen_q, seqlen_k, window, capacity, heads, selection_heads, list_heads, query_blocks;
  int first_pair, first_block, blocks, pairs;
  float scale, softcap;

  __device__ int held(int batch) const { return held_keys(cache_seqlens, batch, seqlen_k); }
  __host__ __device__ int rows() const { return list_heads * sampled.samples; }  // of a list and block

  // The query head of a row of a pair's list.
  __device__ int head_of(int pair, int row) const {
    return pair % selection_heads * list_heads + row / sampled.samples;
  }

  // Where the logsumexp of a row of a pair's block goes.
  __device__ float& lse(int pair, int block, int row) const {
    const int64_t of_head = static_cast<int64_t>(pair / selection_heads) * heads + head_of(pair, row);
    return row_lse[(of_head * query_blocks + block) * sampled.samples + row % sampled.samples];
  }
};

constexpr float kLowest = -1e30f;  // finite, so that a row with no chunk has differences of 0 and a sum of 0

// The sum of 2^z over a row's chunks as sum 2^top, put together from parts (top, sum).
struct PartialSum {
  float top = kLowest, sum = 0;

  __device__ void add(float2 part) {
    const float both = fmaxf(top, part.x);
    sum = sum * exp2f(top - both) + part.y * exp2f(part.x - both);
    top = both;
  }
  __device__ float lse2() const { return sum > 0 ? top + log2f(sum) : -INFINITY; }
};

// Vectors of the chunks as the kernels want them, made once a call.
struct MassMeans {
  const float* means = nullptr;     // [pairs, C, D]
  const void* parts = nullptr;      // of q's type, two halves whose sum is mean / 2^e: [pairs, pitch, 2, D], or for
                                    // wgmma [pairs, pitch / 64, 2] SmemTiles of 64 means
  const float2* columns = nullptr;  // [pairs, pitch] (what turns a product into a logit, log2 of the chunk's length)
};

constexpr int kMassTile = 64;  // chunks; pitch is a multiple of it

inline int64_t mass_pitch(int64_t capacity) { return ceil_div(capacity, kMassTile) * kMassTile; }

// The tensor-core kernels: 16-bit q, and enough rows to fill their tiles.
int64_t mass_tiles_bytes(const MassParams&);
cudaError_t run_mass_tiles(const MassParams&, const MassMeans&, DType, int head_dim, void* scratch, cudaStream_t);

// The same on the current device if it is an sm_90 and the build holds sm_90a: the logsumexp of all query blocks, then
// the scores of one slab after another. `memory` is the call's, mass_wgmma_bytes of a slab that is the whole call.
enum class MassStep { kLse, kScores };
bool mass_uses_wgmma();
int64_t mass_wgmma_bytes(const MassParams& all, int head_dim);
cudaError_t run_mass_wgmma(MassStep, const MassParams&, int all_pairs, const MassMeans&, DType, int head_dim,
                           void* memory, cudaStream_t);

// The plain kernels: any q, few rows; they hold rows x C logits of some of the slab's blocks.
int64_t mass_rows_bytes(const MassParams&);
cudaError_t run_mass_rows(const MassParams&, const float* means, DType, int head_dim, void* scratch, cudaStream_t);

}  // namespace dhsa::cuda
