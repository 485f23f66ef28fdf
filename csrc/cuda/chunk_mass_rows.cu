// chunk_mass in plain float32: for float32 queries, and for calls of few rows (decode), whose time is that of reading
// the means once. Two launches for as many query blocks at once as their rows x C logits fit the scratch:
//
//   logit_kernel   z[row, c] in log2 units, ln n_c included, -inf where a chunk holds no candidate of the row's block;
//                  of each tile of chunks a part of the rows' logsumexps
//   score_kernel   row_lse from those parts, then the mean of pi_c / n_c over the rows
#include <algorithm>

#include "cuda/device/chunks.h"
#include "cuda/device/early_launch.h"
#include "cuda/device/load.h"
#include "cuda/device/logit.h"
#include "cuda/dispatch.h"
#include "cuda/launch.h"
#include "cuda/mass.h"

namespace dhsa::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kTileChunks = 128;                       // of a thread block of logit_kernel
constexpr int kChunksPerThread = 4, kRowsAtOnce = 32;  // of score_kernel
constexpr int64_t kScratchBytes = 32 << 20;

struct RowParams : MassParams {
  const float* means;  // [B * S, C, D]
  float* logits;       // [pairs, step_blocks, rows, C]
  float2* parts;       // [pairs, step_blocks, rows, tiles]: PartialSum's
  int head_dim, tiles;
  int first_step_block, step_blocks;  // of the slab: those of this launch

  __device__ int64_t list(int pair_of_slab, int step_block) const {  // of this launch
    return static_cast<int64_t>(pair_of_slab) * step_blocks + step_block;
  }
};

// The sum over the warp of each of 32 values: lane l gets that of value[l]. Recursive, since a loop whose inner bound
// halves is not unrolled, and the values would go to local memory.
template <int kHalf = 16>
__device__ inline float warp_sums(float (&value)[32]) {
  const bool upper = lane_id() & kHalf;
#pragma unroll
  for (int i = 0; i < kHalf; ++i) {
    const float other = __shfl_xor_sync(kFullWarp, upper ? value[i] : value[i + kHalf], kHalf);
    value[i] = (upper ? value[i + kHalf] : value[i]) + other;
  }
  if constexpr (kHalf > 1) return warp_sums<kHalf / 2>(value);
  return value[0];
}

// The sum of the parts of lanes that differ in the bits from `step` on.
__device__ inline void add_lanes(PartialSum& sum, int step) {
  for (; step < 32; step *= 2) {
    sum.add(make_float2(__shfl_xor_sync(kFullWarp, sum.top, step), __shfl_xor_sync(kFullWarp, sum.sum, step)));
  }
}

// A thread block takes kRows rows of a query block, and a warp 32 / kRows of its chunks at a time: a lane holds
// channels [4 lane, 4 lane + 4), and the same plus 128, of all of them, and ends up with the logit of one chunk and
// row.
template <class T, int kRows, int kHalves>
__global__ void __launch_bounds__(kThreads) logit_kernel(RowParams p) {
  constexpr int kChunks = 32 / kRows;
  __shared__ float2 parts[kWarps][kRows];
  const int groups = (p.rows() + kRows - 1) / kRows;
  const int step_block = blockIdx.y / groups, row0 = blockIdx.y % groups * kRows;
  const int slab_block = p.first_step_block + step_block, block = p.first_block + slab_block;
  const int pair = p.first_pair + blockIdx.z, batch = pair / p.selection_heads, held = p.held(batch);
  const int64_t list = p.list(blockIdx.z, step_block);
  const Chunks chunks(p.offsets, p.num_chunks, batch, p.capacity, held);
  let_next_begin();

  float4 q[kRows][kHalves];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const int row = row0 + r, sample = row % p.sampled.samples;
    const int head = p.head_of(pair, row);
    const bool used = row < p.rows() && p.sampled.used(block, sample);
    const T* from =
        static_cast<const T*>(p.q) + batch * p.q_batch + head * p.q_head + p.sampled.row(block, sample) * p.q_token;
#pragma unroll
    for (int half = 0; half < kHalves; ++half) {
      const int channel = half * 128 + lane_id() * 4;
      q[r][half] = used && channel < p.head_dim ? load4(from + channel) : make_float4(0, 0, 0, 0);
    }
  }

  const int row = row0 + lane_id() % kRows, shift = held - p.seqlen_q;
  const int p0 = shift + block * p.sampled.q_block, p1 = shift + p.sampled.last_query(block);
  int2 cut = make_int2(-1, 0);
  if (p.cut.chunks != nullptr) cut = __ldg(p.cut.chunks + static_cast<int64_t>(blockIdx.z) * p.blocks + slab_block);
  PartialSum sum;
  for (int i = 0; i < kTileChunks / kChunks; i += kWarps) {
    const int first = blockIdx.x * kTileChunks + (i + warp_id()) * kChunks;
    if (first >= p.capacity) break;
    float4 mean[kChunks][kHalves];
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      const float* from = p.means + (static_cast<int64_t>(pair) * p.capacity + first + c) * p.head_dim;
#pragma unroll
      for (int half = 0; half < kHalves; ++half) {
        const int channel = half * 128 + lane_id() * 4;
        const bool real = first + c < chunks.count && channel < p.head_dim;
        mean[c][half] = real ? load4(from + channel) : make_float4(0, 0, 0, 0);
      }
    }
    float product[32];
