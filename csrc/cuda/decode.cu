// sparse_decode: stages 4, 6 and 7 for up to 16 new queries, each its own block, over a cache whose chunks are known.
// Four launches, all fixed by shapes:
//
//   score_kernel     [B, S, Lq, C]: the mean query of the heads that share a list, times every chunk's vector
//   select_keys      one list a (batch, selection head, query); score "mass" and refine run chunk_mass and refine_keys
//   attend_kernel    split over keys: a block takes 64 kept keys for up to four heads of one KV head
//   merge_kernel     the splits' partial results by their lse
//
// Each is launched while the one before still runs (device/early_launch.h), the first beside whatever came before it.
//
// At one query, 128K keys and 8,192 chunks the bytes are 4 MB of chunk vectors a selection head and 8 MB of keys and
// values: 4 us of memory time, so latency is what counts. float32 throughout; out in q's dtype. A row with no key: out
// 0, lse -inf.
#include <algorithm>

#include "cuda/device/cp_async.h"
#include "cuda/device/early_launch.h"
#include "cuda/device/load.h"
#include "cuda/device/scan.h"
#include "cuda/dispatch.h"
#include "cuda/launch.h"
#include "cuda/router.h"

namespace dhsa::cuda {
namespace {

// --- Stage 4 ---------------------------------------------------------------------------------------------------------

constexpr int kScoreThreads = 256;
constexpr int kChunksPerWarp = 8;
constexpr int kChunksPerBlock = kScoreThreads / 32 * kChunksPerWarp;
constexpr int kMostQueries = 16, kMostDim = 256;

struct ScoreParams {
  const void* q;
  int64_t stride_batch, stride_head, stride_token;
  const float* k_pooled;  // [B, S, C, D]
  const int* num_chunks;
  float* scores;  // [B, S, Lq, C]
  int seqlen_q, head_dim, capacity, selection_heads, heads_pooled;
};

// q_mean[u] = the mean over the heads of one list; the block's threads share the heads of a query, 16 bytes each.
template <class T>
__device__ void load_mean_queries(const ScoreParams& p, float (*q_mean)[kMostDim], float* parts) {
  const int lanes = p.head_dim / kVec<T>, groups = kScoreThreads / lanes;
  const int group = threadIdx.x / lanes, lane = threadIdx.x % lanes;
  const T* q = static_cast<const T*>(p.q) + blockIdx.z * p.stride_batch +
               static_cast<int64_t>(blockIdx.y) * p.heads_pooled * p.stride_head;
  for (int u = 0; u < p.seqlen_q; ++u) {
    float sum[kVec<T>] = {};
    for (int h = group; group < groups && h < p.heads_pooled; h += groups) {
      float wide[kVec<T>];
      widen<T>(*reinterpret_cast<const uint4*>(q + h * p.stride_head + u * p.stride_token + lane * kVec<T>), wide);
#pragma unroll
      for (int j = 0; j < kVec<T>; ++j) sum[j] += wide[j];
    }
    __syncthreads();
#pragma unroll
    for (int j = 0; j < kVec<T>; ++j) {
      if (group < groups) parts[group * p.head_dim + lane * kVec<T> + j] = sum[j];
    }
    __syncthreads();
    if (threadIdx.x < p.head_dim) {
      float total = 0;
      for (int g = 0; g < min(groups, p.heads_pooled); ++g) total += parts[g * p.head_dim + threadIdx.x];
      q_mean[u][threadIdx.x] = total / static_cast<float>(p.heads_pooled);
    }
  }
  __syncthreads();
}

template <class T>
__global__ void __launch_bounds__(kScoreThreads) score_kernel(ScoreParams p) {
  __shared__ float q_mean[kMostQueries][kMostDim];
  __shared__ float parts[kScoreThreads * kVec<T>];
  const int64_t pair = static_cast<int64_t>(blockIdx.z) * p.selection_heads + blockIdx.y;
  const int first = blockIdx.x * kChunksPerBlock + warp_id() * kChunksPerWarp;
  wait_for_previous();  // the caller's, which may have written the chunks that select_keys reads before it waits
  let_next_begin();
  const int count = min(max(p.num_chunks[blockIdx.z], 0), p.capacity);
  if (static_cast<int>(blockIdx.x) * kChunksPerBlock >= count) return;

  // A lane holds channels [4 lane, 4 lane + 4) and the same plus 128 of eight chunks, loaded before q is there.
  float4 k[kChunksPerWarp][2];
  const int channel = lane_id() * 4;
#pragma unroll
  for (int c = 0; c < kChunksPerWarp; ++c) {
    const float* row = p.k_pooled + (pair * p.capacity + min(first + c, count - 1)) * p.head_dim;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int x = channel + half * 128;
      k[c][half] = x < p.head_dim ? *reinterpret_cast<const float4*>(row + x) : make_float4(0, 0, 0, 0);
    }
  }
  load_mean_queries<T>(p, q_mean, parts);

