// Stages 1 to 7 in one call on one stream: no host synchronisation, no allocation, every launch fixed by shapes alone,
// so the whole can be captured in a CUDA graph and replayed with new inputs.
//
// Score "dot": chunk_scores, then select_keys; score "mass": chunk_mass for the former; refine: refine_keys for the
// latter. The router never holds the [nQ, C] matrix of scores: it works through query blocks in slabs whose scores fit
// a small workspace (and stay in L2 between the two launches), and keeps only the runs.
#include <algorithm>

#include "cuda/device/candidates.h"
#include "cuda/device/pool_rows.h"
#include "cuda/dispatch.h"
#include "cuda/launch.h"
#include "cuda/router.h"

namespace dhsa::cuda {
namespace {

// Scores of one slab. 8 MiB are 256 query blocks at 128K keys and 8,192 chunks: two waves of score tiles on 132 SMs.
// With several selection heads there are as many times more slabs, and twice the slab halves the launches.
constexpr int64_t kSlabBytes = 8 << 20;
// Of the accurate mode: at 128K keys all query blocks of one selection head, so that its keys stay in L2 for
// refine_keys.
constexpr int64_t kAccurateSlabBytes = 64 << 20;

// --- strict: the chunk that holds p1 is scored as if it ended at p1 + 1 ----------------------------------------------

struct StrictParams {
  const void* k;
  int64_t stride_batch, stride_head, stride_token;
  const float* q_pooled;  // [B, S, nQ, D]
  const int *offsets, *num_chunks;
  float* scores;  // the slab's
  int seqlen_q, seqlen_k, q_block, head_dim, capacity, query_blocks, selection_heads, heads_pooled, heads_shared;
  int first_pair, first_block, blocks;
  PoolScale scale;
};

constexpr int kStrictThreads = 128;

// One block a (pair, query block): overwrites one score of the slab.
template <class T, int kCols>
__global__ void __launch_bounds__(kStrictThreads) strict_scores_kernel(StrictParams p) {
  using Rows = RowSum<T, kCols>;
  constexpr int kWarps = kStrictThreads / 32;
  __shared__ float parts[kWarps];
  const int pair = p.first_pair + blockIdx.x / p.blocks, block = p.first_block + blockIdx.x % p.blocks;
  const int batch = pair / p.selection_heads, s = pair % p.selection_heads;
  const Chunks chunks(p.offsets, p.num_chunks, batch, p.capacity, p.seqlen_k);
  const int end = p.seqlen_k - p.seqlen_q + min(p.seqlen_q, (block + 1) * p.q_block);  // p1 + 1
  const int chunk = chunks.first_bound_at_or_after(end) - 1;                           // begins at or before p1
  if (end <= 0 || chunk < 0 || chunk >= chunks.count || chunks.end(chunk) <= end) return;

  const int begin = chunks.begin(chunk), tokens = end - begin;
  const int head = p.heads_shared > 1 ? s / p.heads_shared : s * p.heads_pooled;
  const T* k = static_cast<const T*>(p.k) + batch * p.stride_batch + head * p.stride_head + begin * p.stride_token;
  const float* q = p.q_pooled + (static_cast<int64_t>(pair) * p.query_blocks + block) * p.head_dim;
  float dot = 0;
  for (int channel = 0; channel < p.head_dim; channel += kCols) {
    Rows rows;
    rows.add(k + channel, p.stride_token, p.stride_head, tokens, p.heads_pooled, warp_id() * Rows::kRows,
             kWarps * Rows::kRows);
#pragma unroll
    for (int j = 0; j < kVec<T>; ++j) dot += rows.sum[j] * q[channel + lane_id() % Rows::kLanes * kVec<T> + j];
  }
  dot = warp_sum(dot);
  if (lane_id() == 0) parts[warp_id()] = dot;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int w = 1; w < kWarps; ++w) dot += parts[w];
    const float n = static_cast<float>(tokens);
    const float factor = p.scale == PoolScale::kSqrt ? rsqrtf(n) : p.scale == PoolScale::kMean ? 1.0f / n : 1.0f;
    p.scores[static_cast<int64_t>(blockIdx.x) * p.capacity + chunk] = dot * factor / static_cast<float>(p.heads_pooled);
  }
}

// --- The order of the stages -----------------------------------------------------------------------------------------

