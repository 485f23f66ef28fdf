// refine_keys for one query block, shared by the stage and the fused calls.
#pragma once

#include "core/types.h"
#include "cpu/chunk_mass.h"
#include "cpu/kernels.h"
#include "cpu/key_choice.h"

namespace dhsa::cpu {

struct RefineArgs {
  const Kernels* kernels;
  RowView q, k;
  HeadGroups heads;
  int64_t head_dim, seqlen_q, refine;
  KeyChoice choice;
  Softmax softmax;
};

struct RefineScratch {
  static constexpr int64_t kRows = 64;  // rows that share one packing of the candidates
  ChoiceScratch choice;                 // over chunks
  int32_t* candidates;                  // [candidates] rising
  float* scores;                        // [candidates, padded]
  uint32_t* keys;                       // [candidates]
  float *q, *panels, *logits, *lse;     // [kRows][head_dim], [head_dim][kBlockN], [kRows][kBlockN], [kRows]

  RefineScratch(Arena& arena, int64_t chunks, int64_t head_dim, int64_t seqlen_k, const KeyChoice& choice_args,
                int64_t refine)
      : choice(arena, chunks) {
    const int64_t count = std::min(seqlen_k, std::min(refine, seqlen_k) * choice_args.budget);
    candidates = arena.take<int32_t>(count);
    scores = arena.take<float>(round_up(count, kBlockN));
    keys = arena.take<uint32_t>(count);
    q = arena.take<float>(kRows * head_dim);
    panels = arena.take<float>(kBlockN * head_dim);
    logits = arena.take<float>(kRows * kBlockN);
    lse = arena.take<float>(kRows);
  }
};

// Writes the runs of list s, returns num_runs. row_lse[head in the list * lse_stride + row] of the block's rows, or
// null for score "dot", which reads the queries themselves.
int64_t refine_block(const RefineArgs& args, int64_t b, int64_t s, const float* chunk_scores, const BlockRows& rows,
                     const float* row_lse, int64_t lse_stride, const ChunkList& chunks, const Block& block,
                     int32_t* runs, int64_t capacity, const RefineScratch& scratch);

}  // namespace dhsa::cpu
