// chunk_mass of 16-bit queries on sm_90a: the products of chunk_mass_tiles.cu by wgmma, in launches of their own:
//
//   chunk_mass_lse.cu     z = logit(scale q.mean_c) + ln n_c;  each row's logsumexp, for all query blocks at once
//   chunk_mass_scores.cu  score[c] = mean over a block's rows of exp(logit - row_lse) = pi_c / n_c, a slab at a time
//
// Chunks are the M of a product and rows the N, both in shared memory: a warpgroup multiplies 64 chunks by 128 rows, so
// that a lane has two chunks and 32 rows. Sums over a block's rows (scores) are then additions inside a lane and two
// shuffles, sums over chunks (logsumexp) one accumulator a row until the end, and what a chunk needs (the factor of its
// logits, its length) sits in registers. Two warpgroups take 128 rows each of the same chunks. Each has two
// accumulators and issues the next product before it takes this one's exponentials: 1,024 cycles of the tensor cores a
// tile and warpgroup against 512 of the exponentials' unit (head_dim 128). A warp that issues products stands still
// while the tensor cores are busy with the other group's, so the groups take turns: one multiplies, the other
// exponentiates. A tile of 64 chunks lies in memory as it does in shared memory, both halves of the means, and comes by
// one bulk copy.
//
// Here is what both share: a tile of rows, the walk along the chunks, and which chunks count.
#pragma once

#include <climits>

#include "cuda/device/barrier.h"
#include "cuda/device/chunks.h"
#include "cuda/device/cp_async.h"
#include "cuda/device/load.h"
#include "cuda/device/logit.h"
#include "cuda/device/ring.h"
#include "cuda/device/smem_tile.h"
#include "cuda/device/tma.h"
#include "cuda/device/wgmma.h"
#include "cuda/dispatch.h"
#include "cuda/mass.h"

#if defined(__CUDA_ARCH__) && !defined(__CUDA_ARCH_FEAT_SM90_ALL)
#pragma nv_diag_suppress 177  // for other architectures the kernels are empty, and what they would use unused
#endif

namespace dhsa::cuda::mass_wgmma {

constexpr int kGroups = 2;  // warpgroups
constexpr int kThreads = 128 * kGroups;
// The most common head_dim alone has kernels for special cases: each takes 4 s to compile.
constexpr int kFastDim = 128;
constexpr int kTurnBarrier = 2;  // + warpgroup: it may issue its products

// Which chunks count for the rows of an octet, all of one block: those that begin at or before p1 and end after
// `after`, and the cut chunk in its own way.
struct OctetReach {
  int p1, after;
  int2 cut;                 // MassCut
  const float* cut_logits;  // of the octet's first row
};

template <int kHeadDim_>
struct Config {
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kGroupRows = kHeadDim == 256 ? 64 : 128, kGroupOctets = kGroupRows / 8;
  static constexpr int kSlots = kGroups * kGroupRows;
  static constexpr int kAcc = kGroupRows / 2;  // accumulators a lane: 4 an octet of rows
  using ChunkTile = SmemTile<kMassTile, kHeadDim>;
  using RowTile = SmemTile<kGroupRows, kHeadDim>;
  static constexpr int kTileBytes = 2 * ChunkTile::kBytes;  // both halves of 64 means
  static constexpr int kColumnBytes = kMassTile * 8;
  static constexpr int kStageBytes = kTileBytes + 1024;
  static constexpr int kStages = kHeadDim == 256 ? 2 : 4;
  static constexpr int kRowsAt = kStages * kStageBytes;
  static constexpr int kSharedAt = kRowsAt + kGroups * RowTile::kBytes;