struct Plan {
  BoundaryScores boundary;
  SelectBoundaries cuts;
  ChunkPool chunk_pool;
  QueryPool query_pool;
  SelectKeys select;
  ChunkMass mass;
  RefineKeys refine;
  SparseAttention attention;
  bool own_offsets = false;
  float* slab_scores = nullptr;
  void *means = nullptr, *mass_scratch = nullptr, *refine_scratch = nullptr;
  void *cuts_workspace = nullptr, *attention_workspace = nullptr;
  int64_t pairs = 0, query_blocks = 0, capacity = 0, slab_pairs = 0, slab_blocks = 0, bytes = 0;
};

void plan_mass(const SparsePrefill& x, Plan& plan, Arena& arena) {
  const int64_t batch = x.q.shape[0], query_heads = x.q.shape[1], samples = ceil_div(x.q_block, x.q_stride);
  ChunkMass& mass = plan.mass;
  mass.q = x.q, mass.k_mean = plan.chunk_pool.pooled;
  mass.offsets = plan.select.offsets, mass.num_chunks = plan.select.num_chunks;
  mass.seqlen_k = x.k.shape[2], mass.q_block = x.q_block, mass.q_stride = x.q_stride, mass.rows = x.rows;
  mass.softmax = x.softmax;
  mass.softmax.window = x.choice.window;
  mass.scores = plan.select.chunk_scores;
  mass.row_lse = contiguous(arena.take<float>(batch * query_heads * plan.query_blocks * samples), DType::kFloat32,
                            batch, query_heads, plan.query_blocks, samples);
  plan.means = arena.take<char>(mass_means_bytes(mass, x.strict));
}

void plan_refine(const SparsePrefill& x, Plan& plan) {
  RefineKeys& refine = plan.refine;
  refine.q = x.q, refine.k = x.k, refine.chunk_scores = plan.select.chunk_scores, refine.row_lse = plan.mass.row_lse;
  refine.offsets = plan.select.offsets, refine.num_chunks = plan.select.num_chunks;
  refine.q_block = x.q_block, refine.refine = x.refine, refine.q_stride = x.q_stride;
  refine.rows = x.rows;
  refine.choice = plan.select.choice, refine.softmax = x.softmax;
  refine.runs = plan.select.runs, refine.num_runs = plan.select.num_runs;
}

// How much of the score matrix a slab is, and the memory of its stages. The attention starts when the last slab is
// done, and has the same memory.
void plan_slabs(const SparsePrefill& x, Plan& plan, Arena& arena) {
  const int64_t pairs = std::max<int64_t>(plan.pairs, 1), columns = std::max<int64_t>(plan.capacity, 1);
  if (x.score == ChunkScore::kMass || x.refine > 0) {
    const int64_t rows = std::max<int64_t>(kAccurateSlabBytes / 4 / columns, 1);
    plan.slab_blocks = std::min(rows, plan.query_blocks);
    plan.slab_pairs = std::clamp<int64_t>(rows / std::max<int64_t>(plan.slab_blocks, 1), 1, pairs);
  } else {  // whole tiles of 64 query blocks of all pairs, or of as many pairs as fit
    const int64_t slab_bytes = plan.pairs > 1 ? 2 * kSlabBytes : kSlabBytes;
    const int64_t rows = std::max<int64_t>(slab_bytes / 4 / columns, 1);
    plan.slab_blocks =
        std::clamp<int64_t>(rows / pairs / 64 * 64, std::min<int64_t>(64, plan.query_blocks), plan.query_blocks);
    plan.slab_pairs = std::clamp<int64_t>(rows / std::max<int64_t>(plan.slab_blocks, 1), 1, pairs);
  }
  const Slab largest = {0, plan.slab_pairs, 0, plan.slab_blocks};
  Arena parts(nullptr);
  parts.take<float>(plan.slab_pairs * plan.slab_blocks * plan.capacity);
  const int64_t mass_at = parts.used();
  if (x.score == ChunkScore::kMass) parts.take<char>(mass_scratch_bytes(plan.mass, largest, x.strict));
  const int64_t refine_at = parts.used();
  if (x.refine > 0) parts.take<char>(refine_scratch_bytes(plan.refine, plan.slab_pairs * plan.slab_blocks));
  char* shared = arena.take<char>(std::max(parts.used(), workspace_bytes(plan.attention)));
  plan.slab_scores = reinterpret_cast<float*>(shared), plan.attention_workspace = shared;
  if (shared != nullptr) plan.mass_scratch = shared + mass_at, plan.refine_scratch = shared + refine_at;
}

