// The geometry that stages share: rows of [B, heads, L, D] tensors, chunks of a batch row, query blocks, head groups.
#pragma once

#include <algorithm>
#include <cstdint>

#include "core/types.h"

namespace dhsa::cpu {

// [B, heads, L, D] with a contiguous last dimension.
struct RowView {
  char* data = nullptr;
  int dtype = 0;              // index into the tables of Kernels
  int64_t head = 0, row = 0;  // strides, in elements
  int64_t batch_bytes = 0, head_bytes = 0, row_bytes = 0;

  RowView() = default;
  explicit RowView(const Tensor& t)
      : data(t.as<char>()),
        dtype(static_cast<int>(t.dtype)),
        head(t.stride[1]),
        row(t.stride[2]),
        batch_bytes(t.stride[0] * element_size(t.dtype)),
        head_bytes(t.stride[1] * element_size(t.dtype)),
        row_bytes(t.stride[2] * element_size(t.dtype)) {}

  char* at(int64_t b, int64_t head, int64_t t) const {
    return data + b * batch_bytes + head * head_bytes + t * row_bytes;
  }
};

// The chunks of one batch row. Whatever the offsets hold, a chunk lies in [0, length) and may be empty.
struct ChunkList {
  const int32_t* offsets;
  int64_t count, length;

  ChunkList(const Tensor& offsets_tensor, const Tensor& num_chunks, int64_t b, int64_t length)
      : offsets(offsets_tensor.as<const int32_t>() + b * offsets_tensor.shape[1]),
        count(std::clamp<int64_t>(num_chunks.as<const int32_t>()[b], 0, offsets_tensor.shape[1] - 1)),
        length(length) {}

  int64_t begin(int64_t c) const { return std::clamp<int64_t>(offsets[c], 0, length); }
  int64_t end(int64_t c) const { return std::max(begin(c), std::clamp<int64_t>(offsets[c + 1], 0, length)); }
  int64_t covered() const { return begin(count); }  // keys from here on belong to no chunk

  // The chunks that may hold keys of [first, last): a range of columns, exact for rising offsets.
  int64_t first_over(int64_t first) const {
    return std::max<int64_t>(0, std::upper_bound(offsets, offsets + count, first) - offsets - 1);
  }
  int64_t last_over(int64_t last) const { return std::lower_bound(offsets, offsets + count, last) - offsets; }
};

// Keys that batch row b holds: cache_seqlens[b], or seqlen_k where none are given.
inline int64_t held_keys(const Tensor& cache_seqlens, int64_t b, int64_t seqlen_k) {
  return cache_seqlens.given() ? std::clamp<int64_t>(cache_seqlens.as<const int32_t>()[b], 0, seqlen_k) : seqlen_k;
}

// One block of queries [first, last], at positions [p0, p1]; its candidates are the keys [begin, end).
struct Block {
  int64_t first, last, p0, p1, begin, end;

  Block(int64_t index, int64_t q_block, int64_t seqlen_q, int64_t seqlen_k, int64_t window)
      : first(index * q_block),
        last(std::min(first + q_block, seqlen_q) - 1),
        p0(seqlen_k - seqlen_q + first),
        p1(seqlen_k - seqlen_q + last),
        begin(window > 0 ? std::max<int64_t>(0, p0 - window + 1) : 0),
        end(std::max<int64_t>(0, p1 + 1)) {
    begin = std::min(begin, end);
  }
  int64_t queries() const { return last - first + 1; }
};

// Query heads that share keys, values and key list: `lists` selection heads over `kv_heads` and `q_heads`.
struct HeadGroups {
  int64_t q_heads, kv_heads, lists;

  int64_t groups() const { return std::max(lists, kv_heads); }
  int64_t heads() const { return groups() > 0 ? q_heads / groups() : 0; }  // of a group
  int64_t list(int64_t group) const { return group * lists / groups(); }
  int64_t kv_head(int64_t group) const { return group * kv_heads / groups(); }
  int64_t groups_per_list() const { return lists > 0 ? groups() / lists : 0; }
};

}  // namespace dhsa::cpu