  for (int u = 0; u < p.seqlen_q; ++u) {
    float score[kChunksPerWarp] = {};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int x = channel + half * 128;
      if (x >= p.head_dim) break;
      const float4 q = *reinterpret_cast<const float4*>(&q_mean[u][x]);
#pragma unroll
      for (int c = 0; c < kChunksPerWarp; ++c) {
        const float4 y = k[c][half];
        score[c] += q.x * y.x + q.y * y.y + q.z * y.z + q.w * y.w;
      }
    }
#pragma unroll
    for (int c = 0; c < kChunksPerWarp; ++c) {
      score[c] = warp_sum(score[c]);
      if (lane_id() == c && first + c < count) {
        p.scores[(pair * p.seqlen_q + u) * p.capacity + first + c] = score[c];
      }
    }
  }
}

// --- Stage 7 ---------------------------------------------------------------------------------------------------------

constexpr int kAttendThreads = 128;
constexpr int kSplitKeys = 64;  // 32 splits x 8 KV heads at a budget of 2,048: two blocks an SM
constexpr int kMostSplits = 128;

struct AttendParams {
  const void *q, *k, *v;
  int64_t q_batch, q_head, q_token, k_batch, k_head, k_token, v_batch, v_head, v_token;
  const int *runs, *num_runs;  // [B, S, Lq, R, 2], [B, S, Lq]
  float* partial_out;          // [B * Lq, H, splits, D], times the sum below
  float2* partial_sums;        // [B * Lq, H, splits] (row_max in log2 units, row_sum)
  int run_capacity, seqlen_q, seqlen_k, heads, selection_heads, splits;
  int group;             // query heads a KV head
  int shared_heads;      // query heads that share a KV head and a list
  int head_groups;       // blocks that take one KV head's and list's shared_heads, kHeads at a time
  float scale, softcap;  // softmax_scale
};

// kLanes lanes share a key or value row, 16 bytes (kPieces = 2: 32 bytes) each; a power of two, so that a row's sum is
// a butterfly. head_dim 96 leaves a quarter of them idle.
template <class T, int kHeadDim>
struct RowShape {
  static constexpr int kVectors = kHeadDim / kVec<T>;
  static constexpr int kLanes = kVectors <= 8 ? 8 : kVectors <= 16 ? 16 : 32;
  static constexpr int kPieces = (kVectors + kLanes - 1) / kLanes;
  static constexpr int kValues = kPieces * kVec<T>;
  static constexpr int kGroups = kAttendThreads / kLanes;  // rows in flight in a block

  __device__ static bool holds(int piece) { return lane_id() % kLanes + piece * kLanes < kVectors; }
  __device__ static int channel(int piece) { return (lane_id() % kLanes + piece * kLanes) * kVec<T>; }

  __device__ static void load(const T* row, uint4 (&raw)[kPieces], bool valid) {
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      raw[i] = valid && holds(i) ? load16(row + channel(i)) : make_uint4(0, 0, 0, 0);
    }
  }
  __device__ static void widen_row(const uint4 (&raw)[kPieces], float (&x)[kValues]) {
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      float part[kVec<T>];
      widen<T>(raw[i], part);
#pragma unroll
      for (int j = 0; j < kVec<T>; ++j) x[i * kVec<T> + j] = part[j];
    }
  }
};

// The runs of one list, a thread's share of them neighbours, numbered by how many kept keys come before.
struct KeptKeys {
  const int* runs;
  int first_run, last_run, first_key, count, seqlen_k;

