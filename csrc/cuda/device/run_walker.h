// Walks a run list as the flat sequence of its keys: a warp turns list positions into key indices, 32 runs at a time.
//
// Lane l holds run l of a window of 32: the list positions [.., last) it ends at and `shift`, the key of a position
// less the position. A position's run is found by a binary search over the lanes' `last`, five shuffles. Every warp of
// a loader walks the list on its own and comes to the same answer, so that loaders need no synchronisation.
//
// Any content is safe: num_runs is clamped to the capacity, each run to [key_begin, key_end), and a run that ends
// before it begins is empty. Keys are below 2^26 (the launcher checks), so that 32 lengths cannot overflow.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace dhsa::cuda {

constexpr int64_t kMaxSeqlenK = int64_t(1) << 26;
constexpr int32_t kAbsentKey = 1 << 30;      // behind every position, and far from overflow
constexpr uint32_t kMaxListKeys = 1u << 30;  // a malformed list can name a key many times; it is cut here

class RunWalker {
 public:
  __device__ RunWalker(const int2* runs, int32_t num_runs, int32_t key_begin, int32_t key_end)
      : runs_(runs), num_runs_(num_runs), key_begin_(key_begin), key_end_(key_end), lane_(threadIdx.x % 32) {
    ahead_ = load(lane_);
  }

  // Keys in the whole list.
  __device__ uint32_t count_keys() const {
    uint64_t keys = 0;
#pragma unroll 4
    for (int32_t i = lane_; i < num_runs_; i += 32) keys += clipped(load(i)).y;
    for (int32_t step = 16; step > 0; step /= 2) keys += __shfl_xor_sync(0xffffffffu, keys, step);
    return uint32_t(min(keys, uint64_t(kMaxListKeys)));
  }

  // The keys at positions [begin, begin + 32 * kSlots) below `limit`: key[i] is that of position begin + 32 i + lane,
  // or kAbsentKey past the end. Returns how many there are. Calls come with rising, non-overlapping positions.
  template <int kSlots>
  __device__ int32_t keys_at(uint32_t begin, uint32_t limit, int32_t (&key)[kSlots]) {
    limit = min(limit, kMaxListKeys);
    const uint32_t end = min(begin + 32 * kSlots, limit);
#pragma unroll
    for (int32_t i = 0; i < kSlots; ++i) key[i] = kAbsentKey;
    while (true) {
#pragma unroll
      for (int32_t i = 0; i < kSlots; ++i) {
        const uint32_t slot_begin = begin + 32 * i;
        if (slot_begin < window_end_ && slot_begin + 32 > window_begin_) {
          const uint32_t position = slot_begin + lane_;
          const int32_t found = key_of(position);
          if (position >= window_begin_ && position < min(window_end_, limit)) key[i] = found;
        }
      }
      if (end <= window_end_ || next_ >= num_runs_) break;
      advance();
    }
    return begin >= limit ? 0 : int32_t(min(end, max(begin, window_end_)) - begin);
  }

  // Whether the list has a key at `position`, which no earlier call went past.
  __device__ bool reaches(uint32_t position) {
    while (window_end_ <= position && next_ < num_runs_) advance();
    return position < min(window_end_, kMaxListKeys);
  }

  // Brings kRuns runs behind those already loaded closer: a step over many windows would wait for each on its own.
  template <int kRuns>
  __device__ void prefetch() const {
    constexpr int kRunsPerLine = 128 / sizeof(int2);
    static_assert(kRuns <= 32 * kRunsPerLine, "a line for each lane");
    const int32_t run = next_ + 32 + lane_ * kRunsPerLine;
    if (lane_ < kRuns / kRunsPerLine && run < num_runs_) {
      asm volatile("prefetch.global.L1 [%0];" : : "l"(runs_ + run));
    }
  }

 private:
  __device__ int2 load(int32_t i) const { return i < num_runs_ ? __ldg(runs_ + i) : make_int2(0, 0); }

  // (first key, length) of a run inside [key_begin, key_end).
  __device__ int2 clipped(int2 run) const {
    const int32_t first = min(max(run.x, key_begin_), key_end_);
    const int32_t past = min(max(run.y, key_begin_), key_end_);
    return make_int2(first, max(past - first, 0));
  }

  __device__ void advance() {
    const int2 run = clipped(ahead_);
    next_ += 32;
    ahead_ = load(next_ + lane_);
    uint32_t sum = run.y;
#pragma unroll
    for (int32_t step = 1; step < 32; step *= 2) {
      const uint32_t below = __shfl_up_sync(0xffffffffu, sum, step);
      if (lane_ >= step) sum += below;
    }
    window_begin_ = window_end_;
    last_ = window_begin_ + sum;
    shift_ = run.x - int32_t(last_ - run.y);
    window_end_ = min(__shfl_sync(0xffffffffu, last_, 31), kMaxListKeys);
  }

  __device__ int32_t key_of(uint32_t position) const {
    int32_t run = 0;
#pragma unroll
    for (int32_t step = 16; step > 0; step /= 2) {
      if (__shfl_sync(0xffffffffu, last_, run + step - 1) <= position) run += step;
    }
    return int32_t(position) + __shfl_sync(0xffffffffu, shift_, run);
  }

  const int2* runs_;
  int32_t num_runs_, key_begin_, key_end_, lane_;
  int32_t next_ = 0;  // first run past the window
  int2 ahead_;        // this lane's run of the window after this one, loaded early
  uint32_t last_ = 0;
  int32_t shift_ = 0;
  uint32_t window_begin_ = 0, window_end_ = 0;
};

}  // namespace dhsa::cuda
