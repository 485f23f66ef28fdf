// sparse_attention on any GPU from sm_80 on, float16 and bfloat16: mma.sync, cp.async.
//
//   out[row] = softmax over j in the block's runs, p - window < j <= p, of logit(q[row] . k[j]), times v[j]
//
// One thread block answers one work item (attention_work.h): kBlockM packed rows of one KV head against a key list,
// kBlockN gathered keys at a time, accumulating in float32. Four warps split the rows; every warp loads a part of each
// K/V tile, two tiles deep: while one is multiplied, the next is on its way. A row with no key gives out 0, lse -inf.
//
//   shared memory: Q [kBlockM, D] | 2 stages of K [kBlockN, D], V [kBlockN, D] | 2 lists of kBlockN key indices
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
  static constexpr int kBlockN = kHeadDim == 256 ? 32 : 64;  // 96 KB of shared memory at most: one block fits the
                                                             // SM of sm_86 and sm_89, two that of sm_90
  static constexpr int kSlots = kBlockN / 32;
  static constexpr int kStages = 2;
  using QTile = SmemTile<kBlockM, kHeadDim>;
  using KTile = SmemTile<kBlockN, kHeadDim>;
  static constexpr int kStageBytes = 2 * KTile::kBytes;
  static constexpr int kKeysOffset = QTile::kBytes + kStages * kStageBytes;
  static constexpr int kSmemBytes = kKeysOffset + kStages * kBlockN * 4;
};

// s = Q K^T for the warp's rows.
template <class T, class C>
__device__ inline void multiply_qk(float (&s)[C::kRowTiles][C::kBlockN / 2], uint32_t q_smem, uint32_t k_smem,
                                   int32_t warp, int32_t lane) {
#pragma unroll
  for (int32_t m = 0; m < C::kRowTiles; ++m) {
#pragma unroll
    for (int32_t i = 0; i < C::kBlockN / 2; ++i) s[m][i] = 0.0f;
  }
#pragma unroll
  for (int32_t step = 0; step < C::kHeadDim / 16; ++step) {
    uint32_t a[C::kRowTiles][4];
#pragma unroll
    for (int32_t m = 0; m < C::kRowTiles; ++m) {
      const int32_t row = (warp * C::kRowTiles + m) * 16 + lane % 16;
      ldmatrix_x4(a[m], q_smem + C::QTile::offset(row, 2 * step + lane / 16));
    }
#pragma unroll
    for (int32_t n = 0; n < C::kBlockN / 16; ++n) {
      uint32_t b[4];  // keys 16 n + 0..7: b[0], b[1]; 8..15: b[2], b[3]
      const int32_t key = 16 * n + lane / 16 * 8 + lane % 8;
      ldmatrix_x4(b, k_smem + C::KTile::offset(key, 2 * step + lane / 8 % 2));
#pragma unroll
      for (int32_t m = 0; m < C::kRowTiles; ++m) {
        float (&s0)[4] = reinterpret_cast<float (&)[4]>(s[m][8 * n]);
        float (&s1)[4] = reinterpret_cast<float (&)[4]>(s[m][8 * n + 4]);
        mma_m16n8k16<T>(s0, a[m], b[0], b[1]);
        mma_m16n8k16<T>(s1, a[m], b[2], b[3]);
      }
    }
  }
}