Plan make_plan(const SparsePrefill& x, void* workspace) {
  const int64_t batch = x.q.shape[0], seqlen_q = x.q.shape[2], seqlen_k = x.k.shape[2], head_dim = x.q.shape[3];
  const int64_t heads = x.select_heads;
  Arena arena(workspace);
  Plan plan;
  plan.own_offsets = !x.offsets.given();
  plan.pairs = batch * heads;
  plan.query_blocks = ceil_div(seqlen_q, x.q_block);
  plan.capacity = plan.own_offsets ? chunk_capacity(seqlen_k, x.max_chunks, x.segment) : x.offsets.shape[1] - 1;

  Tensor offsets = x.offsets, num_chunks = x.num_chunks;
  if (plan.own_offsets) {
    offsets = contiguous(arena.take<int>(batch * (plan.capacity + 1)), DType::kInt32, batch, plan.capacity + 1);
    num_chunks = contiguous(arena.take<int>(batch), DType::kInt32, batch);
    plan.boundary.k = x.k, plan.boundary.window = x.boundary_window;
    plan.boundary.scores = contiguous(arena.take<float>(batch * seqlen_k), DType::kFloat32, batch, seqlen_k);
    plan.cuts.scores = plan.boundary.scores;
    plan.cuts.max_chunks = x.max_chunks, plan.cuts.nms_radius = x.nms_radius, plan.cuts.threshold = x.threshold;
    plan.cuts.segment = x.segment, plan.cuts.offsets = offsets, plan.cuts.num_chunks = num_chunks;
    plan.cuts_workspace = arena.take<char>(workspace_bytes(plan.cuts));
  }

  plan.chunk_pool.x = x.k, plan.chunk_pool.offsets = offsets, plan.chunk_pool.num_chunks = num_chunks;
  plan.chunk_pool.heads = heads, plan.chunk_pool.scale = x.score == ChunkScore::kMass ? PoolScale::kMean : x.pool;
  plan.chunk_pool.pooled = contiguous(arena.take<float>(plan.pairs * plan.capacity * head_dim), DType::kFloat32, batch,
                                      heads, plan.capacity, head_dim);
  plan.query_pool.q = x.q, plan.query_pool.heads = heads, plan.query_pool.q_block = x.q_block;
  plan.query_pool.scale = x.pool;
  if (x.score == ChunkScore::kDot) {
    plan.query_pool.pooled = contiguous(arena.take<float>(plan.pairs * plan.query_blocks * head_dim), DType::kFloat32,
                                        batch, heads, plan.query_blocks, head_dim);
  }

  KeyChoice choice = x.choice;
  choice.sink = std::min(choice.sink, seqlen_k), choice.local = std::min(choice.local, seqlen_k);
  choice.min_chunk = plan.own_offsets && x.segment == 0 ? x.nms_radius + 1 : 1;
  const int64_t runs = x.refine > 0 ? refined_run_capacity(seqlen_k, choice.budget)
                                    : run_capacity(plan.capacity, choice.budget, choice.min_chunk);
  plan.select.chunk_scores = contiguous(nullptr, DType::kFloat32, batch, heads, plan.query_blocks, plan.capacity);
  plan.select.offsets = offsets, plan.select.num_chunks = num_chunks;
  plan.select.seqlen_q = seqlen_q, plan.select.seqlen_k = seqlen_k, plan.select.q_block = x.q_block;
  plan.select.choice = choice;
  plan.select.runs = contiguous(arena.take<int>(plan.pairs * plan.query_blocks * runs * 2), DType::kInt32, batch, heads,
                                plan.query_blocks, runs, 2);
  plan.select.num_runs =
      contiguous(arena.take<int>(plan.pairs * plan.query_blocks), DType::kInt32, batch, heads, plan.query_blocks);

  if (x.score == ChunkScore::kMass) plan_mass(x, plan, arena);
  if (x.refine > 0) plan_refine(x, plan);

  plan.attention.q = x.q, plan.attention.k = x.k, plan.attention.v = x.v;
  plan.attention.runs = plan.select.runs, plan.attention.num_runs = plan.select.num_runs;
  plan.attention.q_block = x.q_block, plan.attention.softmax = x.softmax;
  plan.attention.out = x.out, plan.attention.lse = x.lse;

  plan_slabs(x, plan, arena);
  plan.bytes = arena.used();
  return plan;
}

