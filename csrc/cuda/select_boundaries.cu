// Stage 2: greedy non-maximum suppression of scores [B, Lk] into offsets [B, C + 1] and num_chunks [B], bit for bit
// what the sequential definition gives. Two kernels, no host loop:
//
//   suppress_kernel     which tokens survive full NMS, as one status word pair (accepted, dropped) per 32 tokens
//   choose_cuts_kernel  the best `quota - 1` survivors of each segment, written as rising offsets
//
// Greedy with a cap equals full NMS, then the best: a token's fate depends only on better tokens within nms_radius. So
// every warp watches its own tokens: dropped once a better neighbour is accepted, accepted once all are dropped. Fates
// never change, so warps need no barrier: stale words only delay them. Random scores settle in a few sweeps. Constant
// or ramp scores form one chain along the whole row; it runs through registers inside a word, shared memory inside a
// tile and L2 between tiles, about 60 cycles a cut, 14,563 cuts at 128K. docs/router_cuda.md has the argument.
#include <algorithm>

#include "cuda/device/order.h"
#include "cuda/device/radix_select.h"
#include "cuda/device/scan.h"
#include "cuda/dispatch.h"
#include "cuda/launch.h"

namespace dhsa::cuda {
namespace {

// The fate of 32 tokens. Written as one 64-bit word, so a reader always sees a consistent pair.
struct __align__(8) Status {
  uint32_t accepted, dropped;
};

struct Params {
  const float* scores;  // [B, Lk]
  Status* status;       // [B, words]
  uint2* survivors;     // [B, Lk] (order key, token), each segment's from its first token's index on
  int *offsets, *num_chunks;
  int batch, seqlen_k, words, capacity, max_chunks, radius, segment;
  float threshold;
  int tiles_per_row;
};

__device__ inline Status load_status(const Status* p) {
  Status s;
  asm volatile("ld.volatile.v2.u32 {%0, %1}, [%2];" : "=r"(s.accepted), "=r"(s.dropped) : "l"(p) : "memory");
  return s;
}

__device__ inline void store_status(Status* p, Status s) {
  asm volatile("st.volatile.v2.u32 [%0], {%1, %2};" ::"l"(p), "r"(s.accepted), "r"(s.dropped) : "memory");
}

// Whether a token may become a cut at all: a score above the threshold, more than nms_radius from every forced cut.
__device__ inline bool is_candidate(const Params& p, int token, float score) {
  if (token >= p.seqlen_k || isnan(score) || score == -INFINITY || score <= p.threshold) return false;
  const int after = p.segment > 0 ? token % p.segment : token;
  const int before = min(p.segment > 0 ? p.segment - after : INT_MAX, p.seqlen_k - token);
  return after > p.radius && before > p.radius;
}

// --- Full NMS, nms_radius <= 255 -------------------------------------------------------------------------------------

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kMaskRadius = 255;  // beyond it, one block a segment takes the best token again and again

// kReach words on either side hold every neighbour of a word's tokens; a warp owns kWarpWords words of the tile. A
// larger reach takes a smaller tile, so that its masks of better neighbours fit static shared memory. Eight words a
// warp spare a long chain handoffs, but ordinary scores then wait for one warp's 256 tokens.
template <int kReach>
struct Tile {
  static constexpr int kWarpWords = kReach <= 2 ? 4 : 2;
  static constexpr int kWords = kWarpWords * kWarps, kTokens = kWords * 32, kMaskWords = 2 * kReach + 1;
  Status status[kReach + kWords + kReach];  // with the neighbouring tiles' nearest words
  uint32_t better[kTokens][kMaskWords];     // better[i]: i's neighbours that come before it; odd stride, no conflicts
  uint32_t key[kTokens + 2 * kReach * 32];
};

// One visit of a tile: the words it owns, from what they and their neighbours hold, until every token's fate is known
// or, when the block has other tiles to serve, until nothing moves.
template <int kReach>
struct TileVisit {
  using Shape = Tile<kReach>;
  Shape& tile;
  const Params& p;
  Status* row_status;
  int first_word;

  __device__ Status* outside(int word) const { return row_status + first_word + word; }
  __device__ bool in_row(int word) const { return first_word + word >= 0 && first_word + word < p.words; }
  __device__ Status& inside(int word) { return tile.status[word + kReach]; }