  struct Shared {
    uint64_t full[kStages], empty[kStages];
    int64_t row_at[kSlots];  // elements from q on; -1: no row
    float offset[kSlots];    // what is added to a row's logits: -reference or -row_lse; -inf for a slot without a row
    float warp_part[4][kSlots];    // of a row: each warp's sum or maximum
    float wide[2][kMassTile];      // the second group's sums over a block that spans both
    float weight[kSlots / 8];      // 1 / rows, by block of the tile
    OctetReach reach[kSlots / 8];  // by octet of slots
    int dead[kSlots];              // a NaN or infinity in the row
    int first, last, whole;        // ChunkRange
  };
  static constexpr int kSmemBytes = kSharedAt + static_cast<int>(sizeof(Shared));
};

struct WgmmaParams : MassParams {  // cut is the call's: [pairs, nQ], [pairs, nQ, rows]
  MassMeans means;                 // parts: [pairs, pitch / 64] tiles as they lie in shared memory
  float2* partial;                 // [splits, pairs, nQ, octets, 8] (reference, sum of 2^(z - reference))
  int* careful;                    // [splits, pairs, nQ]: some product overflows
  int all_pairs, octets, pitch, head_dim;
  int group_blocks;  // whole blocks that a warpgroup's rows hold; 0: a block spans both, and `parts` row tiles
  int parts, row_tiles, tile_slots;
  int lse_splits, lse_chunks;      // chunks of a split: a multiple of 64
  int score_splits, score_chunks;  // of score_kernel's
};

// --- Rows ------------------------------------------------------------------------------------------------------------

// A row tile: whole blocks, or one block's share of slots. Blocks are the call's.
struct RowTile {
  int pair, first_block, blocks, first_octet;

