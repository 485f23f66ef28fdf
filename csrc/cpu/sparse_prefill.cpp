// sparse_prefill on CPU: stages 1 to 3 over the whole call, then one work item per query block and list does the rest.
// Beside boundaries and packed pooled keys, memory is O(workers * (chunks + tile)): no nQ x C matrix, no stored lists.
#include <algorithm>

#include "cpu/attention.h"
#include "cpu/chunk_mass.h"
#include "cpu/chunk_pool.h"
#include "cpu/dispatch.h"
#include "cpu/key_choice.h"
#include "cpu/refine_keys.h"
#include "dhsa.h"

namespace dhsa::cpu {
namespace {

struct Shapes {
  int64_t batch, seqlen_q, seqlen_k, head_dim, chunks, blocks, lists, pooled_lists, samples, runs;
  bool finds_boundaries;
  HeadGroups heads;
  KeyChoice choice;  // sink and local clamped to the keys there are

  explicit Shapes(const SparsePrefill& p)
      : batch(p.q.shape[0]),
        seqlen_q(p.q.shape[2]),
        seqlen_k(p.k.shape[2]),
        head_dim(p.q.shape[3]),
        chunks(p.offsets.given() ? p.offsets.shape[1] - 1 : chunk_capacity(seqlen_k, p.max_chunks, p.segment)),
        blocks(ceil_div(seqlen_q, p.q_block)),
        lists(p.select_heads),
        pooled_lists(std::min(p.select_heads, p.k.shape[1])),
        samples(rows_of_block(std::min(p.q_block, seqlen_q), p.q_stride)),
        finds_boundaries(!p.offsets.given()),
        heads{p.q.shape[1], p.k.shape[1], p.select_heads},
        choice(p.choice) {
    choice.sink = std::min(choice.sink, seqlen_k);
    choice.local = std::min(choice.local, seqlen_k);
    runs = p.refine > 0 ? refined_run_capacity(seqlen_k, choice.budget)
                        : run_capacity(chunks, choice.budget, choice.min_chunk);
  }
  int64_t packed_floats() const { return PooledKeys::padded(chunks) * head_dim; }  // of one list
};

Tensor dense_tensor(void* data, DType dtype, int64_t rows, int64_t columns) {
  Tensor t;
  t.data = data;
  t.dtype = dtype;
  t.ndim = columns > 0 ? 2 : 1;
  t.shape[0] = rows;
  t.shape[1] = columns;
  t.stride[0] = columns > 0 ? columns : 1;
  t.stride[1] = 1;
  return t;
}

// Stages 1 and 2, into the workspace.
struct Boundaries {
  BoundaryScores scores;
  SelectBoundaries select;

  Boundaries(Arena& arena, const SparsePrefill& p, const Shapes& shapes) {
    const int64_t batch = shapes.finds_boundaries ? shapes.batch : 0;
    scores.k = p.k;
    scores.window = p.boundary_window;
    scores.scores =
        dense_tensor(arena.take<float>(batch * shapes.seqlen_k), DType::kFloat32, shapes.batch, shapes.seqlen_k);
    scores.scores.ndim = 2;
    select.scores = scores.scores;
    select.max_chunks = p.max_chunks;
    select.nms_radius = p.nms_radius;
    select.threshold = p.threshold;
    select.segment = p.segment;
    select.offsets = p.offsets;
    select.num_chunks = p.num_chunks;
    if (shapes.finds_boundaries) {
      select.offsets =
          dense_tensor(arena.take<int32_t>(batch * (shapes.chunks + 1)), DType::kInt32, batch, shapes.chunks + 1);
      select.num_chunks = dense_tensor(arena.take<int32_t>(batch), DType::kInt32, batch, 0);
    }
  }
  int64_t bytes(int workers) const {
    return std::max(workspace_bytes(scores, workers), workspace_bytes(select, workers));
  }
};

struct PoolScratch {
  float* rows;  // [kMaxPanel][head_dim]
  PoolScratch(Arena& arena, const Shapes& shapes) : rows(arena.take<float>(kMaxPanel * shapes.head_dim)) {}
};

struct BlockScratch {
  float *scores, *row_lse, *query, *cut;  // [C, padded], [heads of a list][samples], [head_dim], [head_dim]
  int32_t* runs;                          // [R][2]
  char* means;
  MassScratch mass;
  RefineScratch refine;
  AttentionScratch attention;