  __device__ void load(const float* scores) {
    const int first_token = (first_word - kReach) * 32;
    for (int i = threadIdx.x; i < Shape::kTokens + 2 * kReach * 32; i += kThreads) {
      const int token = first_token + i;
      tile.key[i] = token >= 0 && token < p.seqlen_k ? order_key(__ldg(scores + token)) : 0;
    }
    for (int w = static_cast<int>(threadIdx.x) - kReach; w < Shape::kWords + kReach; w += kThreads) {
      inside(w) = in_row(w) ? load_status(outside(w)) : Status{0, ~0u};
    }
    __syncthreads();
    for (int w = warp_id(); w < Shape::kWords; w += kWarps) {
      const int i = w * 32 + lane_id(), token = first_word * 32 + i;
      const uint32_t* key = tile.key + kReach * 32;
      const uint32_t mine = key[i];
#pragma unroll
      for (int m = 0; m < Shape::kMaskWords; ++m) {
        const int base = (w + m - kReach) * 32;
        uint32_t mask = 0;
        for (int j = max(base, i - p.radius); j <= min(base + 31, i + p.radius); ++j) {
          const bool comes_before = key[j] > mine || (key[j] == mine && j < i);
          mask |= static_cast<uint32_t>(comes_before) << (j - base);
        }
        tile.better[i][m] = mask;
      }
      const bool candidate = token < p.seqlen_k && is_candidate(p, token, __ldg(scores + token));
      const uint32_t out = __ballot_sync(kFullWarp, !candidate);
      if (lane_id() == 0) inside(w).dropped |= out;
    }
    __syncthreads();
  }

  // Decides what can be decided in one word; true if anything was. A lane is a token. Two votes a cut: who is accepted,
  // who falls with it.
  __device__ bool advance_word(int word) {
    __syncwarp();  // lane 0 wrote this word's last state
    Status own = load_status(&inside(word));
    if ((own.accepted | own.dropped) == ~0u) return false;
    const uint32_t* better = tile.better[word * 32 + lane_id()];
    const uint32_t near = better[kReach];
    bool waiting = false, loses = (near & own.accepted) != 0;
#pragma unroll
    for (int m = 0; m < Shape::kMaskWords; ++m) {
      if (m == kReach) continue;
      const Status other = load_status(&inside(word + m - kReach));
      loses |= (better[m] & other.accepted) != 0;
      waiting |= (better[m] & ~(other.accepted | other.dropped)) != 0;
    }
    bool open = !((own.accepted | own.dropped) >> lane_id() & 1);
    uint32_t lost = __ballot_sync(kFullWarp, open && loses);
    own.dropped |= lost, open &= !loses;
    bool changed = lost != 0;
    // From here on an open token has no accepted better neighbour: the vote that accepted one dropped it.
    uint32_t pending = near & ~own.dropped;
    for (;;) {
      const bool wins = open && !waiting && pending == 0;
      const uint32_t won = __ballot_sync(kFullWarp, wins);
      if (won == 0) break;
      const bool falls = open && (near & won) != 0;
      lost = __ballot_sync(kFullWarp, falls);
      own.accepted |= won, own.dropped |= lost;
      pending &= ~lost;
      open = open && !wins && !falls;
      changed = true;
    }
    if (changed && lane_id() == 0) store_status(&inside(word), own), store_status(outside(word), own);
    return changed;
  }

  // A warp whose words reach beyond the tile fetches what the neighbouring tiles have decided since. Two warps may
  // fetch the same word; the older copy, if it comes last, is only older.
  __device__ void refresh_edges(int first) {
    const int left = -1 - lane_id(), right = Shape::kWords + lane_id();
    if (left >= first - kReach && in_row(left)) store_status(&inside(left), load_status(outside(left)));
    if (right < first + Shape::kWarpWords + kReach && in_row(right)) {
      store_status(&inside(right), load_status(outside(right)));
    }
  }

  __device__ bool settled(int first, int words) {
    bool open = false;
    for (int w = lane_id(); w < words; w += 32) {
      const Status s = load_status(&inside(first + w));
      open |= (s.accepted | s.dropped) != ~0u;
    }
    return __ballot_sync(kFullWarp, open) == 0;
  }

