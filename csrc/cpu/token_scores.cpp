// token_scores on CPU: the definition of select_keys' order, written out. The fused calls never make this matrix.
#include <algorithm>
#include <limits>

#include "cpu/views.h"
#include "dhsa.h"

namespace dhsa::cpu {

int64_t workspace_bytes(const TokenScores&, int) { return 0; }

void run(const TokenScores& p, void*, const Executor& executor) {
  const int64_t rows = p.chunk_scores.shape[1] * p.chunk_scores.shape[2], columns = p.chunk_scores.shape[3];
  executor.run(p.chunk_scores.shape[0] * rows, [&](int64_t item, int) {
    const ChunkList chunks(p.offsets, p.num_chunks, item / rows, p.seqlen_k);
    const float* from = p.chunk_scores.as<const float>() + item * columns;
    float* to = p.scores.as<float>() + item * p.seqlen_k;
    std::fill_n(to, p.seqlen_k, -std::numeric_limits<float>::infinity());
    for (int64_t c = 0; c < chunks.count; ++c) std::fill(to + chunks.begin(c), to + chunks.end(c), from[c]);
  });
}

}  // namespace dhsa::cpu
