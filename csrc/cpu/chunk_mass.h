// chunk_mass for one query block, shared by the stage and the fused calls; and the pooled keys as both read them.
#pragma once

#include "core/types.h"
#include "cpu/kernels.h"
#include "cpu/query_rows.h"
#include "cpu/scratch.h"
#include "cpu/views.h"

namespace dhsa::cpu {

// The pooled keys of one list: packed for gemm, [round_up(C, kMaxPanel) / panel][head_dim][panel], where many
// query blocks share them; or the rows of k_pooled as they are, [C][head_dim], where a decode call reads them once.
struct PooledKeys {
  const float* data;
  int64_t columns, head_dim;
  int64_t panel;  // 0: rows

  static int64_t padded(int64_t chunks) { return round_up(chunks, kMaxPanel); }

  // out[m][c1 - c0] = q[m] . pooled[c] for c of [c0, c1), multiples of kMaxPanel; columns past C come out finite.
  void products(const Kernels& kernels, const float* q, int64_t m, int64_t c0, int64_t c1, float* out) const;
};

// The pooled keys that can matter to a block: a range of columns, rounded out to kMaxPanel.
struct ColumnRange {
  int64_t c0, c1;
  ColumnRange(const ChunkList& chunks, const Block& block)
      : c0(std::min(chunks.first_over(block.begin), chunks.count) / kMaxPanel * kMaxPanel),
        c1(std::max(c0, round_up(std::min(chunks.last_over(block.end), chunks.count), kMaxPanel))) {}
};

// In place of one chunk's packed vector: the chunk that holds p1, ended at p1 + 1 (sparse_prefill's strict).
struct CutChunk {
  int64_t column = -1;  // -1: none
  int64_t tokens = 0;
  const float* vector = nullptr;  // [head_dim]
};

struct MassScratch {
  static constexpr int64_t kRows = 16;
  float *q, *z, *log_n;  // [kRows][head_dim], [kRows][C], [C]
  MassScratch(Arena& arena, int64_t chunks, int64_t head_dim)
      : q(arena.take<float>(kRows * head_dim)),
        z(arena.take<float>(kRows * PooledKeys::padded(chunks))),
        log_n(arena.take<float>(PooledKeys::padded(chunks))) {}
};

// scores[C] (columns to round_up(C, kMaxPanel) are scratch) and row_lse[head * lse_stride + row] of the block's rows.
void mass_block(const Kernels& kernels, const BlockRows& rows, const PooledKeys& pooled, const ChunkList& chunks,
                const CutChunk& cut, const Block& block, const Softmax& softmax, float* scores, float* row_lse,
                int64_t lse_stride, const MassScratch& scratch);

}  // namespace dhsa::cpu
