// chunk_scores on CPU: kBlockN pooled keys are packed once per work item and multiplied with every query block's
// vector.
#include <algorithm>

#include "cpu/dispatch.h"
#include "cpu/scratch.h"
#include "dhsa.h"

namespace dhsa::cpu {
namespace {

constexpr int64_t kRows = 256;  // query blocks of a work item
constexpr int64_t kSlice = 16;  // products of a partial sum: one float32 chain over head_dim loses a digit on scores
                                // whose parts cancel

struct Scratch {
  float *panels, *tile, *sum;
  Scratch(Arena& arena, int64_t head_dim)
      : panels(arena.take<float>(kBlockN * head_dim)),
        tile(arena.take<float>(kRows * kMaxPanel)),
        sum(arena.take<float>(kRows * kMaxPanel)) {}
};

}  // namespace

int64_t workspace_bytes(const ChunkScores& p, int workers) {
  return workers * scratch_bytes<Scratch>(p.q_pooled.shape[3]);
}

void run(const ChunkScores& p, void* workspace, const Executor& executor) {
  const Kernels& kernels = active_kernels();
  const int64_t rows = p.q_pooled.shape[2], columns = p.k_pooled.shape[2], head_dim = p.q_pooled.shape[3];
  const int64_t row_parts = ceil_div(rows, kRows), column_parts = ceil_div(columns, kBlockN);
  const int64_t parts = row_parts * column_parts;
  executor.run(p.q_pooled.shape[0] * p.q_pooled.shape[1] * parts, [&](int64_t item, int worker) {
    const Scratch scratch = worker_scratch<Scratch>(workspace, worker, head_dim);
    const int64_t list = item / parts;
    const int64_t row = item % parts / column_parts * kRows, column = item % column_parts * kBlockN;
    const int64_t m = std::min(kRows, rows - row), n = std::min(kBlockN, columns - column);
    const float* q = p.q_pooled.as<const float>() + (list * rows + row) * head_dim;
    const float* k = p.k_pooled.as<const float>() + (list * columns + column) * head_dim;
    float* scores = p.scores.as<float>() + (list * rows + row) * columns + column;

    kernels.pack_keys[0](k, head_dim, nullptr, n, round_up(n, kernels.panel), head_dim, scratch.panels);
    for (int64_t c = 0; c < n; c += kernels.panel) {
      const float* panel = scratch.panels + c * head_dim;
      const int64_t width = std::min(kernels.panel, n - c);
      const int64_t cells = m * kernels.panel;
      std::fill_n(scratch.sum, cells, 0.0f);
      for (int64_t d = 0; d < head_dim; d += kSlice) {
        kernels.gemm(m, std::min(kSlice, head_dim - d), q + d, head_dim, panel + d * kernels.panel, kernels.panel,
                     scratch.tile, kernels.panel, false);
        for (int64_t i = 0; i < cells; ++i) scratch.sum[i] += scratch.tile[i];
      }
      for (int64_t r = 0; r < m; ++r) std::copy_n(scratch.sum + r * kernels.panel, width, scores + r * columns + c);
    }
  });
}

}  // namespace dhsa::cpu
