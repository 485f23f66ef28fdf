// Length-weighted selection among keys that a thread block holds in registers: one histogram over the range that the
// keys span, then the few keys of the bin that holds the cut-off, by one warp's comparisons. radix_select.h answers the
// same for keys in memory in three histograms over fixed digits, where scores of one magnitude crowd into a handful of
// bins.
#pragma once

#include <cstdint>

#include "cuda/device/radix_select.h"

namespace dhsa::cuda {

// Thread t's key j is item j * kThreads + t; key 0: no item. Items of a warp's key j are 32 neighbours, one bit word.
template <int kThreads, int kKeys>
struct RegisterSelect {
  static constexpr int kWarps = kThreads / 32;
  static constexpr int kBins = RadixSelect<kThreads>::kBins, kDigitBits = 11;
  static constexpr int kBinsPerThread = kBins / kThreads;
  static_assert(kBins == 1 << kDigitBits && kBinsPerThread % 4 == 0, "bins are read four at once");

  struct Shared {
    uint32_t lowest[kWarps], highest[kWarps];
    uint32_t few_keys[32];
    int few_weights[32];
    int few, digit, rest, weight;
  };
  RadixSelect<kThreads>& memory;  // its histogram and scan
  Shared& shared;

  // weight(j) of this thread's key j, > 0 where the key is not 0; 0 < want <= the sum of all. The histogram may be
  // written again after the next barrier.
  template <class Weight>
  __device__ Cutoff select(const uint32_t (&key)[kKeys], int want, Weight weight) {
    uint32_t low = 0xffffffffu, high = 0;
#pragma unroll
    for (int j = 0; j < kKeys; ++j) low = min(low, key[j] - 1), high = max(high, key[j]);  // 0 - 1 is the largest
    low = __reduce_min_sync(kFullWarp, low) + 1, high = __reduce_max_sync(kFullWarp, high);
    if (lane_id() == 0) shared.lowest[warp_id()] = low - 1, shared.highest[warp_id()] = high;
    clear(want);
    __syncthreads();
#pragma unroll
    for (int w = 0; w < kWarps; ++w) low = min(low - 1, shared.lowest[w]) + 1, high = max(high, shared.highest[w]);
    uint32_t base = low;
    int shift = max(32 - __clz(high - low) - kDigitBits, 0);
    uint32_t span = high - low;  // keys [base, base + span] are left
    while (true) {
#pragma unroll
      for (int j = 0; j < kKeys; ++j) {
        if (key[j] != 0 && key[j] - base <= span) atomicAdd(&memory.histogram[(key[j] - base) >> shift], weight(j));
      }
      __syncthreads();
      find_bin(want);
      __syncthreads();
      base += static_cast<uint32_t>(shared.digit) << shift;
      want = shared.rest;
      if (want == shared.weight) return {base - 1, 0};  // the bin is wanted to its last item
      if (shift == 0) return {base, want};
      span = (1u << shift) - 1;
#pragma unroll
      for (int j = 0; j < kKeys; ++j) {
        if (key[j] == 0 || key[j] - base > span) continue;
        const int at = atomicAdd(&shared.few, 1);
        if (at < 32) shared.few_keys[at] = key[j], shared.few_weights[at] = weight(j);
      }
      __syncthreads();
      if (shared.few <= 32) return among_few(want);
      __syncthreads();  // all have read `few`
      clear(want);
      shift = max(shift - kDigitBits, 0);
      __syncthreads();
    }
  }

 private:
  __device__ void clear(int want) {
    uint4* bins = reinterpret_cast<uint4*>(memory.histogram);
#pragma unroll
    for (int i = threadIdx.x; i < kBins / 4; i += kThreads) bins[i] = make_uint4(0, 0, 0, 0);
    if (threadIdx.x == 0) shared.few = shared.digit = 0, shared.rest = want, shared.weight = -1;
  }

  // The bin that holds the want-th unit of weight from the top; thread t owns the t-th group from the top.
  __device__ void find_bin(int want) {
    int bin[kBinsPerThread];  // rising
    const int first = kBins - (static_cast<int>(threadIdx.x) + 1) * kBinsPerThread;
#pragma unroll
    for (int i = 0; i < kBinsPerThread; i += 4) {
      *reinterpret_cast<int4*>(bin + i) = *reinterpret_cast<const int4*>(memory.histogram + first + i);
    }
    int sum = 0, total;
#pragma unroll
    for (int i = 0; i < kBinsPerThread; ++i) sum += bin[i];
    int above = memory.scan.exclusive_sum(sum, &total);
    if (above >= want || above + sum < want) return;
    int digit = 0, rest = 0, weight = 0;
#pragma unroll
    for (int i = kBinsPerThread - 1; i >= 0; --i) {
      if (above < want && above + bin[i] >= want) digit = first + i, rest = want - above, weight = bin[i];
      above += bin[i];
    }
    shared.digit = digit, shared.rest = rest, shared.weight = weight;
  }

  // The cut-off among the listed keys, in every warp alike.
  __device__ Cutoff among_few(int want) {
    const int n = shared.few;
    const uint32_t mine = lane_id() < n ? shared.few_keys[lane_id()] : 0;
    const int mine_weight = lane_id() < n ? shared.few_weights[lane_id()] : 0;
    int above = 0, equal = 0;
    for (int i = 0; i < n; ++i) {
      const uint32_t other = __shfl_sync(kFullWarp, mine, i);
      const int other_weight = __shfl_sync(kFullWarp, mine_weight, i);
      above += other > mine ? other_weight : 0, equal += other == mine ? other_weight : 0;
    }
    const unsigned found = __ballot_sync(kFullWarp, lane_id() < n && above < want && above + equal >= want);
    const int lane = max(__ffs(found) - 1, 0);
    return {__shfl_sync(kFullWarp, mine, lane), want - __shfl_sync(kFullWarp, above, lane)};
  }
};

}  // namespace dhsa::cuda
