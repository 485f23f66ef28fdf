// Length-weighted selection among keys (order.h) that a thread block holds in registers: one histogram over the range
// that the keys span, then the few keys of the bin that holds the cut-off, by one warp's comparisons. radix_select.h
// answers the same for keys in memory in three histograms over fixed digits, where scores of one magnitude crowd into a
// handful of bins.
//
// Bins have equal widths in keys, that is in a score's logarithm, which suits shares of attention mass. Scores of both
// signs would crowd again, most of the keys between them being those of tiny numbers: there bins have equal widths in
// scores. Code is kept short: in decode it runs once a launch, and waits for its own instructions.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cuda/device/order.h"
#include "cuda/device/radix_select.h"

namespace dhsa::cuda {

// Thread t's key j is item j * kThreads + t; key 0: no item. Items of a warp's key j are 32 neighbours, one bit word.
template <int kThreads, int kKeys>
struct RegisterSelect {
  static constexpr int kWarps = kThreads / 32;
  static constexpr int kBins = RadixSelect<kThreads>::kBins, kDigitBits = 11;
  static constexpr int kBinsPerThread = kBins / kThreads;
  static_assert(kBins == 1 << kDigitBits, "a bin is a digit");

  struct Shared {
    uint32_t lowest[kWarps], highest[kWarps];
    uint32_t few_keys[32];
    int few_weights[32];
    int few, digit, rest;
  };
  RadixSelect<kThreads>& memory;  // its histogram and scan
  Shared& shared;

  // weight(j) of this thread's key j, > 0 where the key is not 0; 0 < want <= the sum of all. The histogram may be
  // written again after the next barrier.
  template <class Weight>
  __device__ Cutoff select(const uint32_t (&key)[kKeys], int want, Weight weight) {
    Bins bins = span(key, want, [](uint32_t) { return true; });
    while (bins.width > 0) {
      int bin_of[kKeys];
#pragma unroll
      for (int j = 0; j < kKeys; ++j) {
        bin_of[j] = bins.hold(key[j]) ? bins.of(key[j]) : -1;
        if (bin_of[j] >= 0) atomicAdd(&memory.histogram[bin_of[j]], weight(j));
      }
      __syncthreads();
      find_bin(want);
      __syncthreads();
      const int bin = shared.digit;
      want = shared.rest;
#pragma unroll
      for (int j = 0; j < kKeys; ++j) {
        if (bin_of[j] != bin) continue;
        const int at = atomicAdd(&shared.few, 1);
        if (at < 32) shared.few_keys[at] = key[j], shared.few_weights[at] = weight(j);
      }
      __syncthreads();
      if (shared.few <= 32) return among_few(want);
      __syncthreads();  // all have read `few`
      bins = span(key, want, [&](uint32_t k) { return bins.hold(k) && bins.of(k) == bin; });
    }
    return {bins.base, want};  // all that is left are equal
  }

 private:
  // Which keys are counted, [base, base + width], and in which bin: the lowest and the highest in different ones.
  struct Bins {
    uint32_t base, width;
    int shift;
    bool by_score;
    float lowest, scale;

    __device__ Bins(uint32_t low, uint32_t high) : base(low), width(high - low) {
      const float range = score_of(high) - score_of(low);
      by_score = low < kZeroKey && high > kZeroKey && range < INFINITY;
      lowest = score_of(low), scale = kBins / range;
      shift = max(32 - __clz(width) - kDigitBits, 0);
    }
    __device__ bool hold(uint32_t key) const { return key != 0 && key - base <= width; }
    __device__ int of(uint32_t key) const {  // rises with the key
      if (!by_score) return static_cast<int>((key - base) >> shift);
      return min(static_cast<int>((score_of(key) - lowest) * scale), kBins - 1);
    }
  };

  // Bins over the range of the keys that pass `among`, all empty. Ends with a barrier.
  template <class Among>
  __device__ Bins span(const uint32_t (&key)[kKeys], int want, const Among& among) {
    clear(want);
    uint32_t low = 0xffffffffu, high = 0;
#pragma unroll
    for (int j = 0; j < kKeys; ++j) {
      if (key[j] != 0 && among(key[j])) low = min(low, key[j]), high = max(high, key[j]);
    }
    low = __reduce_min_sync(kFullWarp, low), high = __reduce_max_sync(kFullWarp, high);
    if (lane_id() == 0) shared.lowest[warp_id()] = low, shared.highest[warp_id()] = high;
    __syncthreads();
    const int w = lane_id() % kWarps;
    return Bins(__reduce_min_sync(kFullWarp, shared.lowest[w]), __reduce_max_sync(kFullWarp, shared.highest[w]));
  }

  __device__ void clear(int want) {
    uint4* bins = reinterpret_cast<uint4*>(memory.histogram);
#pragma unroll
    for (int i = threadIdx.x; i < kBins / 4; i += kThreads) bins[i] = make_uint4(0, 0, 0, 0);
    if (threadIdx.x == 0) shared.few = shared.digit = 0, shared.rest = want;
  }

  // The bin that holds the want-th unit of weight from the top; thread t owns the t-th group from the top.
  __device__ void find_bin(int want) {
    using Piece = std::conditional_t<kBinsPerThread % 4 == 0, int4, int2>;
    int bin[kBinsPerThread];  // rising
    const int first = kBins - (static_cast<int>(threadIdx.x) + 1) * kBinsPerThread;
#pragma unroll
    for (int i = 0; i < kBinsPerThread; i += static_cast<int>(sizeof(Piece) / 4)) {
      *reinterpret_cast<Piece*>(bin + i) = *reinterpret_cast<const Piece*>(memory.histogram + first + i);
    }
    int sum = 0, total;
#pragma unroll
    for (int i = 0; i < kBinsPerThread; ++i) sum += bin[i];
    int above = memory.scan.exclusive_sum(sum, &total);
    if (above >= want || above + sum < want) return;
    int digit = 0, rest = 0;
#pragma unroll
    for (int i = kBinsPerThread - 1; i >= 0; --i) {
      if (above < want && above + bin[i] >= want) digit = first + i, rest = want - above;
      above += bin[i];
    }
    shared.digit = digit, shared.rest = rest;
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
