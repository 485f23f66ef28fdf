// sparse_attention on Hopper (sm_90a), float16 and bfloat16: wgmma fed by a producer warpgroup that gathers keys, by
// TMA where a tile's are neighbours and by cp.async where they are not.
//
//   out[row] = softmax over j in the block's runs, p - window < j <= p, of logit(q[row] . k[j]), times v[j]
//
// A thread block stays on its SM and answers one work item after another (attention_work.h). In warpgroup 0, warp 0
// walks the run list and writes down each tile's keys, warps 1 and 2 load the rows of K and of V that it names, and
// warp 3 does nothing. Warpgroups 1 and 2 own kHalves m64 tiles of packed rows each, whose Q they load themselves: S =
// Q K^T from shared memory, softmax in registers, O += P V with P from registers, all accumulated in float32. The next
// S is always issued before the P V of the last one, so that tensor cores work through a softmax. A row with no key
// gives out 0, lse -inf.
//
//   barrier     arrivals per phase                                        waited for by    then
//   listed[s]   1: the walker wrote keys and header of tile s             copiers          tile s may be filled
//   full[s]     2 x 32 copier threads + 1 walker, and the bytes of boxes  consumers        tile s may be read
//   empty[s]    8 consumer warps, after P V of the tile is complete       walker           tile s may be overwritten
//
// A gathered tile's copier threads arrive when their cp.asyncs have landed. For a tile of boxes (kBoxes) lane 0 starts
// the copies, announces their bytes and arrives for its warp. A stage is written now through the generic proxy
// (cp.async), now through the async one (TMA), and always read through the async one (wgmma). From generic write to
// wgmma, and to the TMA write of a later phase, the order runs through full[s] and the fence.proxy.async that every
// consumer thread does after it; from TMA write to cp.async through full[s] (the end of a TMA copy fences by itself),
// wgmma's wait and empty[s].
//
// A work item sends at least one tile; the header of a tile says what it is (Header).
#pragma once

#include "cuda/device/attention_work.h"
#include "cuda/device/barrier.h"
#include "cuda/device/cp_async.h"
#include "cuda/device/epilogue.h"
#include "cuda/device/gather.h"
#include "cuda/device/mma.h"
#include "cuda/device/ring.h"
#include "cuda/device/run_walker.h"
#include "cuda/device/smem_tile.h"
#include "cuda/device/softmax.h"
#include "cuda/device/tma.h"
#include "cuda/device/wgmma.h"
#include "cuda/sm90/config.h"
#include "cuda/sm90/key_boxes.h"

namespace dhsa::cuda::sm90 {

enum Header : int32_t {
  kMasked = 1,   // some row must not see some key of the tile
  kLast = 2,     // of the work item
  kNoWork = 4,   // a split without a share: no Q, no keys, no answer
  kRagged = 16,  // some of the tile's rows hold no key
  kPartial = 8,  // the answer goes to the partials
  kBoxes = 32,   // the tile's keys are kBlockN neighbours: TMA loads them
};

template <class C>
struct Smem {
  uint32_t q, keys, header, barriers;