  // True if the whole tile is settled. A chain may run either way, so sweeps alternate; once nothing moves, news can
  // only come in at the ends of the warp's words.
  __device__ bool run(bool alone) {
    constexpr int kIdlePolls = 64;  // before a shared block turns to its next tile
    constexpr int kEnd = kReach < Shape::kWarpWords ? kReach : Shape::kWarpWords;
    const int first = warp_id() * Shape::kWarpWords, last = first + Shape::kWarpWords - 1;
    for (int w = lane_id(); w < Shape::kWarpWords; w += 32) {
      if (in_row(first + w)) store_status(outside(first + w), load_status(&inside(first + w)));
    }
    bool moved = true;
    for (int idle = 0; alone || idle < kIdlePolls; idle = moved ? 0 : idle + 1) {
      bool done = false;
      while (moved && !done) {
        moved = false;
        for (int w = first; w <= last; ++w) moved |= advance_word(w);
        for (int w = last; w >= first; --w) moved |= advance_word(w);
        __syncwarp();
        done = settled(first, Shape::kWarpWords);
      }
      if (done) break;
      refresh_edges(first);
      __syncwarp();
      moved = false;
      for (int w = 0; w < kEnd; ++w) moved |= advance_word(first + w) | advance_word(last - w);
    }
    __syncwarp();
    return __syncthreads_and(settled(first, Shape::kWarpWords));
  }
};

// Launched cooperatively: blocks wait for each other, so all must be resident. status starts as zeros.
template <int kReach>
__global__ void __launch_bounds__(kThreads) suppress_kernel(Params p) {
  __shared__ Tile<kReach> tile;
  const int tiles = p.batch * p.tiles_per_row;
  const bool alone = tiles <= static_cast<int>(gridDim.x);
  for (bool all_settled = false; !all_settled;) {
    all_settled = true;
    for (int t = blockIdx.x; t < tiles; t += gridDim.x) {
      const int row = t / p.tiles_per_row;
      TileVisit<kReach> visit = {tile, p, p.status + static_cast<int64_t>(row) * p.words,
                                 t % p.tiles_per_row * Tile<kReach>::kWords};
      visit.load(p.scores + static_cast<int64_t>(row) * p.seqlen_k);
      all_settled &= visit.run(alone);
    }
  }
}

// --- Full NMS, any larger radius: at most Lk / (radius + 1) cuts, found one after the other --------------------------

constexpr int kWideThreads = 1024;

// One block a segment of a row. status starts as zeros; only `accepted` is written.
__global__ void __launch_bounds__(kWideThreads) suppress_wide_kernel(Params p) {
  __shared__ unsigned long long best;
  const int segment = p.segment > 0 ? p.segment : p.seqlen_k;
  const int first = blockIdx.x * segment, last = min(first + segment, p.seqlen_k);
  const float* scores = p.scores + static_cast<int64_t>(blockIdx.y) * p.seqlen_k;
  Status* status = p.status + static_cast<int64_t>(blockIdx.y) * p.words;
  // A token within the radius of an accepted one is marked by a bit in `dropped`.
  for (;;) {
    if (threadIdx.x == 0) best = 0;
    __syncthreads();
    unsigned long long mine = 0;
    for (int t = first + threadIdx.x; t < last; t += kWideThreads) {
      const float score = __ldg(scores + t);
      if (!is_candidate(p, t, score) || load_status(status + t / 32).dropped >> (t % 32) & 1) continue;
      const unsigned long long key =
          static_cast<unsigned long long>(order_key(score)) << 32 | ~static_cast<uint32_t>(t);
      mine = max(mine, key);
    }
    if (mine != 0) atomicMax(&best, mine);
    __syncthreads();
    if (best == 0) return;
    const int cut = static_cast<int>(~static_cast<uint32_t>(best));
    if (threadIdx.x == 0) atomicOr(&status[cut / 32].accepted, 1u << (cut % 32));
    const int low = max(first, cut - p.radius), high = min(last - 1, cut + p.radius);
    for (int t = low + threadIdx.x; t <= high; t += kWideThreads) atomicOr(&status[t / 32].dropped, 1u << (t % 32));
    __threadfence();
    __syncthreads();
  }
}

// --- The best of the survivors ---------------------------------------------------------------------------------------

constexpr int kCutThreads = 1024;

// The accepted bits of word `word` that lie in tokens [first, last).
__device__ inline uint32_t accepted_in(const Status* status, int word, int first, int last) {
  uint32_t bits = status[word].accepted;
  const int base = word * 32;
  if (first > base) bits &= ~0u << (first - base);
  if (last < base + 32) bits &= ~(~0u << (last - base));
  return bits;
}

// The chunks of all segments before `segment_index`; every thread calls.
__device__ int chunks_before(const Params& p, const Status* status, int segment_index, int* scratch) {
  if (threadIdx.x == 0) *scratch = 0;
  __syncthreads();
  for (int s = warp_id(); s < segment_index; s += kCutThreads / 32) {
    const int first = s * p.segment, last = first + p.segment;
    int cuts = 0;
    for (int w = first / 32 + lane_id(); w <= (last - 1) / 32; w += 32) {
      cuts += __popc(accepted_in(status, w, first, last));
    }
    cuts = __shfl_sync(kFullWarp, warp_inclusive_sum(cuts), 31);
    if (lane_id() == 0) atomicAdd(scratch, min(p.max_chunks, cuts + 1));
  }
  __syncthreads();
  return *scratch;
}

// One block a segment of a row.
__global__ void __launch_bounds__(kCutThreads) choose_cuts_kernel(Params p) {
  __shared__ RadixSelect<kCutThreads> select;
  __shared__ int scratch;
  BlockScan<kCutThreads>& scan = select.scan;
  const Status* status = p.status + static_cast<int64_t>(blockIdx.y) * p.words;
  int* offsets = p.offsets + static_cast<int64_t>(blockIdx.y) * (p.capacity + 1);
  const int segment = p.segment > 0 ? p.segment : p.seqlen_k;
  const int first = blockIdx.x * segment, last = min(first + segment, p.seqlen_k);
  const bool last_segment = blockIdx.x == gridDim.x - 1;
  const int quota = p.segment > 0 && last - first < segment
                        ? max(1, static_cast<int>(static_cast<int64_t>(p.max_chunks) * (last - first) / segment))
                        : p.max_chunks;
  const int base = chunks_before(p, status, blockIdx.x, &scratch);

  // The survivors, in order of position: each thread takes neighbouring words.
  uint2* survivors = p.survivors + static_cast<int64_t>(blockIdx.y) * p.seqlen_k + first;
  const float* scores = p.scores + static_cast<int64_t>(blockIdx.y) * p.seqlen_k;
  const int first_word = first / 32, words = last > first ? (last - 1) / 32 + 1 - first_word : 0;
  const int share = (words + kCutThreads - 1) / kCutThreads;
  const int my_first = first_word + min(static_cast<int>(threadIdx.x) * share, words);
  const int my_last = min(my_first + share, first_word + words);
  int mine = 0, count;
  for (int w = my_first; w < my_last; ++w) mine += __popc(accepted_in(status, w, first, last));
  int rank = scan.exclusive_sum(mine, &count);
  for (int w = my_first; w < my_last; ++w) {
    for (uint32_t bits = accepted_in(status, w, first, last); bits != 0; bits &= bits - 1) {
      const int token = w * 32 + __ffs(bits) - 1;
      survivors[rank++] = make_uint2(order_key(__ldg(scores + token)), token);
    }
  }
  __syncthreads();

  const int cuts = min(count, quota - 1);
  Cutoff cutoff = {0, 0};  // everything is above key 0
  if (cuts == 0) cutoff = {kNoKey, 0};
  if (0 < cuts && cuts < count) {
    cutoff = select.select(0, count, cuts, [&](int i) { return survivors[i].x; }, [](int) { return 1; });
  }

  int above = 0, equal = 0;  // before this tile
  for (int tile = 0; tile < count; tile += kCutThreads) {
    const int i = tile + threadIdx.x;
    const uint2 item = i < count ? survivors[i] : make_uint2(0, 0);
    const bool is_above = i < count && item.x > cutoff.key, is_equal = i < count && item.x == cutoff.key;
    int total;
    const int before = scan.exclusive_sum(is_above << 16 | static_cast<int>(is_equal), &total);
    const int above_before = above + (before >> 16), equal_before = equal + (before & 0xffff);
    if (is_above || (is_equal && equal_before < cutoff.rest)) {
      offsets[base + 1 + above_before + min(equal_before, cutoff.rest)] = item.y;
    }
    above += total >> 16, equal += total & 0xffff;
  }

  const int chunks = last > first ? base + 1 + cuts : base;
  if (threadIdx.x == 0) {
    if (last > first) offsets[base] = first;
    if (last_segment) p.num_chunks[blockIdx.y] = chunks;
  }
  if (last_segment) {
    for (int c = chunks + threadIdx.x; c <= p.capacity; c += kCutThreads) offsets[c] = p.seqlen_k;
  }
}

// --- Launch ----------------------------------------------------------------------------------------------------------

struct Layout {
  Status* status;
  uint2* survivors;
  int64_t words, bytes;
};

Layout lay_out(const SelectBoundaries& x, void* workspace) {
  const int64_t batch = x.scores.shape[0], seqlen_k = x.scores.shape[1];
  Arena arena(workspace);
  Layout layout;
  layout.words = ceil_div(seqlen_k, 32);
  layout.status = arena.take<Status>(batch * layout.words);
  layout.survivors = arena.take<uint2>(batch * seqlen_k);
  layout.bytes = arena.used();
  return layout;
}

template <int kReach>
cudaError_t launch_suppress(Params p, cudaStream_t stream) {
  p.tiles_per_row = static_cast<int>(ceil_div(p.words, Tile<kReach>::kWords));
  int device = 0, processors = 0, blocks = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess) {
    error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, suppress_kernel<kReach>, kThreads, 0);
  }
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute cooperative = {};
  cooperative.id = cudaLaunchAttributeCooperative;
  cooperative.val.cooperative = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(std::min(p.batch * p.tiles_per_row, std::max(1, processors * blocks)));
  config.blockDim = dim3(kThreads);
  config.stream = stream;
  config.attrs = &cooperative, config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, suppress_kernel<kReach>, p);
}

