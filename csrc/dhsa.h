// dhsa: Dynamic Hierarchical Sparse Attention, the torch-free core. One params struct and one function per stage, in
// pipeline order; docs/algorithm.md has the equations.
//
//   q, k, v -> boundary_scores -> select_boundaries -> chunk_pool -> chunk_scores -> (token_scores) -> select_keys
//           -> sparse_attention -> out, lse;   accurate mode: chunk_mass and refine_keys for chunk_scores, select_keys.
//
// Letters in shapes: B batch, H query heads, Hkv key/value heads, Lq and Lk lengths, D head_dim, S selection heads
// (1, Hkv or H), C chunk capacity, nQ = ceil(Lq / q_block) query blocks, R run capacity. Query i sits at position
// Lk - Lq + i; a block's first and last queries sit at p0 and p1.
//
// Use: fill the inputs, call check() (throws std::invalid_argument with one sentence), allocate the outputs, call the
// stage of a backend. q, k, v, x have dtype float32, float16 or bfloat16, a contiguous last dimension, and any other
// strides that are multiples of 16 bytes. Scores and pooled vectors are contiguous float32, indices contiguous int32.
// Nothing here allocates, owns a thread or keeps state: memory and threads are the adapter's.
#pragma once

#include <cstdint>
#include <functional>

#include "core/types.h"

