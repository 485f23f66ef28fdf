// refine_keys on CPU: candidates are packed a tile at a time and shared by every row of a KV head.
#include "cpu/refine_keys.h"

#include <algorithm>

#include "cpu/chunk_pool.h"
#include "cpu/dispatch.h"
#include "dhsa.h"

namespace dhsa::cpu {
namespace {

// Adds min(1, exp(s - row_lse)) of the rows of one head group, [first_head, first_head + heads) of the list's, to the
// candidates' scores.
void add_key_mass(const RefineArgs& args, int64_t b, int64_t kv_head, const BlockRows& rows, int64_t first_head,
                  const float* row_lse, int64_t lse_stride, int64_t candidates, const RefineScratch& scratch) {
  const Kernels& kernels = *args.kernels;
  const int64_t count = args.heads.heads() * rows.count;
  for (int64_t first = 0; first < count; first += RefineScratch::kRows) {
    const int64_t m = std::min(RefineScratch::kRows, count - first);
    for (int64_t r = 0; r < m; ++r) {
      const int64_t head = first_head + (first + r) / rows.count, u = (first + r) % rows.count;
      kernels.load_rows[rows.dtype](rows.at(head, u), rows.row, 1, args.head_dim, args.softmax.scale,
                                    scratch.q + r * args.head_dim);
      scratch.lse[r] = row_lse[head * lse_stride + u];
    }
    for (int64_t j = 0; j < candidates; j += kBlockN) {
      const int64_t n = std::min(kBlockN, candidates - j), padded = round_up(n, kMaxPanel);
      kernels.pack_keys[args.k.dtype](args.k.at(b, kv_head, 0), args.k.row, scratch.candidates + j, n, padded,
                                      args.head_dim, scratch.panels);
      kernels.gemm(m, args.head_dim, scratch.q, args.head_dim, scratch.panels, padded, scratch.logits, kBlockN, false);
      for (int64_t r = 0; r < m; ++r) {
        kernels.bounded_exp_row(scratch.logits + r * kBlockN, padded, args.softmax.softcap, scratch.lse[r],
                                scratch.scores + j);
      }
    }
  }
}

// Adds the pooled query's product with the candidates of one head group. The pooled query is in scratch.q.
void add_key_dot(const RefineArgs& args, int64_t b, int64_t group, int64_t candidates, const RefineScratch& scratch) {
  for (int64_t j = 0; j < candidates; j += kBlockN) {
    const int64_t n = std::min(kBlockN, candidates - j);
    args.kernels->dot_rows[args.k.dtype](scratch.q, 1, args.k.at(b, args.heads.kv_head(group), 0), args.k.row,
                                         scratch.candidates + j, n, args.head_dim, scratch.logits, kBlockN);
    for (int64_t i = 0; i < n; ++i) scratch.scores[j + i] += scratch.logits[i];
  }
}

void score_candidates(const RefineArgs& args, int64_t b, int64_t s, const BlockRows& rows, const float* row_lse,
                      int64_t lse_stride, const Block& block, int64_t candidates, const RefineScratch& scratch) {
  std::fill_n(scratch.scores, round_up(candidates, kBlockN), 0.0f);
  const int64_t groups = args.heads.groups_per_list(), heads = args.heads.heads();
  if (row_lse == nullptr) {
    pool_rows(*args.kernels, args.q, args.head_dim, b, s * groups * heads, groups * heads, block.first, block.last + 1,
              pool_factor(PoolScale::kSqrt, block.queries()), scratch.q);
  }
  for (int64_t g = 0; g < groups; ++g) {
    if (row_lse == nullptr) {
      add_key_dot(args, b, s * groups + g, candidates, scratch);
    } else {
      add_key_mass(args, b, args.heads.kv_head(s * groups + g), rows, g * heads, row_lse, lse_stride, candidates,
                   scratch);
    }
  }
}

}  // namespace

int64_t refine_block(const RefineArgs& args, int64_t b, int64_t s, const float* chunk_scores, const BlockRows& rows,
                     const float* row_lse, int64_t lse_stride, const ChunkList& chunks, const Block& block,
                     int32_t* runs, int64_t capacity, const RefineScratch& scratch) {
  RunWriter writer(runs, capacity);
  if (keeps_all(block, args.choice, args.seqlen_q)) {
    writer.add(block.begin, block.end);
    return writer.finish();
  }
  const ForcedKeys forced(block, args.choice, chunks.covered());
  writer.add(forced.begin, forced.sink_end);

  const int64_t others = forced.local_begin - forced.sink_end;
  const int64_t limit = std::min(std::min(args.refine, others) * forced.room, others);
  int64_t n = 0;
  choose_keys(chunk_scores, chunks, forced.sink_end, forced.local_begin, limit, scratch.choice,
              [&](int64_t begin, int64_t end) {
                for (int64_t j = begin; j < end && n < limit; ++j) scratch.candidates[n++] = static_cast<int32_t>(j);
              });
  Cutoff cutoff{0, 0};
  if (n > forced.room) {
    score_candidates(args, b, s, rows, row_lse, lse_stride, block, n, scratch);
    for (int64_t i = 0; i < n; ++i) scratch.keys[i] = order_key(scratch.scores[i]);
    cutoff = find_cutoff(scratch.keys, nullptr, n, forced.room);
  } else {
    std::fill_n(scratch.keys, n, 1u);
  }
  for (int64_t i = 0; i < n; ++i) {
    if (scratch.keys[i] < cutoff.key || (scratch.keys[i] == cutoff.key && cutoff.left-- <= 0)) continue;
    writer.add(scratch.candidates[i], scratch.candidates[i] + 1);
  }
  writer.add(forced.local_begin, forced.end);
  return writer.finish();
}

namespace {

struct Scratch {
  char* means;
  RefineScratch refine;
  Scratch(Arena& arena, const RefineKeys& p)
      : means(arena.take<char>(
            p.row_lse.given() ? mean_bytes(p.rows, p.q, p.chunk_scores.shape[1], p.q_block, p.q_stride) : 0)),
        refine(arena, p.chunk_scores.shape[3], p.q.shape[3], p.k.shape[2], p.choice, p.refine) {}
};

}  // namespace

int64_t workspace_bytes(const RefineKeys& p, int workers) { return workers * scratch_bytes<Scratch>(p); }

void run(const RefineKeys& p, void* workspace, const Executor& executor) {
  const int64_t lists = p.chunk_scores.shape[1], blocks = p.chunk_scores.shape[2], columns = p.chunk_scores.shape[3];
  const int64_t seqlen_q = p.q.shape[2], seqlen_k = p.k.shape[2], capacity = p.runs.shape[3];
  const RefineArgs args{&active_kernels(), RowView(p.q), RowView(p.k), {p.q.shape[1], p.k.shape[1], lists},
                        p.q.shape[3],      seqlen_q,     p.refine,     p.choice,
                        p.softmax};
  const int64_t samples = p.row_lse.given() ? p.row_lse.shape[3] : 0;
  executor.run(p.q.shape[0] * lists * blocks, [&](int64_t item, int worker) {
    const int64_t b = item / (lists * blocks), s = item / blocks % lists, j = item % blocks;
    const int64_t heads = p.q.shape[1] / lists, held = held_keys(p.cache_seqlens, b, seqlen_k);
    const Scratch scratch = worker_scratch<Scratch>(workspace, worker, p);
    const Block block(j, p.q_block, seqlen_q, held, p.choice.window);
    BlockRows rows;
    const float* row_lse = nullptr;
    if (p.row_lse.given()) {
      rows = block_rows(*args.kernels, args.q, args.head_dim, b, s * heads, heads, block, p.rows, p.q_stride,
                        scratch.means);
      row_lse = p.row_lse.as<const float>() + ((b * p.q.shape[1] + s * heads) * blocks + j) * samples;
    }
    int32_t* runs = p.runs.as<int32_t>() + item * capacity * 2;
    const int64_t count =
        refine_block(args, b, s, p.chunk_scores.as<const float>() + item * columns, rows, row_lse, blocks * samples,
                     ChunkList(p.offsets, p.num_chunks, b, held), block, runs, capacity, scratch.refine);
    std::fill(runs + 2 * count, runs + 2 * capacity, 0);
    p.num_runs.as<int32_t>()[item] = static_cast<int32_t>(count);
  });
}

}  // namespace dhsa::cpu