cudaError_t suppress(const Params& p, int segments, cudaStream_t stream) {
  const int reach = (p.radius + 31) / 32;
  if (reach <= 1) return launch_suppress<1>(p, stream);
  if (reach == 2) return launch_suppress<2>(p, stream);
  if (reach <= 4) return launch_suppress<4>(p, stream);
  if (p.radius <= kMaskRadius) return launch_suppress<8>(p, stream);
  suppress_wide_kernel<<<dim3(segments, p.batch), kWideThreads, 0, stream>>>(p);
  return cudaGetLastError();
}

}  // namespace

int64_t workspace_bytes(const SelectBoundaries& x) { return lay_out(x, nullptr).bytes; }

cudaError_t run(const SelectBoundaries& x, void* workspace, cudaStream_t stream) {
  const int64_t batch = x.scores.shape[0], seqlen_k = x.scores.shape[1];
  if (batch == 0) return cudaSuccess;
  const Layout layout = lay_out(x, workspace);
  Params p = {};
  p.scores = x.scores.as<float>(), p.status = layout.status, p.survivors = layout.survivors;
  p.offsets = x.offsets.as<int>(), p.num_chunks = x.num_chunks.as<int>();
  p.batch = static_cast<int>(batch), p.seqlen_k = static_cast<int>(seqlen_k), p.words = static_cast<int>(layout.words);
  p.capacity = static_cast<int>(x.offsets.shape[1] - 1);
  p.max_chunks = static_cast<int>(std::min<int64_t>(x.max_chunks, INT32_MAX));
  p.radius = static_cast<int>(std::min(x.nms_radius, seqlen_k)), p.threshold = x.threshold;
  p.segment = x.segment < seqlen_k ? static_cast<int>(x.segment) : 0;
  if (x.segment > seqlen_k) {  // one short segment: its share of the quota is the row's
    p.max_chunks = static_cast<int>(std::max<int64_t>(1, x.max_chunks * seqlen_k / x.segment));
  }
  const int segments = p.segment > 0 ? static_cast<int>(ceil_div(seqlen_k, p.segment)) : 1;
  if (seqlen_k > 0) {
    cudaError_t error = cudaMemsetAsync(p.status, 0, sizeof(Status) * batch * layout.words, stream);
    if (error == cudaSuccess) error = suppress(p, segments, stream);
    if (error != cudaSuccess) return error;
  }
  choose_cuts_kernel<<<dim3(segments, batch), kCutThreads, 0, stream>>>(p);
  return cudaGetLastError();
}

}  // namespace dhsa::cuda
