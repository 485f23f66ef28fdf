// Stage 3: pooled[b, s, c] = the sum of x over the tokens of chunk c and the heads that share selection head s, divided
// by those heads' number and by sqrt(n), n or 1; columns >= num_chunks are 0. query_pool is the same over fixed blocks.
// float32 sums in a fixed order, the head mean fused: x is read once, nothing is expanded.
#include <algorithm>

#include "cuda/device/chunks.h"
#include "cuda/device/pool_rows.h"
#include "cuda/dispatch.h"
#include "cuda/launch.h"

namespace dhsa::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
// A chunk up to this long is one warp's; a longer one is shared by its whole block. Chunks average 16 tokens.
constexpr int kLongChunk = 128;

struct Params {
  const void* x;
  const int *offsets, *num_chunks;  // chunk_pool only
  float* pooled;                    // [B, S, columns, D]
  int64_t stride_batch, stride_head, stride_token;
  int seqlen, head_dim, columns, selection_heads;
  int heads_pooled;  // heads of x averaged into one selection head
  int heads_shared;  // selection heads that read the same head of x
  int q_block;       // query_pool only
  PoolScale scale;
};

__device__ inline float pool_factor(PoolScale scale, int tokens, int heads) {
  const float n = static_cast<float>(tokens);
  const float token_factor = scale == PoolScale::kSqrt ? rsqrtf(n) : scale == PoolScale::kMean ? 1.0f / n : 1.0f;
  return token_factor / static_cast<float>(heads);
}

// Where a block's piece of kCols channels starts: blockIdx = (piece and column group, selection head, batch).
template <class T, int kCols>
struct Piece {
  int column_group, channel;
  const T* x;
  float* pooled;

  __device__ explicit Piece(const Params& p) {
    const int pieces = p.head_dim / kCols;
    column_group = blockIdx.x / pieces;
    channel = blockIdx.x % pieces * kCols;
    const int s = blockIdx.y, head = p.heads_shared > 1 ? s / p.heads_shared : s * p.heads_pooled;
    x = static_cast<const T*>(p.x) + blockIdx.z * p.stride_batch + head * p.stride_head + channel;
    pooled = p.pooled + (static_cast<int64_t>(blockIdx.z) * p.selection_heads + s) * p.columns * p.head_dim + channel;
  }
};

// Adds up the warps' sums and writes them; every thread calls.
template <class T, int kCols>
__device__ void store_block_sum(RowSum<T, kCols>& rows, float* pooled, float factor) {
  __shared__ float parts[kWarps][kCols];
  rows.fold_lanes();
  rows.store(parts[warp_id()], 1.0f);
  __syncthreads();
  if (threadIdx.x < kCols) {
    float sum = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) sum += parts[w][threadIdx.x];
    pooled[threadIdx.x] = sum * factor;
  }
  __syncthreads();
}

template <class T, int kCols>
__global__ void __launch_bounds__(kThreads) chunk_pool_kernel(Params p) {
  using Rows = RowSum<T, kCols>;
  const Piece<T, kCols> piece(p);
  const Chunks chunks(p.offsets, p.num_chunks, blockIdx.z, p.columns, p.seqlen);
  const int first = piece.column_group * kWarps;

  const int chunk = first + warp_id();
  if (chunk < p.columns) {
    const int begin = chunk < chunks.count ? chunks.begin(chunk) : 0;
    const int tokens = chunk < chunks.count ? chunks.end(chunk) - begin : 0;
    if (tokens <= kLongChunk) {
      Rows rows;
      rows.add(piece.x + begin * p.stride_token, p.stride_token, p.stride_head, tokens, p.heads_pooled, 0, Rows::kRows);
      rows.fold_lanes();
      const float factor = tokens > 0 ? pool_factor(p.scale, tokens, p.heads_pooled) : 0.0f;
      rows.store(piece.pooled + static_cast<int64_t>(chunk) * p.head_dim, factor);
    }
  }
  for (int c = first; c < min(first + kWarps, chunks.count); ++c) {
    const int begin = chunks.begin(c), tokens = chunks.end(c) - begin;
    if (tokens <= kLongChunk) continue;
    Rows rows;
    rows.add(piece.x + begin * p.stride_token, p.stride_token, p.stride_head, tokens, p.heads_pooled,
             warp_id() * Rows::kRows, kWarps * Rows::kRows);
    store_block_sum<T, kCols>(rows, piece.pooled + static_cast<int64_t>(c) * p.head_dim,
                              pool_factor(p.scale, tokens, p.heads_pooled));
  }
}

