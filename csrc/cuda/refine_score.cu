// The scores of refine_keys' short lists: key j gets the sum over the list's heads and their sampled rows u of
//
//   min(1, exp(logit(scale * q[u] . k[j]) - row_lse[u]))          (without row_lse: q_pooled . k[j], no softmax)
//
// Products are exact 16-bit operands summed in float32 on the tensor cores (float32 inputs: plain float32). Warps share
// nothing but the rows: each gathers 32 keys of its own with cp.async, moves them to registers as the B operand of
// every product, and has the next 32 on their way meanwhile. At 32 rows a list a key's 2 D bytes feed 64 D operations,
// so L2 is the limit: 0.9 MB a list at 3,500 keys of 256 bytes.
#include <algorithm>

#include "cuda/device/cp_async.h"
#include "cuda/device/load.h"
#include "cuda/device/logit.h"
#include "cuda/device/mma.h"
#include "cuda/device/scan.h"
#include "cuda/device/smem_tile.h"
#include "cuda/refine.h"

namespace dhsa::cuda {
namespace {

constexpr int kThreads = kRefineThreads, kWarps = kThreads / 32;
constexpr int kRowTile = 64;   // rows in shared memory; lists of more gather their keys once for each 64
constexpr int kPoolParts = 3;  // a pooled query is the sum of three 16-bit rows, 24 bits together

template <class T, int kHeadDim>
struct Shape {
  static constexpr int kKeys = kHeadDim == 256 ? 16 : 32;  // of a warp's tile: 64 registers hold them
  using KeyTile = SmemTile<kKeys, kHeadDim>;
  using RowTile = SmemTile<kRowTile, kHeadDim>;
  static constexpr int kPieces = kHeadDim / 8;  // of 16 bytes
};
template <int kHeadDim>
struct Shape<float, kHeadDim> {
  static constexpr int kRows = 8;  // rows at once
  struct KeyTile {
    static constexpr int kBytes = 0;
  };
  struct RowTile {
    static constexpr int kBytes = kRows * kHeadDim * 4;
  };
};

// min(1, exp(logit - row_lse)), and NaN where the logit is; lse: row_lse negated, in log2 units.
__device__ inline float share_of_row(float product, float scale, float softcap, float lse) {
  return exp2_approx(min_or_nan(logit2(product, scale, softcap) + lse, 0.0f));
}

struct Rows {  // of one KV head's group of query heads
  int batch, block, pair, first_head, kv_head, count;
};

template <class T>
__device__ const T* row_of(const RefineParams& p, const Rows& rows, int u) {
  const int row = max(p.sampled.row(rows.block, u % p.sampled.samples), 0);
  return static_cast<const T*>(p.q) + rows.batch * p.q_batch + (rows.first_head + u / p.sampled.samples) * p.q_head +
         row * p.q_token;
}

__device__ inline bool row_used(const RefineParams& p, const Rows& rows, int u) {
  return u < rows.count && p.sampled.used(rows.block, u % p.sampled.samples);
}

__device__ inline float negated_lse2(const RefineParams& p, const Rows& rows, int u) {
  if (!row_used(p, rows, u)) return -INFINITY;
  const int64_t head = static_cast<int64_t>(rows.batch) * p.heads + rows.first_head + u / p.sampled.samples;
  return -kLog2OfE * p.row_lse[(head * p.query_blocks + rows.block) * p.sampled.samples + u % p.sampled.samples];
}

// The largest power of two that brings every |x| below 2: a pooled query's common factor changes no order.
__device__ inline float power_of_two_scale(float largest) {
  return largest > 0 && largest < INFINITY ? exp2f(-fminf(fmaxf(ilogbf(largest), -100), 100)) : 1.0f;
}

// Rows [first, first + n) of the group into shared memory, zeros up to a multiple of 16; ends with a barrier.
template <class T, int kHeadDim>
__device__ void load_rows(const RefineParams& p, const Rows& rows, int first, int n, uint32_t row_smem,
                          float* row_lse) {
  using S = Shape<T, kHeadDim>;
  const int padded = (n + 15) / 16 * 16;
  for (int i = threadIdx.x; i < padded * S::kPieces; i += kThreads) {
    const int row = i / S::kPieces, piece = i % S::kPieces;
    const bool used = row_used(p, rows, first + row);
    const T* from = used ? row_of<T>(p, rows, first + row) + piece * 8 : static_cast<const T*>(p.q);
    cp_async_16(row_smem + S::RowTile::offset(row, piece), from, used);
  }
  cp_async_commit();
  for (int i = threadIdx.x; i < kRowTile; i += kThreads) {
    row_lse[i] = i < n ? negated_lse2(p, rows, first + i) : -INFINITY;
  }
  cp_async_wait<0>();
  __syncthreads();
}

// The pooled query as kPoolParts rows whose sum it is, times a power of two.
template <class T, int kHeadDim>
__device__ void load_pooled_row(const RefineParams& p, const Rows& rows, char* row_tile) {
  using S = Shape<T, kHeadDim>;
  const float* pooled = p.q_pooled + (static_cast<int64_t>(rows.pair) * p.query_blocks + rows.block) * kHeadDim;
  for (int i = threadIdx.x; i < 16 * S::kPieces; i += kThreads) {
    *reinterpret_cast<uint4*>(row_tile + S::RowTile::offset(i / S::kPieces, i % S::kPieces)) = make_uint4(0, 0, 0, 0);
  }
  float largest = 0;
  for (int d = lane_id(); d < kHeadDim; d += 32) largest = fmaxf(largest, fabsf(pooled[d]));
#pragma unroll
  for (int step = 16; step > 0; step /= 2) largest = fmaxf(largest, __shfl_xor_sync(kFullWarp, largest, step));
  const float factor = power_of_two_scale(largest);
  __syncthreads();
  for (int d = threadIdx.x; d < kHeadDim; d += kThreads) {
    float rest = pooled[d] * factor;
    for (int part = 0; part < kPoolParts; ++part) {
      T rounded;
      from_float(rest, &rounded);
      rest -= to_float(rounded);
      *reinterpret_cast<T*>(row_tile + S::RowTile::offset(part, d / 8) + d % 8 * 2) = rounded;
    }
  }
  __syncthreads();
}

enum class Share { kPooled, kPlain, kSoftcap };

// Adds the rows of one 16-row tile to the lane's column sums. kPart: some of its rows are empty.
template <Share kShare, bool kPart>
__device__ inline void add_rows(const RefineParams& p, float scale2, const float (&product)[4], float (&sum)[2],
                                const float (&lse)[2], const bool (&used)[2]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (kShare == Share::kPooled) {
      sum[i % 2] += product[i];
    } else {
      float share = kShare == Share::kSoftcap ? share_of_row(product[i], p.scale, p.softcap, lse[i / 2])
                                              : exp2_approx(min_or_nan(fmaf(product[i], scale2, lse[i / 2]), 0.0f));
      if (kPart) share = used[i / 2] ? share : 0.0f;
      sum[i % 2] += share;
    }
  }
}

// scores[i] += (add) or = the rows' shares of key positions[i], i < n. A warp takes kKeys neighbours of the list.
template <class T, int kHeadDim, Share kShare>
__device__ void score_tiles(const RefineParams& p, const T* k, const Shortlist& list, int n, int rows, bool add,
                            uint32_t row_smem, uint32_t key_smem, const float* row_lse) {
  using S = Shape<T, kHeadDim>;
  constexpr int kSteps = kHeadDim / 16, kGroups = S::kKeys / 16;
  constexpr int kLanesPerRow = 8, kRowsAtOnce = 32 / kLanesPerRow;
  const int tiles = (n + S::kKeys - 1) / S::kKeys;
  const auto position_of = [&](int tile) {
    const int i = tile * S::kKeys + lane_id() % S::kKeys;
    return tile < tiles && i < n ? list.positions[i] : -1;
  };
  // Addresses of a tile are a lane's base, a constant for the row and the panel, and an exclusive or for the swizzle:
  // rows of one lane differ by multiples of 8, or of 4 where it gathers.
  const uint32_t write_at = key_smem + S::KeyTile::offset(lane_id() / kLanesPerRow, lane_id() % kLanesPerRow);
  const uint32_t key_at = key_smem + S::KeyTile::offset(lane_id() % 8 + lane_id() / 16 * 8, lane_id() / 8 % 2);
  const uint32_t row_at = row_smem + S::RowTile::offset(lane_id() % 16, lane_id() / 16);
  const auto gather = [&](int position) {
#pragma unroll
    for (int j = 0; j < S::kKeys / kRowsAtOnce; ++j) {
      const int key = __shfl_sync(kFullWarp, position, j * kRowsAtOnce + lane_id() / kLanesPerRow);
      const T* from = k + static_cast<int64_t>(max(key, 0)) * p.k_token + lane_id() % kLanesPerRow * 8;
      const uint32_t to = (write_at ^ (j % 2 * 4 << 4)) + j * kRowsAtOnce * 128;
#pragma unroll
      for (int panel = 0; panel < S::KeyTile::kPanels; ++panel) {
        if (panel * 8 + lane_id() % kLanesPerRow >= S::kPieces) continue;
        cp_async_16(to + panel * S::KeyTile::kPanelBytes, from + panel * 64, key >= 0);
      }
    }
    cp_async_commit();
  };

  const int stride = kWarps * static_cast<int>(gridDim.y);  // blockIdx.y shares a list's tiles where lists are few
  int tile = static_cast<int>(blockIdx.y) * kWarps + warp_id();
  if (tile < tiles) gather(position_of(tile));
  int next_position = position_of(tile + stride);
  const int group = lane_id() / 4, member = lane_id() % 4;
  const float scale2 = p.scale * kLog2OfE;
  for (; tile < tiles; tile += stride) {
    cp_async_wait<0>();
    __syncwarp();
    uint32_t keys[kSteps][kGroups][4];
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
#pragma unroll
      for (int g = 0; g < kGroups; ++g) {
        ldmatrix_x4(keys[step][g], (key_at ^ (step % 4 * 2 << 4)) + step / 4 * S::KeyTile::kPanelBytes + g * 16 * 128);
      }
    }
    __syncwarp();
    if (tile + stride < tiles) gather(next_position);
    next_position = position_of(tile + 2 * stride);

    float sum[kGroups][2][2] = {};  // of 8 columns: the lane's two
#pragma unroll 1
    for (int row0 = 0; row0 < rows; row0 += 16) {
      float product[kGroups][2][4] = {};
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        uint32_t a[4];
        ldmatrix_x4(a, (row_at ^ (step % 4 * 2 << 4)) + step / 4 * S::RowTile::kPanelBytes + row0 * 128);
#pragma unroll
        for (int g = 0; g < kGroups; ++g) {
          mma_m16n8k16<T>(product[g][0], a, keys[step][g][0], keys[step][g][1]);
          mma_m16n8k16<T>(product[g][1], a, keys[step][g][2], keys[step][g][3]);
        }
      }
      const float lse[2] = {row_lse[row0 + group], row_lse[row0 + group + 8]};
      const bool used[2] = {row0 + group < rows, row0 + group + 8 < rows};
      if (row0 + 16 <= rows) {
#pragma unroll
        for (int i = 0; i < 2 * kGroups; ++i) {
          add_rows<kShare, false>(p, scale2, product[i / 2][i % 2], sum[i / 2][i % 2], lse, used);
        }
      } else {
#pragma unroll
        for (int i = 0; i < 2 * kGroups; ++i) {
          add_rows<kShare, true>(p, scale2, product[i / 2][i % 2], sum[i / 2][i % 2], lse, used);
        }
      }
    }
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      // Lanes of one member hold the same four columns: halves of the warp first keep two of them each, then one.
      const bool upper = lane_id() & 16, odd = lane_id() & 8;
      float two[2];
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const float give = upper ? sum[g][0][c] : sum[g][1][c], keep = upper ? sum[g][1][c] : sum[g][0][c];
        two[c] = keep + __shfl_xor_sync(kFullWarp, give, 16);
      }
      float one = (odd ? two[1] : two[0]) + __shfl_xor_sync(kFullWarp, odd ? two[0] : two[1], 8);
      one += __shfl_xor_sync(kFullWarp, one, 4);
      const int i = tile * S::kKeys + g * 16 + upper * 8 + member * 2 + odd;
      if (group % 2 == 0 && i < n) list.scores[i] = add ? list.scores[i] + one : one;
    }
  }
}

