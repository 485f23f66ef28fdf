// Chunks of one batch row, read safely: whatever offsets and num_chunks hold, bounds lie in [0, seqlen_k].
#pragma once

#include <cstdint>

#include "cuda/device/scan.h"

namespace dhsa::cuda {

// Keys that batch row `batch` holds: cache_seqlens[batch], or seqlen_k where that is null.
__device__ inline int held_keys(const int* cache_seqlens, int batch, int seqlen_k) {
  return cache_seqlens == nullptr ? seqlen_k : min(max(__ldg(cache_seqlens + batch), 0), seqlen_k);
}

struct Chunks {
  const int* offsets;  // [capacity + 1]
  int count;           // clamped to [0, capacity]
  int seqlen_k;

  __device__ Chunks(const int* all_offsets, const int* num_chunks, int64_t batch, int capacity, int seqlen_k)
      : offsets(all_offsets + batch * (capacity + 1)),
        count(min(max(__ldg(num_chunks + batch), 0), capacity)),
        seqlen_k(seqlen_k) {}

  // begin(count) is where the keys that belong to no chunk start.
  __device__ int begin(int chunk) const { return min(max(__ldg(offsets + chunk), 0), seqlen_k); }
  __device__ int end(int chunk) const { return begin(chunk + 1); }

  // The first bound in [0, count] that is >= position, or count + 1; a whole warp calls, 32 probes a step.
  __device__ int first_bound_at_or_after(int position) const {
    int low = 0, high = count + 1;  // the answer lies in [low, high]
    while (low < high) {
      const int step = (high - low + 31) / 32;
      const int probe = low + (lane_id() + 1) * step - 1;
      const bool below = probe < high && begin(probe) < position;
      const int passed = __popc(__ballot_sync(kFullWarp, below));
      const int next_high = min(high, low + (passed + 1) * step - 1);
      low = min(high, low + passed * step);
      high = max(low, next_high);
    }
    return low;
  }
};

}  // namespace dhsa::cuda
