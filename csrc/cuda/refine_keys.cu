// Stage 6, accurate: for each (batch, selection head, query block), the forced keys and the best of a short list. The
// short list is the first refine * (budget - forced) unforced keys in select_keys' order; key j of it scores the sum
// over the list's heads and their sampled rows u of
//
//   min(1, exp(logit(scale * q[u] . k[j]) - row_lse[u]))          (without row_lse: q_pooled . k[j], no softmax)
//
// and the best fill the budget, ties to the lower index. A NaN score is the last in order.
//
// Three launches for as many lists as fit the scratch, a thread block a list in each, since they want different shares
// of an SM: coarse (a radix select over chunks, then the short list's positions) and fine (a radix select over the
// short list, then runs) are chains of barriers and want many blocks, score (refine_score.cu) wants registers.
#include <algorithm>

#include "cuda/device/chunk_selection.h"
#include "cuda/launch.h"
#include "cuda/refine.h"
#include "cuda/router.h"

namespace dhsa::cuda {
namespace {

// Threads of the two selections, and keys that one holds in registers: 8,192 chunks, 4,096 entries; more go through
// memory.
constexpr int kCoarseThreads = 512, kChunkKeys = 16;
constexpr int kThreads = kRefineThreads, kWarps = kThreads / 32, kListKeys = 16;

struct CoarseShared {
  SelectionShared<kCoarseThreads> selection;
  FewChunks<kCoarseThreads, kChunkKeys> few;
  int bounds[2];
};

struct Shared {
  SelectionShared<kThreads> selection;
  RegisterSelect<kThreads, kListKeys>::Shared chosen;
  int last_position;
};

// --- Coarse: the short list ------------------------------------------------------------------------------------------

// A kept chunk: its keys [begin, begin + tokens) are entries [at, at + tokens) of the short list.
struct KeptChunk {
  int at, begin, tokens;
};

// Writes the positions of the first `want` free keys in order of their chunks' scores; returns how many there are.
__device__ int coarse_list(const Candidates& keys, int want, const Chunks& chunks, const float* scores,
                           CoarseShared& shared, const Shortlist& list) {
  const int free_keys = keys.free_end - keys.free_begin;
  if (want >= free_keys) {
    for (int i = threadIdx.x; i < free_keys; i += kCoarseThreads) list.positions[i] = keys.free_begin + i;
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
  ChunkSelection<kCoarseThreads> selection = {short_keys, chunks, scores, shared.selection};
  if (!selection.choose_from_registers(first, last, shared.few, [] {})) selection.choose(first, last);
  constexpr int kRoom = RadixSelect<kCoarseThreads>::kBins * 4 / static_cast<int>(sizeof(KeptChunk));
  KeptChunk* kept_chunks = reinterpret_cast<KeptChunk*>(shared.selection.select.histogram);
  int ties_used = 0, count = 0;
  for (int tile = first; tile < last; tile += kChunkWords * 32) {
    selection.vote(tile, last);
    ChunkWord word = selection.decide(tile, last, ties_used);
    const int word_first = tile + static_cast<int>(threadIdx.x) * 32;
    const auto taken = [&](int bit) {
      return word.divided >> bit & 1 ? word.take : selection.free_tokens(word_first + bit);
    };
    int tokens = 0, total, total_kept;
    for (uint32_t bits = word.kept; bits != 0; bits &= bits - 1) tokens += taken(__ffs(bits) - 1);
    int at = count + shared.selection.select.scan.exclusive_sum(tokens, &total);
    int slot = shared.selection.select.scan.exclusive_sum(__popc(word.kept), &total_kept);
    count += total;
    // Kept chunks go through shared memory, so that half a warp writes each.
    for (int done = 0; done < total_kept; done += kRoom) {
      for (; word.kept != 0 && slot < done + kRoom; ++slot) {
        const int bit = __ffs(word.kept) - 1, here = taken(bit);
        if (slot >= done) kept_chunks[slot - done] = {at, selection.free_begin(word_first + bit), here};
        at += here, word.kept &= word.kept - 1;
      }
      __syncthreads();
      for (int i = static_cast<int>(threadIdx.x) / 16; i < min(total_kept - done, kRoom); i += kCoarseThreads / 16) {
        const KeptChunk chunk = kept_chunks[i];
        if (chunk.at < 0) continue;  // overlapping chunks of malformed offsets may add up to anything
        for (int k = static_cast<int>(threadIdx.x) % 16; k < min(chunk.tokens, want - chunk.at); k += 16) {
          list.positions[chunk.at + k] = chunk.begin + k;
        }
      }
      __syncthreads();
    }
  }
  return min(count, want);
}

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

// Puts the forced keys around `count` runs, of which the first or the last may join them; returns the number of runs.
template <class Put>
__device__ inline int put_forced(const Candidates& keys, int count, bool joins_prefix, bool joins_suffix, int capacity,
                                 const Put& put) {
  const bool prefix = keys.begin < keys.free_begin, suffix = keys.free_end < keys.end;
  if (threadIdx.x == 0) {
    if (prefix) put(0, 0, keys.begin);
    if (prefix && !joins_prefix) put(0, 1, keys.free_begin);
    if (suffix && joins_suffix) put(count - 1, 1, keys.end);
    if (suffix && !joins_suffix) put(count, 0, keys.free_end), put(count, 1, keys.end);
  }
  return min(count + (suffix && !joins_suffix), capacity);
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
  return put_forced(keys, count, joins_prefix, joins_suffix, capacity, put);
}

// mark_kept and write_runs of a list of n <= kThreads * kListKeys entries, a thread an entry throughout.
__device__ int runs_from_registers(const Candidates& keys, const Shortlist& list, int n, int* runs, int capacity,
                                   Shared& shared) {
  using Select = RegisterSelect<kThreads, kListKeys>;
  constexpr int kWords = kThreads / 32 * kListKeys;
  static_assert(7 * kWords <= RadixSelect<kThreads>::kBins && kWords <= kThreads,
                "the histogram's memory holds the words");
  const bool choose = keys.want < n;
  uint32_t key[kListKeys];
  float score[kListKeys] = {};
#pragma unroll
  for (int j = 0; j < kListKeys; ++j) {
    const int i = j * kThreads + static_cast<int>(threadIdx.x);
    if (choose && i < n) score[j] = __ldg(list.scores + i);
  }
#pragma unroll
  for (int j = 0; j < kListKeys; ++j) {
    key[j] = j * kThreads + static_cast<int>(threadIdx.x) < n ? order_key(score[j]) : 0;
  }
  Cutoff cutoff = {0, 0};  // every entry is above it
  if (choose) {
    cutoff = Select{shared.selection.select, shared.chosen}.select(key, keys.want, [](int) { return 1; });
    __syncthreads();
  }
  int position[kListKeys];
#pragma unroll
  for (int j = 0; j < kListKeys; ++j) {
    const int i = j * kThreads + static_cast<int>(threadIdx.x);
    position[j] = i < n ? __ldg(list.positions + i) : 0;
  }

  // By word of 32 entries: kept ones, those whose successor is the next key, the outer positions.
  int* words = shared.selection.select.histogram;
  uint32_t* above = reinterpret_cast<uint32_t*>(words);
  uint32_t *equal = above + kWords, *follows = equal + kWords, *starts = follows + kWords, *ends = starts + kWords;
  int *head = words + 5 * kWords, *tail = head + kWords;
#pragma unroll
  for (int j = 0; j < kListKeys; ++j) {
    const int word = j * (kThreads / 32) + warp_id(), i = word * 32 + lane_id();
    const int next = __shfl_down_sync(kFullWarp, position[j], 1);
    const uint32_t links = __ballot_sync(kFullWarp, lane_id() < 31 && i + 1 < n && next == position[j] + 1);
    const uint32_t better = __ballot_sync(kFullWarp, key[j] > cutoff.key);
    const uint32_t same = __ballot_sync(kFullWarp, key[j] != 0 && key[j] == cutoff.key);
    if (lane_id() == 0) above[word] = better, equal[word] = same, follows[word] = links, head[word] = position[j];
    if (lane_id() == 31) tail[word] = position[j];
    if (i == n - 1) shared.last_position = position[j];
  }
  __syncthreads();
  const int word = threadIdx.x;
  uint32_t kept = 0, link = 0;
  {
    uint32_t ties = word < kWords ? equal[word] : 0;
    int total;
    int used = shared.selection.select.scan.exclusive_sum(__popc(ties), &total);
    if (word < kWords) {
      kept = above[word], link = follows[word];
      for (; ties != 0 && used < cutoff.rest; ties &= ties - 1, ++used) kept |= ties & (0u - ties);
      if (word + 1 < kWords && (word + 1) * 32 < n && head[word + 1] == tail[word] + 1) link |= 0x80000000u;
      above[word] = kept, follows[word] = link;  // only this thread has read them
    }
  }
  __syncthreads();
  const bool prefix = keys.begin < keys.free_begin, suffix = keys.free_end < keys.end;
  const bool joins_prefix = prefix && n > 0 && head[0] == keys.free_begin && (above[0] & 1) != 0;
  const bool joins_suffix =
      suffix && n > 0 && shared.last_position + 1 == keys.free_end && (above[(n - 1) / 32] >> (n - 1) % 32 & 1) != 0;
  uint32_t starting = 0;
  if (word < kWords) {
    const bool before = word > 0 ? (above[word - 1] & follows[word - 1]) >> 31 : joins_prefix;
    const uint32_t after = word + 1 < kWords ? above[word + 1] & 1 : 0;
    starting = kept & ~((kept & link) << 1 | static_cast<uint32_t>(before));
    starts[word] = starting, ends[word] = kept & ~(link & (kept >> 1 | after << 31));
  }
  int total;
  const int base = prefix + shared.selection.select.scan.exclusive_sum(__popc(starting), &total);
  if (word < kWords) equal[word] = static_cast<uint32_t>(base);
  __syncthreads();
  const int count = prefix + total;
  const auto put = [&](int run, int side, int at) {
    if (run < capacity) runs[2 * run + side] = at;
  };
#pragma unroll
  for (int j = 0; j < kListKeys; ++j) {
    const int here = j * (kThreads / 32) + warp_id();
    const uint32_t start = starts[here], up_to = start & (2u << lane_id()) - 1;
    const int run = static_cast<int>(equal[here]) + __popc(up_to) - 1;
    if (start >> lane_id() & 1) put(run, 0, position[j]);
    if (ends[here] >> lane_id() & 1) put(run, 1, position[j] + 1);
  }
  __syncthreads();  // the last run's end may be written twice
  return put_forced(keys, count, joins_prefix, joins_suffix, capacity, put);
}

// --- The kernels -----------------------------------------------------------------------------------------------------

__device__ void finish_list(const RefineParams& p, const List& list, int count) {
  int* runs = p.runs + list.row * p.run_capacity * 2;
  if (threadIdx.x == 0) p.num_runs[list.row] = count;
  for (int i = 2 * count + threadIdx.x; i < 2 * p.run_capacity; i += blockDim.x) runs[i] = 0;
}

__global__ void __launch_bounds__(kCoarseThreads, 2) coarse_kernel(RefineParams p) {
  __shared__ CoarseShared shared;
  const Shortlist shortlist(p);
  const List list(p);
  const int held = p.rules.held(list.batch);
  const Chunks chunks(p.offsets, p.num_chunks, list.batch, p.capacity, held);
  const Candidates keys(p.rules, held, list.block, chunks.begin(chunks.count));
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

__global__ void __launch_bounds__(kThreads, 4) fine_kernel(RefineParams p) {
  __shared__ Shared shared;
  const Shortlist shortlist(p);
  const List list(p);
  const int n = *shortlist.count;
  if (n < 0) return;
  const int held = p.rules.held(list.batch);
  const Chunks chunks(p.offsets, p.num_chunks, list.batch, p.capacity, held);
  const Candidates keys(p.rules, held, list.block, chunks.begin(chunks.count));
  int* runs = p.runs + list.row * p.run_capacity * 2;
  if (n <= kThreads * kListKeys) {
    return finish_list(p, list, runs_from_registers(keys, shortlist, n, runs, p.run_capacity, shared));
  }
  mark_kept(shortlist, n, keys.want, shared);
  finish_list(p, list, write_runs(keys, shortlist, n, runs, p.run_capacity, shared));
}

// --- Launch ----------------------------------------------------------------------------------------------------------

constexpr int64_t kScratchBytes =
    72 << 20;  // of short lists: 2,217 of 4,096 keys, where sparse_prefill's slab has 2,048

int64_t short_list_limit(const RefineKeys& x) {
  const int64_t seqlen_k = x.k.shape[2];
  return std::max<int64_t>(1, x.choice.budget >= seqlen_k / x.refine ? seqlen_k : x.choice.budget * x.refine);
}

bool reads_means(const RefineKeys& x) { return x.rows == QueryRows::kMean && x.row_lse.given(); }

// Lists of a launch: as many as the scratch holds, or the same share each if it takes several.
int64_t lists_at_once(const RefineKeys& x, int64_t lists) {
  const int64_t most = std::max<int64_t>(kScratchBytes / Shortlist::bytes(short_list_limit(x)), 128);
  return ceil_div(lists, std::max<int64_t>(ceil_div(lists, most), 1));
}

struct Workspace {
  QueryPool pool;
  char* row_means = nullptr;
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
  if (reads_means(x)) w.row_means = arena.take<char>(row_means_bytes(x.q, x.q_block, x.q_stride));
  w.scratch = arena.take<char>(refine_scratch_bytes(x, batch * lists * blocks));
  w.bytes = arena.used();
  return w;
}

}  // namespace

int64_t refine_scratch_bytes(const RefineKeys& x, int64_t lists) {
  return lists_at_once(x, lists) * Shortlist::bytes(short_list_limit(x));
}

cudaError_t run_refine_keys(const RefineKeys& x, const float* q_pooled, const void* row_means, void* scratch,
                            const Slab& slab, cudaStream_t stream) {
  const auto clamp = [](int64_t n) { return static_cast<int>(std::min<int64_t>(n, INT32_MAX / 2)); };
  const int64_t heads = x.q.shape[1], heads_kv = x.k.shape[1], selection_heads = x.runs.shape[1];
  RefineParams p = {};
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
  p.rules.cache_seqlens = x.cache_seqlens.given() ? x.cache_seqlens.as<int>() : nullptr;
  p.sampled = sampled_rows(x.q.shape[2], x.q_block, x.q_stride);
  if (reads_means(x)) read_row_means(p, row_means, heads, x.runs.shape[2], x.q.shape[3]);
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
    coarse_kernel<<<here, kCoarseThreads, 0, stream>>>(p);
    error = run_refine_score(p, x.q.dtype, x.q.shape[3], here, stream);
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
  if (reads_means(x)) {
    const cudaError_t error = run_row_means(x.q, x.q_block, x.q_stride, w.row_means, stream);
    if (error != cudaSuccess) return error;
  }
  return run_refine_keys(x, w.pool.pooled.as<float>(), w.row_means, w.scratch, all, stream);
}

}  // namespace dhsa::cuda
