// Which chunks a list keeps: a weighted radix select over chunks, the weight being the free tokens that a chunk adds,
// then one bit a chunk. Shared by select_keys and by refine_keys' coarse filter.
#pragma once

#include "cuda/device/candidates.h"
#include "cuda/device/order.h"
#include "cuda/device/radix_select.h"

namespace dhsa::cuda {

constexpr int kChunkWords = 256;  // of 32 chunks, one a thread: a tile of 8,192 chunks

template <int kThreads>
struct SelectionShared {
  static_assert(kThreads >= kChunkWords, "a thread owns a word");
  RadixSelect<kThreads> select;
  uint32_t present[kChunkWords], above[kChunkWords],
      equal[kChunkWords];  // chunks with a free key; better than, equal to the cut-off
};

// The chunks of one word: which are kept, which of them whole, and how much of the one that the cut-off divides.
struct ChunkWord {
  uint32_t present = 0, kept = 0, divided = 0;
  int take = 0;  // keys of the divided chunk

  __device__ uint32_t whole() const { return kept & ~divided; }
};

template <int kThreads>
struct ChunkSelection {
  const Candidates keys;
  const Chunks& chunks;
  const float* scores;
  SelectionShared<kThreads>& shared;
  Cutoff cutoff = {kNoKey, 0};

  __device__ uint32_t key(int chunk) const { return order_key(scores[chunk]); }
  __device__ int free_begin(int chunk) const { return max(chunks.begin(chunk), keys.free_begin); }
  __device__ int free_tokens(int chunk) const {
    return max(min(chunks.end(chunk), keys.free_end) - free_begin(chunk), 0);
  }

  // Chunks [first, last) hold the keys that are neither forced nor out of reach.
  __device__ void choose(int first, int last) {
    if (keys.want <= 0) return;
    cutoff = shared.select.select(
        first, last, keys.want, [&](int c) { return key(c); }, [&](int c) { return free_tokens(c); });
  }

  // The words of chunks [tile, min(tile + 32 * kChunkWords, last)), from one vote for 32 chunks.
  __device__ void vote(int tile, int last) {
    for (int w = threadIdx.x; w < kChunkWords; w += kThreads) {
      if (tile + w * 32 >= last) shared.present[w] = shared.above[w] = shared.equal[w] = 0;
    }
#pragma unroll 4
    for (int w = warp_id(); w < kChunkWords; w += kThreads / 32) {
      if (tile + w * 32 >= last) break;
      const int chunk = tile + w * 32 + lane_id();
      const bool present = chunk < last && free_tokens(chunk) > 0;
      const uint32_t k = present ? key(chunk) : 0;
      const uint32_t all = __ballot_sync(kFullWarp, present);
      const uint32_t above = __ballot_sync(kFullWarp, present && k > cutoff.key);
      const uint32_t equal = __ballot_sync(kFullWarp, present && k == cutoff.key);
      if (lane_id() == 0) shared.present[w] = all, shared.above[w] = above, shared.equal[w] = equal;
    }
    __syncthreads();
  }

  // This thread's word. Ties: lower chunks first, the last one cut at its end; ties_used counts their keys.
  __device__ ChunkWord decide(int tile, int& ties_used) {
    ChunkWord word;
    uint32_t equal = 0;
    if (threadIdx.x < kChunkWords) {
      word.present = shared.present[threadIdx.x], word.kept = shared.above[threadIdx.x];
      equal = shared.equal[threadIdx.x];
    }
    if (!__syncthreads_or(equal != 0)) return word;
    const int first = tile + static_cast<int>(threadIdx.x) * 32;
    int keys_here = 0, total;
    for (uint32_t bits = equal; bits != 0; bits &= bits - 1) keys_here += free_tokens(first + __ffs(bits) - 1);
    int used = ties_used + shared.select.scan.exclusive_sum(keys_here, &total);
    ties_used += total;
    for (uint32_t bits = equal; bits != 0 && used < cutoff.rest; bits &= bits - 1) {
      const uint32_t bit = bits & (0u - bits);
      const int tokens = free_tokens(first + __ffs(bits) - 1);
      word.kept |= bit;
      if (used + tokens > cutoff.rest) word.divided = bit, word.take = cutoff.rest - used;
      used += tokens;
    }
    return word;
  }
};

}  // namespace dhsa::cuda
