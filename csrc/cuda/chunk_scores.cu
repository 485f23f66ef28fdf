// Stage 4: scores[b, s, i, c] = q_pooled[b, s, i] . k_pooled[b, s, c], no softmax scale. float32 to about 2^-21: each
// operand is split into two TF32 numbers, a = hi + lo, and hi.hi + hi.lo + lo.hi is summed on the tensor cores, eight
// channels at a time: they cut sums off, toward 0, so that what they add up is added up by float32 instructions, which
// round. Plain TF32 (2^-11) would reorder chunks.
//
// A block computes 64 query blocks x 128 chunks with 8 warps of 32 x 32, over head_dim in steps of 32: cp.async into
// two shared buffers, one loading while the other is multiplied.
#include <algorithm>

#include "cuda/device/chunks.h"
#include "cuda/device/cp_async.h"
#include "cuda/device/tf32.h"
#include "cuda/dispatch.h"
#include "cuda/launch.h"
#include "cuda/router.h"

namespace dhsa::cuda {
namespace {

constexpr int kBlockM = 64, kBlockN = 128, kBlockK = 32;
constexpr int kStride = kBlockK + 4;  // floats a row: fragment reads (8 rows x 4 columns) touch each bank once
constexpr int kThreads = 256;
constexpr int kWarpM = 32, kWarpN = 32, kWarpsN = kBlockN / kWarpN;

struct Params {
  const float *q, *k;  // [B * S, nQ, D], [B * S, C, D]
  float* scores;       // [pairs, blocks, C]
  int query_blocks, capacity, head_dim;
  int first_pair, first_block, blocks, selection_heads;
  const int *offsets, *num_chunks;  // null: every tile is computed
  int seqlen_q, seqlen_k, q_block;
};

struct Tiles {
  float q[2][kBlockM][kStride], k[2][kBlockN][kStride];
};

// Rows [0, rows) of src and columns [column, column + 32) of head_dim.
template <int kRows>
__device__ inline void copy_tile(float (*to)[kStride], const float* src, int rows, int head_dim, int column) {
  constexpr int kPieces = kBlockK / 4;
#pragma unroll
  for (int i = threadIdx.x; i < kRows * kPieces; i += kThreads) {
    const int row = i / kPieces, x = i % kPieces * 4;
    const bool valid = row < rows && column + x < head_dim;
    cp_async_16(smem_address(&to[row][x]), valid ? src + static_cast<int64_t>(row) * head_dim + column + x : src,
                valid);
  }
}

// One step of 32 channels. Lane = 4 * group + member; a fragment's rows are group and group + 8, its columns member and
// member + 4.
__device__ inline void multiply(const float (*q)[kStride], const float (*k)[kStride], float (&acc)[2][4][4]) {
  const int group = lane_id() / 4, member = lane_id() % 4;
#pragma unroll
  for (int column = 0; column < kBlockK; column += 8) {
    uint32_t a_hi[2][4], a_lo[2][4];
#pragma unroll
    for (int m = 0; m < 2; ++m) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        split(q[m * 16 + group + i % 2 * 8][column + member + i / 2 * 4], a_hi[m][i], a_lo[m][i]);
      }
    }
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      uint32_t b_hi[2], b_lo[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) split(k[n * 8 + group][column + member + i * 4], b_hi[i], b_lo[i]);
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        float sums[4] = {};
        mma_tf32(sums, a_lo[m], b_hi);
        mma_tf32(sums, a_hi[m], b_lo);
        mma_tf32(sums, a_hi[m], b_hi);
#pragma unroll
        for (int i = 0; i < 4; ++i) acc[m][n][i] += sums[i];
      }
    }
  }
}

// An infinite operand makes the split's low part NaN, and products that overflow may do so first in a cross product,
// with the wrong sign: a score that is not finite is summed again in plain float32.
__device__ float plain_dot(const float* q, const float* k, int head_dim) {
  float sum = 0;
  for (int d = 0; d < head_dim; ++d) sum += q[d] * k[d];
  return sum;
}

// Whether any query of the tile's rows may keep a key of chunks [first_chunk, ...).
__device__ bool reachable(const Params& p, int pair, int last_row, int first_chunk) {
  if (p.offsets == nullptr) return true;
  const Chunks chunks(p.offsets, p.num_chunks, pair / p.selection_heads, p.capacity, p.seqlen_k);
  if (first_chunk >= chunks.count) return false;
  const int last_query = min(p.seqlen_q, (last_row + 1) * p.q_block) - 1;
  return chunks.begin(first_chunk) <= p.seqlen_k - p.seqlen_q + last_query;
}