template <class T, int kHeadDim>
struct Scorer {
  static constexpr int kSmemBytes = Shape<T, kHeadDim>::RowTile::kBytes + kWarps * Shape<T, kHeadDim>::KeyTile::kBytes;

  __device__ static void run(const RefineParams& p, Rows rows, const Shortlist& list, int n, bool add, char* smem,
                             float* row_lse) {
    using S = Shape<T, kHeadDim>;
    const T* k = static_cast<const T*>(p.k) + rows.batch * p.k_batch + rows.kv_head * p.k_head;
    const uint32_t row_smem = smem_address(smem);
    const uint32_t key_smem = row_smem + S::RowTile::kBytes + warp_id() * S::KeyTile::kBytes;
    if (p.row_lse == nullptr) {
      load_pooled_row<T, kHeadDim>(p, rows, smem);
      score_tiles<T, kHeadDim, Share::kPooled>(p, k, list, n, 16, add, row_smem, key_smem, row_lse);
      __syncthreads();
      return;
    }
    for (int first = 0; first < rows.count; first += kRowTile) {
      const int here = min(kRowTile, rows.count - first);
      load_rows<T, kHeadDim>(p, rows, first, here, row_smem, row_lse);
      if (p.softcap > 0) {
        score_tiles<T, kHeadDim, Share::kSoftcap>(p, k, list, n, here, add || first > 0, row_smem, key_smem, row_lse);
      } else {
        score_tiles<T, kHeadDim, Share::kPlain>(p, k, list, n, here, add || first > 0, row_smem, key_smem, row_lse);
      }
      __syncthreads();
    }
  }
};