  __device__ int begin(int run) const { return min(max(runs[2 * run], 0), seqlen_k); }
  __device__ int tokens(int run) const { return max(min(runs[2 * run + 1], seqlen_k) - begin(run), 0); }

  __device__ KeptKeys(const AttendParams& p, int64_t list, BlockScan<kAttendThreads>& scan)
      : runs(p.runs + list * p.run_capacity * 2), seqlen_k(p.seqlen_k) {
    const int num_runs = min(max(p.num_runs[list], 0), p.run_capacity);
    const int share = (num_runs + kAttendThreads - 1) / kAttendThreads;
    first_run = min(static_cast<int>(threadIdx.x) * share, num_runs);
    last_run = min(first_run + share, num_runs);
    int mine = 0;
#pragma unroll 1
    for (int r = first_run; r < last_run; ++r) mine += tokens(r);
    first_key = scan.exclusive_sum(mine, &count);
  }

  // positions[i] = the position of kept key first + i, i < n; the block calls and synchronises after.
  __device__ void write_positions(int first, int n, int* positions) const {
    int key = first_key;
#pragma unroll 1
    for (int r = first_run; r < last_run && key < first + n; ++r) {
      const int start = begin(r), length = tokens(r);
#pragma unroll 1
      for (int i = max(first - key, 0); i < length && key + i < first + n; ++i) positions[key + i - first] = start + i;
      key += length;
    }
  }
};

constexpr float kLog2e = 1.44269504088896341f, kLn2 = 0.693147180559945309f;
constexpr float kLowest = -1e30f;  // finite, so that a row with no key has differences of 0 and a sum of 0

// Products as logits in log2 units.
template <int kHeads>
__device__ inline void to_logits2(const AttendParams& p, float (&z)[kHeads]) {
  const float scale = p.softcap > 0 ? p.scale / p.softcap : p.scale * kLog2e;
#pragma unroll
  for (int h = 0; h < kHeads; ++h) z[h] *= scale;
  if (p.softcap <= 0) return;
#pragma unroll
  for (int h = 0; h < kHeads; ++h) z[h] = p.softcap * kLog2e * tanhf(z[h]);
}

