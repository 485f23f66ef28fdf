// Length-weighted selection without a sort: the largest cut-off key such that items above it weigh less than `want`.
// Three passes of 11, 11 and 10 bits; each builds a histogram of weights over one digit of the keys that share the
// digits found so far, and walks it from the top.
#pragma once

#include <cstdint>

#include "cuda/device/scan.h"

namespace dhsa::cuda {

// Items with a key above `key` are kept whole; those equal to it, in the order of their index, until `rest` is used.
struct Cutoff {
  uint32_t key;
  int rest;
};

template <int kThreads>
struct RadixSelect {
  static constexpr int kBins = 2048;
  static constexpr int kCached = 8192 / kThreads;  // keys a thread keeps in registers between passes
  static constexpr int kBinsPerThread = kBins / kThreads;
  static_assert(kBins % kThreads == 0, "each thread walks whole bins");
  int histogram[kBins];
  BlockScan<kThreads> scan;
  uint32_t found_digit;
  int found_rest, found_weight;  // of the bin that holds the cut-off: what is still wanted of it, and all that it holds

  // key(i) and weight(i) for i in [begin, end); weights >= 0, 0 < want <= their sum. Ends with a barrier.
  template <class Key, class Weight>
  __device__ Cutoff select(int begin, int end, int want, Key key, Weight weight) {
    uint32_t cache[kCached];
    const bool cached = end - begin <= kCached * kThreads;
    const int rounds = (end - begin + kThreads - 1) / kThreads;
    begin += threadIdx.x;
    if (cached) {
#pragma unroll
      for (int j = 0; j < kCached; ++j) {
        if (j >= rounds) break;
        const int i = begin + j * kThreads;
        if (i < end) cache[j] = key(i);
      }
    }
    uint32_t prefix = 0, known = 0;
#pragma unroll
    for (int pass = 0; pass < 3; ++pass) {
      const int shift = pass == 0 ? 21 : pass == 1 ? 10 : 0;
      const uint32_t digits = pass == 2 ? 1023 : 2047;
      for (int bin = threadIdx.x; bin < kBins; bin += kThreads) histogram[bin] = 0;
      if (threadIdx.x == 0) found_digit = 0, found_rest = want, found_weight = -1;
      __syncthreads();
      const auto count = [&](uint32_t k, int i) {
        if ((k & known) != prefix) return;
        const int w = weight(i);
        if (w > 0) atomicAdd(&histogram[(k >> shift) & digits], w);
      };
      if (cached) {
#pragma unroll
        for (int j = 0; j < kCached; ++j) {
          if (j >= rounds) break;
          const int i = begin + j * kThreads;
          if (i < end) count(cache[j], i);
        }
      } else {
        for (int i = begin; i < end; i += kThreads) count(key(i), i);
      }
      __syncthreads();
      find_digit(want);
      __syncthreads();
      prefix |= found_digit << shift;
      known |= digits << shift;
      want = found_rest;
      const bool whole = want == found_weight && prefix > 0;
      __syncthreads();
      if (whole) return {prefix - 1, 0};  // the bin is wanted to its last item: the digits below do not matter
    }
    return {prefix, want};
  }

 private:
  // The bin that holds the want-th unit of weight, counted from the top bin; thread t owns the t-th group from the top.
  __device__ void find_digit(int want) {
    const int top = kBins - 1 - static_cast<int>(threadIdx.x) * kBinsPerThread;
    int sum = 0;
#pragma unroll
    for (int i = 0; i < kBinsPerThread; ++i) sum += histogram[top - i];
    int total;
    int above = scan.exclusive_sum(sum, &total);
    if (above >= want || above + sum < want) return;
    for (int i = 0; i < kBinsPerThread; ++i) {
      const int weight = histogram[top - i];
      if (above + weight >= want) {
        found_digit = top - i, found_rest = want - above, found_weight = weight;
        return;
      }
      above += weight;
    }
  }
};

}  // namespace dhsa::cuda
