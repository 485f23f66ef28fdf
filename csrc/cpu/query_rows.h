// The rows by which chunk_mass and refine_keys know a query block (QueryRows), for the query heads that share a list.
#pragma once

#include <algorithm>

#include "core/types.h"
#include "cpu/kernels.h"
#include "cpu/scratch.h"
#include "cpu/views.h"

namespace dhsa::cpu {

// Row u stands for the queries that end u * q_stride before the block's last; the last row, first in time, for what is
// left of them.
inline int64_t rows_of_block(int64_t queries, int64_t q_stride) { return ceil_div(queries, q_stride); }

struct BlockRows {
  const char* data = nullptr;  // row 0 of the first head
  int dtype = 0;               // index into the tables of Kernels
  int64_t heads = 0, count = 0, head_bytes = 0, row_bytes = 0;
  int64_t row = 0;  // elements from row u to row u + 1

  const char* at(int64_t head, int64_t u) const { return data + head * head_bytes + u * row_bytes; }
};

// Bytes of the means of a block, [heads of a list][rows][head_dim] in q's type; 0 where its rows are queries.
inline int64_t mean_bytes(QueryRows rows, const Tensor& q, int64_t lists, int64_t q_block, int64_t q_stride) {
  if (rows == QueryRows::kSample || lists == 0) return 0;
  const int64_t count = rows_of_block(std::min(q_block, q.shape[2]), q_stride);
  return q.shape[1] / lists * count * q.shape[3] * element_size(q.dtype);
}

// Rows that are queries stay where they are; means are written to `means`, rounded to q's type before any scaling, so
// that every backend multiplies the same numbers.
inline BlockRows block_rows(const Kernels& kernels, const RowView& q, int64_t head_dim, int64_t b, int64_t first_head,
                            int64_t heads, const Block& block, QueryRows kind, int64_t q_stride, char* means) {
  BlockRows rows;
  rows.dtype = q.dtype;
  rows.heads = heads;
  rows.count = rows_of_block(block.queries(), q_stride);
  if (kind == QueryRows::kSample) {
    rows.data = q.at(b, first_head, block.last);
    rows.head_bytes = q.head_bytes;
    rows.row_bytes = -q.row_bytes * q_stride;
    rows.row = -q.row * q_stride;
    return rows;
  }
  const int64_t bytes = head_dim * element_size(static_cast<DType>(q.dtype));
  rows.data = means;
  rows.row = head_dim;
  rows.row_bytes = bytes;
  rows.head_bytes = rows.count * bytes;
  for (int64_t head = 0; head < heads; ++head) {
    for (int64_t u = 0; u < rows.count; ++u) {
      const int64_t last = block.last - u * q_stride, first = std::max(block.first, last - q_stride + 1);
      kernels.mean_rows[q.dtype](q.at(b, first_head + head, first), q.row, last - first + 1, head_dim,
                                 means + head * rows.head_bytes + u * bytes);
    }
  }
  return rows;
}

}  // namespace dhsa::cpu
