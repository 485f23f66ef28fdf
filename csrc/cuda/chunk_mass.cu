// Stage 4, accurate: for each query block, an estimate of the attention mass that one token of each chunk gets.
//
//   z[u, c]  = logit(scale q[u] . k_mean[c]) + ln n_c over the chunks that hold a candidate of the block
//   scores[c] = mean over the list's heads and their sampled rows u of softmax(z[u])[c] / n_c; other chunks 0
//   row_lse[u] = logsumexp(z[u]), +inf for a sample that a short block lacks
//
// float32 throughout; a z that is NaN or infinite counts as -inf. This file prepares what the families of kernels read
// (the means as two 16-bit halves, the cut chunks of strict) and picks one: chunk_mass_wgmma.cu on sm_90a or
// chunk_mass_tiles.cu, chunk_mass_rows.cu for float32 and for few rows.
#include <algorithm>
#include <cstring>

#include "cuda/device/chunks.h"
#include "cuda/device/load.h"
#include "cuda/device/logit.h"
#include "cuda/device/pool_rows.h"
#include "cuda/device/smem_tile.h"
#include "cuda/dispatch.h"
#include "cuda/launch.h"
#include "cuda/mass.h"

namespace dhsa::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kFewRows = 256;  // of a pair: below, one tile of slots would be mostly empty
constexpr int kMostDim = 256;

// --- Means as two halves ---------------------------------------------------------------------------------------------

struct SplitParams {
  const float* means;  // [pairs, C, D]
  const int *offsets, *num_chunks;
  void* parts;      // MassMeans
  float2* columns;  // [pairs, pitch]
  int capacity, pitch, head_dim, selection_heads, seqlen_k, pairs;
  bool tiled;    // as wgmma wants them
  float factor;  // scale, times log2(e) where no softcap follows
};

// A warp a chunk. The mean is scaled by a power of two to below 2, so that float16 holds both halves whatever the
// keys' range; the column's factor scales the product back. A chunk without tokens, or with a mean that is not finite,
// gets zeros and a length of log2(0).
template <class T>
__global__ void __launch_bounds__(kThreads) split_means_kernel(SplitParams p) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + warp_id();
  if (row >= static_cast<int64_t>(p.pairs) * p.pitch) return;
  const int pair = static_cast<int>(row / p.pitch), chunk = static_cast<int>(row % p.pitch);
  const Chunks chunks(p.offsets, p.num_chunks, pair / p.selection_heads, p.capacity, p.seqlen_k);
  const int tokens = chunk < chunks.count ? chunks.end(chunk) - chunks.begin(chunk) : 0;
  const float* mean = p.means + (static_cast<int64_t>(pair) * p.capacity + chunk) * p.head_dim;
  float largest = 0;
  bool finite = true;
  if (tokens > 0) {
    for (int d = lane_id(); d < p.head_dim; d += 32) {
      const float x = fabsf(__ldg(mean + d));
      finite &= x < INFINITY;
      largest = fmaxf(largest, x);
    }
  }
#pragma unroll
  for (int step = 16; step > 0; step /= 2) largest = fmaxf(largest, __shfl_xor_sync(kFullWarp, largest, step));
  const bool alive = __all_sync(kFullWarp, finite) && tokens > 0;
  const float exponent = largest > 0 && alive ? fminf(fmaxf(static_cast<float>(ilogbf(largest)), -100), 100) : 0;
  const int panels = (p.head_dim + 63) / 64, panel_bytes = kMassTile * 128;
  const int64_t half = p.tiled ? panels * panel_bytes : p.head_dim * 2;
  char* to = static_cast<char*>(p.parts) + (p.tiled ? row / kMassTile : row) * 2 * half;
  for (int d = lane_id(); d < p.head_dim; d += 32) {
    const float x = alive ? __ldg(mean + d) * exp2f(-exponent) : 0.0f;
    const uint32_t at = p.tiled ? SmemTile<kMassTile, kMostDim>::offset(row % kMassTile, d / 8) + d % 8 * 2 : d * 2;
    T high;
    from_float(x, &high);
    *reinterpret_cast<T*>(to + at) = high;
    from_float(x - to_float(high), reinterpret_cast<T*>(to + half + at));
  }
  if (lane_id() == 0) {
    p.columns[row] = alive ? make_float2(p.factor * exp2f(exponent), log2f(static_cast<float>(tokens)))
                           : make_float2(0.0f, -INFINITY);
  }
}

// --- strict: the chunk that holds p1, ended at p1 + 1 ----------------------------------------------------------------

