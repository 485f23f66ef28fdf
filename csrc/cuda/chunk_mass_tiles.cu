// chunk_mass of 16-bit queries by mma.sync (chunk_mass_wgmma.cu on sm_90a), in two launches over tiles of rows x 1,024
// chunks:
//
//   lse_kernel     z = logit(scale q.mean_c) + ln n_c;  each row's logsumexp over the tile's chunks
//   score_kernel   row_lse from those parts; score[c] = mean over a block's rows of exp(logit - row_lse) = pi_c / n_c
//
// The second computes the products again instead of reading them: 4 bytes a product through L2 would take longer. A
// mean is two 16-bit halves (mass.h), so a product is exact to 2^-17 of its terms.
// A thread block holds 256 row slots as A fragments, 32 a warp, and streams chunks through two cp.async stages of 64.
// Rows of a query block fill whole octets of slots, so that every octet has one block: its sums over rows are shuffles.
#include <algorithm>

#include "cuda/device/chunks.h"
#include "cuda/device/cp_async.h"
#include "cuda/device/load.h"
#include "cuda/device/logit.h"
#include "cuda/device/mma.h"
#include "cuda/device/smem_tile.h"
#include "cuda/dispatch.h"
#include "cuda/mass.h"

namespace dhsa::cuda {
namespace {

constexpr int kWarps = 8, kThreads = 32 * kWarps;
constexpr int kSplitChunks = 1024;  // of a thread block: 16 tiles, and causal halves come out even
constexpr int kSubN = 16;           // columns whose accumulators are live at once
constexpr float kSlack = 20;        // a row's reference moves when a logit exceeds it by 2^20

template <int kHeadDim_>
struct Config {
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kRowTiles = kHeadDim == 256 ? 1 : 2;  // of 16 rows a warp: 64 registers of A fragments
  static constexpr int kSlots = kWarps * kRowTiles * 16, kOctets = kSlots / 8, kWarpOctets = 2 * kRowTiles;
  static constexpr int kBlockN = kHeadDim == 256 ? 32 : kMassTile;
  using Tile = SmemTile<kBlockN, kHeadDim>;
  static constexpr int kColumnsAt = 2 * Tile::kBytes;
  static constexpr int kStageBytes = kColumnsAt + 1024;
  static constexpr int kStages = 2;
  static constexpr int kSumsAt = kStages * kStageBytes;  // [kOctets][kBlockN] floats
  static constexpr int kLseAt = kSumsAt + kOctets * kBlockN * 4;
  static constexpr int kSmemBytes = kLseAt + kSlots * 4;
};

struct TileParams : MassParams {
  MassMeans means;
  float2* partial;  // [pairs, row_tiles, splits, kSlots] (reference, sum of 2^(z - reference))
  int octets;       // of a block's rows
  int blocks_per_tile, tiles_per_block, row_tiles, splits, pitch;
};

// A row tile: whole blocks, or one block's share of slots.
struct RowTile {
  int pair, first_block, blocks;  // blocks are the slab's
  int first_octet;                // of the block, where it spans several tiles
  int row_tile;

  __device__ RowTile(const TileParams& p, int row_tile) : pair(blockIdx.z), row_tile(row_tile) {
    const bool shared = p.tiles_per_block > 1;
    first_block = shared ? row_tile / p.tiles_per_block : row_tile * p.blocks_per_tile;
    blocks = min(p.blocks_per_tile, p.blocks - first_block);
    first_octet = 0;
  }
};

// Where a slot's row comes from; block is the slab's, -1 for an empty slot.
struct SlotRow {
  int block, row;
};

template <class C>
__device__ SlotRow slot_row(const TileParams& p, const RowTile& tile, int slot) {
  const int octet = slot / 8;
  const int block = p.tiles_per_block > 1 ? 0 : octet / p.octets;
  const int octet_of_block =
      p.tiles_per_block > 1 ? tile.row_tile % p.tiles_per_block * C::kOctets + octet : octet - block * p.octets;
  const int row = octet_of_block * 8 + slot % 8;
  if (block >= tile.blocks || row >= p.rows()) return {-1, 0};
  return {tile.first_block + block, row};
}

__device__ inline int position0(const TileParams& p, int block) {  // p0 of a slab's block
  return p.seqlen_k - p.seqlen_q + (p.first_block + block) * p.sampled.q_block;
}
__device__ inline int position1(const TileParams& p, int block) {
  return p.seqlen_k - p.seqlen_q + p.sampled.last_query(p.first_block + block);
}

// Chunks that some block of the tile can reach, and how many from the first on are whole for all of them.
struct ChunkRange {
  int first, last, whole;

