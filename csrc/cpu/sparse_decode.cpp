// sparse_decode on CPU: choose the keys of each query and list; attend to them in parts of equal length, so that a few
// heads keep every core busy; merge the parts by their maxima and sums. The parts depend on the number of keys alone,
// never on the number of queries or workers: decoding queries together or one by one gives the same bits.
#include <algorithm>
#include <cmath>

#include "cpu/attention.h"
#include "cpu/chunk_mass.h"
#include "cpu/chunk_pool.h"
#include "cpu/dispatch.h"
#include "cpu/key_choice.h"
#include "cpu/refine_keys.h"
#include "dhsa.h"

namespace dhsa::cpu {
namespace {

constexpr int64_t kPartKeys = 512;
constexpr int64_t kMaxParts = 16;

struct Shapes {
  int64_t batch, seqlen_q, seqlen_k, head_dim, chunks, lists, runs, parts;
  HeadGroups heads;
  KeyChoice choice;

  explicit Shapes(const SparseDecode& p)
      : batch(p.q.shape[0]),
        seqlen_q(p.q.shape[2]),
        seqlen_k(p.k.shape[2]),
        head_dim(p.q.shape[3]),
        chunks(p.k_pooled.shape[2]),
        lists(p.k_pooled.shape[1]),
        parts(std::clamp<int64_t>(ceil_div(seqlen_k, kPartKeys), 1, kMaxParts)),
        heads{p.q.shape[1], p.k.shape[1], lists},
        choice(p.choice) {
    choice.sink = std::min(choice.sink, seqlen_k);
    choice.local = std::min(choice.local, seqlen_k);
    choice.dense_tail = 0;
    runs = p.refine > 0 ? refined_run_capacity(seqlen_k, choice.budget)
                        : run_capacity(chunks, choice.budget, choice.min_chunk);
  }
  int64_t list_items() const { return batch * lists * seqlen_q; }
  int64_t group_items() const { return batch * heads.groups() * seqlen_q; }
};

// What the phases hand on.
struct Lists {
  int32_t *runs, *num_runs, *num_keys;  // [B, S, Lq, R, 2], [B, S, Lq], [B, S, Lq]
  float *row_max, *row_sum, *acc;       // [B, groups, Lq, parts, heads of a group] (x head_dim)

  Lists(Arena& arena, const Shapes& shapes) {
    runs = arena.take<int32_t>(shapes.list_items() * shapes.runs * 2);
    num_runs = arena.take<int32_t>(shapes.list_items());
    num_keys = arena.take<int32_t>(shapes.list_items());
    const int64_t rows = shapes.group_items() * shapes.parts * shapes.heads.heads();
    row_max = arena.take<float>(rows);
    row_sum = arena.take<float>(rows);
    acc = arena.take<float>(rows * shapes.head_dim);
  }
};

struct ChooseScratch {
  float *scores, *row_lse, *query;
  MassScratch mass;
  RefineScratch refine;