struct CutParams {
  MassParams mass;
  const void* k;
  int64_t k_batch, k_head, k_token;
  int head_dim, heads_pooled, heads_shared;
  int2* chunks;   // [pairs, blocks]
  float* logits;  // [pairs, blocks, rows]
};

// A thread block a (pair, block): the cut chunk's mean, then its logit for every row.
template <class T, int kCols>
__global__ void __launch_bounds__(kThreads) cut_kernel(CutParams p) {
  using Rows = RowSum<T, kCols>;
  __shared__ __align__(16) float parts[kWarps][kMostDim];
  const MassParams& m = p.mass;
  const int pair = m.first_pair + blockIdx.y, block = m.first_block + blockIdx.x;
  const int batch = pair / m.selection_heads, s = pair % m.selection_heads;
  const int64_t list = static_cast<int64_t>(blockIdx.y) * m.blocks + blockIdx.x;
  const Chunks chunks(m.offsets, m.num_chunks, batch, m.capacity, m.seqlen_k);
  const int end = m.seqlen_k - m.seqlen_q + m.sampled.last_query(block) + 1;
  const int chunk = chunks.first_bound_at_or_after(end) - 1;
  const bool cut = end > 0 && chunk >= 0 && chunk < chunks.count && chunks.end(chunk) > end;
  if (threadIdx.x == 0) p.chunks[list] = cut ? make_int2(chunk, end - chunks.begin(chunk)) : make_int2(-1, 0);
  if (!cut) return;

  const int begin = chunks.begin(chunk), tokens = end - begin;
  const int head = p.heads_shared > 1 ? s / p.heads_shared : s * p.heads_pooled;
  const T* k = static_cast<const T*>(p.k) + batch * p.k_batch + head * p.k_head + begin * p.k_token;
  for (int channel = 0; channel < p.head_dim; channel += kCols) {
    Rows rows;
    rows.add(k + channel, p.k_token, p.k_head, tokens, p.heads_pooled, warp_id() * Rows::kRows, kWarps * Rows::kRows);
    rows.fold_lanes();
    if (lane_id() < Rows::kLanes) rows.store(&parts[warp_id()][channel], 1.0f);
  }
  __syncthreads();
  for (int d = threadIdx.x; d < p.head_dim; d += kThreads) {
    float sum = 0;
    for (int w = 0; w < kWarps; ++w) sum += parts[w][d];
    parts[0][d] = sum / static_cast<float>(tokens * p.heads_pooled);
  }
  __syncthreads();
  for (int row = warp_id(); row < m.rows(); row += kWarps) {
    const int sample = row % m.sampled.samples, q_head = m.head_of(pair, row);
    float dot = 0;
    if (m.sampled.used(block, sample)) {
      const T* q =
          static_cast<const T*>(m.q) + batch * m.q_batch + q_head * m.q_head + m.sampled.row(block, sample) * m.q_token;
      for (int d = lane_id(); d < p.head_dim; d += 32) dot += to_float(q[d]) * parts[0][d];
    }
    const float z = logit2(warp_sum(dot), m.scale, m.softcap);
    if (lane_id() == 0) p.logits[list * m.rows() + row] = fabsf(z) < INFINITY ? z : -INFINITY;
  }
}

// --- Launch ----------------------------------------------------------------------------------------------------------

bool takes_tiles(const ChunkMass& x) {
  const int64_t rows = x.q.shape[1] / std::max<int64_t>(x.k_mean.shape[1], 1) * x.row_lse.shape[3] * x.row_lse.shape[2];
  return x.q.dtype != DType::kFloat32 && rows >= kFewRows && !x.cache_seqlens.given();
}

MassParams mass_params(const ChunkMass& x, const Slab& slab, const void* row_means = nullptr) {
  const auto clamp = [](int64_t n) { return static_cast<int>(std::min<int64_t>(n, INT32_MAX / 2)); };
  MassParams p = {};
  p.q = x.q.data, p.q_batch = x.q.stride[0], p.q_head = x.q.stride[1], p.q_token = x.q.stride[2];
  p.offsets = x.offsets.as<int>(), p.num_chunks = x.num_chunks.as<int>();
  p.scores = x.scores.as<float>(), p.row_lse = x.row_lse.as<float>();
  p.cache_seqlens = x.cache_seqlens.given() ? x.cache_seqlens.as<int>() : nullptr;
  p.sampled = sampled_rows(x.q.shape[2], x.q_block, x.q_stride);
  p.seqlen_q = clamp(x.q.shape[2]), p.seqlen_k = clamp(x.seqlen_k), p.window = clamp(x.softmax.window);
  p.capacity = clamp(x.k_mean.shape[2]), p.heads = clamp(x.q.shape[1]), p.selection_heads = clamp(x.k_mean.shape[1]);
  p.list_heads = p.heads / std::max(p.selection_heads, 1), p.query_blocks = clamp(x.row_lse.shape[2]);
  p.first_pair = clamp(slab.first_pair), p.first_block = clamp(slab.first_block);
  p.blocks = clamp(slab.blocks), p.pairs = clamp(slab.pairs);
  p.scale = x.softmax.scale, p.softcap = x.softmax.softcap;
  if (x.rows == QueryRows::kMean) read_row_means(p, row_means, x.q.shape[1], p.query_blocks, x.q.shape[3]);
  return p;
}

