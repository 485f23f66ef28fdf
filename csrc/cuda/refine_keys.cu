// Stage 6, accurate: for each (batch, selection head, query block), the forced keys and the best of a short list. The
// short list is the first refine * (budget - forced) unforced keys in select_keys' order; key j of it scores the sum
// over the list's heads and their sampled rows u of
//
//   min(1, exp(logit(scale * q[u] . k[j]) - row_lse[u]))          (without row_lse: q_pooled . k[j], no softmax)
//
// and the best fill the budget, ties to the lower index. Products are exact 16-bit operands summed in float32 on the
// tensor cores (float32 inputs: plain float32). A NaN score is the last in order.
//
// Three launches for as many lists as fit the scratch, a thread block a list in each, since they want different shares
// of an SM: coarse (a radix select over chunks, then the short list's positions) and fine (a radix select over the
// short list, then runs) are chains of barriers and want many blocks, score wants registers. While scoring, warps share
// nothing but the rows: each gathers 32 keys of its own with cp.async, moves them to registers as the B operand of
// every product, and has the next 32 on their way meanwhile. At 32 rows a list a key's 2 D bytes feed 64 D operations,
// so L2 is the limit: 0.9 MB a list at 3,500 keys of 256 bytes.
#include <algorithm>

#include "cuda/device/chunk_selection.h"
#include "cuda/device/cp_async.h"
#include "cuda/device/load.h"
#include "cuda/device/logit.h"
#include "cuda/device/mma.h"
#include "cuda/device/sampled_rows.h"
#include "cuda/device/smem_tile.h"
#include "cuda/dispatch.h"
#include "cuda/launch.h"
#include "cuda/router.h"

namespace dhsa::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kRowTile = 64;   // rows in shared memory; lists of more gather their keys once for each 64
constexpr int kPoolParts = 3;  // a pooled query is the sum of three 16-bit rows, 24 bits together

struct Params {
  const void *q, *k;
  int64_t q_batch, q_head, q_token, k_batch, k_head, k_token;
  const float* scores;    // the slab's: [pairs, blocks, C]
  const float* row_lse;   // [B, H, nQ, samples], or null
  const float* q_pooled;  // [B, S, nQ, D], where row_lse is null
  const int *offsets, *num_chunks;
  int *runs, *num_runs;  // [B, S, nQ, R, 2], [B, S, nQ]
  char* scratch;         // one Shortlist for each list of the launch
  int64_t scratch_bytes;
  KeyRules rules;
  SampledRows sampled;
  int refine, capacity, run_capacity, query_blocks, selection_heads, heads, heads_kv;
  int group_heads;      // query heads that share a list and a KV head
  int groups_per_list;  // KV heads that a list's heads read
  int limit;            // the longest short list
  int first_pair, first_block, blocks;
  int first_list;  // of the slab
  float scale, softcap;
};

struct Shortlist {
  int* positions;            // [limit], rising
  float* scores;             // [limit]
  uint32_t *kept, *follows;  // [limit / 32 + 1]: is kept; the next entry's key is this one's neighbour
  int* count;                // entries; -1: the block keeps every candidate, and its runs are written

  static int64_t words(int64_t limit) { return limit / 32 + 1; }
  static int64_t bytes(int64_t limit) { return ceil_div(8 * (limit + words(limit)) + 4, 256) * 256; }
  __device__ explicit Shortlist(const Params& p)
      : positions(reinterpret_cast<int*>(p.scratch + blockIdx.x * p.scratch_bytes)),
        scores(reinterpret_cast<float*>(positions + p.limit)),
        kept(reinterpret_cast<uint32_t*>(scores + p.limit)),
        follows(kept + p.limit / 32 + 1),
        count(reinterpret_cast<int*>(follows + p.limit / 32 + 1)) {}
};

// The list that a thread block works on.
struct List {
  int item;  // of the slab
  int pair, block, batch, s;
  int64_t row;

  __device__ explicit List(const Params& p)
      : item(p.first_list + static_cast<int>(blockIdx.x)),
        pair(p.first_pair + item / p.blocks),
        block(p.first_block + item % p.blocks),
        batch(pair / p.selection_heads),
        s(pair % p.selection_heads),
        row(static_cast<int64_t>(pair) * p.query_blocks + block) {}
};

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

struct Shared {
  SelectionShared<kThreads> selection;
  int bounds[2];
};

// --- Coarse: the short list ------------------------------------------------------------------------------------------