  ChooseScratch(Arena& arena, const SparseDecode& p, const Shapes& shapes)
      : scores(arena.take<float>(PooledKeys::padded(shapes.chunks))),
        row_lse(arena.take<float>(shapes.heads.q_heads / std::max<int64_t>(shapes.lists, 1))),
        query(arena.take<float>(shapes.head_dim)),
        mass(arena, shapes.chunks, shapes.head_dim),
        refine(arena, shapes.chunks, shapes.head_dim, shapes.seqlen_k, shapes.choice, p.refine) {}
};

// Stages 4 and 6 of one query and list.
void choose_keys_of(const SparseDecode& p, const Shapes& shapes, const RefineArgs& args, int64_t item,
                    const Lists& lists, const ChooseScratch& scratch) {
  const Kernels& kernels = *args.kernels;
  const int64_t list = item / shapes.seqlen_q, b = list / shapes.lists, s = list % shapes.lists;
  const int64_t heads = shapes.heads.q_heads / shapes.lists, held = held_keys(p.cache_seqlens, b, shapes.seqlen_k);
  const Block block(item % shapes.seqlen_q, 1, shapes.seqlen_q, held, p.softmax.window);
  const ChunkList chunks(p.offsets, p.num_chunks, b, held);
  const PooledKeys pooled{p.k_pooled.as<const float>() + list * shapes.chunks * shapes.head_dim, shapes.chunks,
                          shapes.head_dim, 0};
  const bool mass = p.score == ChunkScore::kMass;
  // A block of one query: its only row, and its mean.
  const BlockRows rows =
      block_rows(kernels, args.q, shapes.head_dim, b, s * heads, heads, block, QueryRows::kSample, 1, nullptr);
  if (mass) {
    mass_block(kernels, rows, pooled, chunks, CutChunk{}, block, p.softmax, scratch.scores, scratch.row_lse, 1,
               scratch.mass);
  } else {
    const auto [c0, c1] = ColumnRange(chunks, block);
    pool_rows(kernels, args.q, shapes.head_dim, b, s * heads, heads, block.first, block.first + 1, 1.0f, scratch.query);
    if (c0 < c1) pooled.products(kernels, scratch.query, 1, c0, c1, scratch.scores + c0);
  }
  int32_t* runs = lists.runs + item * shapes.runs * 2;
  const int64_t count = p.refine > 0 ? refine_block(args, b, s, scratch.scores, rows, mass ? scratch.row_lse : nullptr,
                                                    1, chunks, block, runs, shapes.runs, scratch.refine)
                                     : select_block(scratch.scores, chunks, block, shapes.choice, shapes.seqlen_q, runs,
                                                    shapes.runs, scratch.refine.choice);
  int32_t keys = 0;
  for (int64_t r = 0; r < count; ++r) keys += runs[2 * r + 1] - runs[2 * r];
  lists.num_runs[item] = static_cast<int32_t>(count);
  lists.num_keys[item] = keys;
}

void merge_parts(const AttentionArgs& args, int64_t b, int64_t head, int64_t query, int64_t parts, int64_t part_stride,
                 const float* row_max, const float* row_sum, float* acc) {
  const int64_t head_dim = args.head_dim;
  float total_max = row_max[0];
  for (int64_t part = 1; part < parts; ++part) total_max = std::max(total_max, row_max[part * part_stride]);
  const auto weight = [&](int64_t part) {
    return row_sum[part * part_stride] == 0.0f ? 0.0f : std::exp(row_max[part * part_stride] - total_max);
  };
  float total_sum = row_sum[0] * weight(0);
  args.kernels->scale_row(acc, head_dim, weight(0));
  for (int64_t part = 1; part < parts; ++part) {
    const float w = weight(part);
    const float* from = acc + part * part_stride * head_dim;
    total_sum += row_sum[part * part_stride] * w;
    for (int64_t d = 0; d < head_dim; ++d) acc[d] += w * from[d];
  }
  finish_row(args, b, head, query, total_max, total_sum, acc);
}

}  // namespace

int64_t workspace_bytes(const SparseDecode& p, int workers) {
  const Shapes shapes(p);
  const int64_t per_worker = std::max(scratch_bytes<ChooseScratch>(p, shapes),
                                      scratch_bytes<AttentionScratch>(active_kernels(), p.k.dtype, shapes.head_dim));
  return scratch_bytes<Lists>(shapes) + workers * per_worker;
}

void run(const SparseDecode& p, void* workspace, const Executor& executor) {
  const Shapes shapes(p);
  const AttentionArgs args(active_kernels(), p, shapes.lists);
  const RefineArgs refine{args.kernels,    args.q,   args.k,        shapes.heads, shapes.head_dim,
                          shapes.seqlen_q, p.refine, shapes.choice, p.softmax};
  Arena arena(workspace);
  const Lists lists(arena, shapes);
  void* scratch = arena.take<char>(0);
  const int64_t heads = shapes.heads.heads(), groups = shapes.heads.groups(), parts = shapes.parts;

  executor.run(shapes.list_items(), [&](int64_t item, int worker) {
    choose_keys_of(p, shapes, refine, item, lists, worker_scratch<ChooseScratch>(scratch, worker, p, shapes));
  });

  // item = ((b, group), query)
  const auto list_of = [&](int64_t item) {
    const int64_t row = item / shapes.seqlen_q, b = row / groups;
    return (b * shapes.lists + shapes.heads.list(row % groups)) * shapes.seqlen_q + item % shapes.seqlen_q;
  };
  const auto parts_of = [&](int64_t list) {
    return std::clamp<int64_t>(ceil_div(lists.num_keys[list], kPartKeys), 1, parts);
  };
  executor.run(shapes.group_items() * parts, [&](int64_t i, int worker) {
    const int64_t item = i / parts, part = i % parts, list = list_of(item), row = item / shapes.seqlen_q;
    if (part >= parts_of(list)) return;
    const int64_t step = ceil_div(lists.num_keys[list], parts_of(list));
    AttentionArgs row_args = args;
    row_args.seqlen_k = held_keys(p.cache_seqlens, row / groups, shapes.seqlen_k);
    attend_part(row_args, row / groups, row % groups, item % shapes.seqlen_q,
                {lists.runs + list * shapes.runs * 2, lists.num_runs[list]}, part * step, (part + 1) * step,
                lists.row_max + i * heads, lists.row_sum + i * heads, lists.acc + i * heads * shapes.head_dim,
                worker_scratch<AttentionScratch>(scratch, worker, active_kernels(), p.k.dtype, shapes.head_dim));
  });
  executor.run(shapes.group_items(), [&](int64_t item, int) {
    const int64_t row = item / shapes.seqlen_q, first = item * parts * heads;
    for (int64_t h = 0; h < heads; ++h) {
      merge_parts(args, row / groups, row % groups * heads + h, item % shapes.seqlen_q, parts_of(list_of(item)), heads,
                  lists.row_max + first + h, lists.row_sum + first + h, lists.acc + (first + h) * shapes.head_dim);
    }
  });
}

}  // namespace dhsa::cpu