// A thread block takes a split's keys for kHeads heads, lanes of a RowShape a row. All rows of a trip to memory are
// asked for at once, into shared memory: a thread reads back what it has copied itself. The loop over them is not
// unrolled: a thread block runs it once, and waits for its instructions longer than for their results.
template <class T, int kHeadDim, int kHeads>
__global__ void __launch_bounds__(kAttendThreads) attend_kernel(AttendParams p) {
  using Shape = RowShape<T, kHeadDim>;
  constexpr int kShare = kSplitKeys / Shape::kGroups, kMost = 8 / Shape::kPieces;
  constexpr int kBatch = kShare < kMost ? kShare : kMost;  // rows a lane group has in flight
  struct Stage {
    uint4 k[kBatch][Shape::kPieces][kAttendThreads], v[kBatch][Shape::kPieces][kAttendThreads];
  };
  struct Groups {
    float out[Shape::kGroups][kHeads][kHeadDim], factor[Shape::kGroups][kHeads];
    float2 sums[Shape::kGroups][kHeads];
  };
  __shared__ BlockScan<kAttendThreads> scan;
  __shared__ int positions[kSplitKeys];
  __shared__ __align__(16) char memory[sizeof(Stage) > sizeof(Groups) ? sizeof(Stage) : sizeof(Groups)];
  Stage& stage = *reinterpret_cast<Stage*>(memory);
  Groups& groups = *reinterpret_cast<Groups*>(memory);  // once all keys are taken

  const int split = blockIdx.x, batch = blockIdx.z / p.seqlen_q, u = blockIdx.z % p.seqlen_q;
  const int first_in_share = blockIdx.y % p.head_groups * kHeads;
  const int head0 = blockIdx.y / p.head_groups * p.shared_heads + first_in_share;
  const int heads = min(kHeads, p.shared_heads - first_in_share), kv_head = head0 / p.group;
  const int s = head0 / (p.heads / p.selection_heads);
  const int group = threadIdx.x / Shape::kLanes;
  let_next_begin();
  const T* k = static_cast<const T*>(p.k) + batch * p.k_batch + kv_head * p.k_head;
  const T* v = static_cast<const T*>(p.v) + batch * p.v_batch + kv_head * p.v_head;

  float q[kHeads][Shape::kValues], out[kHeads][Shape::kValues] = {}, row_max[kHeads], row_sum[kHeads] = {};
#pragma unroll
  for (int h = 0; h < kHeads; ++h) {
    uint4 raw[Shape::kPieces];
    Shape::load(static_cast<const T*>(p.q) + batch * p.q_batch + (head0 + h) * p.q_head + u * p.q_token, raw,
                h < heads);
    Shape::widen_row(raw, q[h]);
    row_max[h] = kLowest;
  }

  wait_for_previous();
  const int64_t list = (static_cast<int64_t>(batch) * p.selection_heads + s) * p.seqlen_q + u;
  const KeptKeys kept(p, list, scan);
  const int share = (kept.count + p.splits - 1) / p.splits;
  const int last_key = min((split + 1) * share, kept.count);
  for (int first = split * share; first < last_key; first += kSplitKeys) {
    const int n = min(kSplitKeys, last_key - first);
    __syncthreads();
    kept.write_positions(first, n, positions);
    __syncthreads();
    for (int base = group; base - group < n; base += kBatch * Shape::kGroups) {
#pragma unroll 2
      for (int i = 0; i < kBatch; ++i) {
        const int key = base + i * Shape::kGroups;
        const int64_t position = key < n ? positions[key] : 0;
#pragma unroll
        for (int piece = 0; piece < Shape::kPieces; ++piece) {
          const bool valid = key < n && Shape::holds(piece);
          const int64_t channel = valid ? Shape::channel(piece) : 0;
          cp_async_16(smem_address(&stage.k[i][piece][threadIdx.x]), k + position * p.k_token + channel, valid);
          cp_async_16(smem_address(&stage.v[i][piece][threadIdx.x]), v + position * p.v_token + channel, valid);
        }
      }
      cp_async_commit();
      cp_async_wait<0>();
#pragma unroll 1
      for (int i = 0; i < kBatch; ++i) {
        const bool valid = base + i * Shape::kGroups < n;
        uint4 raw[Shape::kPieces];
        float row[Shape::kValues], z[kHeads], rescale[kHeads];
#pragma unroll
        for (int piece = 0; piece < Shape::kPieces; ++piece) raw[piece] = stage.k[i][piece][threadIdx.x];
        Shape::widen_row(raw, row);
#pragma unroll
        for (int h = 0; h < kHeads; ++h) {
          z[h] = 0;
#pragma unroll
          for (int j = 0; j < Shape::kValues; ++j) z[h] += q[h][j] * row[j];
        }
#pragma unroll
        for (int step = Shape::kLanes / 2; step > 0; step /= 2) {
#pragma unroll
          for (int h = 0; h < kHeads; ++h) z[h] += __shfl_xor_sync(kFullWarp, z[h], step);
        }
        to_logits2(p, z);
#pragma unroll
        for (int h = 0; h < kHeads; ++h) {
          const float top = valid ? fmaxf(row_max[h], z[h]) : row_max[h];
          rescale[h] = exp2f(row_max[h] - top), z[h] = valid ? exp2f(z[h] - top) : 0.0f;
          row_max[h] = top, row_sum[h] = row_sum[h] * rescale[h] + z[h];
        }
#pragma unroll
        for (int piece = 0; piece < Shape::kPieces; ++piece) raw[piece] = stage.v[i][piece][threadIdx.x];
        Shape::widen_row(raw, row);
#pragma unroll
        for (int h = 0; h < kHeads; ++h) {
#pragma unroll
          for (int j = 0; j < Shape::kValues; ++j) out[h][j] = out[h][j] * rescale[h] + z[h] * row[j];
        }
      }
    }
  }

  __syncthreads();
#pragma unroll
  for (int h = 0; h < kHeads; ++h) {
#pragma unroll
    for (int i = 0; i < Shape::kPieces; ++i) {
      if (!Shape::holds(i)) continue;
#pragma unroll
      for (int j = 0; j < kVec<T>; ++j) groups.out[group][h][Shape::channel(i) + j] = out[h][i * kVec<T> + j];
    }
    if (lane_id() % Shape::kLanes == 0) groups.sums[group][h] = make_float2(row_max[h], row_sum[h]);
  }
  __syncthreads();
  const int64_t part = (static_cast<int64_t>(blockIdx.z) * p.heads + head0) * p.splits + split;  // + h * p.splits
  if (threadIdx.x < Shape::kGroups * kHeads) {
    const int g = threadIdx.x / kHeads, h = threadIdx.x % kHeads;
    float top = kLowest, sum = 0;
#pragma unroll 1
    for (int other = 0; other < Shape::kGroups; ++other) top = fmaxf(top, groups.sums[other][h].x);
    groups.factor[g][h] = exp2f(groups.sums[g][h].x - top);
    if (g == 0 && h < heads) {
#pragma unroll 1
      for (int other = 0; other < Shape::kGroups; ++other) {
        sum += groups.sums[other][h].y * exp2f(groups.sums[other][h].x - top);
      }
      p.partial_sums[part + h * p.splits] = make_float2(top, sum);
    }
  }
  __syncthreads();
#pragma unroll 1
  for (int i = threadIdx.x; i < heads * kHeadDim; i += kAttendThreads) {
    const int h = i / kHeadDim, d = i % kHeadDim;
    float total = 0;
#pragma unroll
    for (int g = 0; g < Shape::kGroups; ++g) total += groups.out[g][h][d] * groups.factor[g][h];
    p.partial_out[(part + h * p.splits) * kHeadDim + d] = total;
  }
}