cudaError_t run_strict(const SparsePrefill& x, const Plan& plan, const Slab& slab, cudaStream_t stream) {
  StrictParams p = {};
  p.k = x.k.data;
  p.stride_batch = x.k.stride[0], p.stride_head = x.k.stride[1], p.stride_token = x.k.stride[2];
  p.q_pooled = plan.query_pool.pooled.as<float>();
  p.offsets = plan.select.offsets.as<int>(), p.num_chunks = plan.select.num_chunks.as<int>();
  p.scores = plan.slab_scores;
  p.seqlen_q = static_cast<int>(x.q.shape[2]), p.seqlen_k = static_cast<int>(x.k.shape[2]);
  p.q_block = static_cast<int>(x.q_block), p.head_dim = static_cast<int>(x.k.shape[3]);
  p.capacity = static_cast<int>(plan.capacity), p.query_blocks = static_cast<int>(plan.query_blocks);
  p.selection_heads = static_cast<int>(x.select_heads);
  p.heads_pooled = static_cast<int>(std::max<int64_t>(x.k.shape[1] / x.select_heads, 1));
  p.heads_shared = static_cast<int>(std::max<int64_t>(x.select_heads / x.k.shape[1], 1));
  p.first_pair = static_cast<int>(slab.first_pair), p.first_block = static_cast<int>(slab.first_block);
  p.blocks = static_cast<int>(slab.blocks), p.scale = x.pool;
  const int64_t grid = slab.pairs * slab.blocks;
  return with_dtype(x.k.dtype, [&](auto element) {
    using T = decltype(element);
    if (p.head_dim % 64 == 0) {
      strict_scores_kernel<T, 64><<<grid, kStrictThreads, 0, stream>>>(p);
    } else {
      strict_scores_kernel<T, 32><<<grid, kStrictThreads, 0, stream>>>(p);
    }
    return cudaGetLastError();
  });
}

cudaError_t score_slab(const SparsePrefill& x, const Plan& plan, const Slab& slab, cudaStream_t stream) {
  if (x.score == ChunkScore::kMass) {
    ChunkMass mass = plan.mass;
    mass.scores.data = plan.slab_scores;
    return run_chunk_mass(mass, x.strict ? &x.k : nullptr, plan.means, plan.mass_scratch, slab, stream);
  }
  const Reach reach = {plan.select.offsets.as<int>(), plan.select.num_chunks.as<int>(), plan.select.seqlen_q,
                       plan.select.seqlen_k, x.q_block};
  const cudaError_t error =
      run_chunk_scores(plan.query_pool.pooled, plan.chunk_pool.pooled, plan.slab_scores, slab, reach, stream);
  return error == cudaSuccess && x.strict ? run_strict(x, plan, slab, stream) : error;
}

cudaError_t run_slab(const SparsePrefill& x, const Plan& plan, const Slab& slab, cudaStream_t stream) {
  const cudaError_t error = score_slab(x, plan, slab, stream);
  if (error != cudaSuccess) return error;
  if (x.refine > 0) {
    RefineKeys refine = plan.refine;
    refine.chunk_scores.data = plan.slab_scores;
    const void* row_means = refine.row_lse.given() ? mass_row_means(plan.mass, plan.means) : nullptr;
    return run_refine_keys(refine, plan.query_pool.pooled.as<float>(), row_means, plan.refine_scratch, slab, stream);
  }
  SelectKeys select = plan.select;
  select.chunk_scores.data = plan.slab_scores;
  return run_select_keys(select, slab, stream);
}

}  // namespace

int64_t workspace_bytes(const SparsePrefill& x) { return make_plan(x, nullptr).bytes; }

cudaError_t run(const SparsePrefill& x, void* workspace, cudaStream_t stream) {
  if (x.q.shape[0] == 0 || x.q.shape[1] == 0 || x.q.shape[2] == 0) return cudaSuccess;
  const Plan plan = make_plan(x, workspace);
  cudaError_t error = cudaSuccess;
  if (plan.own_offsets) {
    error = run(plan.boundary, nullptr, stream);
    if (error == cudaSuccess) error = run(plan.cuts, plan.cuts_workspace, stream);
  }
  if (error == cudaSuccess) error = run(plan.chunk_pool, nullptr, stream);
  if (error == cudaSuccess) {
    error = x.score == ChunkScore::kMass ? run_mass_means(plan.mass, plan.means, stream, x.strict ? &x.k : nullptr)
                                         : run(plan.query_pool, nullptr, stream);
  }
  for (int64_t pair = 0; pair < plan.pairs; pair += plan.slab_pairs) {
    for (int64_t block = 0; block < plan.query_blocks; block += plan.slab_blocks) {
      const Slab slab = {pair, std::min(plan.slab_pairs, plan.pairs - pair), block,
                         std::min(plan.slab_blocks, plan.query_blocks - block)};
      if (error == cudaSuccess) error = run_slab(x, plan, slab, stream);
    }
  }
  return error == cudaSuccess ? run(plan.attention, plan.attention_workspace, stream) : error;
}

}  // namespace dhsa::cuda