  __device__ RowTile(const WgmmaParams& p, int index) : pair(p.first_pair + static_cast<int>(blockIdx.z)) {
    const bool wide = p.group_blocks == 0;
    first_block = p.first_block + (wide ? index / p.parts : index * kGroups * p.group_blocks);
    blocks = wide ? 1 : min(kGroups * p.group_blocks, p.first_block + p.blocks - first_block);
    first_octet = wide ? index % p.parts * (p.tile_slots / 8) : 0;
  }
};

// Where a slot's row comes from; block counts from the tile's first, -1 for an empty slot.
struct SlotRow {
  int block, row;
};

template <class C>
__device__ SlotRow slot_row(const WgmmaParams& p, const RowTile& tile, int slot) {
  int block = 0, octet = tile.first_octet + slot / 8;
  if (p.group_blocks > 0) {
    octet = slot % C::kGroupRows / 8;
    const int of_group = octet / p.octets;
    block = of_group < p.group_blocks ? slot / C::kGroupRows * p.group_blocks + of_group : tile.blocks;
    octet -= of_group * p.octets;
  }
  const int row = octet * 8 + slot % 8;
  if (block >= tile.blocks || row >= p.rows()) return {-1, 0};
  return {block, row};
}

__device__ inline int64_t list_of(const WgmmaParams& p, const RowTile& tile, int block) {  // of the call
  return static_cast<int64_t>(tile.pair) * p.query_blocks + tile.first_block + block;
}

// The tile's rows in shared memory, zeros for empty slots and for rows with a NaN or infinity: such a row's logits
// would all be NaN or infinite, which count as none. Rows come as the B operand of a warpgroup each.
template <class T, class C>
__device__ void load_rows(const WgmmaParams& p, const RowTile& tile, char* rows, typename C::Shared& shared) {
  constexpr int kPieces = C::kHeadDim / 8;
  const int slot = threadIdx.x;
  if (slot < C::kSlots) {
    const SlotRow at = slot_row<C>(p, tile, slot);
    const int block = tile.first_block + max(at.block, 0), sample = at.row % p.sampled.samples;
    const bool used = at.block >= 0 && p.sampled.used(block, sample);
    const int head = p.head_of(tile.pair, at.row);
    shared.row_at[slot] =
        used ? tile.pair / p.selection_heads * p.q_batch + head * p.q_head + p.sampled.row(block, sample) * p.q_token
             : -1;
    shared.dead[slot] = !used;
  }
  __syncthreads();
  if (threadIdx.x < kThreads) {
    const uint32_t exponent = std::is_same_v<T, __half> ? 0x7c00u : 0x7f80u;
#pragma unroll 8
    for (int i = threadIdx.x; i < C::kSlots * kPieces; i += kThreads) {
      const int row = i / kPieces, piece = i % kPieces;
      const int64_t at = shared.row_at[row];
      const uint4 x = at < 0 ? make_uint4(0, 0, 0, 0) : load16(static_cast<const T*>(p.q) + at + piece * 8);
      bool finite = true;
#pragma unroll
      for (uint32_t pair : {x.x, x.y, x.z, x.w}) {
        finite &= (pair & exponent) != exponent && (pair >> 16 & exponent) != exponent;
      }
      if (!finite) shared.dead[row] = 1;
      char* group = rows + row / C::kGroupRows * C::RowTile::kBytes;
      *reinterpret_cast<uint4*>(group + C::RowTile::offset(row % C::kGroupRows, piece)) = x;
    }
  }
  __syncthreads();
  if (slot < C::kSlots && shared.dead[slot] && shared.row_at[slot] >= 0) {
    char* group = rows + slot / C::kGroupRows * C::RowTile::kBytes;
    for (int piece = 0; piece < kPieces; ++piece) {
      *reinterpret_cast<uint4*>(group + C::RowTile::offset(slot % C::kGroupRows, piece)) = make_uint4(0, 0, 0, 0);
    }
  }
  fence_async_proxy();
}

// --- Chunks ----------------------------------------------------------------------------------------------------------

// bound[i] = the first bound at or after position[i] (Chunks), three chains of loads side by side; a whole warp calls.
__device__ inline void find_bounds(const Chunks& chunks, const int (&position)[3], int (&bound)[3]) {
  int high[3];
#pragma unroll
  for (int i = 0; i < 3; ++i) bound[i] = 0, high[i] = chunks.count + 1;
  while (bound[0] < high[0] || bound[1] < high[1] || bound[2] < high[2]) {
    bool below[3];
#pragma unroll
    for (int i = 0; i < 3; ++i) {
      const int probe = bound[i] + (lane_id() + 1) * ((high[i] - bound[i] + 31) / 32) - 1;
      below[i] = bound[i] <= probe && probe < high[i] && chunks.begin(probe) < position[i];
    }
#pragma unroll
    for (int i = 0; i < 3; ++i) {
      const int step = (high[i] - bound[i] + 31) / 32, passed = __popc(__ballot_sync(kFullWarp, below[i]));
      const int next_high = min(high[i], bound[i] + (passed + 1) * step - 1);
      bound[i] = min(high[i], bound[i] + passed * step);
      high[i] = max(bound[i], next_high);
    }
  }
}

__device__ inline int position0(const WgmmaParams& p, int block) {
  return p.seqlen_k - p.seqlen_q + block * p.sampled.q_block;
}
__device__ inline int position1(const WgmmaParams& p, int block) {
  return p.seqlen_k - p.seqlen_q + p.sampled.last_query(block);
}

// Chunks that some block of the tile can reach, and how many from the first on are whole for all of them. One warp.
template <class C>
__device__ void find_range(const WgmmaParams& p, const RowTile& tile, const Chunks& chunks,
                           typename C::Shared& shared) {
  const int p0 = position0(p, tile.first_block), p1 = position1(p, tile.first_block + tile.blocks - 1);
  const int position[3] = {p0 - p.window + 2, p1 + 1, position1(p, tile.first_block) + 2};
  int bound[3];
  find_bounds(chunks, position, bound);
  if (lane_id() > 0) return;
  shared.first = p.window > 0 ? max(bound[0] - 1, 0) / kMassTile * kMassTile : 0;
  shared.last = min(bound[1], chunks.count);
  shared.whole = p.window > 0 ? 0 : bound[2] - 1;
}

// Tells the compiler that all lanes have the same x.
__device__ inline int uniform(int x) { return __shfl_sync(kFullWarp, x, 0); }

// Starts the copy of chunks [chunk0, chunk0 + 64) of the pair to the ring's next stage, once every warp is done with
// it. One thread.
template <class C>
__device__ inline void load_tile(const WgmmaParams& p, int pair, int chunk0, uint32_t smem, typename C::Shared& shared,
                                 Ring<C::kStages>& ring) {
  const uint32_t full = smem_address(&shared.full[ring.stage]), to = smem + ring.stage * C::kStageBytes;
  const int64_t column = static_cast<int64_t>(pair) * p.pitch + chunk0;
  barrier_wait(smem_address(&shared.empty[ring.stage]), ring.parity ^ 1);
  barrier_arrive_expect(full, C::kTileBytes + C::kColumnBytes);
  bulk_copy(to, static_cast<const char*>(p.means.parts) + column / kMassTile * C::kTileBytes, C::kTileBytes, full);
  bulk_copy(to + C::kTileBytes, p.means.columns + column, C::kColumnBytes, full);
  ring.advance();
}

// A lane's two chunks of a tile.
struct LaneChunks {
  float factor[2], tokens[2];  // tokens 0: none of the chunk counts
};

// acc = means of the stage . the group's rows: acc[4 n + 2 half + side] is chunk 16 w + lane / 4 + 8 half of the tile
// for warp w of the group, row 8 n + lane % 4 * 2 + side.
template <class T, class C>
__device__ inline void issue_product(uint32_t stage, uint32_t rows, float (&acc)[C::kAcc]) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  const uint64_t a = wgmma_descriptor(stage, 0, 1024), b = wgmma_descriptor(rows, 0, 1024);
#pragma unroll
  for (float& x : acc) x = 0;
  wgmma_fence();
#pragma unroll
  for (int part = 0; part < 2; ++part) {
#pragma unroll
    for (int step = 0; step < C::kHeadDim / 16; ++step) {
      const int a_at = part * C::ChunkTile::kBytes + step / 4 * C::ChunkTile::kPanelBytes + step % 4 * 32;
      const int b_at = step / 4 * C::RowTile::kPanelBytes + step % 4 * 32;
      Wgmma<T, C::kGroupRows>::ss(acc, a + (a_at >> 4), b + (b_at >> 4), part + step > 0);
    }
  }
  wgmma_commit();
#endif
}

