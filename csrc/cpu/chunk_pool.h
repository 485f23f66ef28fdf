// Sums of rows over tokens and heads, shared by chunk_pool, query_pool and the fused calls.
#pragma once

#include "core/types.h"
#include "cpu/kernels.h"
#include "cpu/views.h"

namespace dhsa::cpu {

float pool_factor(PoolScale scale, int64_t tokens);  // 1 / sqrt(n), 1 / n or 1

// out[d] = factor * mean over heads [first_head, first_head + heads) of the sum over tokens [begin, end) of
// x[token][d].
void pool_rows(const Kernels& kernels, const RowView& x, int64_t head_dim, int64_t b, int64_t first_head, int64_t heads,
               int64_t begin, int64_t end, float factor, float* out);

// The heads of x that selection head s reads.
struct PooledHeads {
  int64_t first, count;
  PooledHeads(int64_t x_heads, int64_t lists, int64_t s)
      : first(x_heads % lists == 0 ? s * (x_heads / lists) : s / (lists / x_heads)),
        count(x_heads % lists == 0 ? x_heads / lists : 1) {}
};

}  // namespace dhsa::cpu