struct MergeParams {
  const float* partial_out;
  const float2* partial_sums;
  void* out;
  float* lse;  // [B, H, Lq]
  int64_t out_batch, out_head, out_token;
  int seqlen_q, heads, head_dim, splits;
};

// One block a (query, head), a thread a channel.
template <class T>
__global__ void merge_kernel(MergeParams p) {
  __shared__ float factors[kMostSplits];
  const int head = blockIdx.x, batch = blockIdx.y / p.seqlen_q, u = blockIdx.y % p.seqlen_q;
  const int64_t first = (static_cast<int64_t>(blockIdx.y) * p.heads + head) * p.splits;
  wait_for_previous();
  float top = kLowest, sum = 0;
  for (int i = lane_id(); i < p.splits; i += 32) top = fmaxf(top, p.partial_sums[first + i].x);
#pragma unroll
  for (int step = 16; step > 0; step /= 2) top = fmaxf(top, __shfl_xor_sync(kFullWarp, top, step));
  for (int i = lane_id(); i < p.splits; i += 32) {
    const float2 part = p.partial_sums[first + i];
    const float factor = exp2f(part.x - top);
    sum += part.y * factor;
    if (warp_id() == 0) factors[i] = factor;
  }
  sum = warp_sum(sum);
  __syncthreads();
  float out = 0;
#pragma unroll 16
  for (int i = 0; i < p.splits; ++i) out += p.partial_out[(first + i) * p.head_dim + threadIdx.x] * factors[i];
  T* to = static_cast<T*>(p.out) + batch * p.out_batch + head * p.out_head + u * p.out_token + threadIdx.x;
  from_float(sum > 0 ? out / sum : (sum == 0 ? 0.0f : NAN), to);
  if (threadIdx.x == 0) {
    p.lse[(static_cast<int64_t>(batch) * p.heads + head) * p.seqlen_q + u] =
        sum == 0 ? -INFINITY : (top + log2f(sum)) * kLn2;
  }
}

// --- Launch ----------------------------------------------------------------------------------------------------------

struct Plan {
  SelectKeys select;
  ChunkMass mass;
  RefineKeys refine;
  char *mass_workspace = nullptr, *refine_workspace = nullptr;
  float *scores = nullptr, *partial_out = nullptr;
  float2* partial_sums = nullptr;
  int64_t splits = 1, bytes = 0;
};