// Writes the positions of the first `want` free keys in order of their chunks' scores; returns how many there are.
__device__ int coarse_list(const Candidates& keys, int want, const Chunks& chunks, const float* scores, Shared& shared,
                           const Shortlist& list) {
  const int free_keys = keys.free_end - keys.free_begin;
  if (want >= free_keys) {
    for (int i = threadIdx.x; i < free_keys; i += kThreads) list.positions[i] = keys.free_begin + i;
    __syncthreads();
    return free_keys;
  }
  if (warp_id() < 2) {
    const int bound = chunks.first_bound_at_or_after(warp_id() == 0 ? keys.free_begin + 1 : keys.free_end);
    if (lane_id() == 0) shared.bounds[warp_id()] = bound;
  }
  __syncthreads();
  const int first = max(shared.bounds[0] - 1, 0), last = min(shared.bounds[1], chunks.count);
  Candidates short_keys = keys;
  short_keys.want = want;
  ChunkSelection<kThreads> selection = {short_keys, chunks, scores, shared.selection};
  selection.choose(first, last);
  int ties_used = 0, count = 0;
  for (int tile = first; tile < last; tile += kChunkWords * 32) {
    selection.vote(tile, last);
    const ChunkWord word = selection.decide(tile, ties_used);
    const int word_first = tile + static_cast<int>(threadIdx.x) * 32;
    const auto taken = [&](int bit) {
      return word.divided >> bit & 1 ? word.take : selection.free_tokens(word_first + bit);
    };
    int tokens = 0, total;
    for (uint32_t bits = word.kept; bits != 0; bits &= bits - 1) tokens += taken(__ffs(bits) - 1);
    int at = count + shared.selection.select.scan.exclusive_sum(tokens, &total);
    count += total;
    if (__any_sync(kFullWarp, __popc(word.kept) > 6)) {  // crowded words: a lane a chunk, one word after the other
      for (unsigned left = __ballot_sync(kFullWarp, word.kept != 0); left != 0; left &= left - 1) {
        const int from = __ffs(left) - 1, chunk = __shfl_sync(kFullWarp, word_first, from) + lane_id();
        const uint32_t kept = __shfl_sync(kFullWarp, word.kept, from), cut = __shfl_sync(kFullWarp, word.divided, from);
        const int take = __shfl_sync(kFullWarp, word.take, from), first_at = __shfl_sync(kFullWarp, at, from);
        int n = 0;
        if (kept >> lane_id() & 1) n = cut >> lane_id() & 1 ? take : selection.free_tokens(chunk);
        const int end = first_at + warp_inclusive_sum(n);
        const int shift = n > 0 ? selection.free_begin(chunk) - (end - n) : 0;
        for (int i = end - n; i < min(end, want); ++i) list.positions[i] = i + shift;
      }
    } else {
      for (uint32_t bits = word.kept; bits != 0; bits &= bits - 1) {
        const int bit = __ffs(bits) - 1, begin = selection.free_begin(word_first + bit);
        const int end = at + taken(bit), shift = begin - at;
        for (; at < end; ++at) {
          if (at < want) list.positions[at] = at + shift;
        }
      }
    }
    __syncthreads();
  }
  return min(count, want);
}

// --- Score -----------------------------------------------------------------------------------------------------------

// min(1, exp(logit - row_lse)), and NaN where the logit is; lse: row_lse negated, in log2 units.
__device__ inline float share_of_row(float product, float scale, float softcap, float lse) {
  return exp2_approx(min_or_nan(logit2(product, scale, softcap) + lse, 0.0f));
}

struct Rows {  // of one KV head's group of query heads
  int batch, block, pair, first_head, kv_head, count;
};

template <class T>
__device__ const T* row_of(const Params& p, const Rows& rows, int u) {
  const int query = max(p.sampled.query(rows.block, u % p.sampled.samples), 0);
  return static_cast<const T*>(p.q) + rows.batch * p.q_batch + (rows.first_head + u / p.sampled.samples) * p.q_head +
         query * p.q_token;
}

__device__ inline bool row_used(const Params& p, const Rows& rows, int u) {
  return u < rows.count && p.sampled.used(rows.block, u % p.sampled.samples);
}

