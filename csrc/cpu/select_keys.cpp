// select_keys on CPU: one work item per list of keys.
#include <algorithm>

#include "cpu/key_choice.h"
#include "dhsa.h"

namespace dhsa::cpu {

int64_t workspace_bytes(const SelectKeys& p, int workers) {
  return workers * scratch_bytes<ChoiceScratch>(p.chunk_scores.shape[3]);
}

void run(const SelectKeys& p, void* workspace, const Executor& executor) {
  const int64_t lists = p.chunk_scores.shape[1], blocks = p.chunk_scores.shape[2], columns = p.chunk_scores.shape[3];
  const int64_t capacity = p.runs.shape[3];
  executor.run(p.chunk_scores.shape[0] * lists * blocks, [&](int64_t item, int worker) {
    const int64_t b = item / (lists * blocks), held = held_keys(p.cache_seqlens, b, p.seqlen_k);
    const ChunkList chunks(p.offsets, p.num_chunks, b, held);
    const Block block(item % blocks, p.q_block, p.seqlen_q, held, p.choice.window);
    int32_t* runs = p.runs.as<int32_t>() + item * capacity * 2;
    const int64_t count =
        select_block(p.chunk_scores.as<const float>() + item * columns, chunks, block, p.choice, p.seqlen_q, runs,
                     capacity, worker_scratch<ChoiceScratch>(workspace, worker, columns));
    std::fill(runs + 2 * count, runs + 2 * capacity, 0);
    p.num_runs.as<int32_t>()[item] = static_cast<int32_t>(count);
  });
}

}  // namespace dhsa::cpu