#pragma unroll
    for (int j = 0; j < 32; ++j) {
      product[j] = 0;
#pragma unroll
      for (int half = 0; half < kHalves; ++half) {
        const float4 a = mean[j / kRows][half], b = q[j % kRows][half];
        product[j] += a.x * b.x + a.y * b.y + a.z * b.z + a.w * b.w;
      }
    }
    const float dot = warp_sums(product);
    const int chunk = first + lane_id() / kRows;
    if (chunk >= p.capacity || row >= p.rows()) continue;
    const bool real = chunk < chunks.count;
    const int begin = real ? chunks.begin(chunk) : 0, end = real ? chunks.end(chunk) : 0;
    float z = logit2(dot, p.scale, p.softcap) + log2f(static_cast<float>(end - begin));
    if (real && chunk == cut.x) {
      const int64_t of_call = (static_cast<int64_t>(blockIdx.z) * p.blocks + slab_block) * p.rows() + row;
      z = __ldg(p.cut.logits + of_call) + log2f(static_cast<float>(cut.y));
    }
    const bool candidate = begin < end && begin <= p1 && (p.window == 0 || end > p0 - p.window + 1);
    const bool counts = candidate && fabsf(z) < INFINITY;
    p.logits[(list * p.rows() + row) * p.capacity + chunk] = counts ? z : -INFINITY;
    if (counts) sum.add(make_float2(z, 1));
  }
  add_lanes(sum, kRows);
  if (lane_id() < kRows) parts[warp_id()][lane_id()] = make_float2(sum.top, sum.sum);
  __syncthreads();
  if (threadIdx.x < kRows && row0 + static_cast<int>(threadIdx.x) < p.rows()) {
    PartialSum tile;
    for (int w = 0; w < kWarps; ++w) tile.add(parts[w][threadIdx.x]);
    p.parts[(list * p.rows() + row0 + threadIdx.x) * p.tiles + blockIdx.x] = make_float2(tile.top, tile.sum);
  }
}

// A thread block takes kThreads * kChunksPerThread chunks of a query block; each finds the rows' logsumexps anew.
__global__ void __launch_bounds__(kThreads) score_kernel(RowParams p) {
  __shared__ float lse2[kRowsAtOnce];  // log2 units; +inf: no part of the mean
  const int slab_block = p.first_step_block + blockIdx.y, block = p.first_block + slab_block;
  const int pair = p.first_pair + blockIdx.z, batch = pair / p.selection_heads;
  const int64_t list = p.list(blockIdx.z, blockIdx.y),
                list_of_slab = p.blocks * static_cast<int64_t>(blockIdx.z) + slab_block;
  const int first = blockIdx.x * kThreads * kChunksPerThread + threadIdx.x;
  const Chunks chunks(p.offsets, p.num_chunks, batch, p.capacity, p.held(batch));
  wait_for_previous();
  float sum[kChunksPerThread] = {};
  for (int row0 = 0; row0 < p.rows(); row0 += kRowsAtOnce) {
    const int rows = min(kRowsAtOnce, p.rows() - row0);
    __syncthreads();  // the rows before these have been read
    for (int r = warp_id(); r < rows; r += kWarps) {
      PartialSum row;
      for (int i = lane_id(); i < p.tiles; i += 32) row.add(p.parts[(list * p.rows() + row0 + r) * p.tiles + i]);
      add_lanes(row, 1);
      if (lane_id() > 0) continue;
      const bool used = p.sampled.used(block, (row0 + r) % p.sampled.samples);
      lse2[r] = used && row.sum > 0 ? row.lse2() : INFINITY;
      if (blockIdx.x == 0) p.lse(pair, block, row0 + r) = used ? row.lse2() / kLog2OfE : INFINITY;
    }
    __syncthreads();
#pragma unroll
    for (int j = 0; j < kChunksPerThread; ++j) {
      const int chunk = first + j * kThreads;
      if (chunk >= chunks.count) break;
      const float* z = p.logits + (list * p.rows() + row0) * p.capacity + chunk;
      for (int r = 0; r < rows; ++r) sum[j] += exp2f(z[static_cast<int64_t>(r) * p.capacity] - lse2[r]);
    }
  }

  const float used_rows = static_cast<float>(p.list_heads * p.sampled.count(block));
  int2 cut = make_int2(-1, 0);
  if (p.cut.chunks != nullptr) cut = __ldg(p.cut.chunks + list_of_slab);
#pragma unroll
  for (int j = 0; j < kChunksPerThread; ++j) {
    const int chunk = first + j * kThreads;
    if (chunk >= chunks.count) break;
    const int tokens = chunk == cut.x ? cut.y : max(chunks.end(chunk) - chunks.begin(chunk), 1);
    p.scores[list_of_slab * p.capacity + chunk] = sum[j] / (used_rows * static_cast<float>(tokens));
  }
}