  __device__ ChunkRange(const TileParams& p, const RowTile& tile, const Chunks& chunks) {
    const int p0 = position0(p, tile.first_block), p1 = position1(p, tile.first_block + tile.blocks - 1);
    first = p.window > 0 ? max(chunks.first_bound_at_or_after(p0 - p.window + 2) - 1, 0) / kMassTile * kMassTile : 0;
    last = min(chunks.first_bound_at_or_after(p1 + 1), chunks.count);
    whole = p.window > 0 ? 0 : chunks.first_bound_at_or_after(position1(p, tile.first_block) + 2) - 1;
  }
};

__device__ inline bool finite_pair(uint32_t x, uint32_t exponent) {
  return (x & exponent) != exponent && (x >> 16 & exponent) != exponent;
}

// The warp's rows as A fragments, zeros for empty slots and for a row with a NaN or infinity: its logits would all be
// NaN or infinite, which count as none. Returns bit 2 m + half for the lane's rows that are neither.
template <class T, class C>
__device__ unsigned load_rows(const TileParams& p, const RowTile& tile,
                              uint32_t (&a)[C::kRowTiles][C::kHeadDim / 16][4]) {
  const uint32_t exponent = std::is_same_v<T, __half> ? 0x7c00u : 0x7f80u;
  const int group = lane_id() / 4, member = lane_id() % 4;
  const int pair = p.first_pair + tile.pair, batch = pair / p.selection_heads;
  const int first_head = pair % p.selection_heads * p.list_heads;
  unsigned alive = 0;
#pragma unroll
  for (int m = 0; m < C::kRowTiles; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const SlotRow slot = slot_row<C>(p, tile, (warp_id() * C::kRowTiles + m) * 16 + half * 8 + group);
      const int block = p.first_block + max(slot.block, 0), sample = slot.row % p.sampled.samples;
      const bool used = slot.block >= 0 && p.sampled.used(block, sample);
      const T* row = static_cast<const T*>(p.q);
      if (used) {
        row += batch * p.q_batch + (first_head + slot.row / p.sampled.samples) * p.q_head +
               p.sampled.row(block, sample) * p.q_token;
      }
      bool finite = used;
#pragma unroll
      for (int step = 0; step < C::kHeadDim / 16; ++step) {
#pragma unroll
        for (int side = 0; side < 2; ++side) {
          const uint32_t x = __ldg(reinterpret_cast<const uint32_t*>(row + step * 16 + side * 8 + member * 2));
          a[m][step][half + side * 2] = x;
          finite &= finite_pair(x, exponent);
        }
      }
      finite &= __shfl_xor_sync(kFullWarp, finite, 1);
      finite &= __shfl_xor_sync(kFullWarp, finite, 2);
      alive |= static_cast<unsigned>(finite) << (2 * m + half);
#pragma unroll
      for (int step = 0; step < C::kHeadDim / 16; ++step) {
        if (!finite) a[m][step][half] = a[m][step][half + 2] = 0;
      }
    }
  }
  return alive;
}

template <class C>
__device__ void load_stage(const TileParams& p, int64_t column, uint32_t stage) {
  constexpr int kPieces = C::kHeadDim / 8;
  const char* parts = static_cast<const char*>(p.means.parts) + column * 2 * C::kHeadDim * 2;
#pragma unroll
  for (int i = threadIdx.x; i < C::kBlockN * 2 * kPieces; i += kThreads) {
    const int row = i / (2 * kPieces), part = i / kPieces % 2, piece = i % kPieces;
    cp_async_16(stage + part * C::Tile::kBytes + C::Tile::offset(row, piece), parts + i * 16, true);
  }
  if (threadIdx.x < C::kBlockN / 2) {
    cp_async_16(stage + C::kColumnsAt + threadIdx.x * 16, p.means.columns + column + threadIdx.x * 2, true);
  }
  cp_async_commit();
}

// acc = q . mean of kSubN columns from `column` of the stage on; acc[m][4 n + i] as mma.h has it.
template <class T, class C>
__device__ inline void multiply(const uint32_t (&a)[C::kRowTiles][C::kHeadDim / 16][4], uint32_t stage, int column,
                                float (&acc)[C::kRowTiles][kSubN / 2]) {
  // Columns of one lane differ by multiples of 8, so that a step only flips bits of the swizzle.
  const uint32_t at = stage + column * 128 + C::Tile::offset(lane_id() % 8 + lane_id() / 16 * 8, lane_id() / 8 % 2);
#pragma unroll
  for (int step = 0; step < C::kHeadDim / 16; ++step) {
#pragma unroll
    for (int part = 0; part < 2; ++part) {
      uint32_t b[4];
      ldmatrix_x4(b, (at ^ (step % 4 * 2 << 4)) + step / 4 * C::Tile::kPanelBytes + part * C::Tile::kBytes);
#pragma unroll
      for (int m = 0; m < C::kRowTiles; ++m) {
        mma_m16n8k16<T>(reinterpret_cast<float (&)[4]>(acc[m][0]), a[m][step], b[0], b[1]);
        mma_m16n8k16<T>(reinterpret_cast<float (&)[4]>(acc[m][4]), a[m][step], b[2], b[3]);
      }
    }
  }
}

// The accumulators as logits in log2 units: + log2 n_c for the logsumexp, without it for the scores. Chunks that hold
// no candidate of a row's block get -inf, the cut chunk its own logit.
template <class C, bool kScores>
__device__ inline void to_logits(const TileParams& p, const RowTile& tile, const Chunks& chunks, int chunk0, int column,
                                 const float2* columns, bool masked, float (&acc)[C::kRowTiles][kSubN / 2]) {
  const int member = lane_id() % 4;
#pragma unroll
  for (int n = 0; n < kSubN / 8; ++n) {
    float4 two = *reinterpret_cast<const float4*>(columns + column + n * 8 + member * 2);
    if (p.softcap > 0) {
#pragma unroll
      for (int m = 0; m < C::kRowTiles; ++m) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          float& z = acc[m][4 * n + i];
          z = softcapped2(z * (i % 2 ? two.z : two.x), p.softcap);
        }
      }
      two.x = two.z = 1;
    }
#pragma unroll
    for (int m = 0; m < C::kRowTiles; ++m) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float factor = i % 2 ? two.z : two.x, length = kScores ? 0.0f : i % 2 ? two.w : two.y;
        acc[m][4 * n + i] = fmaf(acc[m][4 * n + i], factor, length);
      }
    }
  }
  if (!masked) return;
