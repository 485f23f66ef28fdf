// chunk_mass in plain float32: for float32 queries, and for calls of few rows (decode), whose time is that of reading
// the means once. Two launches for as many query blocks at once as their rows x C logits fit the scratch:
//
//   logit_kernel   z[row, c] in log2 units, ln n_c included; -inf where a chunk holds no candidate of the row's block
//   mass_kernel    one thread block a query block: each row's logsumexp, then the mean of pi_c / n_c over the rows
#include <algorithm>

#include "cuda/device/chunks.h"
#include "cuda/device/load.h"
#include "cuda/device/logit.h"
#include "cuda/dispatch.h"
#include "cuda/mass.h"

namespace dhsa::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kTileRows = 32, kTileChunks = 64, kTileDim = 32;
constexpr int kRowsPerThread = kTileRows * kTileChunks / kThreads;
constexpr int64_t kScratchBytes = 32 << 20;

struct RowParams : MassParams {
  const float* means;  // [B * S, C, D]
  float* logits;       // [pairs, step_blocks, rows, C]
  int head_dim;
  int first_step_block, step_blocks;  // of the slab: those of this launch
};

template <class T>
__device__ float query_element(const RowParams& p, int pair, int block, int row, int d) {
  const int sample = row % p.sampled.samples, head = pair % p.selection_heads * p.list_heads + row / p.sampled.samples;
  if (!p.sampled.used(block, sample)) return 0.0f;
  return to_float(static_cast<const T*>(
      p.q)[pair / p.selection_heads * p.q_batch + head * p.q_head + p.sampled.row(block, sample) * p.q_token + d]);
}

template <class T>
__global__ void __launch_bounds__(kThreads) logit_kernel(RowParams p) {
  __shared__ float q[kTileRows][kTileDim];
  __shared__ float k[kTileChunks][kTileDim + 1];
  const int pair = p.first_pair + blockIdx.z, rows = p.step_blocks * p.rows();
  const int row0 = blockIdx.y * kTileRows, chunk0 = blockIdx.x * kTileChunks;
  const int column = threadIdx.x % kTileChunks, group = threadIdx.x / kTileChunks;
  const int chunk = chunk0 + column;
  const int held = p.held(pair / p.selection_heads);
  const Chunks chunks(p.offsets, p.num_chunks, pair / p.selection_heads, p.capacity, held);

  float sum[kRowsPerThread] = {};
  for (int d0 = 0; d0 < p.head_dim; d0 += kTileDim) {
    for (int i = threadIdx.x; i < kTileRows * kTileDim; i += kThreads) {
      const int row = row0 + i / kTileDim, d = d0 + i % kTileDim;
      const int block = p.first_block + p.first_step_block + row / p.rows();
      q[i / kTileDim][i % kTileDim] =
          row < rows && d < p.head_dim ? query_element<T>(p, pair, block, row % p.rows(), d) : 0.0f;
    }
    for (int i = threadIdx.x; i < kTileChunks * kTileDim; i += kThreads) {
      const int c = chunk0 + i / kTileDim, d = d0 + i % kTileDim;
      k[i / kTileDim][i % kTileDim] =
          c < chunks.count && d < p.head_dim
              ? __ldg(p.means + (static_cast<int64_t>(pair) * p.capacity + c) * p.head_dim + d)
              : 0.0f;
    }
    __syncthreads();
#pragma unroll 8
    for (int d = 0; d < kTileDim; ++d) {
      const float x = k[column][d];
#pragma unroll
      for (int r = 0; r < kRowsPerThread; ++r) sum[r] += q[group * kRowsPerThread + r][d] * x;
    }
    __syncthreads();
  }

  if (chunk >= p.capacity) return;
  const bool real = chunk < chunks.count;
  const int begin = real ? chunks.begin(chunk) : 0, end = real ? chunks.end(chunk) : 0;
#pragma unroll
  for (int r = 0; r < kRowsPerThread; ++r) {
    const int row = row0 + group * kRowsPerThread + r;
    if (row >= rows) break;
    const int slab_block = p.first_step_block + row / p.rows(), block = p.first_block + slab_block;
    const int shift = held - p.seqlen_q, p0 = shift + block * p.sampled.q_block;
    const int64_t list = static_cast<int64_t>(blockIdx.z) * p.blocks + slab_block;
    float z = logit2(sum[r], p.scale, p.softcap) + log2f(static_cast<float>(end - begin));
    if (p.cut.chunks != nullptr && __ldg(&p.cut.chunks[list].x) == chunk) {
      z = __ldg(p.cut.logits + list * p.rows() + row % p.rows()) +
          log2f(static_cast<float>(__ldg(&p.cut.chunks[list].y)));
    }
    const bool candidate =
        begin < end && begin <= shift + p.sampled.last_query(block) && (p.window == 0 || end > p0 - p.window + 1);
    p.logits[(static_cast<int64_t>(blockIdx.z) * rows + row) * p.capacity + chunk] =
        candidate && fabsf(z) < INFINITY ? z : -INFINITY;
  }
}