int tiles_of(const MassParams& p) { return static_cast<int>(ceil_div(p.capacity, kTileChunks)); }

int64_t block_rows(const MassParams& p) { return static_cast<int64_t>(p.pairs) * p.rows(); }  // of one query block

int64_t block_bytes(const MassParams& p) {
  return block_rows(p) * (std::max(p.capacity, 1) * int64_t{4} + tiles_of(p) * int64_t{8});
}

// Query blocks of a launch: their logits fit the scratch, and with their groups of rows one grid.
int64_t blocks_at_once(const MassParams& p) {
  const int64_t fit = std::min<int64_t>(kScratchBytes / block_bytes(p), 65535 / ceil_div(p.rows(), 4));
  return std::clamp<int64_t>(fit, 1, std::max(p.blocks, 1));
}

struct Scratch {
  float2* parts;
  float* logits;
  int64_t bytes;
};

Scratch layout(const MassParams& p, void* memory) {
  Arena arena(memory);
  const int64_t rows = block_rows(p) * blocks_at_once(p);
  Scratch scratch = {arena.take<float2>(rows * tiles_of(p)), arena.take<float>(rows * p.capacity)};
  scratch.bytes = arena.used();
  return scratch;
}

template <class T, int kRows>
void launch_logits(const RowParams& p, cudaStream_t stream) {
  const dim3 grid(p.tiles, p.step_blocks * static_cast<unsigned>(ceil_div(p.rows(), kRows)), p.pairs);
  if (p.head_dim <= 128) {
    logit_kernel<T, kRows, 1><<<grid, kThreads, 0, stream>>>(p);
  } else {
    logit_kernel<T, kRows, 2><<<grid, kThreads, 0, stream>>>(p);
  }
}

}  // namespace

int64_t mass_rows_bytes(const MassParams& p) { return p.rows() == 0 ? 0 : layout(p, nullptr).bytes; }

cudaError_t run_mass_rows(const MassParams& x, const float* means, DType dtype, int head_dim, void* memory,
                          cudaStream_t stream) {
  if (x.pairs == 0 || x.blocks == 0) return cudaSuccess;
  const Scratch scratch = layout(x, memory);
  RowParams p = {};
  static_cast<MassParams&>(p) = x;
  p.means = means, p.parts = scratch.parts, p.logits = scratch.logits, p.head_dim = head_dim, p.tiles = tiles_of(x);
  const int step = static_cast<int>(blocks_at_once(x));
  cudaError_t error = cudaSuccess;
  for (int block = 0; block < x.blocks && error == cudaSuccess; block += step) {
    p.first_step_block = block, p.step_blocks = std::min(step, x.blocks - block);
    if (x.capacity > 0) {
      error = with_dtype(dtype, [&](auto element) {
        using T = decltype(element);
        p.rows() <= 4 ? launch_logits<T, 4>(p, stream) : launch_logits<T, 8>(p, stream);
        return cudaGetLastError();
      });
    }
    const dim3 grid(std::max<int64_t>(ceil_div(x.capacity, kThreads * kChunksPerThread), 1), p.step_blocks, x.pairs);
    if (error == cudaSuccess) error = launch_early(score_kernel, grid, kThreads, stream, p);
  }
  return error;
}

}  // namespace dhsa::cuda