#pragma unroll
  for (int m = 0; m < C::kRowTiles; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const SlotRow slot = slot_row<C>(p, tile, (warp_id() * C::kRowTiles + m) * 16 + half * 8 + lane_id() / 4);
      const int p0 = position0(p, max(slot.block, 0)), p1 = position1(p, max(slot.block, 0));
      int2 cut = make_int2(-1, 0);
      const int64_t list = static_cast<int64_t>(tile.pair) * p.blocks + max(slot.block, 0);
      if (p.cut.chunks != nullptr) cut = __ldg(p.cut.chunks + list);
#pragma unroll
      for (int n = 0; n < kSubN / 8; ++n) {
#pragma unroll
        for (int side = 0; side < 2; ++side) {
          const int chunk = chunk0 + column + n * 8 + member * 2 + side;
          float& z = acc[m][4 * n + half * 2 + side];
          if (chunk == cut.x) {
            z = __ldg(p.cut.logits + list * p.rows() + slot.row) + (kScores ? 0.0f : log2f(cut.y));
          } else if (chunk >= chunks.count || chunks.begin(chunk) > p1 ||
                     (p.window > 0 && chunks.end(chunk) <= p0 - p.window + 1)) {
            z = -INFINITY;
          }
        }
      }
    }
  }
}

template <class C>
__device__ inline float2* partial_of(const TileParams& p, const RowTile& tile, int split) {
  return p.partial + ((static_cast<int64_t>(tile.pair) * p.row_tiles + tile.row_tile) * p.splits + split) * C::kSlots;
}

// --- logsumexp -------------------------------------------------------------------------------------------------------