Plan make_plan(const SparseDecode& x, void* workspace) {
  const int64_t batch = x.q.shape[0], heads = x.q.shape[1], seqlen_q = x.q.shape[2], head_dim = x.q.shape[3];
  const int64_t seqlen_k = x.k.shape[2], selection_heads = x.k_pooled.shape[1], capacity = x.k_pooled.shape[2];
  Arena arena(workspace);
  Plan plan;
  plan.scores = arena.take<float>(batch * selection_heads * seqlen_q * capacity);
  const int64_t runs = x.refine > 0 ? refined_run_capacity(seqlen_k, x.choice.budget)
                                    : run_capacity(capacity, x.choice.budget, x.choice.min_chunk);
  plan.select.chunk_scores = contiguous(plan.scores, DType::kFloat32, batch, selection_heads, seqlen_q, capacity);
  plan.select.offsets = x.offsets, plan.select.num_chunks = x.num_chunks;
  plan.select.seqlen_q = seqlen_q, plan.select.seqlen_k = seqlen_k, plan.select.q_block = 1;
  plan.select.cache_seqlens = plan.mass.cache_seqlens = plan.refine.cache_seqlens = x.cache_seqlens;
  plan.select.choice = x.choice;
  plan.select.runs = contiguous(arena.take<int>(batch * selection_heads * seqlen_q * runs * 2), DType::kInt32, batch,
                                selection_heads, seqlen_q, runs, 2);
  plan.select.num_runs =
      contiguous(arena.take<int>(batch * selection_heads * seqlen_q), DType::kInt32, batch, selection_heads, seqlen_q);
  if (x.score == ChunkScore::kMass) {
    plan.mass.q = x.q, plan.mass.k_mean = x.k_pooled;
    plan.mass.offsets = x.offsets, plan.mass.num_chunks = x.num_chunks;
    plan.mass.seqlen_k = seqlen_k, plan.mass.q_block = plan.mass.q_stride = 1;
    plan.mass.softmax = x.softmax, plan.mass.softmax.window = x.choice.window;
    plan.mass.scores = plan.select.chunk_scores;
    plan.mass.row_lse =
        contiguous(arena.take<float>(batch * heads * seqlen_q), DType::kFloat32, batch, heads, seqlen_q, 1);
    plan.mass_workspace = arena.take<char>(workspace_bytes(plan.mass));
  }
  if (x.refine > 0) {
    plan.refine.q = x.q, plan.refine.k = x.k, plan.refine.chunk_scores = plan.select.chunk_scores;
    plan.refine.row_lse = plan.mass.row_lse, plan.refine.offsets = x.offsets, plan.refine.num_chunks = x.num_chunks;
    plan.refine.q_block = plan.refine.q_stride = 1, plan.refine.refine = x.refine;
    plan.refine.choice = x.choice, plan.refine.softmax = x.softmax;
    plan.refine.runs = plan.select.runs, plan.refine.num_runs = plan.select.num_runs;
    plan.refine_workspace = arena.take<char>(workspace_bytes(plan.refine));
  }
  plan.splits = std::clamp<int64_t>(ceil_div(std::min(x.choice.budget, seqlen_k), kSplitKeys), 1, kMostSplits);
  plan.partial_out = arena.take<float>(batch * seqlen_q * heads * plan.splits * head_dim);
  plan.partial_sums = arena.take<float2>(batch * seqlen_q * heads * plan.splits);
  plan.bytes = arena.used();
  return plan;
}

template <class T>
cudaError_t launch_scores(const SparseDecode& x, const Plan& plan, cudaStream_t stream) {
  const int64_t batch = x.q.shape[0], selection_heads = x.k_pooled.shape[1], capacity = x.k_pooled.shape[2];
  if (capacity == 0) return cudaSuccess;
  const ScoreParams p = {x.q.data,
                         x.q.stride[0],
                         x.q.stride[1],
                         x.q.stride[2],
                         x.k_pooled.as<float>(),
                         x.num_chunks.as<int>(),
                         plan.scores,
                         static_cast<int>(x.q.shape[2]),
                         static_cast<int>(x.q.shape[3]),
                         static_cast<int>(capacity),
                         static_cast<int>(selection_heads),
                         static_cast<int>(x.q.shape[1] / selection_heads)};
  const dim3 grid(ceil_div(capacity, kChunksPerBlock), selection_heads, batch);
  return launch_early(score_kernel<T>, grid, kScoreThreads, stream, p);
}

