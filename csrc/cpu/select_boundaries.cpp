// select_boundaries on CPU: a stable radix sort of a row's scores, then the greedy walk. O(Lk) per row, whatever the
// scores: an accepted cut blocks 2 * nms_radius + 1 tokens, and cuts lie further apart than nms_radius.
#include <algorithm>
#include <cmath>
#include <limits>

#include "cpu/dispatch.h"
#include "cpu/key_choice.h"
#include "cpu/scratch.h"
#include "dhsa.h"

namespace dhsa::cpu {
namespace {

struct Scratch {
  uint32_t* keys;         // [Lk] falling order: smaller comes first
  int32_t *order, *swap;  // [Lk]
  uint8_t* state;         // [Lk + 1]
  int64_t* room;          // [segments]
  Scratch(Arena& arena, const SelectBoundaries& p) {
    const int64_t seqlen_k = p.scores.shape[1];
    keys = arena.take<uint32_t>(seqlen_k);
    order = arena.take<int32_t>(seqlen_k);
    swap = arena.take<int32_t>(seqlen_k);
    state = arena.take<uint8_t>(seqlen_k + 1);
    room = arena.take<int64_t>(p.segment > 0 ? ceil_div(seqlen_k, p.segment) : 1);
  }
};

enum State : uint8_t { kFree, kBlocked, kCut };

void sort_candidates(Scratch& s, int64_t n) {
  for (int shift = 0; shift < 32; shift += 8) {
    int64_t next[257] = {};
    for (int64_t i = 0; i < n; ++i) ++next[((s.keys[s.order[i]] >> shift) & 255u) + 1];
    for (int digit = 0; digit < 256; ++digit) next[digit + 1] += next[digit];
    for (int64_t i = 0; i < n; ++i) s.swap[next[(s.keys[s.order[i]] >> shift) & 255u]++] = s.order[i];
    std::swap(s.order, s.swap);
  }
}

void cut(uint8_t* state, int64_t seqlen_k, int64_t t, int64_t radius) {
  const int64_t last = std::min(seqlen_k, radius < seqlen_k - t ? t + radius : seqlen_k);
  for (int64_t i = radius < t ? t - radius : 0; i <= last; ++i) {
    if (state[i] == kFree) state[i] = kBlocked;
  }
  state[t] = kCut;
}

void select_row(const SelectBoundaries& p, int64_t b, Scratch s) {
  const int64_t seqlen_k = p.scores.shape[1], capacity = p.offsets.shape[1] - 1;
  const int64_t segment = p.segment > 0 ? p.segment : std::max<int64_t>(seqlen_k, 1);
  const float* scores = p.scores.as<const float>() + b * seqlen_k;
  int32_t* offsets = p.offsets.as<int32_t>() + b * (capacity + 1);

  std::fill_n(s.state, seqlen_k + 1, static_cast<uint8_t>(kFree));
  for (int64_t t = 0; t < seqlen_k; t += segment) {
    const int64_t tokens = std::min(segment, seqlen_k - t);
    const int64_t quota =
        tokens == segment || p.segment == 0 ? p.max_chunks : std::max<int64_t>(1, p.max_chunks * tokens / segment);
    s.room[t / segment] = quota - 1;
    cut(s.state, seqlen_k, t, p.nms_radius);
  }
  cut(s.state, seqlen_k, seqlen_k, p.nms_radius);

  int64_t n = 0;
  for (int64_t t = 0; t < seqlen_k; ++t) {
    if (s.state[t] != kFree || std::isnan(scores[t]) || scores[t] <= p.threshold ||
        scores[t] == -std::numeric_limits<float>::infinity()) {
      continue;
    }
    s.keys[t] = ~order_key(scores[t]);
    s.order[n++] = static_cast<int32_t>(t);
  }
  sort_candidates(s, n);
  for (int64_t i = 0; i < n; ++i) {
    const int64_t t = s.order[i];
    if (s.state[t] != kFree || s.room[t / segment] == 0) continue;
    --s.room[t / segment];
    cut(s.state, seqlen_k, t, p.nms_radius);
  }

  int64_t cuts = 0;
  for (int64_t t = 0; t < seqlen_k; ++t) {
    if (s.state[t] == kCut) offsets[cuts++] = static_cast<int32_t>(t);
  }
  p.num_chunks.as<int32_t>()[b] = static_cast<int32_t>(cuts);
  std::fill(offsets + cuts, offsets + capacity + 1, static_cast<int32_t>(seqlen_k));
}

}  // namespace

int64_t workspace_bytes(const SelectBoundaries& p, int workers) { return workers * scratch_bytes<Scratch>(p); }

void run(const SelectBoundaries& p, void* workspace, const Executor& executor) {
  executor.run(p.scores.shape[0],
               [&](int64_t b, int worker) { select_row(p, b, worker_scratch<Scratch>(workspace, worker, p)); });
}

}  // namespace dhsa::cpu
