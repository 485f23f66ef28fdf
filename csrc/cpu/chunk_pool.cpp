// chunk_pool and query_pool on CPU. Where S repeats the heads of x, a head is summed once and copied.
#include "cpu/chunk_pool.h"

#include <algorithm>
#include <cmath>

#include "cpu/dispatch.h"
#include "cpu/scratch.h"
#include "dhsa.h"

namespace dhsa::cpu {

float pool_factor(PoolScale scale, int64_t tokens) {
  const float n = static_cast<float>(std::max<int64_t>(tokens, 1));
  return scale == PoolScale::kSqrt ? 1.0f / std::sqrt(n) : scale == PoolScale::kMean ? 1.0f / n : 1.0f;
}

void pool_rows(const Kernels& kernels, const RowView& x, int64_t head_dim, int64_t b, int64_t first_head, int64_t heads,
               int64_t begin, int64_t end, float factor, float* out) {
  std::fill_n(out, head_dim, 0.0f);
  if (begin >= end) return;
  for (int64_t head = first_head; head < first_head + heads; ++head) {
    kernels.add_rows[x.dtype](x.at(b, head, begin), x.row, end - begin, head_dim, out);
  }
  kernels.scale_row(out, head_dim, factor / static_cast<float>(heads));
}

namespace {

constexpr int64_t kColumns = 32;  // pooled vectors of a work item

// Pools columns [0, columns) of every batch row and selection head; bounds(b, c) gives a column's tokens.
template <class Bounds>
void pool_columns(const Tensor& x_tensor, const Tensor& pooled, PoolScale scale, const Executor& executor,
                  const Bounds& bounds) {
  const Kernels& kernels = active_kernels();
  const RowView x(x_tensor);
  const int64_t x_heads = x_tensor.shape[1], lists = pooled.shape[1], columns = pooled.shape[2];
  const int64_t head_dim = pooled.shape[3];
  const int64_t heads = std::min(x_heads, lists), copies = lists / std::max<int64_t>(heads, 1);
  const int64_t parts = ceil_div(columns, kColumns);
  executor.run(pooled.shape[0] * heads * parts, [&](int64_t item, int) {
    const int64_t b = item / (heads * parts), s = item / parts % heads * copies;
    const PooledHeads from(x_heads, lists, s);
    const int64_t last = std::min(columns, (item % parts + 1) * kColumns);
    for (int64_t c = item % parts * kColumns; c < last; ++c) {
      const auto [begin, end] = bounds(b, c);
      float* out = pooled.as<float>() + ((b * lists + s) * columns + c) * head_dim;
      pool_rows(kernels, x, head_dim, b, from.first, from.count, begin, end, pool_factor(scale, end - begin), out);
      for (int64_t copy = 1; copy < copies; ++copy) std::copy_n(out, head_dim, out + copy * columns * head_dim);
    }
  });
}

struct Range {
  int64_t begin, end;
};

}  // namespace

int64_t workspace_bytes(const ChunkPool&, int) { return 0; }

void run(const ChunkPool& p, void*, const Executor& executor) {
  pool_columns(p.x, p.pooled, p.scale, executor, [&](int64_t b, int64_t c) {
    const ChunkList chunks(p.offsets, p.num_chunks, b, p.x.shape[2]);
    return c < chunks.count ? Range{chunks.begin(c), chunks.end(c)} : Range{0, 0};
  });
}

int64_t workspace_bytes(const QueryPool&, int) { return 0; }

void run(const QueryPool& p, void*, const Executor& executor) {
  pool_columns(p.q, p.pooled, p.scale, executor,
               [&](int64_t, int64_t c) { return Range{c * p.q_block, std::min((c + 1) * p.q_block, p.q.shape[2])}; });
}

}  // namespace dhsa::cpu