template <class T, int kHeadDim>
__global__ void __launch_bounds__(kThreads, 2) lse_kernel(TileParams p) {
  using C = Config<kHeadDim>;
  extern __shared__ __align__(1024) char smem[];
  const RowTile tile(p, blockIdx.x);
  const int pair = p.first_pair + tile.pair;
  const Chunks chunks(p.offsets, p.num_chunks, pair / p.selection_heads, p.capacity, p.seqlen_k);
  const ChunkRange range(p, tile, chunks);
  const int first = max(static_cast<int>(blockIdx.y) * kSplitChunks, range.first);
  const int last = min((static_cast<int>(blockIdx.y) + 1) * kSplitChunks, range.last);
  if (first >= last) return;

  const int64_t base = static_cast<int64_t>(pair) * p.pitch;
  const uint32_t stages = smem_address(smem);
  load_stage<C>(p, base + first, stages);
  uint32_t a[C::kRowTiles][kHeadDim / 16][4];
  const unsigned alive = load_rows<T, C>(p, tile, a);
  float reference[C::kRowTiles][2], sum[C::kRowTiles][2];
#pragma unroll
  for (int m = 0; m < C::kRowTiles; ++m) {
    reference[m][0] = reference[m][1] = kLowest, sum[m][0] = sum[m][1] = 0;
  }
  int stage = 0;
  for (int chunk0 = first; chunk0 < last; chunk0 += C::kBlockN, stage ^= 1) {
    cp_async_wait<0>();
    __syncthreads();
    if (chunk0 + C::kBlockN < last) load_stage<C>(p, base + chunk0 + C::kBlockN, stages + (stage ^ 1) * C::kStageBytes);
    const uint32_t here = stages + stage * C::kStageBytes;
    const float2* columns = reinterpret_cast<const float2*>(smem + stage * C::kStageBytes + C::kColumnsAt);
    const bool masked = chunk0 + C::kBlockN > range.whole;
#pragma unroll 1
    for (int column = 0; column < C::kBlockN; column += kSubN) {
      float z[C::kRowTiles][kSubN / 2] = {};
      multiply<T, C>(a, here, column, z);
      to_logits<C, false>(p, tile, chunks, chunk0, column, columns, masked, z);
#pragma unroll
      for (int m = 0; m < C::kRowTiles; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float top = kLowest;
#pragma unroll
          for (int n = 0; n < kSubN / 8; ++n)
            top = fmaxf(top, fmaxf(z[m][4 * n + half * 2], z[m][4 * n + half * 2 + 1]));
          float& m_row = reference[m][half];
          if (top > m_row + kSlack) sum[m][half] *= exp2_approx(m_row - top), m_row = top;
#pragma unroll
          for (int n = 0; n < kSubN / 8; ++n) {
            sum[m][half] +=
                exp2_approx(z[m][4 * n + half * 2] - m_row) + exp2_approx(z[m][4 * n + half * 2 + 1] - m_row);
          }
        }
      }
    }
  }
  float2* partial = partial_of<C>(p, tile, blockIdx.y);
#pragma unroll
  for (int m = 0; m < C::kRowTiles; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float top = reference[m][half];
      top = fmaxf(top, __shfl_xor_sync(kFullWarp, top, 1));
      top = fmaxf(top, __shfl_xor_sync(kFullWarp, top, 2));
      float total = sum[m][half] * exp2_approx(reference[m][half] - top);
      total += __shfl_xor_sync(kFullWarp, total, 1);
      total += __shfl_xor_sync(kFullWarp, total, 2);
      const int slot = (warp_id() * C::kRowTiles + m) * 16 + half * 8 + lane_id() / 4;
      if (lane_id() % 4 == 0) partial[slot] = make_float2(top, alive >> (2 * m + half) & 1 ? total : 0.0f);
    }
  }
}

// --- Scores ----------------------------------------------------------------------------------------------------------

// negated[slot] = -row_lse in log2 units, -inf where a row has no chunk or no place in the mean; the first split's
// thread block writes row_lse.
template <class C>
__device__ void merge_lse(const TileParams& p, const RowTile& tile, const ChunkRange& range, float* negated) {
  const int pair = p.first_pair + tile.pair, batch = pair / p.selection_heads;
  const int split0 = range.first / kSplitChunks, split1 = (range.last + kSplitChunks - 1) / kSplitChunks;
  for (int slot = threadIdx.x; slot < C::kSlots; slot += kThreads) {
    const SlotRow at = slot_row<C>(p, tile, slot);
    PartialSum sum;
    for (int split = split0; split < split1; ++split) sum.add(partial_of<C>(p, tile, split)[slot]);
    const int block = p.first_block + max(at.block, 0), sample = at.row % p.sampled.samples;
    const bool used = at.block >= 0 && p.sampled.used(block, sample);
    const float lse = sum.lse2();
    negated[slot] = used && sum.sum > 0 ? -lse : -INFINITY;
    if (blockIdx.y == 0 && at.block >= 0) p.lse(pair, block, at.row) = used ? lse / kLog2OfE : INFINITY;
  }
  __syncthreads();
}

