// The candidates of one query block, and which of them are forced: the arithmetic of stage 6 before any score.
#pragma once

#include "cuda/device/chunks.h"

namespace dhsa::cuda {

struct KeyRules {
  int seqlen_q, seqlen_k, q_block;
  int budget, sink, local, window, dense_tail;
  const int* cache_seqlens = nullptr;  // [B], or null

  __device__ int held(int batch) const { return held_keys(cache_seqlens, batch, seqlen_k); }
};

// Candidates are keys [begin, end). Forced are [begin, free_begin) and [free_end, end); `want` of the keys between are
// kept, by score. free_begin >= free_end: every candidate is kept.
struct Candidates {
  int begin, end, free_begin, free_end, want;

  // held: the row's keys (KeyRules::held).
  __device__ Candidates(const KeyRules& rules, int held, int block, int chunked_end) {
    const int first_query = block * rules.q_block, end_query = min(rules.seqlen_q, first_query + rules.q_block);
    const int shift = held - rules.seqlen_q, p0 = shift + first_query;
    end = max(shift + end_query, 0);
    begin = rules.window > 0 ? min(max(p0 - rules.window + 1, 0), end) : 0;
    free_begin = min(max(begin, rules.sink), end);
    free_end = max(min(min(p0 - rules.local + 1, chunked_end), end), begin);
    const bool dense = rules.dense_tail > 0 && end_query > rules.seqlen_q - rules.dense_tail;
    if (free_begin >= free_end) free_end = free_begin;
    const int free_keys = free_end - free_begin, forced = end - begin - free_keys;
    want = max(min(rules.budget, end - begin) - forced, 0);
    if (dense || want >= free_keys) free_end = free_begin, want = 0;
  }
  __device__ bool all_kept() const { return free_begin >= free_end; }
};

}  // namespace dhsa::cuda
