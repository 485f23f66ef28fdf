// sparse_attention on any GPU from sm_80 on, float16 and bfloat16: mma.sync, cp.async.
//
//   out[row] = softmax over j in the block's runs, p - window < j <= p, of logit(q[row] . k[j]), times v[j]
//
// One thread block answers one work item (attention_work.h): kBlockM packed rows of one KV head against a key list,
// kBlockN gathered keys at a time, accumulating in float32. Four warps split the rows; every warp loads a part of each
// K/V tile, two tiles deep: while one is multiplied, the next is on its way. A row with no key gives out 0, lse -inf.
//
// Finding a tile's keys in the run list takes a warp 150 instructions, twice what its part of the copies does. So each
// warp lists every fourth tile only, all four at the same time, into a ring of eight lists. One barrier a tile, at its
// start, orders everything:
//
//   tile         4 i                  4 i + 1      4 i + 2      4 i + 3
//   copies       4 i + 1              4 i + 2      4 i + 3      4 i + 4
//   lists        4 i + 4 .. 4 i + 7
//   overwrites   4 i - 4 .. 4 i - 1   the lists that tiles before the barrier copied and masked by
//
//   shared memory: Q [kBlockM, D] | 2 stages of K [kBlockN, D], V [kBlockN, D]
//                  8 lists of kBlockN keys | 8 headers | kBlockM positions of rows
#pragma once

#include "cuda/device/attention_work.h"
#include "cuda/device/cp_async.h"
#include "cuda/device/epilogue.h"
#include "cuda/device/gather.h"
#include "cuda/device/mma.h"
#include "cuda/device/run_walker.h"
#include "cuda/device/smem_tile.h"
#include "cuda/device/softmax.h"