__global__ void __launch_bounds__(kThreads) mass_kernel(RowParams p) {
  const int slab_block = p.first_step_block + blockIdx.x, block = p.first_block + slab_block;
  const int pair = p.first_pair + blockIdx.y, batch = pair / p.selection_heads;
  const float* logits = p.logits + (static_cast<int64_t>(blockIdx.y) * p.step_blocks + blockIdx.x) * p.rows() *
                                       static_cast<int64_t>(p.capacity);
  const Chunks chunks(p.offsets, p.num_chunks, batch, p.capacity, p.held(batch));
  const int samples = p.sampled.samples;
  const auto lse_of = [&](int row) {
    const int head = pair % p.selection_heads * p.list_heads + row / samples;
    return p.row_lse + ((static_cast<int64_t>(batch) * p.heads + head) * p.query_blocks + block) * samples +
           row % samples;
  };

  for (int row = warp_id(); row < p.rows(); row += kWarps) {
    const float* z = logits + static_cast<int64_t>(row) * p.capacity;
    float top = -1e30f, sum = 0;
    for (int c = lane_id(); c < chunks.count; c += 32) {
      const float both = fmaxf(top, z[c]);
      sum = sum * exp2f(top - both) + exp2f(z[c] - both);
      top = both;
    }
    for (int step = 16; step > 0; step /= 2) {
      const float other = __shfl_xor_sync(kFullWarp, top, step), both = fmaxf(top, other);
      sum = sum * exp2f(top - both) + __shfl_xor_sync(kFullWarp, sum, step) * exp2f(other - both);
      top = both;
    }
    if (lane_id() == 0) {
      const float lse = sum > 0 ? (top + log2f(sum)) / kLog2OfE : -INFINITY;
      *lse_of(row) = p.sampled.used(block, row % samples) ? lse : INFINITY;
    }
  }
  __syncthreads();

  const int queries = p.sampled.last_query(block) - block * p.sampled.q_block + 1;
  const float used_rows = static_cast<float>(p.list_heads * ((queries + p.sampled.q_stride - 1) / p.sampled.q_stride));
  const int64_t list = static_cast<int64_t>(blockIdx.y) * p.blocks + slab_block;
  int2 cut = make_int2(-1, 0);
  if (p.cut.chunks != nullptr) cut = __ldg(p.cut.chunks + list);
  for (int c = threadIdx.x; c < chunks.count; c += kThreads) {
    float sum = 0;
    for (int row = 0; row < p.rows(); ++row) {
      const float z = logits[static_cast<int64_t>(row) * p.capacity + c], lse = *lse_of(row);
      if (z > -INFINITY && fabsf(lse) < INFINITY) sum += exp2f(z - lse * kLog2OfE);
    }
    const int tokens = c == cut.x ? cut.y : max(chunks.end(c) - chunks.begin(c), 1);
    p.scores[list * p.capacity + c] = sum / (used_rows * static_cast<float>(tokens));
  }
}

int64_t block_bytes(const MassParams& p) {  // of one query block of every pair
  return static_cast<int64_t>(p.pairs) * p.rows() * std::max(p.capacity, 1) * 4;
}

// Query blocks of a launch: their logits fit the scratch, their row tiles one grid.
int64_t blocks_at_once(const MassParams& p) {
  const int64_t fit = std::min<int64_t>(kScratchBytes / block_bytes(p), int64_t(65535) * kTileRows / p.rows());
  return std::clamp<int64_t>(fit, 1, std::max(p.blocks, 1));
}

}  // namespace

int64_t mass_rows_bytes(const MassParams& p) {
  if (p.rows() == 0) return 0;
  return block_bytes(p) * blocks_at_once(p);
}

cudaError_t run_mass_rows(const MassParams& x, const float* means, DType dtype, int head_dim, void* scratch,
                          cudaStream_t stream) {
  if (x.pairs == 0 || x.blocks == 0) return cudaSuccess;
  RowParams p = {};
  static_cast<MassParams&>(p) = x;
  p.means = means, p.logits = static_cast<float*>(scratch), p.head_dim = head_dim;
  const int step = static_cast<int>(blocks_at_once(x));
  cudaError_t error = cudaSuccess;
  for (int block = 0; block < x.blocks && error == cudaSuccess; block += step) {
    p.first_step_block = block, p.step_blocks = std::min(step, x.blocks - block);
    const dim3 grid(ceil_div(x.capacity, kTileChunks), ceil_div(p.step_blocks * p.rows(), kTileRows), x.pairs);
    if (x.capacity > 0) {
      error = with_dtype(dtype, [&](auto element) {
        logit_kernel<decltype(element)><<<grid, kThreads, 0, stream>>>(p);
        return cudaGetLastError();
      });
    }
    if (error == cudaSuccess) {
      mass_kernel<<<dim3(p.step_blocks, x.pairs), kThreads, 0, stream>>>(p);
      error = cudaGetLastError();
    }
  }
  return error;
}

}  // namespace dhsa::cuda