template <class T, int kHeadDim>
cudaError_t launch_attend(const SparseDecode& x, const Plan& plan, cudaStream_t stream) {
  AttendParams p = {};
  p.q = x.q.data, p.q_batch = x.q.stride[0], p.q_head = x.q.stride[1], p.q_token = x.q.stride[2];
  p.k = x.k.data, p.k_batch = x.k.stride[0], p.k_head = x.k.stride[1], p.k_token = x.k.stride[2];
  p.v = x.v.data, p.v_batch = x.v.stride[0], p.v_head = x.v.stride[1], p.v_token = x.v.stride[2];
  p.runs = plan.select.runs.as<int>(), p.num_runs = plan.select.num_runs.as<int>();
  p.partial_out = plan.partial_out, p.partial_sums = plan.partial_sums;
  p.run_capacity = static_cast<int>(plan.select.runs.shape[3]);
  p.seqlen_q = static_cast<int>(x.q.shape[2]), p.seqlen_k = static_cast<int>(x.k.shape[2]);
  p.heads = static_cast<int>(x.q.shape[1]), p.selection_heads = static_cast<int>(x.k_pooled.shape[1]);
  p.splits = static_cast<int>(plan.splits), p.group = static_cast<int>(x.q.shape[1] / x.k.shape[1]);
  p.shared_heads = std::min(p.group, p.heads / p.selection_heads);
  p.scale = x.softmax.scale, p.softcap = x.softmax.softcap;
  const auto launch = [&](auto kernel, int heads) {
    p.head_groups = static_cast<int>(ceil_div(p.shared_heads, heads));
    const dim3 grid(p.splits, p.heads / p.shared_heads * p.head_groups, x.q.shape[0] * p.seqlen_q);
    return launch_early(kernel, grid, kAttendThreads, stream, p);
  };
  return p.shared_heads == 1 ? launch(attend_kernel<T, kHeadDim, 1>, 1) : launch(attend_kernel<T, kHeadDim, 4>, 4);
}

template <class T>
cudaError_t launch_merge(const SparseDecode& x, const Plan& plan, cudaStream_t stream) {
  MergeParams p = {plan.partial_out, plan.partial_sums, x.out.data, x.lse.as<float>()};
  p.out_batch = x.out.stride[0], p.out_head = x.out.stride[1], p.out_token = x.out.stride[2];
  p.seqlen_q = static_cast<int>(x.q.shape[2]), p.heads = static_cast<int>(x.q.shape[1]);
  p.head_dim = static_cast<int>(x.q.shape[3]), p.splits = static_cast<int>(plan.splits);
  return launch_early(merge_kernel<T>, dim3(p.heads, x.q.shape[0] * p.seqlen_q), p.head_dim, stream, p);
}

}  // namespace

int64_t workspace_bytes(const SparseDecode& x) { return make_plan(x, nullptr).bytes; }

cudaError_t run(const SparseDecode& x, void* workspace, cudaStream_t stream) {
  if (x.q.shape[0] == 0 || x.q.shape[1] == 0 || x.q.shape[2] == 0) return cudaSuccess;
  const Plan plan = make_plan(x, workspace);
  return with_dtype(x.q.dtype, [&](auto element) {
    using T = decltype(element);
    cudaError_t error =
        x.score == ChunkScore::kMass ? run(plan.mass, plan.mass_workspace, stream) : launch_scores<T>(x, plan, stream);
    if (error == cudaSuccess) {
      const Slab all = {0, x.q.shape[0] * x.k_pooled.shape[1], 0, x.q.shape[2]};
      error = x.refine > 0 ? run(plan.refine, plan.refine_workspace, stream)
                           : run_select_keys(plan.select, all, stream, true);
    }
    if (error != cudaSuccess) return error;
    error = with_head_dim(x.q.shape[3], [&](auto dim) { return launch_attend<T, dim.value>(x, plan, stream); });
    return error == cudaSuccess ? launch_merge<T>(x, plan, stream) : error;
  });
}

}  // namespace dhsa::cuda