template <class T, int kCols>
__global__ void __launch_bounds__(kThreads) query_pool_kernel(Params p) {
  using Rows = RowSum<T, kCols>;
  const Piece<T, kCols> piece(p);
  const int begin = piece.column_group * p.q_block, tokens = min(p.q_block, p.seqlen - begin);
  Rows rows;
  rows.add(piece.x + begin * p.stride_token, p.stride_token, p.stride_head, tokens, p.heads_pooled,
           warp_id() * Rows::kRows, kWarps * Rows::kRows);
  store_block_sum<T, kCols>(rows, piece.pooled + static_cast<int64_t>(piece.column_group) * p.head_dim,
                            pool_factor(p.scale, tokens, p.heads_pooled));
}

Params make_params(const Tensor& x, const Tensor& pooled, int64_t heads, PoolScale scale) {
  Params p = {};
  p.x = x.data, p.pooled = pooled.as<float>();
  p.stride_batch = x.stride[0], p.stride_head = x.stride[1], p.stride_token = x.stride[2];
  p.seqlen = static_cast<int>(x.shape[2]), p.head_dim = static_cast<int>(x.shape[3]);
  p.columns = static_cast<int>(pooled.shape[2]), p.selection_heads = static_cast<int>(heads);
  p.heads_pooled = static_cast<int>(std::max<int64_t>(x.shape[1] / heads, 1));
  p.heads_shared = static_cast<int>(std::max<int64_t>(heads / std::max<int64_t>(x.shape[1], 1), 1));
  p.scale = scale;
  return p;
}

// Calls f(element, piece width) for a dtype and head_dim.
template <class F>
cudaError_t with_piece(DType dtype, int head_dim, F f) {
  return with_dtype(dtype, [&](auto element) {
    if (head_dim % 64 == 0) return f(element, std::integral_constant<int, 64>());
    if (head_dim % 32 == 0) return f(element, std::integral_constant<int, 32>());
    return cudaErrorInvalidValue;
  });
}

}  // namespace

int64_t workspace_bytes(const ChunkPool&) { return 0; }
int64_t workspace_bytes(const QueryPool&) { return 0; }

cudaError_t run(const ChunkPool& x, void*, cudaStream_t stream) {
  Params p = make_params(x.x, x.pooled, x.heads, x.scale);
  p.offsets = x.offsets.as<int>(), p.num_chunks = x.num_chunks.as<int>();
  if (x.x.shape[0] == 0 || p.columns == 0 || x.heads == 0) return cudaSuccess;
  return with_piece(x.x.dtype, p.head_dim, [&](auto element, auto cols) {
    const dim3 grid(ceil_div(p.columns, kWarps) * (p.head_dim / cols), x.heads, x.x.shape[0]);
    chunk_pool_kernel<decltype(element), cols><<<grid, kThreads, 0, stream>>>(p);
    return cudaGetLastError();
  });
}

cudaError_t run(const QueryPool& x, void*, cudaStream_t stream) {
  Params p = make_params(x.q, x.pooled, x.heads, x.scale);
  p.q_block = static_cast<int>(x.q_block);
  if (x.q.shape[0] == 0 || p.columns == 0 || x.heads == 0) return cudaSuccess;
  return with_piece(x.q.dtype, p.head_dim, [&](auto element, auto cols) {
    const dim3 grid(p.columns * (p.head_dim / cols), x.heads, x.q.shape[0]);
    query_pool_kernel<decltype(element), cols><<<grid, kThreads, 0, stream>>>(p);
    return cudaGetLastError();
  });
}

}  // namespace dhsa::cuda