Slab whole_call(const ChunkMass& x) { return {0, x.scores.shape[0] * x.scores.shape[1], 0, x.scores.shape[2]}; }

struct Cuts {
  int2* chunks = nullptr;
  float* logits = nullptr;
};

Cuts layout_cuts(const MassParams& p, bool strict, Arena& arena) {
  if (!strict) return {};
  const int64_t lists = static_cast<int64_t>(p.pairs) * p.blocks;
  return {arena.take<int2>(lists), arena.take<float>(lists * p.rows())};
}

// What serves the whole call: its rows, its chunks' means, and what wgmma's kernels keep from the logsumexp to the last
// slab.
struct CallMemory {
  char* row_means = nullptr;
  MassMeans means;
  Cuts cuts;
  char* wgmma = nullptr;
};

CallMemory layout_call(const ChunkMass& x, bool strict, Arena& arena) {
  CallMemory call;
  if (x.rows == QueryRows::kMean) call.row_means = arena.take<char>(row_means_bytes(x.q, x.q_block, x.q_stride));
  call.means.means = x.k_mean.as<float>();
  if (!takes_tiles(x)) return call;
  const int64_t columns = x.k_mean.shape[0] * x.k_mean.shape[1] * mass_pitch(x.k_mean.shape[2]);
  call.means.parts = arena.take<char>(columns * 2 * ceil_div(x.k_mean.shape[3], 64) * 128);
  call.means.columns = arena.take<float2>(columns);
  if (std::strstr(archs_compiled(), "90a") == nullptr) return call;  // sizes must not depend on the device
  const MassParams p = mass_params(x, whole_call(x));
  call.cuts = layout_cuts(p, strict, arena);
  call.wgmma = arena.take<char>(mass_wgmma_bytes(p, static_cast<int>(x.q.shape[3])));
  return call;
}

struct SlabScratch {
  Cuts cuts;
  char* kernels = nullptr;
};

SlabScratch layout_slab(const ChunkMass& x, const Slab& slab, bool strict, Arena& arena) {
  const MassParams p = mass_params(x, slab);
  SlabScratch scratch;
  scratch.cuts = layout_cuts(p, strict, arena);
  scratch.kernels = arena.take<char>(takes_tiles(x) ? mass_tiles_bytes(p) : mass_rows_bytes(p));
  return scratch;
}

cudaError_t run_cut(const Tensor& k, const MassParams& mass, const Cuts& cuts, cudaStream_t stream) {
  CutParams p = {};
  p.mass = mass, p.k = k.data;
  p.k_batch = k.stride[0], p.k_head = k.stride[1], p.k_token = k.stride[2];
  p.head_dim = static_cast<int>(k.shape[3]);
  p.heads_pooled = std::max(static_cast<int>(k.shape[1]) / mass.selection_heads, 1);
  p.heads_shared = std::max(mass.selection_heads / static_cast<int>(k.shape[1]), 1);
  p.chunks = cuts.chunks, p.logits = cuts.logits;
  return with_dtype(k.dtype, [&](auto element) {
    using T = decltype(element);
    const dim3 grid(mass.blocks, mass.pairs);
    if (p.head_dim % 64 == 0) {
      cut_kernel<T, 64><<<grid, kThreads, 0, stream>>>(p);
    } else {
      cut_kernel<T, 32><<<grid, kThreads, 0, stream>>>(p);
    }
    return cudaGetLastError();
  });
}

}  // namespace

int64_t mass_means_bytes(const ChunkMass& x, bool strict) {
  Arena arena(nullptr);
  layout_call(x, strict, arena);
  return arena.used();
}