__device__ inline float negated_lse2(const Params& p, const Rows& rows, int u) {
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
__device__ void load_rows(const Params& p, const Rows& rows, int first, int n, uint32_t row_smem, float* row_lse) {
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
__device__ void load_pooled_row(const Params& p, const Rows& rows, char* row_tile) {
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
__device__ inline void add_rows(const Params& p, float scale2, const float (&product)[4], float (&sum)[2],
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
__device__ void score_tiles(const Params& p, const T* k, const Shortlist& list, int n, int rows, bool add,
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

  __device__ static void run(const Params& p, Rows rows, const Shortlist& list, int n, bool add, char* smem,
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

  __device__ static void run(const Params& p, Rows rows, const Shortlist& list, int n, bool add, char* smem,
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

// --- Fine: the kept keys as runs -------------------------------------------------------------------------------------

// Marks the best `want` of the list's n keys, ties to the lower index, and which entries are neighbours of the next.
__device__ void mark_kept(const Shortlist& list, int n, int want, Shared& shared) {
  Cutoff cutoff = {0, n};
  if (want < n) {
    cutoff = shared.selection.select.select(
        0, n, want, [&](int i) { return order_key(list.scores[i]); }, [](int) { return 1; });
  }
  const int words = (n + 31) / 32;
  int ties_used = 0;
  for (int tile = 0; tile < words; tile += kThreads) {
    for (int w = warp_id(); w < kThreads && tile + w < words; w += kWarps) {
      const int i = (tile + w) * 32 + lane_id();
      const uint32_t key = i < n ? (want < n ? order_key(list.scores[i]) : 1) : 0;
      const bool next = i + 1 < n && list.positions[i] + 1 == list.positions[i + 1];
      const uint32_t above = __ballot_sync(kFullWarp, i < n && key > cutoff.key);
      const uint32_t equal = __ballot_sync(kFullWarp, i < n && key == cutoff.key);
      const uint32_t follows = __ballot_sync(kFullWarp, next);
      if (lane_id() == 0) {
        shared.selection.above[w] = above, shared.selection.equal[w] = equal;
        list.follows[tile + w] = follows;
      }
    }
    __syncthreads();
    const int word = tile + static_cast<int>(threadIdx.x);
    uint32_t equal = word < words ? shared.selection.equal[threadIdx.x] : 0;
    uint32_t kept = word < words ? shared.selection.above[threadIdx.x] : 0;
    int total;
    int used = ties_used + shared.selection.select.scan.exclusive_sum(__popc(equal), &total);
    ties_used += total;
    for (; equal != 0 && used < cutoff.rest; equal &= equal - 1, ++used) kept |= equal & (0u - equal);
    if (word < words) list.kept[word] = kept;
    __syncthreads();
  }
}

// Writes the runs of the marked keys and of the forced ones around them; returns the number of runs.
__device__ int write_runs(const Candidates& keys, const Shortlist& list, int n, int* runs, int capacity,
                          Shared& shared) {
  const int words = (n + 31) / 32;
  const bool prefix = keys.begin < keys.free_begin, suffix = keys.free_end < keys.end;
  const bool any = n > 0;
  const bool joins_prefix = prefix && any && list.positions[0] == keys.free_begin && (list.kept[0] & 1) != 0;
  const bool joins_suffix =
      suffix && any && list.positions[n - 1] + 1 == keys.free_end && (list.kept[(n - 1) / 32] >> (n - 1) % 32 & 1) != 0;
  const auto put = [&](int run, int side, int position) {
    if (run < capacity) runs[2 * run + side] = position;
  };
  int count = prefix;
  for (int tile = 0; tile < words; tile += kThreads) {
    const int word = tile + static_cast<int>(threadIdx.x);
    uint32_t starts = 0, ends = 0;
    if (word < words) {
      const uint32_t kept = list.kept[word], follows = list.follows[word];
      const uint32_t linked = kept & follows;  // kept, and the next key is its neighbour
      const bool before = word > 0 ? (list.kept[word - 1] & list.follows[word - 1]) >> 31 : joins_prefix;
      const uint32_t after = word + 1 < words ? list.kept[word + 1] & 1 : 0;
      starts = kept & ~(linked << 1 | static_cast<uint32_t>(before));
      ends = kept & ~(follows & (kept >> 1 | after << 31));
    }
    int total;
    const int base = count + shared.selection.select.scan.exclusive_sum(__popc(starts), &total);
    count += total;
    for (uint32_t bits = starts; bits != 0; bits &= bits - 1) {
      const int bit = __ffs(bits) - 1;
      put(base + __popc(starts & ((1u << bit) - 1)), 0, list.positions[word * 32 + bit]);
    }
    for (uint32_t bits = ends; bits != 0; bits &= bits - 1) {
      const int bit = __ffs(bits) - 1;
      put(base + __popc(starts & (2u << bit) - 1) - 1, 1, list.positions[word * 32 + bit] + 1);
    }
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    if (prefix) put(0, 0, keys.begin);
    if (prefix && !joins_prefix) put(0, 1, keys.free_begin);
    if (suffix && joins_suffix) put(count - 1, 1, keys.end);
    if (suffix && !joins_suffix) put(count, 0, keys.free_end), put(count, 1, keys.end);
  }
  return min(count + (suffix && !joins_suffix), capacity);
}

// --- The kernels -----------------------------------------------------------------------------------------------------

__device__ void finish_list(const Params& p, const List& list, int count) {
  int* runs = p.runs + list.row * p.run_capacity * 2;
  if (threadIdx.x == 0) p.num_runs[list.row] = count;
  for (int i = 2 * count + threadIdx.x; i < 2 * p.run_capacity; i += kThreads) runs[i] = 0;
}

__global__ void __launch_bounds__(kThreads, 4) coarse_kernel(Params p) {
  __shared__ Shared shared;
  const Shortlist shortlist(p);
  const List list(p);
  const Chunks chunks(p.offsets, p.num_chunks, list.batch, p.capacity, p.rules.seqlen_k);
  const Candidates keys(p.rules, list.block, chunks.begin(chunks.count));
  if (keys.all_kept()) {
    int* runs = p.runs + list.row * p.run_capacity * 2;
    const int count = keys.begin < keys.end;
    if (threadIdx.x == 0) *shortlist.count = -1;
    if (count > 0 && threadIdx.x == 0) runs[0] = keys.begin, runs[1] = keys.end;
    return finish_list(p, list, count);
  }
  const int want = static_cast<int>(min(static_cast<int64_t>(p.refine) * keys.want, static_cast<int64_t>(p.limit)));
  const float* scores = p.scores + static_cast<int64_t>(list.item) * p.capacity;
  const int count = coarse_list(keys, want, chunks, scores, shared, shortlist);
  if (threadIdx.x == 0) *shortlist.count = count;
}

template <class T, int kHeadDim>
__global__ void __launch_bounds__(kThreads, 2) score_kernel(Params p) {
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

__global__ void __launch_bounds__(kThreads, 4) fine_kernel(Params p) {
  __shared__ Shared shared;
  const Shortlist shortlist(p);
  const List list(p);
  const int n = *shortlist.count;
  if (n < 0) return;
  const Chunks chunks(p.offsets, p.num_chunks, list.batch, p.capacity, p.rules.seqlen_k);
  const Candidates keys(p.rules, list.block, chunks.begin(chunks.count));
  mark_kept(shortlist, n, keys.want, shared);
  int* runs = p.runs + list.row * p.run_capacity * 2;
  finish_list(p, list, write_runs(keys, shortlist, n, runs, p.run_capacity, shared));
}

// --- Launch ----------------------------------------------------------------------------------------------------------

constexpr int64_t kScratchBytes = 64 << 20;

int64_t short_list_limit(const RefineKeys& x) {
  const int64_t seqlen_k = x.k.shape[2];
  return std::max<int64_t>(1, x.choice.budget >= seqlen_k / x.refine ? seqlen_k : x.choice.budget * x.refine);
}

// Lists of a launch.
int64_t lists_at_once(const RefineKeys& x, int64_t lists) {
  return std::min(lists, std::max<int64_t>(kScratchBytes / Shortlist::bytes(short_list_limit(x)), 128));
}

// Thread blocks that share a list's keys: so many that few lists fill a GPU.
int64_t splits_of(int64_t lists) { return std::clamp<int64_t>(264 / lists, 1, 16); }

template <class T, int kHeadDim>
cudaError_t launch_score(const Params& p, int64_t lists, cudaStream_t stream) {
  const auto kernel = score_kernel<T, kHeadDim>;
  constexpr int kBytes = Scorer<T, kHeadDim>::kSmemBytes;
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (error != cudaSuccess) return error;
  kernel<<<dim3(lists, splits_of(lists)), kThreads, kBytes, stream>>>(p);
  return cudaGetLastError();
}

template <class T>
cudaError_t launch_score(const Params& p, int64_t head_dim, int64_t lists, cudaStream_t stream) {
  switch (head_dim) {
    case 64:
      return launch_score<T, 64>(p, lists, stream);
    case 96:
      return launch_score<T, 96>(p, lists, stream);
    case 128:
      return launch_score<T, 128>(p, lists, stream);
    case 256:
      return launch_score<T, 256>(p, lists, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

struct Workspace {
  QueryPool pool;
  char* scratch;
  int64_t bytes;
};

Workspace layout(const RefineKeys& x, void* memory) {
  Arena arena(memory);
  Workspace w = {};
  const int64_t batch = x.q.shape[0], lists = x.chunk_scores.shape[1], blocks = x.chunk_scores.shape[2];
  if (!x.row_lse.given()) {
    w.pool.q = x.q, w.pool.heads = lists, w.pool.q_block = x.q_block, w.pool.scale = PoolScale::kSqrt;
    w.pool.pooled = contiguous(arena.take<float>(batch * lists * blocks * x.q.shape[3]), DType::kFloat32, batch, lists,
                               blocks, x.q.shape[3]);
  }
  w.scratch = arena.take<char>(refine_scratch_bytes(x, batch * lists * blocks));
  w.bytes = arena.used();
  return w;
}

}  // namespace

int64_t refine_scratch_bytes(const RefineKeys& x, int64_t lists) {
  return lists_at_once(x, lists) * Shortlist::bytes(short_list_limit(x));
}

cudaError_t run_refine_keys(const RefineKeys& x, const float* q_pooled, void* scratch, const Slab& slab,
                            cudaStream_t stream) {
  const auto clamp = [](int64_t n) { return static_cast<int>(std::min<int64_t>(n, INT32_MAX / 2)); };
  const int64_t heads = x.q.shape[1], heads_kv = x.k.shape[1], selection_heads = x.runs.shape[1];
  Params p = {};
  p.q = x.q.data, p.k = x.k.data;
  p.q_batch = x.q.stride[0], p.q_head = x.q.stride[1], p.q_token = x.q.stride[2];
  p.k_batch = x.k.stride[0], p.k_head = x.k.stride[1], p.k_token = x.k.stride[2];
  p.scores = x.chunk_scores.as<float>(), p.row_lse = x.row_lse.given() ? x.row_lse.as<float>() : nullptr;
  p.q_pooled = q_pooled;
  p.offsets = x.offsets.as<int>(), p.num_chunks = x.num_chunks.as<int>();
  p.runs = x.runs.as<int>(), p.num_runs = x.num_runs.as<int>();
  p.scratch = static_cast<char*>(scratch), p.scratch_bytes = Shortlist::bytes(short_list_limit(x));
  p.rules = {clamp(x.q.shape[2]),  clamp(x.k.shape[2]),   clamp(x.q_block),       clamp(x.choice.budget),
             clamp(x.choice.sink), clamp(x.choice.local), clamp(x.choice.window), clamp(x.choice.dense_tail)};
  p.sampled = {p.rules.seqlen_q, p.rules.q_block, clamp(x.q_stride), clamp(ceil_div(x.q_block, x.q_stride))};
  p.refine = clamp(x.refine), p.capacity = clamp(x.chunk_scores.shape[3]), p.run_capacity = clamp(x.runs.shape[3]);
  p.query_blocks = clamp(x.runs.shape[2]), p.selection_heads = clamp(selection_heads);
  p.heads = clamp(heads), p.heads_kv = clamp(heads_kv);
  p.groups_per_list = clamp(std::max<int64_t>(heads_kv / selection_heads, 1));
  p.group_heads = clamp(heads / std::max(heads_kv, selection_heads));
  p.limit = clamp(short_list_limit(x));
  p.first_pair = clamp(slab.first_pair), p.first_block = clamp(slab.first_block), p.blocks = clamp(slab.blocks);
  p.scale = x.softmax.scale, p.softcap = x.softmax.softcap;
  const int64_t lists = slab.pairs * slab.blocks, step = std::max<int64_t>(lists_at_once(x, lists), 1);
  cudaError_t error = cudaSuccess;
  for (int64_t first = 0; first < lists && error == cudaSuccess; first += step) {
    const int64_t here = std::min(step, lists - first);
    p.first_list = clamp(first);
    coarse_kernel<<<here, kThreads, 0, stream>>>(p);
    error = with_dtype(x.q.dtype,
                       [&](auto element) { return launch_score<decltype(element)>(p, x.q.shape[3], here, stream); });
    fine_kernel<<<here, kThreads, 0, stream>>>(p);
    if (error == cudaSuccess) error = cudaGetLastError();
  }
  return error;
}

int64_t workspace_bytes(const RefineKeys& x) { return layout(x, nullptr).bytes; }

cudaError_t run(const RefineKeys& x, void* workspace, cudaStream_t stream) {
  const Slab all = {0, x.runs.shape[0] * x.runs.shape[1], 0, x.runs.shape[2]};
  if (all.pairs * all.blocks == 0) return cudaSuccess;
  const Workspace w = layout(x, workspace);
  if (!x.row_lse.given()) {
    const cudaError_t error = run(w.pool, nullptr, stream);
    if (error != cudaSuccess) return error;
  }
  return run_refine_keys(x, w.pool.pooled.as<float>(), w.scratch, all, stream);
}

}  // namespace dhsa::cuda