// float32, for correctness: a thread a key, eight rows at a time in shared memory.
template <int kHeadDim>
struct Scorer<float, kHeadDim> {
  static constexpr int kRows = Shape<float, kHeadDim>::kRows, kSmemBytes = Shape<float, kHeadDim>::RowTile::kBytes;

  __device__ static void run(const RefineParams& p, Rows rows, const Shortlist& list, int n, bool add, char* smem,
                             float* row_lse) {
    const float* k = static_cast<const float*>(p.k) + rows.batch * p.k_batch + rows.kv_head * p.k_head;
    float* tile = reinterpret_cast<float*>(smem);  // [kRows][kHeadDim]
    const bool pooled = p.row_lse == nullptr;
    for (int first = 0; first < (pooled ? 1 : rows.count); first += kRows) {
      const int here = pooled ? 1 : min(kRows, rows.count - first);
      for (int i = threadIdx.x; i < here * kHeadDim; i += kThreads) {
        const int row = i / kHeadDim, d = i % kHeadDim;
        if (pooled) {
          tile[i] = p.q_pooled[(static_cast<int64_t>(rows.pair) * p.query_blocks + rows.block) * kHeadDim + d];
        } else {
          tile[i] = row_used(p, rows, first + row) ? row_of<float>(p, rows, first + row)[d] : 0.0f;
        }
      }
      if (!pooled && threadIdx.x < here) row_lse[threadIdx.x] = negated_lse2(p, rows, first + threadIdx.x);
      __syncthreads();
      for (int i = blockIdx.y * kThreads + threadIdx.x; i < n; i += gridDim.y * kThreads) {
        const float* key = k + list.positions[i] * p.k_token;
        float product[kRows] = {};
        for (int d = 0; d < kHeadDim; d += 4) {
          const float4 x = load4(key + d);
#pragma unroll
          for (int r = 0; r < kRows; ++r) {
            if (r >= here) break;
            const float* u = tile + r * kHeadDim + d;
            product[r] += u[0] * x.x + u[1] * x.y + u[2] * x.z + u[3] * x.w;
          }
        }
        float sum = pooled ? product[0] : 0.0f;
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          if (pooled || r >= here || !row_used(p, rows, first + r)) continue;
          sum += share_of_row(product[r], p.scale, p.softcap, row_lse[r]);
        }
        list.scores[i] = add || first > 0 ? list.scores[i] + sum : sum;
      }
      __syncthreads();
    }
  }
};