namespace dhsa::cuda::sm80 {

// kRowTiles m16 tiles per warp: 2 halves the traffic per product, and needs 192 registers for O and S at head_dim 128.
template <int kHeadDim_, int kRowTiles_>
struct Config {
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kRowTiles = kRowTiles_;
  static constexpr int kWarps = 4;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kBlockM = 16 * kRowTiles * kWarps;
  static constexpr int kBlockN = kHeadDim == 256 ? 32 : 64;  // 96 KB of tiles at most: one block fits the SM
                                                             // of sm_86 and sm_89, two that of sm_90
  static constexpr int kSlots = kBlockN / 32;
  static constexpr int kAheadV = 4;  // fragments of V that are loaded before P is known
  static constexpr int kStages = 2;
  using QTile = SmemTile<kBlockM, kHeadDim>;
  using KTile = SmemTile<kBlockN, kHeadDim>;
  template <class T>
  using Gather = KeyGather<T, kHeadDim, kBlockN, kWarps>;
  static constexpr int kStageBytes = 2 * KTile::kBytes;
  static constexpr int kKeysOffset = QTile::kBytes + kStages * kStageBytes;
  static constexpr int kListedTiles = 2 * kWarps;
  static constexpr int kHeaderOffset = kKeysOffset + kListedTiles * kBlockN * 4;
  static constexpr int kPositionsOffset = kHeaderOffset + kListedTiles * 4;
  static constexpr int kSmemBytes = kPositionsOffset + kBlockM * 4;
  static_assert(kSmemBytes <= 99 * 1024, "a thread block of sm_86 and sm_89 gets 99 KB");
};

// What is known of a listed tile.
enum Header : int32_t {
  kMasked = 1,  // some row must not see some key of the tile
  kNoKeys = 2,  // the list ended before the tile
};

// s = Q K^T for the warp's rows, the first of which lies at q_smem.
template <class T, class C>
__device__ inline void multiply_qk(float (&s)[C::kRowTiles][C::kBlockN / 2], uint32_t q_smem, uint32_t k_smem,
                                   int32_t lane) {
  const uint32_t q_lane = q_smem + C::QTile::offset(lane % 16, lane / 16);
  const uint32_t k_lane = k_smem + C::KTile::offset(lane / 16 * 8 + lane % 8, lane / 8 % 2);
#pragma unroll
  for (int32_t m = 0; m < C::kRowTiles; ++m) {
#pragma unroll
    for (int32_t i = 0; i < C::kBlockN / 2; ++i) s[m][i] = 0.0f;
  }
  // Fragments of this step, and of the next to load meanwhile. Keys 16 n + 0..7 are in b[n][0] and b[n][1], 8..15 in
  // b[n][2] and b[n][3].
  uint32_t a[2][C::kRowTiles][4], b[2][C::kBlockN / 16][4];
  const auto load = [&](int32_t step) {
#pragma unroll
    for (int32_t m = 0; m < C::kRowTiles; ++m) ldmatrix_x4(a[step % 2][m], C::QTile::step(q_lane, 16 * m, 2 * step));
#pragma unroll
    for (int32_t n = 0; n < C::kBlockN / 16; ++n) {
      ldmatrix_x4(b[step % 2][n], C::KTile::step(k_lane, 16 * n, 2 * step));
    }
  };
  load(0);
#pragma unroll
  for (int32_t step = 0; step < C::kHeadDim / 16; ++step) {
    if (step + 1 < C::kHeadDim / 16) load(step + 1);
#pragma unroll
    for (int32_t n = 0; n < C::kBlockN / 16; ++n) {
#pragma unroll
      for (int32_t m = 0; m < C::kRowTiles; ++m) {
        float (&s0)[4] = reinterpret_cast<float (&)[4]>(s[m][8 * n]);
        float (&s1)[4] = reinterpret_cast<float (&)[4]>(s[m][8 * n + 4]);
        mma_m16n8k16<T>(s0, a[step % 2][m], b[step % 2][n][0], b[step % 2][n][1]);
        mma_m16n8k16<T>(s1, a[step % 2][m], b[step % 2][n][2], b[step % 2][n][3]);
      }
    }
  }
}

// Fragments of V of a step of 16 keys: columns 16 n + 0..7 (b[0], b[1]) and 8..15 (b[2], b[3]).
template <class C>
__device__ inline void load_v(uint32_t (&b)[4], uint32_t v_smem, int32_t step, int32_t n, int32_t lane) {
  ldmatrix_x4_transposed(b, C::KTile::step(v_smem + C::KTile::offset(lane % 16, lane / 16), 16 * step, 2 * n));
}

// o += P V for the warp's rows. `ahead` holds the first fragments of V.
template <class T, class C>
__device__ inline void multiply_pv(float (&o)[C::kRowTiles][C::kHeadDim / 2],
                                   const uint32_t (&prob)[C::kRowTiles][C::kBlockN / 16][4],
                                   const uint32_t (&ahead)[C::kAheadV][4], uint32_t v_smem, int32_t lane) {
#pragma unroll
  for (int32_t step = 0; step < C::kBlockN / 16; ++step) {
#pragma unroll
    for (int32_t n = 0; n < C::kHeadDim / 16; ++n) {
      uint32_t b[4];
      if (step == 0 && n < C::kAheadV) {
#pragma unroll
        for (int32_t i = 0; i < 4; ++i) b[i] = ahead[n][i];
      } else {
        load_v<C>(b, v_smem, step, n, lane);
      }
#pragma unroll
      for (int32_t m = 0; m < C::kRowTiles; ++m) {
        float (&o0)[4] = reinterpret_cast<float (&)[4]>(o[m][8 * n]);
        float (&o1)[4] = reinterpret_cast<float (&)[4]>(o[m][8 * n + 4]);
        mma_m16n8k16<T>(o0, prob[m][step], b[0], b[1]);
        mma_m16n8k16<T>(o1, prob[m][step], b[2], b[3]);
      }
    }
  }
}

// Keeps x in local memory, and leaves its registers to others.
template <class X>
__device__ inline void keep_in_memory(X& x) {
  asm volatile("" : : "l"(&x) : "memory");
}

template <class T, class C>
__global__ void __launch_bounds__(C::kThreads, 2) attention_kernel(const AttentionParams p) {
  extern __shared__ __align__(1024) uint8_t smem_bytes[];
  const int32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const WorkItem item = work_item<C::kBlockM>(p, blockIdx.x);
  if (item.num_rows <= 0) return;

  const int64_t list = list_index(p, item);
  const int32_t num_runs = max(0, min(p.num_runs[list], p.run_capacity));
  RunWalker walker(p.runs + list * p.run_capacity, num_runs, item.key_begin, item.key_end);
  SplitRange range = {0, kMaxListKeys, 1};
  if (item.split >= 0) {
    range = split_range<C::kBlockN>(p, item.split, walker.count_keys());
    if (threadIdx.x == 0 && item.split == 0) *split_count(p, item, item.first_row / C::kBlockM) = range.count;
    if (item.split >= range.count) return;
  }

  const uint32_t q_smem = smem_address(smem_bytes);
  int32_t* const listed_keys = reinterpret_cast<int32_t*>(smem_bytes + C::kKeysOffset);
  int32_t* const headers = reinterpret_cast<int32_t*>(smem_bytes + C::kHeaderOffset);
  int32_t* const positions = reinterpret_cast<int32_t*>(smem_bytes + C::kPositionsOffset);
  const int32_t kv_head = item.group / p.groups_per_kv;
  const T* k = static_cast<const T*>(p.k) + item.batch * p.k_stride.batch + kv_head * p.k_stride.head;
  const T* v = static_cast<const T*>(p.v) + item.batch * p.v_stride.batch + kv_head * p.v_stride.head;

  // The walker is wanted once in four tiles, its dozen registers by fragments of Q and K in each.
  RunWalker resting_walker = walker;
  keep_in_memory(resting_walker);
  keep_in_memory(range);
  // Writes down keys and header of the item's tile number `tile`. A warp calls it with every kWarps-th number.
  const auto list_tile = [&](int32_t tile) {
    int32_t key[C::kSlots];
    RunWalker walker = resting_walker;
    const int32_t count = walker.template keys_at<C::kSlots>(range.begin + tile * C::kBlockN, range.end, key);
    walker.template prefetch<C::kWarps * C::kBlockN>();  // what its next turn goes over if runs are single keys
    resting_walker = walker;
    const int32_t slot = tile % C::kListedTiles;
    bool masked = false;
#pragma unroll
    for (int32_t i = 0; i < C::kSlots; ++i) {
      listed_keys[slot * C::kBlockN + 32 * i + lane] = key[i];
      masked |= key[i] > item.first_position;  // as kAbsentKey is
      masked |= p.window > 0 && item.last_position - key[i] >= p.window;
    }
    masked = __any_sync(0xffffffffu, masked);
    if (lane == 0) headers[slot] = (masked ? kMasked : 0) | (count == 0 ? kNoKeys : 0);
  };
  // This warp's part of the copy of a listed tile; one without keys becomes zeros, which spares a branch.
  using Gather = typename C::template Gather<T>;
  const auto gather_of = [&](int32_t tile) {
    return Gather(q_smem + C::QTile::kBytes + tile % C::kStages * C::kStageBytes, k, v, p.k_stride.row, p.v_stride.row,
                  listed_keys + tile % C::kListedTiles * C::kBlockN, warp, lane);
  };

  float o[C::kRowTiles][C::kHeadDim / 2];
  OnlineSoftmax softmax[C::kRowTiles];
#pragma unroll
  for (int32_t m = 0; m < C::kRowTiles; ++m) {
#pragma unroll
    for (int32_t i = 0; i < C::kHeadDim / 2; ++i) o[m][i] = 0.0f;
  }
  for (int32_t row = threadIdx.x; row < C::kBlockM; row += C::kThreads) {
    positions[row] = item.block_position + (item.first_row + row) / p.group;
  }
  const LogitRule<false> rule(p.scale, p.softcap);

  gather_queries<T, C::kHeadDim, C::kBlockM, C::kBlockM, C::kWarps>(q_smem, p, item, 0, warp, lane);
  list_tile(warp);
  __syncthreads();  // the first lists are there
  const Gather first = gather_of(0);
#pragma unroll
  for (int32_t i = 0; i < Gather::kPairs; ++i) first.copy_pair(i);
  cp_async_commit();
  int32_t header = headers[0];
  for (int32_t tile = 0; !(header & kNoKeys); ++tile) {
    cp_async_wait<0>();
    __syncthreads();  // the tile has come, and every warp is done with the stage and the lists that are filled next
    if (tile % C::kWarps == 0) list_tile(tile + C::kWarps + warp);
    const int32_t next_header = headers[(tile + 1) % C::kListedTiles];
    const uint32_t k_smem = q_smem + C::QTile::kBytes + tile % C::kStages * C::kStageBytes;

    float s[C::kRowTiles][C::kBlockN / 2];
    uint32_t prob[C::kRowTiles][C::kBlockN / 16][4];
    multiply_qk<T, C>(s, q_smem + warp * C::kRowTiles * 16 * 128, k_smem, lane);
    const Gather next = gather_of(tile + 1);
    uint32_t ahead[C::kAheadV][4];
#pragma unroll
    for (int32_t m = 0; m < C::kRowTiles; ++m) {
      rule.transform(s[m]);
      if (header & kMasked) {
        const int32_t row = (warp * C::kRowTiles + m) * 16 + lane / 4;
        const int32_t position[2] = {positions[row], positions[row + 8]};
        mask_tile(s[m], listed_keys + tile % C::kListedTiles * C::kBlockN, position, p.window, lane);
      }
      // Copies go among exponentials, which leave every second issue slot free. Among products they would hold up
      // ldmatrix, which the compiler does not move past them.
#pragma unroll
      for (int32_t i = m; i < Gather::kPairs; i += C::kRowTiles) next.copy_pair(i);
      if (m == C::kRowTiles - 1) {
#pragma unroll
        for (int32_t n = 0; n < C::kAheadV; ++n) load_v<C>(ahead[n], k_smem + C::KTile::kBytes, 0, n, lane);
      }
      float rescale[2];
      if (softmax[m].template update<T>(prob[m], s[m], rule.factor, rescale)) scale_rows(o[m], rescale);
    }
    cp_async_commit();
    multiply_pv<T, C>(o, prob, ahead, k_smem + C::KTile::kBytes, lane);

    header = next_header;
  }
  cp_async_wait<0>();

#pragma unroll
  for (int32_t m = 0; m < C::kRowTiles; ++m) {
    const int32_t row = (warp * C::kRowTiles + m) * 16 + lane / 4;
    store_rows<T, C::kHeadDim>(p, item, item.split >= 0 && range.count > 1, row, o[m], softmax[m], rule.factor, lane);
  }
}

template <class T, int kHeadDim, int kRowTiles>
cudaError_t launch(AttentionParams& p, cudaStream_t stream) {
  using C = Config<kHeadDim, kRowTiles>;
  p.block_rows = C::kBlockM;
  p.block_tiles = (p.q_block * p.group + C::kBlockM - 1) / C::kBlockM;
  const int64_t items = num_items(p);
  if (items > 0x7fffffff) return cudaErrorInvalidValue;
  const auto kernel = attention_kernel<T, C>;
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, C::kSmemBytes);
  if (error != cudaSuccess) return error;
  kernel<<<unsigned(items), C::kThreads, C::kSmemBytes, stream>>>(p);
  return cudaGetLastError();
}

}  // namespace dhsa::cuda::sm80