  __device__ explicit Smem(uint32_t base)
      : q(base), keys(base + C::kKeysOffset), header(base + C::kHeaderOffset), barriers(base + C::kBarrierOffset) {}
  __device__ uint32_t k_tile(int32_t stage) const { return q + C::kStageOffset + stage * C::kStageBytes; }
  __device__ uint32_t v_tile(int32_t stage) const { return k_tile(stage) + C::KTile::kBytes; }
  __device__ uint32_t listed(int32_t stage) const { return barriers + 8 * stage; }
  __device__ uint32_t full(int32_t stage) const { return barriers + 8 * (C::kStages + stage); }
  __device__ uint32_t empty(int32_t stage) const { return barriers + 8 * (2 * C::kStages + stage); }
};

// --- Producer --------------------------------------------------------------------------------------------------------

// Warp 0: writes keys and header of every tile of every work item.
template <class C>
__device__ inline void walk(const AttentionParams& p, bool boxes, const Smem<C>& smem, uint8_t* smem_bytes,
                            int32_t lane) {
  int32_t* const keys = reinterpret_cast<int32_t*>(smem_bytes + C::kKeysOffset);
  int32_t* const header = reinterpret_cast<int32_t*>(smem_bytes + C::kHeaderOffset);
  Ring<C::kStages> ring;
  const auto announce = [&](int32_t tile) {
    if (lane == 0) header[ring.stage] = tile;
    __syncwarp();
    if (lane == 0) {
      barrier_arrive(smem.listed(ring.stage));
      barrier_arrive(smem.full(ring.stage));
    }
    ring.advance();
  };
  const int32_t items = int32_t(num_items(p));
  for (int32_t index = blockIdx.x; index < items; index += gridDim.x) {
    const WorkItem item = work_item<C::kBlockM>(p, index);
    if (item.num_rows <= 0) continue;
    const int64_t list = list_index(p, item);
    const int32_t num_runs = max(0, min(p.num_runs[list], p.run_capacity));
    RunWalker walker(p.runs + list * p.run_capacity, num_runs, item.key_begin, item.key_end);
    SplitRange range = {0, kMaxListKeys, 1};
    if (item.split >= 0) {
      range = split_range<C::kBlockN>(p, item.split, walker.count_keys());
      if (lane == 0 && item.split == 0) *split_count(p, item, item.first_row / C::kBlockM) = range.count;
      if (item.split >= range.count) {
        barrier_wait(smem.empty(ring.stage), ring.parity ^ 1);
        announce(kNoWork);
        continue;
      }
    }
    const int32_t every_tile = range.count > 1 ? kPartial : 0;
    bool last;
    uint32_t begin = range.begin;
    do {
      int32_t key[C::kSlots];
      const uint32_t next = begin + C::kBlockN;
      const int32_t count = walker.template keys_at<C::kSlots>(begin, min(range.end, next), key);
      last = next >= range.end || !walker.reaches(next);
      const int32_t first_key = __shfl_sync(0xffffffffu, key[0], 0) + lane;
      bool masked = count < C::kBlockN, neighbours = boxes;
#pragma unroll
      for (int32_t i = 0; i < C::kSlots; ++i) {
        masked |= key[i] > item.first_position;
        masked |= p.window > 0 && item.last_position - key[i] >= p.window;
        neighbours &= key[i] == first_key + 32 * i;
      }
      masked = __any_sync(0xffffffffu, masked);
      neighbours = __all_sync(0xffffffffu, neighbours);  // so none is kAbsentKey either
      barrier_wait(smem.empty(ring.stage), ring.parity ^ 1);
#pragma unroll
      for (int32_t i = 0; i < C::kSlots; ++i) {
        if (C::kBlockN % 32 == 0 || 32 * i + lane < C::kBlockN) keys[ring.stage * C::kBlockN + 32 * i + lane] = key[i];
      }
      announce((masked ? kMasked : 0) | (last ? kLast : 0) | (count < C::kBlockN ? kRagged : 0) |
               (neighbours ? kBoxes : 0) | every_tile);
      begin = next;
    } while (!last);
  }
}

// One lane, for its warp: the tile's keys from `key` on, a box a panel, and the warp's arrivals. Only whole tiles come
// so: in a ragged one a box would bring V's rows behind the run's end, NaN perhaps. Nor are tiles of several runs put
// together from boxes of 8 rows and gathered rest: 463 TFLOP/s on lists A, where gathering all reaches 560.
template <class Tile>
__device__ inline void load_boxes(uint32_t to, const CUtensorMap* map, uint32_t full, int32_t key, int32_t head,
                                  int32_t batch) {
  barrier_expect(full, Tile::kBytes);
#pragma unroll
  for (int32_t panel = 0; panel < Tile::kPanels; ++panel) {
    load_box(to + panel * Tile::kPanelBytes, map, full, 64 * panel, key, head, batch);
  }
  barrier_arrive(full, 32);
}

// Warp 1 for K, warp 2 for V (tile_offset: where in a stage its tile lies): copies the rows that the walker listed.
template <class T, class C>
__device__ inline void copy(const AttentionParams& p, const Smem<C>& smem, const uint8_t* smem_bytes, const void* data,
                            const Strides& stride, const CUtensorMap* map, int32_t tile_offset, int32_t lane) {
  const int32_t* const keys = reinterpret_cast<const int32_t*>(smem_bytes + C::kKeysOffset);
  const volatile int32_t* const header = reinterpret_cast<const int32_t*>(smem_bytes + C::kHeaderOffset);
  Ring<C::kStages> ring;
  const int32_t items = int32_t(num_items(p));
  for (int32_t index = blockIdx.x; index < items; index += gridDim.x) {
    const WorkItem item = work_item<C::kBlockM>(p, index);
    if (item.num_rows <= 0) continue;
    const int32_t head = item.group / p.groups_per_kv;
    const T* base = static_cast<const T*>(data) + item.batch * stride.batch + head * stride.head;
    int32_t tile;
    do {
      barrier_wait(smem.listed(ring.stage), ring.parity);
      tile = header[ring.stage];
      const uint32_t to = smem.k_tile(ring.stage) + tile_offset;
      const int32_t* const tile_keys = keys + ring.stage * C::kBlockN;
      const uint32_t full = smem.full(ring.stage);
      if (tile & kBoxes) {
        __syncwarp();  // every lane has read the header: lane 0 may arrive for all
        if (lane == 0) load_boxes<typename C::KTile>(to, map, full, tile_keys[0], head, item.batch);
      } else {
        if (tile & kRagged) {
          copy_listed_rows<T, C::kHeadDim, C::kBlockN, false>(to, base, stride.row, tile_keys, lane);
        } else if (!(tile & kNoWork)) {
          copy_listed_rows<T, C::kHeadDim, C::kBlockN, true>(to, base, stride.row, tile_keys, lane);
        }
        barrier_arrive_after_copies(full);
      }
      ring.advance();
    } while (!(tile & (kLast | kNoWork)));
  }
}

// --- Consumers -------------------------------------------------------------------------------------------------------

// Issues S = Q K^T for m64 tile `row_tile` of the block.
template <class T, class C>
__device__ inline void issue_qk(float (&s)[C::kBlockN / 2], const Smem<C>& smem, int32_t row_tile, int32_t stage) {
  const uint64_t q = wgmma_descriptor(smem.q + row_tile * 64 * 128, 0, 1024);
  const uint64_t k = wgmma_descriptor(smem.k_tile(stage), 0, 1024);
#pragma unroll
  for (int32_t step = 0; step < C::kHeadDim / 16; ++step) {
    const uint32_t column = step % 4 * 32;
    Wgmma<T, C::kBlockN>::ss(s, q + ((step / 4 * C::QTile::kPanelBytes + column) >> 4),
                             k + ((step / 4 * C::KTile::kPanelBytes + column) >> 4), step > 0);
  }
}

// Issues O += P V.
template <class T, class C>
__device__ inline void issue_pv(float (&o)[C::kHeadDim / 2], const uint32_t (&prob)[C::kBlockN / 16][4],
                                const Smem<C>& smem, int32_t stage) {
  const uint64_t v = wgmma_descriptor(smem.v_tile(stage), C::KTile::kPanelBytes, 1024);
#pragma unroll
  for (int32_t step = 0; step < C::kBlockN / 16; ++step) {
    Wgmma<T, C::kHeadDim>::rs(o, prob[step], v + ((step * 2048) >> 4));
  }
}

// to = from, here and not earlier: volatile, because ptxas would merge the two and then run the products that read `to`
// one after the other.
template <int kSteps>
__device__ inline void replace(uint32_t (&to)[kSteps][4], const uint32_t (&from)[kSteps][4]) {
#pragma unroll
  for (int32_t i = 0; i < 4 * kSteps; ++i)
    asm volatile("mov.b32 %0, %1;" : "=r"(to[i / 4][i % 4]) : "r"(from[i / 4][i % 4]));
}

template <class T, class C, bool kPlain>
__device__ inline void consume(const AttentionParams& p, const Smem<C>& smem, const uint8_t* smem_bytes,
                               int32_t warpgroup) {
  const int32_t warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
  const int32_t* const keys = reinterpret_cast<const int32_t*>(smem_bytes + C::kKeysOffset);
  const volatile int32_t* const header = reinterpret_cast<const int32_t*>(smem_bytes + C::kHeaderOffset);
  const LogitRule<kPlain> rule(p.scale, p.softcap);
  constexpr int kHalves = C::kHalves;
  Ring<C::kStages> ring;
  const int32_t items = int32_t(num_items(p));

  const auto arrive = [&](uint32_t barrier) {
    __syncwarp();
    if (lane == 0) barrier_arrive(barrier);
  };
  const auto await_tile = [&](const Ring<C::kStages>& at) {
    barrier_wait(smem.full(at.stage), at.parity);
    fence_async_proxy();
    return int32_t(header[at.stage]);
  };
  // Turns: while one warpgroup is in its softmax, the other's products have the tensor cores.
  const auto await_turn = [&] { named_barrier_sync(3 + warpgroup, 256); };
  const auto pass_turn = [&] { named_barrier_arrive(3 + (warpgroup ^ 1), 256); };
  if (warpgroup == 1) pass_turn();
  // The first item from `index` on that has rows; its Q is on the way to this warpgroup's part of the Q tile.
  const auto start_item = [&](int32_t index) {
    for (; index < items; index += gridDim.x) {
      const WorkItem item = work_item<C::kBlockM>(p, index);
      if (item.num_rows <= 0) continue;
      gather_queries<T, C::kHeadDim, C::kBlockM, 64 * kHalves, 4>(smem.q, p, item, warpgroup * kHalves * 64, warp,
                                                                  lane);
      cp_async_commit();  // a wait sees committed groups only
      break;
    }
    return index;
  };

  for (int32_t index = start_item(blockIdx.x); index < items;) {
    const WorkItem item = work_item<C::kBlockM>(p, index);
    int32_t tile = await_tile(ring);
    cp_async_wait<0>();
    fence_async_proxy();
    named_barrier_sync(1 + warpgroup, 128);  // the whole warpgroup's Q has come
    if (tile & kNoWork) {
      arrive(smem.empty(ring.stage));
      ring.advance();
      index = start_item(index + gridDim.x);
      continue;
    }

    float o[kHalves][C::kHeadDim / 2];
    float s[C::kBlockN / 2];
    uint32_t prob[kHalves][C::kBlockN / 16][4];
    OnlineSoftmax softmax[kHalves];
#pragma unroll
    for (int32_t h = 0; h < kHalves; ++h) {
#pragma unroll
      for (int32_t i = 0; i < C::kHeadDim / 2; ++i) o[h][i] = 0.0f;
    }

    // Logits of half h to probabilities, with O[h] brought to the new maximum. Ends the P V under way.
    const auto softmax_step = [&](int32_t h, int32_t tile_header, int32_t stage) {
      rule.transform(s);
      if (tile_header & kMasked) {
        const int32_t row = item.first_row + (warpgroup * kHalves + h) * 64 + warp * 16 + lane / 4;
        const int32_t position[2] = {item.block_position + row / p.group, item.block_position + (row + 8) / p.group};
        mask_tile(s, keys + stage * C::kBlockN, position, p.window, lane);
      }
      float rescale[2];
      if constexpr (kHalves == 1) {
        uint32_t next[C::kBlockN / 16][4];
        const bool grew = softmax[h].template update<T>(next, s, rule.factor, rescale);
        wgmma_wait<0>();  // the P V under way writes this very O, and reads the P that is replaced next
        wgmma_touch(o[h]);
        if (grew) scale_rows(o[h], rescale);
        replace(prob[h], next);
      } else {
        const bool grew = softmax[h].template update<T>(prob[h], s, rule.factor, rescale);
        if (grew) scale_rows(o[h], rescale);
        wgmma_wait<0>();
        wgmma_touch(o[1 - h]);
      }
    };

    wgmma_fence();
    issue_qk<T, C>(s, smem, warpgroup * kHalves, ring.stage);
    wgmma_commit();
    wgmma_wait<0>();
    wgmma_touch(s);
    softmax_step(0, tile, ring.stage);

    int32_t finished = -1;  // the stage whose last P V is under way
    Ring<C::kStages> next_ring;
    int32_t next_tile = 0;
    const auto await_next = [&] {
      if (tile & kLast) return;
      next_ring = ring;
      next_ring.advance();
      next_tile = await_tile(next_ring);
    };
    while (true) {
      if constexpr (kHalves == 2) {
        await_turn();
        wgmma_fence();
        issue_qk<T, C>(s, smem, warpgroup * 2 + 1, ring.stage);
        wgmma_commit();
        issue_pv<T, C>(o[0], prob[0], smem, ring.stage);
        wgmma_commit();
        pass_turn();
        await_next();  // here, where the wait for S hides it
        wgmma_wait<1>();
        wgmma_touch(s);
        if (finished >= 0) arrive(smem.empty(finished));
        softmax_step(1, tile, ring.stage);
      }
      if (tile & kLast) break;
      const int32_t stage = ring.stage;
      if constexpr (kHalves == 1) await_next();
      ring = next_ring, tile = next_tile;
      await_turn();
      wgmma_fence();
      issue_qk<T, C>(s, smem, warpgroup * kHalves, ring.stage);
      wgmma_commit();
      issue_pv<T, C>(o[kHalves - 1], prob[kHalves - 1], smem, stage);
      wgmma_commit();
      pass_turn();
      wgmma_wait<1>();
      wgmma_touch(s);
      softmax_step(0, tile, ring.stage);
      if constexpr (kHalves == 1) arrive(smem.empty(stage));
      finished = stage;
    }
    wgmma_fence();
    issue_pv<T, C>(o[kHalves - 1], prob[kHalves - 1], smem, ring.stage);
    wgmma_commit();
    named_barrier_sync(1 + warpgroup, 128);  // no warp needs this item's Q any more
    index = start_item(index + gridDim.x);
    wgmma_wait<0>();
#pragma unroll
    for (int32_t h = 0; h < kHalves; ++h) wgmma_touch(o[h]);
    arrive(smem.empty(ring.stage));
    ring.advance();

#pragma unroll
    for (int32_t h = 0; h < kHalves; ++h) {
      const int32_t row = (warpgroup * kHalves + h) * 64 + warp * 16 + lane / 4;
      store_rows<T, C::kHeadDim>(p, item, tile & kPartial, row, o[h], softmax[h], rule.factor, lane);
    }
  }
}

// --- Kernel and launcher ---------------------------------------------------------------------------------------------

template <class T, class C, bool kPlain>
__global__ void __launch_bounds__(C::kThreads, 1)
    attention_kernel(const __grid_constant__ AttentionParams p, const __grid_constant__ KeyBoxes boxes) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ uint8_t unaligned[];
  uint8_t* const smem_bytes = unaligned + ((1024 - (smem_address(unaligned) & 1023)) & 1023);
  const Smem<C> smem(smem_address(smem_bytes));
  if (threadIdx.x == 0) {
    for (int32_t stage = 0; stage < C::kStages; ++stage) {
      barrier_init(smem.listed(stage), 1);
      barrier_init(smem.full(stage), 2 * 32 + 1);
      barrier_init(smem.empty(stage), 4 * C::kConsumers);
    }
    fence_async_proxy();  // TMA counts bytes on them
  }
  __syncthreads();
  const int32_t warpgroup = __shfl_sync(0xffffffffu, threadIdx.x / 128, 0);
  if (warpgroup == 0) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(C::kProducerRegisters));
    const int32_t warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
    if (warp == 0) walk<C>(p, boxes.usable != 0, smem, smem_bytes, lane);
    if (warp == 1) copy<T, C>(p, smem, smem_bytes, p.k, p.k_stride, &boxes.k, 0, lane);
    if (warp == 2) copy<T, C>(p, smem, smem_bytes, p.v, p.v_stride, &boxes.v, C::KTile::kBytes, lane);
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(C::kConsumerRegisters));
    consume<T, C, kPlain>(p, smem, smem_bytes, warpgroup - 1);
  }
#endif
}

template <class T, class C>
cudaError_t launch(AttentionParams& p, bool use_boxes, cudaStream_t stream) {
  p.block_rows = C::kBlockM;
  p.block_tiles = (p.q_block * p.group + C::kBlockM - 1) / C::kBlockM;
  int device = 0, multiprocessors = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  }
  const auto kernel = plain_logits(p.scale, p.softcap) ? attention_kernel<T, C, true> : attention_kernel<T, C, false>;
  if (error == cudaSuccess) {
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, C::kSmemBytes);
  }
  if (error != cudaSuccess) return error;
  const int64_t items = num_items(p);
  if (items > (1 << 30)) return cudaErrorInvalidValue;
  const int64_t blocks = items < multiprocessors ? items : multiprocessors;
  const KeyBoxes boxes = use_boxes ? make_key_boxes(p, C::kHeadDim, C::kBlockN) : KeyBoxes{};
  kernel<<<unsigned(blocks), C::kThreads, C::kSmemBytes, stream>>>(p, boxes);
  return cudaGetLastError();
}

}  // namespace dhsa::cuda::sm90