namespace dhsa {

// 1. scores[b, t] = 1 - cos(mean of the `window` keys before t, mean of the `window` keys from t on), heads
//    concatenated; -inf where a whole window does not fit.
struct BoundaryScores {
  Tensor k;            // [B, Hkv, Lk, D]
  int64_t window = 4;  // tokens
  Tensor scores;       // out: [B, Lk] float32
};

// The learned detector: same shape and meaning as boundary_scores (SPEC: "The learned boundary predictor").
struct BoundaryLogits {
  Tensor k;                               // [B, Hkv, Lk, D]; C_in = Hkv * D
  Tensor in_proj_weight, in_proj_bias;    // [3 C_in, C_in], [3 C_in]
  Tensor out_proj_weight, out_proj_bias;  // [C_in, C_in], [C_in]
  Tensor norm_weight, norm_bias;          // [C_in]
  Tensor gate_weight, gate_bias;          // [1, C_in], [1], or not given: mean pooling
  Tensor fc1_weight, fc1_bias;            // [256, 4 C_in + 1], [256]
  Tensor fc2_weight, fc2_bias;            // [1, 256], [1]
  int64_t num_heads = 8, window = 4;
  Tensor logits;  // out: [B, Lk] float32
};

// 2. Greedy non-maximum suppression of the scores into half-open, rising chunk offsets.
struct SelectBoundaries {
  Tensor scores;               // [B, Lk] float32
  int64_t max_chunks = 1;      // quota of a row, or of one whole segment
  int64_t nms_radius = 8;      // tokens
  float threshold;             // scores <= threshold are no candidates; -inf when none was given
  int64_t segment = 0;         // 0, or a forced cut at every multiple of it
  Tensor offsets, num_chunks;  // out: [B, C + 1] int32, [B] int32
};
int64_t chunk_capacity(int64_t seqlen_k, int64_t max_chunks, int64_t segment);  // C

// 3. One vector per chunk: sum over its n tokens / sqrt(n) (or / n, or the sum); columns >= num_chunks are 0.
struct ChunkPool {
  Tensor x;                    // [B, Hx, L, D]
  Tensor offsets, num_chunks;  // [B, C + 1] int32, [B] int32
  int64_t heads = 1;           // S: divides Hx (mean over consecutive groups), or is divided by it (repeats)
  PoolScale scale = PoolScale::kSqrt;
  Tensor pooled;  // out: [B, S, C, D] float32
};

// The same over fixed blocks of q_block queries.
struct QueryPool {
  Tensor q;  // [B, H, Lq, D]
  int64_t heads = 1, q_block = 64;
  PoolScale scale = PoolScale::kSqrt;
  Tensor pooled;  // out: [B, S, nQ, D] float32
};

// 4. Dot products of pooled queries and pooled keys; no softmax scale.
struct ChunkScores {
  Tensor q_pooled, k_pooled;  // [B, S, nQ, D], [B, S, C, D] float32
  Tensor scores;              // out: [B, S, nQ, C] float32
};

// 5. Each token gets its chunk's score, tokens outside every chunk -inf.
struct TokenScores {
  Tensor chunk_scores;         // [B, S, nQ, C] float32
  Tensor offsets, num_chunks;  // [B, C + 1] int32, [B] int32
  int64_t seqlen_k = 0;
  Tensor scores;  // out: [B, S, nQ, Lk] float32
};

// 6. The kept keys of each query block as half-open, rising, disjoint, merged runs; unused entries are 0.
struct SelectKeys {
  Tensor chunk_scores;         // [B, S, nQ, C] float32
  Tensor offsets, num_chunks;  // [B, C + 1] int32, [B] int32
  int64_t seqlen_q = 0, seqlen_k = 0, q_block = 64;
  KeyChoice choice;
  Tensor runs, num_runs;  // out: [B, S, nQ, R, 2] int32, [B, S, nQ] int32
  Tensor cache_seqlens;   // in, as in SparseDecode
};
int64_t run_capacity(int64_t chunk_capacity, int64_t budget, int64_t min_chunk);  // R of select_keys

// 4, accurate: an estimate of the attention mass that one token of each chunk gets from the block's rows.
struct ChunkMass {
  Tensor q;                    // [B, H, Lq, D]
  Tensor k_mean;               // [B, S, C, D] float32
  Tensor offsets, num_chunks;  // [B, C + 1] int32, [B] int32
  int64_t seqlen_k = 0, q_block = 64, q_stride = 8;
  QueryRows rows = QueryRows::kSample;
  Softmax softmax;
  Tensor scores, row_lse;  // out: [B, S, nQ, C] float32, [B, H, nQ, ceil(q_block / q_stride)] float32
  Tensor cache_seqlens;    // in, as in SparseDecode
};

// 6, accurate: the forced keys, then the best of the first refine * (budget - forced) candidates by their own logits.
struct RefineKeys {
  Tensor q, k;                 // [B, H, Lq, D], [B, Hkv, Lk, D]
  Tensor chunk_scores;         // [B, S, nQ, C] float32
  Tensor row_lse;              // [B, H, nQ, ceil(q_block / q_stride)] float32; not given: score "dot"
  Tensor offsets, num_chunks;  // [B, C + 1] int32, [B] int32
  int64_t q_block = 64, refine = 1, q_stride = 8;
  QueryRows rows = QueryRows::kSample;
  KeyChoice choice;
  Softmax softmax;
  Tensor runs, num_runs;  // out: [B, S, nQ, R, 2] int32, [B, S, nQ] int32
  Tensor cache_seqlens;   // in, as in SparseDecode
};
int64_t refined_run_capacity(int64_t seqlen_k, int64_t budget);  // R of refine_keys

// 7. Softmax attention over the keys of each block's runs, causal. A row with no key: out 0, lse -inf.
struct SparseAttention {
  Tensor q, k, v;         // [B, H, Lq, D], [B, Hkv, Lk, D] twice
  Tensor runs, num_runs;  // [B, S, nQ, R, 2] int32, [B, S, nQ] int32; any content is safe
  int64_t q_block = 64;
  Softmax softmax;
  Tensor out, lse;  // out: q's dtype, any strides of the adapter's; [B, H, Lq] float32, natural log
};

// Stages 1 to 7 in one call.
struct SparsePrefill {
  Tensor q, k, v;  // [B, H, Lq, D], [B, Hkv, Lk, D] twice
  int64_t max_chunks = 0, q_block = 64, select_heads = 1;
  ChunkScore score = ChunkScore::kDot;
  PoolScale pool = PoolScale::kSqrt;
  int64_t refine = 0, q_stride = 8;
  QueryRows rows = QueryRows::kSample;
  KeyChoice choice;  // min_chunk is nms_radius + 1 unless offsets were given or a segment is set (then 1)
  int64_t boundary_window = 4, nms_radius = 8;
  float threshold;
  int64_t segment = 0;
  bool strict = false;         // the chunk that holds p1 is scored as if it ended at p1 + 1
  Tensor offsets, num_chunks;  // given: [B, C + 1] int32, [B] int32; else computed in the workspace
  Softmax softmax;
  Tensor out, lse;
};

// Stages 4, 6 and 7 for Lq <= 16 new queries, each its own block, over a cache whose chunks are known.
struct SparseDecode {
  Tensor q, k, v;              // [B, H, Lq, D], [B, Hkv, Lk, D] twice
  Tensor k_pooled;             // [B, S, C, D] float32: "sqrt" for score dot, "mean" for mass
  Tensor offsets, num_chunks;  // [B, C + 1] int32, [B] int32
  Tensor cache_seqlens;        // [B] int32: keys that each row's cache holds, Lk a row's room; not given: all Lk
  ChunkScore score = ChunkScore::kDot;
  int64_t refine = 0;
  KeyChoice choice;
  Softmax softmax;
  Tensor out, lse;
};

namespace cpu {

// The adapter's threads: run(count, task) calls task(i, worker) once for each i in [0, count), worker < workers().
class Executor {
 public:
  virtual ~Executor() = default;
  virtual int workers() const = 0;
  virtual void run(int64_t count, const std::function<void(int64_t item, int worker)>& task) const = 0;
};

// Bytes that the stage needs beside its tensors, 64-byte aligned; 0 where it needs none.
int64_t workspace_bytes(const BoundaryScores&, int workers);
int64_t workspace_bytes(const BoundaryLogits&, int workers);
int64_t workspace_bytes(const SelectBoundaries&, int workers);
int64_t workspace_bytes(const ChunkPool&, int workers);
int64_t workspace_bytes(const QueryPool&, int workers);
int64_t workspace_bytes(const ChunkScores&, int workers);
int64_t workspace_bytes(const TokenScores&, int workers);
int64_t workspace_bytes(const SelectKeys&, int workers);
int64_t workspace_bytes(const ChunkMass&, int workers);
int64_t workspace_bytes(const RefineKeys&, int workers);
int64_t workspace_bytes(const SparseAttention&, int workers);
int64_t workspace_bytes(const SparsePrefill&, int workers);
int64_t workspace_bytes(const SparseDecode&, int workers);

void run(const BoundaryScores&, void* workspace, const Executor&);
void run(const BoundaryLogits&, void* workspace, const Executor&);
void run(const SelectBoundaries&, void* workspace, const Executor&);
void run(const ChunkPool&, void* workspace, const Executor&);
void run(const QueryPool&, void* workspace, const Executor&);
void run(const ChunkScores&, void* workspace, const Executor&);
void run(const TokenScores&, void* workspace, const Executor&);
void run(const SelectKeys&, void* workspace, const Executor&);
void run(const ChunkMass&, void* workspace, const Executor&);
void run(const RefineKeys&, void* workspace, const Executor&);
void run(const SparseAttention&, void* workspace, const Executor&);
void run(const SparsePrefill&, void* workspace, const Executor&);
void run(const SparseDecode&, void* workspace, const Executor&);

// What the dispatcher knows, comma separated, best last. active() throws std::runtime_error when DHSA_FORCE_ISA names
// an ISA that was not compiled or that the machine lacks.
const char* isas_compiled();
const char* isas_detected();
const char* isa_active();
// Of a core's first level and its share of those behind it, which sizes of blocks follow: "32 KiB, 512 KiB".
const char* cache_sizes();

}  // namespace cpu

// Throw std::invalid_argument with one sentence: argument, expected, got. Outputs need not be filled in yet.
void check(const BoundaryScores&);
void check(const BoundaryLogits&);
void check(const SelectBoundaries&);
void check(const ChunkPool&);
void check(const QueryPool&);
void check(const ChunkScores&);
void check(const TokenScores&);
void check(const SelectKeys&);
void check(const ChunkMass&);
void check(const RefineKeys&);
void check(const SparseAttention&);
void check(const SparsePrefill&);
void check(const SparseDecode&);

}  // namespace dhsa