// o += P V for the warp's rows.
template <class T, class C>
__device__ inline void multiply_pv(float (&o)[C::kRowTiles][C::kHeadDim / 2],
                                   const uint32_t (&prob)[C::kRowTiles][C::kBlockN / 16][4], uint32_t v_smem,
                                   int32_t lane) {
#pragma unroll
  for (int32_t step = 0; step < C::kBlockN / 16; ++step) {
#pragma unroll
    for (int32_t n = 0; n < C::kHeadDim / 16; ++n) {
      uint32_t b[4];  // columns 16 n + 0..7: b[0], b[1]; 8..15: b[2], b[3]
      const int32_t key = 16 * step + lane % 16;
      ldmatrix_x4_transposed(b, v_smem + C::KTile::offset(key, 2 * n + lane / 16));
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
  int32_t* const tile_keys = reinterpret_cast<int32_t*>(smem_bytes + C::kKeysOffset);
  const int32_t kv_head = item.group / p.groups_per_kv;
  const T* k = static_cast<const T*>(p.k) + item.batch * p.k_stride.batch + kv_head * p.k_stride.head;
  const T* v = static_cast<const T*>(p.v) + item.batch * p.v_stride.batch + kv_head * p.v_stride.head;

  // Starts the copy of the tile at list position `begin`. Returns its keys; *masked says that rows see it in part.
  const auto load_tile = [&](uint32_t begin, int32_t stage, bool* masked) {
    int32_t key[C::kSlots];
    const int32_t count = walker.template keys_at<C::kSlots>(begin, range.end, key);
    if (count > 0) {
      const uint32_t k_smem = q_smem + C::QTile::kBytes + stage * C::kStageBytes;
      gather_keys<T, C::kHeadDim, C::kBlockN, C::kWarps>(k_smem, k, p.k_stride.row, key, warp, lane);
      gather_keys<T, C::kHeadDim, C::kBlockN, C::kWarps>(k_smem + C::KTile::kBytes, v, p.v_stride.row, key, warp, lane);
      bool partly = count < C::kBlockN;
#pragma unroll
      for (int32_t i = 0; i < C::kSlots; ++i) {
        if (warp == 0) tile_keys[stage * C::kBlockN + 32 * i + lane] = key[i];
        partly |= key[i] > item.first_position;
        partly |= p.window > 0 && item.last_position - key[i] >= p.window;
      }
      *masked = __any_sync(0xffffffffu, partly);
    }
    cp_async_commit();
    return count;
  };

  float o[C::kRowTiles][C::kHeadDim / 2];
  OnlineSoftmax softmax[C::kRowTiles];
  int32_t position[C::kRowTiles][2];
#pragma unroll
  for (int32_t m = 0; m < C::kRowTiles; ++m) {
    const int32_t row = item.first_row + (warp * C::kRowTiles + m) * 16 + lane / 4;
    position[m][0] = item.block_position + row / p.group;
    position[m][1] = item.block_position + (row + 8) / p.group;
#pragma unroll
    for (int32_t i = 0; i < C::kHeadDim / 2; ++i) o[m][i] = 0.0f;
  }
  const LogitRule<false> rule(p.scale, p.softcap);

  bool masked = false, masked_next = false;
  gather_queries<T, C::kHeadDim, C::kBlockM, C::kBlockM, C::kWarps>(q_smem, p, item, 0, warp, lane);
  int32_t count = load_tile(range.begin, 0, &masked);
  int32_t stage = 0;
  for (uint32_t begin = range.begin; count > 0; begin += C::kBlockN) {
    cp_async_wait<0>();
    __syncthreads();  // the tile has come, and every warp is done with the stage that is filled next
    const int32_t count_next = load_tile(begin + C::kBlockN, stage ^ 1, &masked_next);
    const uint32_t k_smem = q_smem + C::QTile::kBytes + stage * C::kStageBytes;

    float s[C::kRowTiles][C::kBlockN / 2];
    uint32_t prob[C::kRowTiles][C::kBlockN / 16][4];
    multiply_qk<T, C>(s, q_smem, k_smem, warp, lane);
#pragma unroll
    for (int32_t m = 0; m < C::kRowTiles; ++m) {
      rule.transform(s[m]);
      if (masked) mask_tile(s[m], tile_keys + stage * C::kBlockN, position[m], p.window, lane);
      float rescale[2];
      if (softmax[m].template update<T>(prob[m], s[m], rule.factor, rescale)) scale_rows(o[m], rescale);
    }
    multiply_pv<T, C>(o, prob, k_smem + C::KTile::kBytes, lane);

    count = count_next, masked = masked_next, stage ^= 1;
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