  BlockScratch(Arena& arena, const SparsePrefill& p, const Shapes& shapes)
      : scores(arena.take<float>(PooledKeys::padded(shapes.chunks))),
        row_lse(arena.take<float>(shapes.heads.q_heads / std::max<int64_t>(shapes.lists, 1) * shapes.samples)),
        query(arena.take<float>(shapes.head_dim)),
        cut(arena.take<float>(shapes.head_dim)),
        runs(arena.take<int32_t>(2 * shapes.runs)),
        means(arena.take<char>(
            p.score == ChunkScore::kMass ? mean_bytes(p.rows, p.q, shapes.lists, p.q_block, p.q_stride) : 0)),
        mass(arena, shapes.chunks, shapes.head_dim),
        refine(arena, shapes.chunks, shapes.head_dim, shapes.seqlen_k, shapes.choice, p.refine),
        attention(arena, active_kernels(), p.k.dtype, shapes.head_dim) {}
};

PoolScale key_scale(const SparsePrefill& p) { return p.score == ChunkScore::kMass ? PoolScale::kMean : p.pool; }

// Stage 3: pooled keys straight into packed panels, once per list that reads different keys.
void pool_chunks(const SparsePrefill& p, const Shapes& shapes, const Boundaries& boundaries, float* panels,
                 void* scratch, const Executor& executor) {
  const Kernels& kernels = active_kernels();
  const RowView k(p.k);
  const int64_t parts = PooledKeys::padded(shapes.chunks) / kMaxPanel, head_dim = shapes.head_dim;
  executor.run(shapes.batch * shapes.pooled_lists * parts, [&](int64_t item, int worker) {
    const PoolScratch pool = worker_scratch<PoolScratch>(scratch, worker, shapes);
    const int64_t list = item / parts, b = list / shapes.pooled_lists, first = item % parts * kMaxPanel;
    const ChunkList chunks(boundaries.select.offsets, boundaries.select.num_chunks, b, shapes.seqlen_k);
    const PooledHeads from(p.k.shape[1], shapes.pooled_lists, list % shapes.pooled_lists);
    const int64_t n = std::clamp<int64_t>(chunks.count - first, 0, kMaxPanel);
    for (int64_t c = 0; c < n; ++c) {
      const int64_t begin = chunks.begin(first + c), end = chunks.end(first + c);
      pool_rows(kernels, k, head_dim, b, from.first, from.count, begin, end, pool_factor(key_scale(p), end - begin),
                pool.rows + c * head_dim);
    }
    kernels.pack_keys[0](pool.rows, head_dim, nullptr, n, kMaxPanel, head_dim,
                         panels + list * shapes.packed_floats() + first * head_dim);
  });
}

class Prefill {
 public:
  Prefill(const SparsePrefill& p, const Shapes& shapes, const Boundaries& boundaries, const float* panels)
      : p_(p),
        shapes_(shapes),
        boundaries_(boundaries),
        panels_(panels),
        kernels_(active_kernels()),
        attention_(kernels_, p, shapes.lists),
        refine_{&kernels_,       attention_.q, attention_.k,  shapes.heads, shapes.head_dim,
                shapes.seqlen_q, p.refine,     shapes.choice, p.softmax} {}

  // A block of the dense tail: every candidate, streamed, for one head group.
  void attend_dense(int64_t b, int64_t group, int64_t j, const AttentionScratch& scratch) const {
    const Block block = query_block(j);
    const int32_t run[2] = {static_cast<int32_t>(block.begin), static_cast<int32_t>(block.end)};
    attend_block(attention_, b, group, block, {run, 1}, scratch);
  }

  // Any other block: score the chunks, choose the keys of list s, attend with every head that shares it.
  void attend_sparse(int64_t b, int64_t s, int64_t j, const BlockScratch& scratch) const {
    const Block block = query_block(j);
    const ChunkList chunks(boundaries_.select.offsets, boundaries_.select.num_chunks, b, shapes_.seqlen_k);
    const bool mass = p_.score == ChunkScore::kMass;
    const int64_t heads = shapes_.heads.q_heads / shapes_.lists;
    BlockRows rows;  // read by both chunk_mass and refine_keys
    if (mass) {
      rows = block_rows(kernels_, attention_.q, shapes_.head_dim, b, s * heads, heads, block, p_.rows, p_.q_stride,
                        scratch.means);
    }
    score_chunks(b, s, block, rows, chunks, scratch);
    int64_t count;
    if (p_.refine > 0) {
      count = refine_block(refine_, b, s, scratch.scores, rows, mass ? scratch.row_lse : nullptr, shapes_.samples,
                           chunks, block, scratch.runs, shapes_.runs, scratch.refine);
    } else {
      count = select_block(scratch.scores, chunks, block, shapes_.choice, shapes_.seqlen_q, scratch.runs, shapes_.runs,
                           scratch.refine.choice);
    }
    const int64_t groups = shapes_.heads.groups_per_list();
    for (int64_t g = s * groups; g < (s + 1) * groups; ++g) {
      attend_block(attention_, b, g, block, {scratch.runs, count}, scratch.attention);
    }
  }

 private:
  Block query_block(int64_t j) const {
    return Block(j, p_.q_block, shapes_.seqlen_q, shapes_.seqlen_k, p_.softmax.window);
  }