// Both ends of a thread's way along the ring; only thread 0 loads.
template <int kStages>
struct Rings {
  Ring<kStages> load, use;
};

// A warpgroup's way through chunks [first, last) of the pair, a tile at a time: plain(chunk0, acc, lane's chunks) for
// the tiles that end by `whole`, each while the next one's product is under way, then masked(...) for the others, one
// by one.
template <class T, class C, class Plain, class Masked>
__device__ inline void walk_chunks(const WgmmaParams& p, int pair, int first, int last, int whole, uint32_t smem,
                                   uint32_t rows, typename C::Shared& shared, Rings<C::kStages>& rings,
                                   const Plain& plain, const Masked& masked) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  // Tiles on their way or in use. A stage is filled again once a tile has passed since this warp left it, so that the
  // loading thread does not wait for the others, or at once where there are only two.
  constexpr int kAhead = C::kStages > 2 ? C::kStages - 1 : C::kStages;
  const int group = uniform(threadIdx.x / 128);
  float acc[2][C::kAcc];
  LaneChunks lane_chunks[2];
  uint32_t empty[2];
  const uint32_t column_at = C::kTileBytes + (warp_id() % 4 * 16 + lane_id() / 4) * 8;
  const auto load = [&](int chunk0) {
    if (threadIdx.x == 0 && chunk0 < last) load_tile<C>(p, pair, chunk0, smem, shared, rings.load);
    __syncwarp();
  };
  int here = first;
  const auto issue = [&](int side) {
    const uint32_t stage = smem + rings.use.stage * C::kStageBytes;
    barrier_wait(smem_address(&shared.full[rings.use.stage]), rings.use.parity);
    named_barrier_sync(kTurnBarrier + group, kThreads);
    issue_product<T, C>(stage, rows, acc[side]);
    named_barrier_arrive(kTurnBarrier + (group ^ 1), kThreads);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float log_tokens;
      asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];"
                   : "=f"(lane_chunks[side].factor[half]), "=f"(log_tokens)
                   : "r"(stage + column_at + half * 64));
      lane_chunks[side].tokens[half] = exp2_approx(log_tokens);
    }
    empty[side] = smem_address(&shared.empty[rings.use.stage]);
    rings.use.advance();
  };
  const auto finish = [&](int side) {
    wgmma_touch(acc[side]);
    if (lane_id() == 0) barrier_arrive(empty[side]);
    __syncwarp();
    load(here + kAhead * kMassTile);
  };
  for (int tile = 0; tile < kAhead; ++tile) load(first + tile * kMassTile);
  // The loop leaves on either side, so that the compiler sees which product is under way.
  int tiles = (whole - first) / kMassTile;
  if (tiles > 0) {
    issue(0);
#pragma unroll 1
    while (true) {
      if (tiles == 1) {
        wgmma_wait<0>();
        finish(0), plain(here, acc[0], lane_chunks[0]), here += kMassTile;
        break;
      }
      issue(1);
      wgmma_wait<1>();
      finish(0), plain(here, acc[0], lane_chunks[0]), here += kMassTile;
      if (tiles == 2) {
        wgmma_wait<0>();
        finish(1), plain(here, acc[1], lane_chunks[1]), here += kMassTile;
        break;
      }
      issue(0);
      wgmma_wait<1>();
      finish(1), plain(here, acc[1], lane_chunks[1]), here += kMassTile;
      tiles -= 2;
    }
  }
#pragma unroll 1
  for (; here < last; here += kMassTile) {
    issue(0);
    wgmma_wait<0>();
    finish(0), masked(here, acc[0], lane_chunks[0]);
  }
#endif
}

// --- One tile's exponentials -----------------------------------------------------------------------------------------