// to[column] = the sum over the 8 rows of the warp's lanes, for kSubN columns. Lanes of one member hold the same four
// of 16 columns: halves of the warp first keep two of them each, then one.
__device__ inline void sum_rows(const float (&x)[kSubN / 8][2], float* to) {
  const bool high = lane_id() & 16, odd = lane_id() & 8;
#pragma unroll
  for (int n = 0; n < kSubN / 8; n += 2) {
    float two[2];
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const float give = high ? x[n][c] : x[n + 1][c], keep = high ? x[n + 1][c] : x[n][c];
      two[c] = keep + __shfl_xor_sync(kFullWarp, give, 16);
    }
    float one = (odd ? two[1] : two[0]) + __shfl_xor_sync(kFullWarp, odd ? two[0] : two[1], 8);
    one += __shfl_xor_sync(kFullWarp, one, 4);
    if ((lane_id() & 4) == 0) to[n * 8 + high * 8 + lane_id() % 4 * 2 + odd] = one;
  }
}

template <class C>
__device__ void write_scores(const TileParams& p, const RowTile& tile, int chunk0, int last, const float2* columns,
                             const float* sums, int units, bool add) {
  for (int i = threadIdx.x; i < tile.blocks * C::kBlockN; i += kThreads) {
    const int block = i / C::kBlockN, column = i % C::kBlockN, chunk = chunk0 + column;
    if (chunk >= last) continue;
    float sum = 0;
    for (int unit = 0; unit < units; ++unit) sum += sums[(block * units + unit) * C::kBlockN + column];
    const int64_t list = static_cast<int64_t>(tile.pair) * p.blocks + tile.first_block + block;
    const bool cut = p.cut.chunks != nullptr && __ldg(&p.cut.chunks[list].x) == chunk;
    if (columns[column].y == -INFINITY && !cut) sum = 0;
    const int samples = p.sampled.count(p.first_block + tile.first_block + block);
    float* to = p.scores + list * p.capacity + chunk;
    const float score = sum / static_cast<float>(p.list_heads * samples);
    *to = add ? *to + score : score;
  }
}

template <class T, int kHeadDim>
__global__ void __launch_bounds__(kThreads, 2) score_kernel(TileParams p) {
  using C = Config<kHeadDim>;
  extern __shared__ __align__(1024) char smem[];
  float* sums = reinterpret_cast<float*>(smem + C::kSumsAt);
  float* negated = reinterpret_cast<float*>(smem + C::kLseAt);
  const bool whole_warps = p.octets % C::kWarpOctets == 0 || p.tiles_per_block > 1;  // a warp's rows are one block's
  const int units = p.tiles_per_block > 1 ? kWarps : whole_warps ? p.octets / C::kWarpOctets : p.octets;
  const uint32_t stages = smem_address(smem);

  for (int part = 0; part < p.tiles_per_block; ++part) {
    const RowTile tile(p, blockIdx.x * p.tiles_per_block + part);
    const int pair = p.first_pair + tile.pair;
    const Chunks chunks(p.offsets, p.num_chunks, pair / p.selection_heads, p.capacity, p.seqlen_k);
    const ChunkRange range(p, tile, chunks);
    const int first = max(static_cast<int>(blockIdx.y) * kSplitChunks, range.first);
    const int last = min((static_cast<int>(blockIdx.y) + 1) * kSplitChunks, range.last);
    if (first >= last && blockIdx.y > 0) return;
    const int64_t base = static_cast<int64_t>(pair) * p.pitch;
    __syncthreads();
    if (first < last) load_stage<C>(p, base + first, stages);
    merge_lse<C>(p, tile, range, negated);
    if (first >= last) continue;
    uint32_t a[C::kRowTiles][kHeadDim / 16][4];
    load_rows<T, C>(p, tile, a);

    int stage = 0;
    for (int chunk0 = first; chunk0 < last; chunk0 += C::kBlockN, stage ^= 1) {
      cp_async_wait<0>();
      __syncthreads();
      if (chunk0 + C::kBlockN < last) {
        load_stage<C>(p, base + chunk0 + C::kBlockN, stages + (stage ^ 1) * C::kStageBytes);
      }
      const uint32_t here = stages + stage * C::kStageBytes;
      const float2* columns = reinterpret_cast<const float2*>(smem + stage * C::kStageBytes + C::kColumnsAt);
      const bool masked = chunk0 + C::kBlockN > range.whole;
#pragma unroll 1
      for (int column = 0; column < C::kBlockN; column += kSubN) {
        float z[C::kRowTiles][kSubN / 2] = {};
        multiply<T, C>(a, here, column, z);
        to_logits<C, true>(p, tile, chunks, chunk0, column, columns, masked, z);
        float warp_sums[kSubN / 8][2] = {};
#pragma unroll
        for (int m = 0; m < C::kRowTiles; ++m) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const int octet = (warp_id() * C::kRowTiles + m) * 2 + half;
            const float lse = negated[octet * 8 + lane_id() / 4];
            float octet_sums[kSubN / 8][2];
#pragma unroll
            for (int n = 0; n < kSubN / 8; ++n) {
#pragma unroll
              for (int side = 0; side < 2; ++side) {
                const float share = exp2_approx(z[m][4 * n + half * 2 + side] + lse);
                octet_sums[n][side] = share;
                warp_sums[n][side] += share;
              }
            }
            if (!whole_warps) sum_rows(octet_sums, sums + octet * C::kBlockN + column);
          }
        }
        if (whole_warps) sum_rows(warp_sums, sums + warp_id() * C::kBlockN + column);
      }
      __syncthreads();
      write_scores<C>(p, tile, chunk0, last, columns, sums, units, part > 0);
    }
  }
}

