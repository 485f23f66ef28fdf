// sparse_attention's kernel arguments, and how its work is cut into tiles that a thread block answers one at a time.
//
// Query heads that share both a key list and a KV head form a head group (all H / Hkv of them when S <= Hkv, one head
// when S = H). A query block of such a group is packed into rows, row = token * group + head, so that one gathered key
// feeds every head of the group; tiles are kBlockM consecutive rows. Blocks in the tail of the call, where dense_tail
// makes lists long, are split along the keys into up to max_splits items, which come first in the order; how many of
// them have work is decided on the device from the length of the list, and attention_combine merges their answers.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace dhsa::cuda {

struct Strides {
  int64_t batch, head, row;  // elements
};

struct AttentionParams {
  const void *q, *k, *v;    // [B, H, Lq, D], [B, Hkv, Lk, D] twice
  void* out;                // [B, H, Lq, D]
  float* lse;               // [B, H, Lq]
  const int2* runs;         // [B, S, nQ, R]: half-open (begin, end)
  const int32_t* num_runs;  // [B, S, nQ]
  Strides q_stride, k_stride, v_stride, out_stride;
  int32_t batch, heads, seqlen_q, seqlen_k, q_block, num_blocks, run_capacity;
  int32_t group;            // query heads of a head group
  int32_t num_groups;       // head groups
  int32_t groups_per_kv;    // head groups that share a KV head
  int32_t select_heads;     // S
  int32_t groups_per_list;  // head groups that share a list
  int32_t window;           // 0 = none
  float scale, softcap;
  int32_t block_rows, block_tiles;  // rows of a tile (kBlockM), tiles of a full query block; set by the launchers
  int32_t tail_blocks;              // the last blocks, which may be split
  int32_t max_splits, min_split_keys;
  float* partial_out;    // [B, num_groups, tail_blocks, max_splits, q_block * group, D]
  float* partial_lse;    // [B, num_groups, tail_blocks, max_splits, q_block * group]
  int32_t* split_count;  // [B, num_groups, tail_blocks, block_tiles]: items that wrote a partial answer; 1 = none did
};

// One thread block's errand: rows [first_row, first_row + num_rows) of a query block, for keys in [key_begin, key_end).
struct WorkItem {
  int32_t batch, group, block;
  int32_t first_row, num_rows;  // num_rows <= 0: nothing to do
  int32_t split;                // -1: not a tail block
  int32_t block_position;       // position of the block's first query
  int32_t first_position, last_position;
  int32_t key_begin, key_end;  // keys that some row may see; lists are clipped to it
};

__host__ __device__ inline int64_t tail_items(const AttentionParams& p) {
  return int64_t(p.batch) * p.num_groups * p.tail_blocks * p.block_tiles * p.max_splits;
}

__host__ __device__ inline int64_t num_items(const AttentionParams& p) {
  return tail_items(p) + int64_t(p.batch) * p.num_groups * (p.num_blocks - p.tail_blocks) * p.block_tiles;
}

// Tail items first, the splits of a tile side by side; then tiles by KV head and rising query block, so that thread
// blocks that run together read the same head's keys: at 128K and head_dim 128 one head's K and V (67 MB) exceed L2.
template <int kBlockM>
__device__ inline WorkItem work_item(const AttentionParams& p, int32_t index) {
  WorkItem item;
  const int32_t tail = int32_t(tail_items(p));
  const bool in_tail = index < tail;
  int32_t rest = in_tail ? index : index - tail;
  item.split = in_tail ? rest % p.max_splits : -1;
  if (in_tail) rest /= p.max_splits;
  const int32_t tile = rest % p.block_tiles;
  rest /= p.block_tiles;
  const int32_t blocks = in_tail ? p.tail_blocks : p.num_blocks - p.tail_blocks;
  item.block = rest % blocks + (in_tail ? p.num_blocks - p.tail_blocks : 0);
  rest /= blocks;
  item.group = rest % p.num_groups, item.batch = rest / p.num_groups;
  const int32_t first_token = item.block * p.q_block;
  const int32_t tokens = min(p.q_block, p.seqlen_q - first_token);
  item.first_row = tile * kBlockM;
  item.num_rows = min(kBlockM, tokens * p.group - item.first_row);
  item.block_position = p.seqlen_k - p.seqlen_q + first_token;
  item.first_position = item.block_position + item.first_row / p.group;
  item.last_position = item.block_position + (item.first_row + max(item.num_rows, 1) - 1) / p.group;
  item.key_end = max(0, min(p.seqlen_k, item.last_position + 1));
  item.key_begin = p.window > 0 ? max(0, min(item.key_end, item.first_position - p.window + 1)) : 0;
  return item;
}

__device__ inline int64_t list_index(const AttentionParams& p, const WorkItem& item) {
  return (int64_t(item.batch) * p.select_heads + item.group / p.groups_per_list) * p.num_blocks + item.block;
}

// Where a packed row's query, output and lse lie.
struct RowPlace {
  int32_t head, token, position;
};

__device__ inline RowPlace row_place(const AttentionParams& p, const WorkItem& item, int32_t row_in_tile) {
  const int32_t row = item.first_row + row_in_tile;
  const int32_t token = row / p.group;
  return {item.group * p.group + row % p.group, item.block * p.q_block + token, item.block_position + token};
}

// A tail item's share of the n keys of its list: positions [begin, end) of the list, in multiples of kBlockN.
struct SplitRange {
  uint32_t begin, end;
  int32_t count;  // items with a share
};

template <int kBlockN>
__device__ inline SplitRange split_range(const AttentionParams& p, int32_t split, uint32_t num_keys) {
  uint32_t share = max(uint32_t(p.min_split_keys), (num_keys + p.max_splits - 1) / p.max_splits);
  share = (share + kBlockN - 1) / kBlockN * kBlockN;
  const int32_t count = max(1, int32_t((num_keys + share - 1) / share));
  return {min(num_keys, split * share), min(num_keys, (split + 1) * share), count};
}

// Row of partial_lse (and of partial_out, times head_dim) that a tail item's packed row writes.
__device__ inline int64_t partial_row(const AttentionParams& p, const WorkItem& item, int32_t row_in_tile) {
  const int64_t tail_block = item.block - (p.num_blocks - p.tail_blocks);
  const int64_t list = (int64_t(item.batch) * p.num_groups + item.group) * p.tail_blocks + tail_block;
  return (list * p.max_splits + item.split) * (p.q_block * p.group) + item.first_row + row_in_tile;
}

__device__ inline int32_t* split_count(const AttentionParams& p, const WorkItem& item, int32_t tile) {
  const int64_t tail_block = item.block - (p.num_blocks - p.tail_blocks);
  const int64_t list = (int64_t(item.batch) * p.num_groups + item.group) * p.tail_blocks + tail_block;
  return p.split_count + list * p.block_tiles + tile;
}

}  // namespace dhsa::cuda
