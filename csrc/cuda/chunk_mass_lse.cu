// Each row's logsumexp over the chunks, for all query blocks at once (chunk_mass_wgmma.h).
//
// exp(z - reference) needs a reference near the row's logits, not their maximum: 2^30 over the logit of one chunk. A
// row whose sum shows that this was no good guess (float32 reaches 2^126 either way), or whose products overflow, sends
// its tile through the chunks twice more: for the maxima, then for the sums, logit by logit.
#include "cuda/chunk_mass_wgmma.h"

namespace dhsa::cuda::mass_wgmma {
namespace {

constexpr float kAbove = 30;                           // of the reference over the logit that it was taken from
constexpr float kLeastSum = 1e-18f, kMostSum = 1e30f;  // of a row whose reference will do

// part[2 n + side] of the lane's rows += the sum over its chunks of n_c 2^(z + offset).
template <class C>
__device__ inline void sum_chunks(const float* offset, const float (&acc)[C::kAcc], const LaneChunks& lane,
                                  float (&part)[C::kAcc / 2]) {
#pragma unroll
  for (int n = 0; n < C::kGroupOctets; ++n) {
    const float2 add = *reinterpret_cast<const float2*>(offset + n * 8);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float share = exp2_approx(fmaf(acc[4 * n + i], lane.factor[i / 2], i % 2 ? add.y : add.x));
      part[2 * n + i % 2] = fmaf(share, lane.tokens[i / 2], part[2 * n + i % 2]);
    }
  }
}

// Their maxima; after mask_logits.
template <class C>
__device__ inline void max_of_chunks(const float (&acc)[C::kAcc], float (&part)[C::kAcc / 2]) {
#pragma unroll
  for (int i = 0; i < C::kAcc; ++i) {
    float& to = part[i / 4 * 2 + i % 2];
    to = fmaxf(to, acc[i]);
  }
}

// offset = -(the logit of chunk c, and some): a reference for sums of exponentials.
template <class T, class C>
__device__ void guess_references(const WgmmaParams& p, int pair, int c, const char* rows, typename C::Shared& shared) {
  const int slot = threadIdx.x;
  if (slot >= C::kSlots) return;
  const float* mean = p.means.means + (static_cast<int64_t>(pair) * p.capacity + c) * C::kHeadDim;
  const char* group = rows + slot / C::kGroupRows * C::RowTile::kBytes;
  float dot = 0;
  for (int piece = 0; piece < C::kHeadDim / 8; ++piece) {
    const uint4 raw = *reinterpret_cast<const uint4*>(group + C::RowTile::offset(slot % C::kGroupRows, piece));
    float x[8];
    widen<T>(raw, x);
#pragma unroll
    for (int i = 0; i < 8; ++i) dot = fmaf(x[i], __ldg(mean + piece * 8 + i), dot);
  }
  const float z = logit2(dot, p.scale, p.softcap);
  shared.offset[slot] = shared.dead[slot] ? -INFINITY : fabsf(z) < 1e30f ? -(z + kAbove) : 0.0f;
}

// warp_part[w][slot] = the sum (or the maximum) of a row's part over the eight lanes that share it.
template <class C>
__device__ inline void fold_lanes(float (&part)[C::kAcc / 2], int group, bool maxima, typename C::Shared& shared) {
#pragma unroll
  for (int i = 0; i < C::kAcc / 2; ++i) {
#pragma unroll
    for (int step = 4; step < 32; step *= 2) {
      const float other = __shfl_xor_sync(kFullWarp, part[i], step);
      part[i] = maxima ? fmaxf(part[i], other) : part[i] + other;
    }
    if (lane_id() < 4) {
      shared.warp_part[warp_id() % 4][group * C::kGroupRows + i / 2 * 8 + lane_id() * 2 + i % 2] = part[i];
    }
  }
}

// kSoftcap: there may be a cap. Asking for one costs a tenth of the time.
template <class T, int kHeadDim, bool kSoftcap>
__global__ void __launch_bounds__(kThreads, 1) lse_kernel(const __grid_constant__ WgmmaParams p) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using C = Config<kHeadDim>;
  extern __shared__ __align__(1024) char smem[];
  typename C::Shared& shared = *reinterpret_cast<typename C::Shared*>(smem + C::kSharedAt);
  const RowTile tile(p, p.row_tiles - 1 - blockIdx.x);  // the longest first
  const Chunks chunks(p.offsets, p.num_chunks, tile.pair / p.selection_heads, p.capacity, p.seqlen_k);
  init_barriers<C>(shared);
  if (warp_id() == 0) find_range<C>(p, tile, chunks, shared);
  find_reach<C>(p, tile, shared);
  load_rows<T, C>(p, tile, smem + C::kRowsAt, shared);
  const int first = uniform(max(static_cast<int>(blockIdx.y) * p.lse_chunks, shared.first));
  const int last = uniform(min((static_cast<int>(blockIdx.y) + 1) * p.lse_chunks, shared.last));
  if (first >= last) return;
  guess_references<T, C>(p, tile.pair, p.window > 0 ? (first + last) / 2 : first, smem + C::kRowsAt, shared);
  __syncthreads();

