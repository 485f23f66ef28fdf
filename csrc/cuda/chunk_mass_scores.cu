// The scores of chunks, a slab of query blocks at a time, from the rows' logsumexps (chunk_mass_wgmma.h).
#include "cuda/chunk_mass_wgmma.h"

namespace dhsa::cuda::mass_wgmma {
namespace {

// Writes the sums over each block's rows of 2^(z + offset).
template <class C, int kBlockOctets>
__device__ inline void reduce_rows(const WgmmaParams& p, const RowTile& tile, int chunk0, int last, int group,
                                   bool add_up, typename C::Shared& shared, const float (&acc)[C::kAcc],
                                   const LaneChunks& lane) {
  const int member = lane_id() % 4, row_in_tile = warp_id() % 4 * 16 + lane_id() / 4 + (member & 1) * 8;
  const bool wide = kBlockOctets == 0 && p.group_blocks == 0;
  const int octets = kBlockOctets > 0 ? kBlockOctets : wide ? C::kGroupOctets : p.octets;
  const int first = wide ? 0 : group * p.group_blocks;
  const float* offset = shared.offset + group * C::kGroupRows + member * 2;
  float* to = p.scores +
              (static_cast<int64_t>(tile.pair - p.first_pair) * p.blocks + tile.first_block - p.first_block + first) *
                  p.capacity +
              chunk0 + row_in_tile;
  const bool writes = member < 2 && chunk0 + row_in_tile < last;
  const bool any = (member & 1 ? lane.tokens[1] : lane.tokens[0]) > 0;
  float sum[2] = {};
  int block = first, of_block = 0;
#pragma unroll
  for (int n = 0; n < C::kGroupOctets; ++n) {
    const float2 add = *reinterpret_cast<const float2*>(offset + n * 8);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      sum[i / 2] += exp2_approx(fmaf(acc[4 * n + i], lane.factor[i / 2], i % 2 ? add.y : add.x));
    }
    if (++of_block < octets) continue;
    // Even members keep the first chunk's sum, odd ones the second's.
    float one = (member & 1 ? sum[1] : sum[0]) + __shfl_xor_sync(kFullWarp, member & 1 ? sum[0] : sum[1], 1);
    one += __shfl_xor_sync(kFullWarp, one, 2);
    one = any ? one : 0.0f;
    if (wide) {
      float* second = shared.wide[chunk0 / kMassTile & 1] + row_in_tile;
      if (group == 1 && member < 2) *second = one;
      named_barrier_sync(1, kThreads);
      if (group == 0 && writes) {
        const float score = (one + *second) * shared.weight[0];
        *to = add_up ? *to + score : score;
      }
    } else if (writes && block < tile.blocks) {
      *to = one * shared.weight[block];
    }
    to += p.capacity, ++block, of_block = 0, sum[0] = sum[1] = 0;
  }
}

// offset[slot] = -row_lse in log2 units, -inf where a row has no chunk or no place in the mean; writes row_lse where
// `writes`. True where some product may have overflowed.
template <class C>
__device__ bool merge_splits(const WgmmaParams& p, const RowTile& tile, bool writes, typename C::Shared& shared) {
  const int split0 = shared.first / p.lse_chunks, split1 = (shared.last + p.lse_chunks - 1) / p.lse_chunks;
  const int64_t lists = static_cast<int64_t>(p.all_pairs) * p.query_blocks;
  bool careful = false;
  if (static_cast<int>(threadIdx.x) < tile.blocks) {
    for (int split = split0; split < split1; ++split) {
      careful |= p.careful[split * lists + list_of(p, tile, threadIdx.x)] != 0;
    }
    const int samples = p.sampled.count(tile.first_block + threadIdx.x);
    shared.weight[threadIdx.x] = 1.0f / static_cast<float>(p.list_heads * samples);
  }
  const int slot = threadIdx.x;
  if (slot < C::kSlots) {
    const SlotRow at = slot_row<C>(p, tile, slot);
    PartialSum sum;
    for (int split = split0; at.block >= 0 && split < split1; ++split) {
      sum.add(p.partial[(split * lists + list_of(p, tile, at.block)) * p.octets * 8 + at.row]);
    }
    const int block = tile.first_block + max(at.block, 0), sample = at.row % p.sampled.samples;
    const bool used = at.block >= 0 && p.sampled.used(block, sample);
    const float lse = sum.lse2();
    shared.offset[slot] = used && sum.sum > 0 ? -lse : -INFINITY;
    if (writes && at.block >= 0) p.lse(tile.pair, block, at.row) = used ? lse / kLog2OfE : INFINITY;
  }
  return __syncthreads_or(careful);
}

// kBlockOctets: p.octets, and no soft cap; or 0 for any.
template <class T, int kHeadDim, int kBlockOctets>
__global__ void __launch_bounds__(kThreads, 1) score_kernel(const __grid_constant__ WgmmaParams p) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using C = Config<kHeadDim>;
  extern __shared__ __align__(1024) char smem[];
  typename C::Shared& shared = *reinterpret_cast<typename C::Shared*>(smem + C::kSharedAt);
  const int group = uniform(threadIdx.x / 128);
  const uint32_t stages = smem_address(smem), rows = stages + C::kRowsAt + group * C::RowTile::kBytes;
  Rings<C::kStages> rings;
  init_barriers<C>(shared);
  const int tiles = p.row_tiles / p.parts;
  for (int part = 0; part < p.parts; ++part) {
    const RowTile tile(p, (tiles - 1 - static_cast<int>(blockIdx.x)) * p.parts + part);  // the longest first
    const Chunks chunks(p.offsets, p.num_chunks, tile.pair / p.selection_heads, p.capacity, p.seqlen_k);
    if (warp_id() == 0) find_range<C>(p, tile, chunks, shared);
    find_reach<C>(p, tile, shared);
    load_rows<T, C>(p, tile, smem + C::kRowsAt, shared);
    const int first = uniform(max(static_cast<int>(blockIdx.y) * p.score_chunks, shared.first));
    const int last = uniform(min((static_cast<int>(blockIdx.y) + 1) * p.score_chunks, shared.last));
    if (first >= last && blockIdx.y > 0) return;
    const bool careful = merge_splits<C>(p, tile, blockIdx.y == 0, shared);  // and a barrier
    if (first < last) {
      walk_chunks<T, C>(
          p, tile.pair, first, last, uniform(careful ? first : min(last, shared.whole)), stages, rows, shared, rings,
          [&](int chunk0, float (&acc)[C::kAcc], LaneChunks& lane) {
            if constexpr (kBlockOctets == 0) cap_logits<C>(p, acc, lane);
            reduce_rows<C, kBlockOctets>(p, tile, chunk0, last, group, part > 0, shared, acc, lane);
          },
          [&](int chunk0, float (&acc)[C::kAcc], LaneChunks& lane) {
            if constexpr (kBlockOctets == 0) cap_logits<C>(p, acc, lane);
            mask_logits<C, false>(p, chunks, chunk0, group, shared, acc, lane);
            reduce_rows<C, kBlockOctets>(p, tile, chunk0, last, group, part > 0, shared, acc, lane);
          });
    }
    __syncthreads();
  }
#endif
}

}  // namespace

cudaError_t launch_scores(const WgmmaParams& p, DType dtype, cudaStream_t stream) {
  return with_head_dim(p.head_dim, [&](auto dim) {
    using C = Config<dim.value>;
    const dim3 grid(p.row_tiles / p.parts, p.score_splits, p.pairs);
    const auto run = [&](auto element) {
      using T = decltype(element);
      auto kernel = score_kernel<T, C::kHeadDim, 0>;
      // The accurate preset's rows: four octets of a block, one on long prompts.
      if constexpr (C::kHeadDim == kFastDim) {
        if (p.octets == 1 && p.softcap <= 0) kernel = score_kernel<T, C::kHeadDim, 1>;
        if (p.octets == 4 && p.softcap <= 0) kernel = score_kernel<T, C::kHeadDim, 4>;
      }
      return launch<C>(kernel, p, grid, stream);
    };
    return dtype == DType::kFloat16 ? run(__half()) : run(__nv_bfloat16());
  });
}

}  // namespace dhsa::cuda::mass_wgmma