__global__ void __launch_bounds__(kThreads) chunk_scores_kernel(Params p) {
  extern __shared__ char shared[];
  Tiles& tiles = *reinterpret_cast<Tiles*>(shared);
  const int pair = p.first_pair + blockIdx.z;
  const int row0 = blockIdx.y * kBlockM, chunk0 = blockIdx.x * kBlockN;  // row0 within the slab
  const int rows = min(kBlockM, p.blocks - row0), chunks = min(kBlockN, p.capacity - chunk0);
  if (!reachable(p, pair, p.first_block + row0 + rows - 1, chunk0)) return;
  const float* q = p.q + (static_cast<int64_t>(pair) * p.query_blocks + p.first_block + row0) * p.head_dim;
  const float* k = p.k + (static_cast<int64_t>(pair) * p.capacity + chunk0) * p.head_dim;

  const auto load = [&](int step) {
    copy_tile<kBlockM>(tiles.q[step % 2], q, rows, p.head_dim, step * kBlockK);
    copy_tile<kBlockN>(tiles.k[step % 2], k, chunks, p.head_dim, step * kBlockK);
    cp_async_commit();
  };
  const int warp_m = warp_id() / kWarpsN * kWarpM, warp_n = warp_id() % kWarpsN * kWarpN;
  float acc[2][4][4] = {};
  const int steps = (p.head_dim + kBlockK - 1) / kBlockK;
  load(0);
  for (int step = 0; step < steps; ++step) {
    if (step + 1 < steps) {
      load(step + 1);
      cp_async_wait<1>();
    } else {
      cp_async_wait<0>();
    }
    __syncthreads();
    multiply(tiles.q[step % 2] + warp_m, tiles.k[step % 2] + warp_n, acc);
    __syncthreads();
  }

#pragma unroll
  for (int m = 0; m < 2; ++m) {
#pragma unroll
    for (int n = 0; n < 4; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = warp_m + m * 16 + lane_id() / 4 + i / 2 * 8;
        const int chunk = warp_n + n * 8 + lane_id() % 4 * 2 + i % 2;
        if (row >= rows || chunk >= chunks) continue;
        float score = acc[m][n][i];
        if (!(fabsf(score) < INFINITY)) {
          score = plain_dot(q + static_cast<int64_t>(row) * p.head_dim, k + static_cast<int64_t>(chunk) * p.head_dim,
                            p.head_dim);
        }
        p.scores[(static_cast<int64_t>(blockIdx.z) * p.blocks + row0 + row) * p.capacity + chunk0 + chunk] = score;
      }
    }
  }
}

}  // namespace

cudaError_t run_chunk_scores(const Tensor& q_pooled, const Tensor& k_pooled, float* scores, const Slab& slab,
                             const Reach& reach, cudaStream_t stream) {
  Params p = {};
  p.q = q_pooled.as<float>(), p.k = k_pooled.as<float>(), p.scores = scores;
  p.query_blocks = static_cast<int>(q_pooled.shape[2]), p.capacity = static_cast<int>(k_pooled.shape[2]);
  p.head_dim = static_cast<int>(k_pooled.shape[3]), p.selection_heads = static_cast<int>(k_pooled.shape[1]);
  p.first_pair = static_cast<int>(slab.first_pair), p.first_block = static_cast<int>(slab.first_block);
  p.blocks = static_cast<int>(slab.blocks);
  p.offsets = reach.offsets, p.num_chunks = reach.num_chunks;
  p.seqlen_q = static_cast<int>(reach.seqlen_q), p.seqlen_k = static_cast<int>(reach.seqlen_k);
  p.q_block = static_cast<int>(reach.q_block);
  if (slab.pairs == 0 || slab.blocks == 0 || p.capacity == 0) return cudaSuccess;
  const cudaError_t error =
      cudaFuncSetAttribute(chunk_scores_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, sizeof(Tiles));
  if (error != cudaSuccess) return error;
  const dim3 grid(ceil_div(p.capacity, kBlockN), ceil_div(slab.blocks, kBlockM), slab.pairs);
  chunk_scores_kernel<<<grid, kThreads, sizeof(Tiles), stream>>>(p);
  return cudaGetLastError();
}

int64_t workspace_bytes(const ChunkScores&) { return 0; }

cudaError_t run(const ChunkScores& x, void*, cudaStream_t stream) {
  const int64_t pairs = x.q_pooled.shape[0] * x.q_pooled.shape[1];
  constexpr int64_t kMostPairs = 65535;  // of one grid
  for (int64_t first = 0; first < pairs; first += kMostPairs) {
    const Slab slab = {first, std::min(kMostPairs, pairs - first), 0, x.q_pooled.shape[2]};
    float* scores = x.scores.as<float>() + first * x.q_pooled.shape[2] * x.k_pooled.shape[2];
    const cudaError_t error = run_chunk_scores(x.q_pooled, x.k_pooled, scores, slab, {}, stream);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace dhsa::cuda
