// chunk_mass on CPU: sixteen rows at a time against every packed chunk, then a softmax over the chunks.
#include "cpu/chunk_mass.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "cpu/dispatch.h"
#include "dhsa.h"

namespace dhsa::cpu {

void PooledKeys::products(const Kernels& kernels, const float* q, int64_t m, int64_t c0, int64_t c1, float* out) const {
  const int64_t n = c1 - c0;
  if (panel > 0) {
    kernels.gemm(m, head_dim, q, head_dim, data + c0 * head_dim, n, out, n, false);
    return;
  }
  const int64_t real = std::min(c1, columns) - c0;
  kernels.dot_rows[0](q, m, data + c0 * head_dim, head_dim, nullptr, real, head_dim, out, n);
  for (int64_t r = 0; r < m; ++r) std::fill(out + r * n + real, out + (r + 1) * n, 0.0f);
}

void mass_block(const Kernels& kernels, const BlockRows& rows, const PooledKeys& pooled, const ChunkList& chunks,
                const CutChunk& cut, const Block& block, const Softmax& softmax, float* scores, float* row_lse,
                int64_t lse_stride, const MassScratch& scratch) {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  const int64_t head_dim = pooled.head_dim;
  const auto [c0, c1] = ColumnRange(chunks, block);
  const int64_t n = c1 - c0, last = std::min(c1, chunks.count);

  // A column whose log_n is -inf holds no candidate.
  const auto tokens = [&](int64_t c) { return c == cut.column ? cut.tokens : chunks.end(c) - chunks.begin(c); };
  std::fill_n(scratch.log_n, n, -kInfinity);
  for (int64_t c = c0; c < last; ++c) {
    const bool candidate = chunks.begin(c) < block.end && chunks.end(c) > block.begin;
    if (candidate && tokens(c) > 0) scratch.log_n[c - c0] = std::log(static_cast<float>(tokens(c)));
  }

  std::fill_n(scores, PooledKeys::padded(pooled.columns), 0.0f);
  for (int64_t head = 0; head < rows.heads; ++head) {
    for (int64_t u0 = 0; u0 < rows.count; u0 += MassScratch::kRows) {
      const int64_t m = std::min(MassScratch::kRows, rows.count - u0);
      kernels.load_rows[rows.dtype](rows.at(head, u0), rows.row, m, head_dim, softmax.scale, scratch.q);
      pooled.products(kernels, scratch.q, m, c0, c1, scratch.z);
      if (cut.column >= c0 && cut.column < c1) {
        kernels.dot_rows[0](scratch.q, m, cut.vector, head_dim, nullptr, 1, head_dim, scratch.z + cut.column - c0, n);
      }
      for (int64_t u = 0; u < m; ++u) {
        row_lse[head * lse_stride + u0 + u] =
            n == 0 ? -kInfinity : kernels.mass_row(scratch.z + u * n, scratch.log_n, n, softmax.softcap, scores + c0);
      }
    }
  }
  const float votes = static_cast<float>(rows.heads * rows.count);
  for (int64_t c = c0; c < last; ++c) {
    if (tokens(c) > 0) scores[c] /= votes * static_cast<float>(tokens(c));
  }
}

namespace {

struct Scratch {
  float* scores;
  char* means;
  MassScratch mass;
  Scratch(Arena& arena, const ChunkMass& p)
      : scores(arena.take<float>(PooledKeys::padded(p.k_mean.shape[2]))),
        means(arena.take<char>(mean_bytes(p.rows, p.q, p.k_mean.shape[1], p.q_block, p.q_stride))),
        mass(arena, p.k_mean.shape[2], p.k_mean.shape[3]) {}
};

int64_t packed_floats(const ChunkMass& p) {  // of one list
  return PooledKeys::padded(p.k_mean.shape[2]) * p.k_mean.shape[3];
}

}  // namespace

int64_t workspace_bytes(const ChunkMass& p, int workers) {
  const int64_t lists = p.k_mean.shape[0] * p.k_mean.shape[1];
  return round_up(lists * packed_floats(p) * 4, kAlign) + workers * scratch_bytes<Scratch>(p);
}

void run(const ChunkMass& p, void* workspace, const Executor& executor) {
  const Kernels& kernels = active_kernels();
  const RowView q(p.q);
  const int64_t batch = p.k_mean.shape[0], lists = p.k_mean.shape[1], columns = p.k_mean.shape[2];
  const int64_t head_dim = p.k_mean.shape[3], blocks = p.scores.shape[2], samples = p.row_lse.shape[3];
  const int64_t heads = lists > 0 ? p.q.shape[1] / lists : 0;
  Arena arena(workspace);
  float* panels = arena.take<float>(batch * lists * packed_floats(p));
  void* workers = arena.take<char>(0);

  executor.run(batch * lists, [&](int64_t list, int) {
    kernels.pack_keys[0](p.k_mean.as<const float>() + list * columns * head_dim, head_dim, nullptr, columns,
                         PooledKeys::padded(columns), head_dim, panels + list * packed_floats(p));
  });
  executor.run(batch * lists * blocks, [&](int64_t item, int worker) {
    const Scratch scratch = worker_scratch<Scratch>(workers, worker, p);
    const int64_t list = item / blocks, b = list / lists, first_head = list % lists * heads, j = item % blocks;
    const int64_t held = held_keys(p.cache_seqlens, b, p.seqlen_k);
    const Block block(j, p.q_block, p.q.shape[2], held, p.softmax.window);
    float* row_lse = p.row_lse.as<float>() + ((b * p.q.shape[1] + first_head) * blocks + j) * samples;
    for (int64_t head = 0; head < heads; ++head) {
      std::fill_n(row_lse + head * blocks * samples, samples, std::numeric_limits<float>::infinity());
    }
    const BlockRows rows =
        block_rows(kernels, q, head_dim, b, first_head, heads, block, p.rows, p.q_stride, scratch.means);
    mass_block(kernels, rows, {panels + list * packed_floats(p), columns, head_dim, kernels.panel},
               ChunkList(p.offsets, p.num_chunks, b, held), CutChunk{}, block, p.softmax, scratch.scores, row_lse,
               blocks * samples, scratch.mass);
    std::copy_n(scratch.scores, columns, p.scores.as<float>() + item * columns);
  });
}

}  // namespace dhsa::cpu
