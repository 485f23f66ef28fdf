#include "cpu/key_choice.h"

#include <cmath>
#include <limits>

#include "core/half.h"

namespace dhsa::cpu {

uint32_t order_key(float score) {
  const uint32_t bits = bits_from_float(std::isnan(score) ? -std::numeric_limits<float>::infinity() : score + 0.0f);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// A weighted radix select: four passes of eight bits find the key at which the running weight reaches the quota.
Cutoff find_cutoff(const uint32_t* keys, const int32_t* weights, int64_t n, int64_t quota) {
  uint32_t prefix = 0, mask = 0;
  for (int shift = 24; shift >= 0; shift -= 8) {
    int64_t weight_of[256] = {};
    for (int64_t i = 0; i < n; ++i) {
      if ((keys[i] & mask) == prefix) weight_of[(keys[i] >> shift) & 255u] += weights ? weights[i] : 1;
    }
    uint32_t digit = 255;
    for (; digit > 0 && weight_of[digit] < quota; --digit) quota -= weight_of[digit];
    prefix |= digit << shift;
    mask |= 255u << shift;
  }
  return {prefix, quota};
}

ForcedKeys::ForcedKeys(const Block& block, const KeyChoice& choice, int64_t covered)
    : begin(block.begin),
      sink_end(std::clamp(choice.sink, block.begin, block.end)),
      local_begin(std::clamp(std::min(block.p0 - choice.local + 1, covered), sink_end, block.end)),
      end(block.end) {
  const int64_t forced = (sink_end - begin) + (end - local_begin);
  room = std::max<int64_t>(0, std::min(choice.budget, end - begin) - forced);
}

bool keeps_all(const Block& block, const KeyChoice& choice, int64_t seqlen_q) {
  return block.last >= seqlen_q - choice.dense_tail;
}

int64_t select_block(const float* scores, const ChunkList& chunks, const Block& block, const KeyChoice& choice,
                     int64_t seqlen_q, int32_t* runs, int64_t capacity, const ChoiceScratch& scratch) {
  RunWriter writer(runs, capacity);
  if (keeps_all(block, choice, seqlen_q)) {
    writer.add(block.begin, block.end);
    return writer.finish();
  }
  const ForcedKeys forced(block, choice, chunks.covered());
  writer.add(forced.begin, forced.sink_end);
  choose_keys(scores, chunks, forced.sink_end, forced.local_begin, forced.room, scratch,
              [&](int64_t begin, int64_t end) { writer.add(begin, end); });
  writer.add(forced.local_begin, forced.end);
  return writer.finish();
}

}  // namespace dhsa::cpu