// --- Launch ----------------------------------------------------------------------------------------------------------

template <class C>
TileParams plan(const MassParams& x) {
  TileParams p = {};
  static_cast<MassParams&>(p) = x;
  p.octets = (x.rows() + 7) / 8;
  p.tiles_per_block = static_cast<int>(ceil_div(p.octets, C::kOctets));
  p.blocks_per_tile = p.tiles_per_block > 1 ? 1 : C::kOctets / p.octets;
  p.row_tiles =
      p.tiles_per_block > 1 ? x.blocks * p.tiles_per_block : static_cast<int>(ceil_div(x.blocks, p.blocks_per_tile));
  p.splits = static_cast<int>(std::max<int64_t>(ceil_div(x.capacity, kSplitChunks), 1));
  p.pitch = static_cast<int>(mass_pitch(x.capacity));
  return p;
}

template <class T, int kHeadDim>
cudaError_t launch(const MassParams& x, const MassMeans& means, void* scratch, cudaStream_t stream) {
  using C = Config<kHeadDim>;
  TileParams p = plan<C>(x);
  p.means = means, p.partial = static_cast<float2*>(scratch);
  const auto lse = lse_kernel<T, kHeadDim>;
  const auto scores = score_kernel<T, kHeadDim>;
  cudaError_t error = cudaFuncSetAttribute(lse, cudaFuncAttributeMaxDynamicSharedMemorySize, C::kSmemBytes);
  if (error == cudaSuccess) {
    error = cudaFuncSetAttribute(scores, cudaFuncAttributeMaxDynamicSharedMemorySize, C::kSmemBytes);
  }
  if (error != cudaSuccess) return error;
  const dim3 grid(p.row_tiles, p.splits, x.pairs), score_grid(p.row_tiles / p.tiles_per_block, p.splits, x.pairs);
  lse<<<grid, kThreads, C::kSmemBytes, stream>>>(p);
  scores<<<score_grid, kThreads, C::kSmemBytes, stream>>>(p);
  return cudaGetLastError();
}

template <class T>
cudaError_t launch(const MassParams& p, const MassMeans& means, int head_dim, void* scratch, cudaStream_t stream) {
  return with_head_dim(head_dim, [&](auto dim) { return launch<T, dim.value>(p, means, scratch, stream); });
}

}  // namespace

int64_t mass_tiles_bytes(const MassParams& x) {
  // Row slots in whole tiles of either size; a tile of 256 slots has at most twice the slots of two of 128.
  const auto bytes = [&](const TileParams& p, int64_t slots) {
    return static_cast<int64_t>(x.pairs) * p.row_tiles * p.splits * slots * static_cast<int64_t>(sizeof(float2));
  };
  return std::max(bytes(plan<Config<128>>(x), Config<128>::kSlots), bytes(plan<Config<256>>(x), Config<256>::kSlots));
}

cudaError_t run_mass_tiles(const MassParams& p, const MassMeans& means, DType dtype, int head_dim, void* scratch,
                           cudaStream_t stream) {
  if (p.pairs == 0 || p.blocks == 0) return cudaSuccess;
  if (dtype == DType::kFloat16) return launch<__half>(p, means, head_dim, scratch, stream);
  return launch<__nv_bfloat16>(p, means, head_dim, scratch, stream);
}

}  // namespace dhsa::cuda
