// Which chunks a list keeps: a weighted radix select over chunks, the weight being the free tokens that a chunk adds,
// then one bit a chunk. Shared by select_keys and by refine_keys' coarse filter.
#pragma once

#include "cuda/device/candidates.h"
#include "cuda/device/order.h"
#include "cuda/device/register_select.h"

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

template <int kThreads, int kKeys>
struct FewChunks {
  typename RegisterSelect<kThreads, kKeys>::Shared chosen;
  int bounds[kThreads * kKeys + 1];
};

template <int kThreads>
struct ChunkSelection {
  const Candidates keys;
  const Chunks& chunks;
  const float* scores;
  SelectionShared<kThreads>& shared;
  Cutoff cutoff = {kNoKey, 0};
  bool voted = false;  // the words of all chunks are there

  const int* bounds = nullptr;  // in shared memory: where chunks [first_bound, ...] begin, once they were read
  int first_bound = 0;

  __device__ uint32_t key(int chunk) const { return order_key(scores[chunk]); }
  __device__ int begin(int chunk) const {
    return bounds != nullptr ? bounds[chunk - first_bound] : chunks.begin(chunk);
  }
  __device__ int free_begin(int chunk) const { return max(begin(chunk), keys.free_begin); }
  __device__ int free_tokens(int chunk) const {
    return max(min(begin(chunk + 1), keys.free_end) - free_begin(chunk), 0);
  }

  // Chunks [first, last) hold the keys that are neither forced nor out of reach.
  __device__ void choose(int first, int last) {
    if (keys.want <= 0) return;
    cutoff = shared.select.select(
        first, last, keys.want, [&](int c) { return key(c); }, [&](int c) { return free_tokens(c); });
  }

  // The same and the vote, where the chunks are few: with their keys in registers and their bounds in shared memory,
  // that is two trips to memory instead of one for each of a thread's chunks. Calls ready() before the first score is
  // read. False, and no choice made, for more than kThreads * kKeys chunks, and where one is too long for 16 bits.
  template <int kKeys, class Ready>
  __device__ bool choose_from_registers(int first, int last, FewChunks<kThreads, kKeys>& memory, const Ready& ready) {
    static_assert(kThreads * kKeys <= 32 * kChunkWords, "all chunks are one tile");
    const int n = last - first;
    const bool fits = keys.want > 0 && n >= 0 && n <= kThreads * kKeys;  // below 0: malformed offsets
    uint32_t key[kKeys], weights[kKeys / 2];
    int longest = 0;
    if (fits) {
#pragma unroll
      for (int j = 0; j < kKeys; ++j) {
        const int i = j * kThreads + static_cast<int>(threadIdx.x);
        if (i < n) memory.bounds[i] = chunks.begin(first + i);
      }
      if (threadIdx.x == 0) memory.bounds[n] = chunks.begin(last);
      bounds = memory.bounds, first_bound = first;
      __syncthreads();
#pragma unroll
      for (int j = 0; j < kKeys; ++j) {
        const int i = j * kThreads + static_cast<int>(threadIdx.x);
        const int tokens = i < n ? free_tokens(first + i) : 0;
        weights[j / 2] = j % 2 == 0 ? tokens : weights[j / 2] | tokens << 16;
        longest = max(longest, tokens);
      }
    }
    ready();
    if (!fits) return false;
    const auto weight = [&](int j) { return static_cast<int>(weights[j / 2] >> j % 2 * 16 & 0xffff); };
    constexpr int kBatch = 8;  // loads of a thread in flight
#pragma unroll
    for (int batch = 0; batch < kKeys; batch += kBatch) {
      float score[kBatch];
#pragma unroll
      for (int j = 0; j < kBatch; ++j) {
        const int i = (batch + j) * kThreads + static_cast<int>(threadIdx.x);
        score[j] = weight(batch + j) > 0 ? scores[first + i] : 0.0f;
      }
#pragma unroll
      for (int j = 0; j < kBatch; ++j) key[batch + j] = weight(batch + j) > 0 ? order_key(score[j]) : 0;
    }
    if (__syncthreads_or(longest > 0xffff)) return false;
    cutoff = RegisterSelect<kThreads, kKeys>{shared.select, memory.chosen}.select(key, keys.want, weight);
#pragma unroll
    for (int j = 0; j < kKeys; ++j) {
      const uint32_t all = __ballot_sync(kFullWarp, key[j] != 0);
      const uint32_t above = __ballot_sync(kFullWarp, key[j] > cutoff.key);
      const uint32_t equal = __ballot_sync(kFullWarp, key[j] != 0 && key[j] == cutoff.key);
      const int word = j * (kThreads / 32) + warp_id();
      if (lane_id() == 0) shared.present[word] = all, shared.above[word] = above, shared.equal[word] = equal;
    }
    __syncthreads();
    return voted = true;
  }

  // The words of chunks [tile, min(tile + 32 * kChunkWords, last)), from one vote for 32 chunks.
  __device__ void vote(int tile, int last) {
    if (voted) return;
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
  __device__ ChunkWord decide(int tile, int last, int& ties_used) {
    ChunkWord word;
    uint32_t equal = 0;
    if (threadIdx.x < kChunkWords) {
      word.present = shared.present[threadIdx.x], word.kept = shared.above[threadIdx.x];
      equal = shared.equal[threadIdx.x];
    }
    const int words = __syncthreads_count(equal != 0);
    if (words == 0) return word;
    const int first = tile + static_cast<int>(threadIdx.x) * 32;
    int used = ties_used;
    if (words > 1 || tile + kChunkWords * 32 < last) {
      int keys_here = 0, total;
      for (uint32_t bits = equal; bits != 0; bits &= bits - 1) keys_here += free_tokens(first + __ffs(bits) - 1);
      used += shared.select.scan.exclusive_sum(keys_here, &total);
      ties_used += total;
    }
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
