// Sparse attention of one query block over one list of keys, shared by sparse_attention and the fused calls.
//
//   out[i] = sum_j softmax_j(logit(i, j)) v[j] over the keys j of the list with p_i - window < j <= p_i
//   logit  = softcap * tanh(scale q.k / softcap), or scale q.k;  lse[i] = log sum_j exp(logit(i, j))
//
// Blocks of several queries: kBlockN keys at a time are gathered into packed float32 tiles, once for all rows (queries
// of all heads that share the KV head), then an online softmax. On x86 keys are read in place by packed queries. Single
// queries: K and V rows are read in place.
// Accumulation is float32. A row with no key: out 0, lse -inf. A value row that a query may not see never touches it,
// NaN included. Rows are worked as many at a time as the caches hold, so that the scratch has one size.
#pragma once

#include "core/types.h"
#include "cpu/caches.h"
#include "cpu/dispatch.h"
#include "cpu/kernels.h"
#include "cpu/scratch.h"
#include "cpu/views.h"

namespace dhsa::cpu {

constexpr int64_t kQueryKeys = 256;                // keys of a single query at once
constexpr int64_t kLateKeys = 32;                  // of a tile past the first query's own key: few rows see the last
constexpr int64_t kAskingRows = 64;                // of a tile, beside which the next one is asked for
constexpr int64_t kListedValuesCache = 48 * 1024;  // whose sets hold a tile's values where they lie

// How many rows share a tile at most, a multiple of 64: repacking for the next ones costs 2 % of their products.
int64_t rows_at_once(const Kernels& kernels, DType type, int64_t head_dim);

struct AttentionArgs {
  const Kernels* kernels;
  RowView q, k, v, out;
  float* lse;
  int64_t lse_batch, lse_head, lse_row;  // strides
  HeadGroups heads;
  int64_t head_dim, seqlen_q, seqlen_k;
  Softmax softmax;
  int64_t max_rows;      // at once
  bool values_in_place;  // may they be read where they lie?

  // P has q, k, v, out, lse and softmax.
  template <class P>
  AttentionArgs(const Kernels& table, const P& p, int64_t lists)
      : kernels(&table),
        q(p.q),
        k(p.k),
        v(p.v),
        out(p.out),
        lse(p.lse.template as<float>()),
        lse_batch(p.lse.stride[0]),
        lse_head(p.lse.stride[1]),
        lse_row(p.lse.stride[2]),
        heads{p.q.shape[1], p.k.shape[1], lists},
        head_dim(p.q.shape[3]),
        seqlen_q(p.q.shape[2]),
        seqlen_k(p.k.shape[2]),
        softmax(p.softmax),
        max_rows(rows_at_once(table, p.k.dtype, head_dim)),
        values_in_place(table.add_listed_columns[v.dtype] != nullptr && head_dim % kMaxPanel == 0 &&
                        caches().first >= kListedValuesCache) {}
};

struct RunList {
  const int32_t* runs;
  int64_t count;
};

struct AttentionScratch {             // R: rows_at_once
  float *q, *acc, *probs;             // [R][D], [R][D], [R][kBlockN], padded
  float *k_panels, *v_panels;         // [keys of a tile][D], padded
  float *row_max, *row_sum, *shrink;  // [R]
  int32_t *low, *high;                // [R] the keys that a row sees: low < key <= high
  int32_t *index, *next_index;        // [kQueryKeys] keys of the tile, and of the one after it
  int32_t* seen_index;                // [keys of a tile] those that one row sees
  float* seen_probs;                  // [keys of a tile]

  AttentionScratch(Arena& arena, const Kernels& kernels, DType type, int64_t head_dim) {
    const int64_t padded_dim = round_up(head_dim, kMaxPanel), keys = kernels.pair_keys;
    const int64_t rows = rows_at_once(kernels, type, head_dim);
    q = arena.take<float>(rows * round_up(head_dim, kPairStep));
    acc = arena.take<float>(rows * padded_dim);
    probs = arena.take<float>((rows + kMaxPanel) * kBlockN);
    k_panels = arena.take<float>(keys * round_up(head_dim, kPairStep));
    v_panels = arena.take<float>(keys * padded_dim);
    row_max = arena.take<float>(rows);
    row_sum = arena.take<float>(rows);
    shrink = arena.take<float>(rows);
    low = arena.take<int32_t>(rows);
    high = arena.take<int32_t>(rows);
    index = arena.take<int32_t>(kQueryKeys + 4);
    next_index = arena.take<int32_t>(kQueryKeys + 4);
    seen_index = arena.take<int32_t>(keys);
    seen_probs = arena.take<float>(keys);
  }
};

// The queries of `block` for one head group.
void attend_block(const AttentionArgs& args, int64_t b, int64_t group, const Block& block, RunList runs,
                  const AttentionScratch& scratch);

// A part of one query's keys: those with ranks [first_rank, last_rank) among the visible ones of the list. Leaves, per
// head of the group, the running maximum, sum and unscaled output at row_max[h], row_sum[h], acc[h * head_dim].
void attend_part(const AttentionArgs& args, int64_t b, int64_t group, int64_t query, RunList runs, int64_t first_rank,
                 int64_t last_rank, float* row_max, float* row_sum, float* acc, const AttentionScratch& scratch);

// out = acc / row_sum and lse = row_max + log(row_sum) for one row.
void finish_row(const AttentionArgs& args, int64_t b, int64_t head, int64_t query, float row_max, float row_sum,
                const float* acc);

}  // namespace dhsa::cpu
