// Stage 6's order of keys, shared by select_keys, refine_keys and the fused calls: which keys a block keeps, as runs.
#pragma once

#include <cstdint>

#include "core/types.h"
#include "cpu/scratch.h"
#include "cpu/views.h"

namespace dhsa::cpu {

// Unsigned keys in the order of the scores: NaN counts as -inf, -0 equals +0.
uint32_t order_key(float score);

// The items of a falling order that fill a quota: those with a greater key whole, then `left` units of those with this
// key, lower index first. Weights null: one unit each. quota > 0.
struct Cutoff {
  uint32_t key;
  int64_t left;
};
Cutoff find_cutoff(const uint32_t* keys, const int32_t* weights, int64_t n, int64_t quota);

// Collects rising half-open runs, merging adjacent ones. Past its capacity it keeps the first R - 1 runs and the last.
class RunWriter {
 public:
  RunWriter(int32_t* runs, int64_t capacity) : runs_(runs), capacity_(capacity) {}

  void add(int64_t begin, int64_t end) {
    if (begin >= end) return;
    if (begin != end_) {
      flush();
      begin_ = begin;
    }
    end_ = end;
  }
  int64_t finish() {  // returns num_runs
    flush();
    return count_;
  }

 private:
  void flush() {
    if (begin_ >= end_) return;
    const int64_t slot = count_ < capacity_ ? count_++ : capacity_ - 1;
    runs_[2 * slot] = static_cast<int32_t>(begin_);
    runs_[2 * slot + 1] = static_cast<int32_t>(end_);
  }
  int32_t* runs_;
  int64_t capacity_, count_ = 0, begin_ = 0, end_ = 0;
};

// A block's forced keys are [begin, sink_end) and [local_begin, end); `room` of the others are kept beside them.
struct ForcedKeys {
  int64_t begin, sink_end, local_begin, end, room;

  ForcedKeys(const Block& block, const KeyChoice& choice, int64_t covered);
};

bool keeps_all(const Block& block, const KeyChoice& choice, int64_t seqlen_q);  // holds a query of the dense tail

struct ChoiceScratch {
  uint32_t* keys;    // [C]
  int32_t* weights;  // [C]
  ChoiceScratch(Arena& arena, int64_t chunks)
      : keys(arena.take<uint32_t>(chunks)), weights(arena.take<int32_t>(chunks)) {}
};

// Calls emit(begin, end), rising, for the first `quota` keys of [first, last) in stage 6's order.
template <class Emit>
void choose_keys(const float* scores, const ChunkList& chunks, int64_t first, int64_t last, int64_t quota,
                 const ChoiceScratch& scratch, const Emit& emit) {
  if (quota <= 0 || first >= last) return;
  const int64_t c0 = chunks.first_over(first), c1 = std::max(c0, chunks.last_over(last));
  int64_t total = 0;
  for (int64_t c = c0; c < c1; ++c) {
    const int64_t size = std::min(chunks.end(c), last) - std::max(chunks.begin(c), first);
    scratch.keys[c - c0] = order_key(scores[c]);
    scratch.weights[c - c0] = static_cast<int32_t>(std::max<int64_t>(size, 0));
    total += scratch.weights[c - c0];
  }
  Cutoff cutoff{0, 0};  // every key is above 0
  if (total > quota) cutoff = find_cutoff(scratch.keys, scratch.weights, c1 - c0, quota);
  for (int64_t c = c0; c < c1; ++c) {
    const uint32_t key = scratch.keys[c - c0];
    if (key < cutoff.key) continue;
    int64_t size = scratch.weights[c - c0];
    if (key == cutoff.key) {
      size = std::min(size, cutoff.left);
      cutoff.left -= size;
    }
    const int64_t begin = std::max(chunks.begin(c), first);
    emit(begin, begin + size);
  }
}

// select_keys for one block; returns num_runs.
int64_t select_block(const float* scores, const ChunkList& chunks, const Block& block, const KeyChoice& choice,
                     int64_t seqlen_q, int32_t* runs, int64_t capacity, const ChoiceScratch& scratch);

}  // namespace dhsa::cpu