  const int group = uniform(threadIdx.x / 128), whole = uniform(shared.whole);
  const uint32_t stages = smem_address(smem), rows = stages + C::kRowsAt + group * C::RowTile::kBytes;
  Rings<C::kStages> rings;
  const int slot = threadIdx.x;
  const SlotRow at = slot < C::kSlots ? slot_row<C>(p, tile, slot) : SlotRow{-1, 0};
  const bool alive = at.block >= 0 && !shared.dead[slot];
  float total = 0;
  bool careful = false, maxima = false;
  while (true) {
    float part[C::kAcc / 2];
#pragma unroll
    for (float& x : part) x = maxima ? -INFINITY : 0.0f;
    const float* offset = shared.offset + group * C::kGroupRows + lane_id() % 4 * 2;
    walk_chunks<T, C>(
        p, tile.pair, first, last, careful ? first : min(last, whole), stages, rows, shared, rings,
        [&](int, float (&acc)[C::kAcc], LaneChunks& lane) {
          if constexpr (kSoftcap) cap_logits<C>(p, acc, lane);
          sum_chunks<C>(offset, acc, lane, part);
        },
        [&](int chunk0, float (&acc)[C::kAcc], LaneChunks& lane) {
          if constexpr (kSoftcap) cap_logits<C>(p, acc, lane);
          mask_logits<C, true>(p, chunks, chunk0, group, shared, acc, lane);
          if (maxima) {
            max_of_chunks<C>(acc, part);
          } else {
            sum_chunks<C>(offset, acc, lane, part);
          }
        });
    fold_lanes<C>(part, group, maxima, shared);
    __syncthreads();
    if (slot < C::kSlots) {
      total = shared.warp_part[0][slot];
      for (int w = 1; w < 4; ++w) {
        total = maxima ? fmaxf(total, shared.warp_part[w][slot]) : total + shared.warp_part[w][slot];
      }
      if (maxima && alive) shared.offset[slot] = total > -INFINITY ? -total : 0.0f;
    }
    const bool good = maxima || careful || !alive || (total > kLeastSum && total < kMostSum);
    if (!__syncthreads_or(!good || maxima)) break;
    maxima = !maxima, careful = true;
  }
  const int64_t split = static_cast<int64_t>(blockIdx.y) * p.all_pairs * p.query_blocks;
  if (at.block >= 0) {
    p.partial[(split + list_of(p, tile, at.block)) * p.octets * 8 + at.row] =
        make_float2(alive ? -shared.offset[slot] : kLowest, alive ? total : 0.0f);
  }
  if (slot < tile.blocks) p.careful[split + list_of(p, tile, slot)] = careful;
#endif
}

}  // namespace

cudaError_t launch_lse(const WgmmaParams& p, DType dtype, cudaStream_t stream) {
  return with_head_dim(p.head_dim, [&](auto dim) {
    using C = Config<dim.value>;
    const dim3 grid(p.row_tiles, p.lse_splits, p.pairs);
    const auto run = [&](auto element) {
      using T = decltype(element);
      auto kernel = lse_kernel<T, C::kHeadDim, true>;
      if constexpr (C::kHeadDim == kFastDim) {
        if (p.softcap <= 0) kernel = lse_kernel<T, C::kHeadDim, false>;
      }
      return launch<C>(kernel, p, grid, stream);
    };
    return dtype == DType::kFloat16 ? run(__half()) : run(__nv_bfloat16());
  });
}

}  // namespace dhsa::cuda::mass_wgmma