cudaError_t run_mass_means(const ChunkMass& x, void* memory, cudaStream_t stream, const Tensor* strict_k) {
  Arena arena(memory);
  const CallMemory call = layout_call(x, strict_k != nullptr, arena);
  if (x.rows == QueryRows::kMean) {
    const cudaError_t error = run_row_means(x.q, x.q_block, x.q_stride, call.row_means, stream);
    if (error != cudaSuccess) return error;
  }
  if (!takes_tiles(x)) return cudaSuccess;
  const bool wgmma = mass_uses_wgmma();
  SplitParams p = {};
  p.means = call.means.means;
  p.parts = const_cast<void*>(call.means.parts), p.columns = const_cast<float2*>(call.means.columns);
  p.offsets = x.offsets.as<int>(), p.num_chunks = x.num_chunks.as<int>();
  p.capacity = static_cast<int>(x.k_mean.shape[2]), p.pitch = static_cast<int>(mass_pitch(x.k_mean.shape[2]));
  p.head_dim = static_cast<int>(x.k_mean.shape[3]), p.selection_heads = static_cast<int>(x.k_mean.shape[1]);
  p.seqlen_k = static_cast<int>(x.seqlen_k), p.pairs = static_cast<int>(x.k_mean.shape[0] * x.k_mean.shape[1]);
  p.tiled = wgmma, p.factor = x.softmax.scale * (x.softmax.softcap > 0 ? 1.0f : kLog2OfE);
  const int64_t grid = ceil_div(static_cast<int64_t>(p.pairs) * p.pitch, kWarps);
  if (grid > 0 && x.q.dtype == DType::kFloat16) {
    split_means_kernel<__half><<<grid, kThreads, 0, stream>>>(p);
  } else if (grid > 0) {
    split_means_kernel<__nv_bfloat16><<<grid, kThreads, 0, stream>>>(p);
  }
  cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess || !wgmma) return error;
  MassParams mass = mass_params(x, whole_call(x), call.row_means);
  if (strict_k != nullptr) {
    error = run_cut(*strict_k, mass, call.cuts, stream);
    if (error != cudaSuccess) return error;
    mass.cut = {call.cuts.chunks, call.cuts.logits};
  }
  return run_mass_wgmma(MassStep::kLse, mass, mass.pairs, call.means, x.q.dtype, p.head_dim, call.wgmma, stream);
}

const void* mass_row_means(const ChunkMass& x, void* memory) {
  Arena arena(memory);
  return layout_call(x, false, arena).row_means;
}

int64_t mass_scratch_bytes(const ChunkMass& x, const Slab& slab, bool strict) {
  Arena arena(nullptr);
  layout_slab(x, slab, strict, arena);
  return arena.used();
}

cudaError_t run_chunk_mass(const ChunkMass& x, const Tensor* strict_k, void* means_memory, void* scratch_memory,
                           const Slab& slab, cudaStream_t stream) {
  Arena call_arena(means_memory), arena(scratch_memory);
  const CallMemory call = layout_call(x, strict_k != nullptr, call_arena);
  const SlabScratch scratch = layout_slab(x, slab, strict_k != nullptr, arena);
  const int head_dim = static_cast<int>(x.q.shape[3]);
  MassParams p = mass_params(x, slab, call.row_means);
  if (takes_tiles(x) && mass_uses_wgmma()) {
    if (strict_k != nullptr) p.cut = {call.cuts.chunks, call.cuts.logits};
    const int all_pairs = static_cast<int>(whole_call(x).pairs);
    return run_mass_wgmma(MassStep::kScores, p, all_pairs, call.means, x.q.dtype, head_dim, call.wgmma, stream);
  }
  if (strict_k != nullptr) {
    const cudaError_t error = run_cut(*strict_k, p, scratch.cuts, stream);
    if (error != cudaSuccess) return error;
    p.cut = {scratch.cuts.chunks, scratch.cuts.logits};
  }
  return takes_tiles(x) ? run_mass_tiles(p, call.means, x.q.dtype, head_dim, scratch.kernels, stream)
                        : run_mass_rows(p, call.means.means, x.q.dtype, head_dim, scratch.kernels, stream);
}

int64_t workspace_bytes(const ChunkMass& x) {
  return mass_means_bytes(x) + mass_scratch_bytes(x, whole_call(x), false);
}

cudaError_t run(const ChunkMass& x, void* workspace, cudaStream_t stream) {
  const Slab all = whole_call(x);
  if (all.pairs * all.blocks == 0) return cudaSuccess;
  const size_t bytes = static_cast<size_t>(all.pairs * all.blocks * x.scores.shape[3] * 4);
  cudaError_t error = bytes > 0 ? cudaMemsetAsync(x.scores.data, 0, bytes, stream) : cudaSuccess;
  if (error == cudaSuccess) error = run_mass_means(x, workspace, stream);
  if (error != cudaSuccess) return error;
  void* scratch = workspace == nullptr ? nullptr : static_cast<char*>(workspace) + mass_means_bytes(x);
  return run_chunk_mass(x, nullptr, workspace, scratch, all, stream);
}

}  // namespace dhsa::cuda