template <class C>
__device__ void find_reach(const WgmmaParams& p, const RowTile& tile, typename C::Shared& shared) {
  const int octet = threadIdx.x;
  if (octet >= C::kSlots / 8) return;
  const SlotRow at = slot_row<C>(p, tile, octet * 8);
  OctetReach reach = {INT_MIN, INT_MAX, make_int2(-1, 0), nullptr};
  if (at.block >= 0) {
    const int64_t list = list_of(p, tile, at.block);
    const int p0 = position0(p, tile.first_block + at.block);
    reach.p1 = position1(p, tile.first_block + at.block), reach.after = p.window > 0 ? p0 - p.window + 1 : INT_MIN;
    if (p.cut.chunks != nullptr) {
      reach.cut = __ldg(p.cut.chunks + list), reach.cut_logits = p.cut.logits + list * p.rows() + at.row;
    }
  }
  shared.reach[octet] = reach;
}

// Turns products into logits where not every chunk counts for every row or a product may have overflowed: -inf for what
// does not count, the cut chunk's own logit, with log2 n_c if kLengths. The lane's factors and lengths become 1.
template <class C, bool kLengths>
__device__ inline void mask_logits(const WgmmaParams& p, const Chunks& chunks, int chunk0, int group,
                                   const typename C::Shared& shared, float (&acc)[C::kAcc], LaneChunks& lane) {
  const int chunk = chunk0 + warp_id() % 4 * 16 + lane_id() / 4, member = lane_id() % 4;
  int begin[2], end[2];
  float length[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int c = chunk + 8 * half;
    const bool real = c < chunks.count && lane.tokens[half] > 0;
    begin[half] = real ? chunks.begin(c) : INT_MAX, end[half] = real ? chunks.end(c) : INT_MIN;
    length[half] = kLengths ? log2f(lane.tokens[half]) : 0.0f;
  }
#pragma unroll
  for (int n = 0; n < C::kGroupOctets; ++n) {
    const OctetReach& reach = shared.reach[group * C::kGroupOctets + n];
    const int p1 = reach.p1, after = reach.after, cut = reach.cut.x - chunk;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int half = i / 2;
      float& z = acc[4 * n + i];
      z *= lane.factor[half];
      const bool counts = (begin[half] <= p1) & (end[half] > after) & (fabsf(z) < INFINITY);
      z = counts ? z + length[half] : -INFINITY;
    }
    if (static_cast<unsigned>(reach.cut.x - chunk0) < kMassTile) {  // of the tile, for all lanes
      const float cut_length = kLengths ? log2f(static_cast<float>(reach.cut.y)) : 0.0f;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (cut == i / 2 * 8) acc[4 * n + i] = __ldg(reach.cut_logits + member * 2 + i % 2) + cut_length;
      }
    }
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) lane.factor[half] = lane.tokens[half] = 1;
}

// By a branch that all threads take alike.
template <class C>
__device__ inline void cap_logits(const WgmmaParams& p, float (&acc)[C::kAcc], LaneChunks& lane) {
  if (p.softcap <= 0) return;
#pragma unroll
  for (int i = 0; i < C::kAcc; ++i) acc[i] = softcapped2(acc[i] * lane.factor[i % 4 / 2], p.softcap);
  lane.factor[0] = lane.factor[1] = 1;
}

template <class C>
__device__ void init_barriers(typename C::Shared& shared) {
  if (threadIdx.x / 128 == 1) named_barrier_arrive(kTurnBarrier, kThreads);  // the first warpgroup's turn
  if (threadIdx.x > 0) return;
  for (int stage = 0; stage < C::kStages; ++stage) {
    barrier_init(smem_address(&shared.full[stage]), 1);
    barrier_init(smem_address(&shared.empty[stage]), kThreads / 32);
  }
  fence_async_proxy();
}

// --- Launches --------------------------------------------------------------------------------------------------------

template <class C, class Kernel>
cudaError_t launch(Kernel kernel, const WgmmaParams& p, dim3 grid, cudaStream_t stream) {
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, C::kSmemBytes);
  if (error != cudaSuccess) return error;
  kernel<<<grid, kThreads, C::kSmemBytes, stream>>>(p);
  return cudaGetLastError();
}

cudaError_t launch_lse(const WgmmaParams&, DType, cudaStream_t);
cudaError_t launch_scores(const WgmmaParams&, DType, cudaStream_t);

}  // namespace dhsa::cuda::mass_wgmma