template <class T, int kHeadDim>
__global__ void __launch_bounds__(kThreads, 2) score_kernel(RefineParams p) {
  extern __shared__ __align__(1024) char tiles[];
  __shared__ float row_lse[kRowTile];  // log2 units, negated; -inf past the rows
  const Shortlist shortlist(p);
  const List list(p);
  const int count = *shortlist.count;
  if (count <= 0 || p.refine == 1) return;  // refine 1: all of the short list is kept
  for (int g = 0; g < p.groups_per_list; ++g) {
    Rows rows = {list.batch, list.block, list.pair};
    rows.first_head = (list.s * p.groups_per_list + g) * p.group_heads;
    rows.kv_head = rows.first_head / (p.heads / p.heads_kv), rows.count = p.group_heads * p.sampled.samples;
    Scorer<T, kHeadDim>::run(p, rows, shortlist, count, g > 0, tiles, row_lse);
  }
}

// Thread blocks that share a list's keys: so many that few lists fill a GPU.
int64_t splits_of(int64_t lists) { return std::clamp<int64_t>(264 / lists, 1, 16); }

template <class T, int kHeadDim>
cudaError_t launch_score(const RefineParams& p, int64_t lists, cudaStream_t stream) {
  const auto kernel = score_kernel<T, kHeadDim>;
  constexpr int kBytes = Scorer<T, kHeadDim>::kSmemBytes;
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (error != cudaSuccess) return error;
  kernel<<<dim3(lists, splits_of(lists)), kThreads, kBytes, stream>>>(p);
  return cudaGetLastError();
}

template <class T>
cudaError_t launch_score(const RefineParams& p, int64_t head_dim, int64_t lists, cudaStream_t stream) {
  return with_head_dim(head_dim, [&](auto dim) { return launch_score<T, dim.value>(p, lists, stream); });
}

}  // namespace

cudaError_t run_refine_score(const RefineParams& p, DType dtype, int64_t head_dim, int64_t lists, cudaStream_t stream) {
  return with_dtype(dtype, [&](auto element) { return launch_score<decltype(element)>(p, head_dim, lists, stream); });
}

}  // namespace dhsa::cuda