  void score_chunks(int64_t b, int64_t s, const Block& block, const BlockRows& rows, const ChunkList& chunks,
                    const BlockScratch& scratch) const {
    const int64_t pooled_list = b * shapes_.pooled_lists + s * shapes_.pooled_lists / shapes_.lists;
    const PooledKeys pooled{panels_ + pooled_list * shapes_.packed_floats(), shapes_.chunks, shapes_.head_dim,
                            kernels_.panel};
    const CutChunk cut = p_.strict ? cut_chunk(b, s, block, chunks, scratch) : CutChunk{};
    if (p_.score == ChunkScore::kMass) {
      mass_block(kernels_, rows, pooled, chunks, cut, block, p_.softmax, scratch.scores, scratch.row_lse,
                 shapes_.samples, scratch.mass);
      return;
    }
    const int64_t heads = shapes_.heads.q_heads / shapes_.lists;
    pool_rows(kernels_, attention_.q, shapes_.head_dim, b, s * heads, heads, block.first, block.last + 1,
              pool_factor(PoolScale::kSqrt, block.queries()), scratch.query);
    const auto [c0, c1] = ColumnRange(chunks, block);
    pooled.products(kernels_, scratch.query, 1, c0, c1, scratch.scores + c0);
    if (cut.column >= 0) {
      kernels_.dot_rows[0](scratch.query, 1, cut.vector, shapes_.head_dim, nullptr, 1, shapes_.head_dim,
                           scratch.scores + cut.column, 1);
    }
  }

  CutChunk cut_chunk(int64_t b, int64_t s, const Block& block, const ChunkList& chunks,
                     const BlockScratch& scratch) const {
    const int64_t c = chunks.last_over(block.end) - 1;
    if (block.end == 0 || c < 0 || chunks.begin(c) >= block.end || chunks.end(c) <= block.end) return {};
    const PooledHeads from(shapes_.heads.kv_heads, shapes_.lists, s);
    const int64_t tokens = block.end - chunks.begin(c);
    pool_rows(kernels_, attention_.k, shapes_.head_dim, b, from.first, from.count, chunks.begin(c), block.end,
              pool_factor(key_scale(p_), tokens), scratch.cut);
    return {c, tokens, scratch.cut};
  }

  const SparsePrefill& p_;
  const Shapes& shapes_;
  const Boundaries& boundaries_;
  const float* panels_;
  const Kernels& kernels_;
  const AttentionArgs attention_;
  const RefineArgs refine_;
};

}  // namespace

int64_t workspace_bytes(const SparsePrefill& p, int workers) {
  const Shapes shapes(p);
  Arena arena(nullptr);
  const Boundaries boundaries(arena, p, shapes);
  arena.take<float>(shapes.batch * shapes.pooled_lists * shapes.packed_floats());
  const int64_t per_worker = std::max(scratch_bytes<PoolScratch>(shapes), scratch_bytes<BlockScratch>(p, shapes));
  return arena.bytes() + std::max(boundaries.bytes(workers), workers * per_worker);
}

void run(const SparsePrefill& p, void* workspace, const Executor& executor) {
  const Shapes shapes(p);
  Arena arena(workspace);
  const Boundaries boundaries(arena, p, shapes);
  float* panels = arena.take<float>(shapes.batch * shapes.pooled_lists * shapes.packed_floats());
  void* scratch = arena.take<char>(0);  // of one phase after the other

  if (shapes.finds_boundaries) {
    run(boundaries.scores, scratch, executor);
    run(boundaries.select, scratch, executor);
  }
  pool_chunks(p, shapes, boundaries, panels, scratch, executor);

  // Dense blocks are long: they come first, split by head group.
  const Prefill prefill(p, shapes, boundaries, panels);
  const int64_t first_dense = std::max<int64_t>(0, shapes.seqlen_q - p.choice.dense_tail) / p.q_block;
  const int64_t sparse = p.choice.dense_tail > 0 ? std::min(first_dense, shapes.blocks) : shapes.blocks;
  const int64_t dense = shapes.blocks - sparse, groups = shapes.heads.groups();
  const int64_t dense_items = shapes.batch * groups * dense;
  executor.run(dense_items + shapes.batch * shapes.lists * sparse, [&](int64_t item, int worker) {
    const BlockScratch block = worker_scratch<BlockScratch>(scratch, worker, p, shapes);
    if (item < dense_items) {
      prefill.attend_dense(item / (groups * dense), item / dense % groups, sparse + item % dense, block.attention);
    } else {
      const int64_t i = item - dense_items;
      prefill.attend_sparse(i / (shapes.lists * sparse), i / sparse % shapes.lists, i % sparse, block);
    }
  });
}

}  // namespace dhsa::cpu
