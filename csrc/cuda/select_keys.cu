// Stage 6: for each (batch, selection head, query block), the kept keys as half-open, rising, disjoint, merged runs.
// One thread block a list. Tokens inherit their chunk's score, so the cut-off is a weighted selection over chunks, the
// weight being the tokens that a chunk adds to the forced ones (device/radix_select.h); no sort, no token scores.
//
// Runs come out of bit words, one bit a chunk. Where "kept" turns on or off is an event: events alternate start, end,
// start, end, so event number e of the list is simply entry e of the flattened [R, 2] output, and numbering them is one
// prefix sum of population counts. Only chunks with an event (some 200 of 8,192) are looked at again.
#include <algorithm>

#include "cuda/device/chunk_selection.h"
#include "cuda/device/early_launch.h"
#include "cuda/dispatch.h"
#include "cuda/launch.h"
#include "cuda/router.h"

namespace dhsa::cuda {
namespace {

struct Params {
  const float* scores;  // the slab's: [pairs, blocks, C]
  const int *offsets, *num_chunks;
  int *runs, *num_runs;  // [B, S, nQ, R, 2], [B, S, nQ]
  KeyRules rules;
  int capacity, run_capacity, query_blocks, selection_heads;
  int first_pair, first_block, blocks;
};

// The output list. Events beyond its capacity are dropped, but the last run is remembered: an overflowing list keeps
// its first R - 1 runs and its last.
struct RunWriter {
  int* runs;
  int capacity;
  int* last;  // shared, [2]: the latest start and end

  // `total`: events known so far, this one included or not; the last start and end are among the last two.
  __device__ void write(int event, int position, int total) const {
    if (event / 2 < capacity - 1) runs[event] = position;
    if (event >= total - 2) last[event % 2] = position;
  }
};

constexpr int kFewThreads = 1024, kFewKeys = 8;  // where lists are few: 8,192 chunks are chosen among in registers

template <int kThreads>
struct Shared {
  SelectionShared<kThreads> selection;
  unsigned warp_state[kThreads / 32];
  int last[2];
};

template <>
struct Shared<kFewThreads> {
  SelectionShared<kFewThreads> selection;
  FewChunks<kFewThreads, kFewKeys> few;
  unsigned warp_state[kFewThreads / 32];
  int last[2];
  int take;  // of the divided chunk
};

// Writes the runs of a finished selection.
template <int kThreads>
struct RunList {
  ChunkSelection<kThreads>& selection;
  Shared<kThreads>& shared;

  // Whether the nearest present chunk before this thread's word is kept to its end. carry: the same before the tile;
  // updated to after it.
  __device__ bool kept_before(const ChunkWord& word, bool& carry) {
    const bool any = word.present != 0, on = any && word.whole() >> (31 - __clz(word.present)) & 1;
    const unsigned has = __ballot_sync(kFullWarp, any), full = __ballot_sync(kFullWarp, on);
    if (lane_id() == 0) shared.warp_state[warp_id()] = has == 0 ? 2u : full >> (31 - __clz(has)) & 1u;
    __syncthreads();
    bool before = carry;
#pragma unroll
    for (int w = 0; w < kChunkWords / 32; ++w) {
      const unsigned state = shared.warp_state[w];
      if (w < warp_id() && state != 2) before = state;
      if (state != 2) carry = state;
    }
    const unsigned lower = has & ((1u << lane_id()) - 1);
    return lower != 0 ? full >> (31 - __clz(lower)) & 1u : before;
  }

  // The present chunks whose "kept" differs from what lies before them; chunks without a free key are passed over.
  __device__ static uint32_t toggles(const ChunkWord& word, bool before) {
    if ((word.present & (word.present + 1)) == 0) {  // no gap
      return ((word.whole() << 1 | static_cast<uint32_t>(before)) ^ word.kept) & word.present;
    }
    uint32_t events = 0;
    for (uint32_t bits = word.present; bits != 0; bits &= bits - 1) {
      const uint32_t bit = bits & (0u - bits);
      if (before != ((word.kept & bit) != 0)) events |= bit;
      before = word.whole() & bit;
    }
    return events;
  }

  // The events of the only tile, a lane a chunk: events crowd in a few words, whose threads would write one after the
  // other. `event` is the word's first.
  __device__ void write_from_lanes(int tile, const ChunkWord& word, uint32_t toggled, int event, int total,
                                   const RunWriter& out) {
    SelectionShared<kThreads>& words = shared.selection;  // this thread's word has been read
    if (threadIdx.x < kChunkWords) {
      words.above[threadIdx.x] = toggled, words.equal[threadIdx.x] = word.divided;
      words.present[threadIdx.x] = static_cast<uint32_t>(event);
      if (word.divided != 0) shared.take = word.take;
    }
    __syncthreads();
    const uint32_t mine = 1u << lane_id();
#pragma unroll 1
    for (int w = warp_id(); w < kChunkWords; w += kThreads / 32) {
      const uint32_t on_or_off = words.above[w], divided = words.equal[w];
      if (((on_or_off | divided) & mine) == 0) continue;
      const int begin = selection.free_begin(tile + w * 32 + lane_id());
      int at = static_cast<int>(words.present[w]) + __popc(on_or_off & (mine - 1)) + __popc(divided & (mine - 1));
      if (on_or_off & mine) out.write(at++, begin, total);
      if (divided & mine) out.write(at, begin + shared.take, total);
    }
  }

  // Writes the runs of the chunks [first, last) and of the forced keys around them; returns the number of runs.
  __device__ int write(int first, int last, const RunWriter& out) {
    const Candidates& keys = selection.keys;
    bool kept = keys.free_begin > keys.begin;  // at the walk's position
    int events = kept, ties_used = 0;
    if (kept && threadIdx.x == 0) out.write(0, keys.begin, 1);
    for (int tile = first; tile < last; tile += kChunkWords * 32) {
      selection.vote(tile, last);
      const ChunkWord word = selection.decide(tile, last, ties_used);
      const uint32_t toggled = toggles(word, kept_before(word, kept));
      int total;
      int event = events + shared.selection.select.scan.exclusive_sum(__popc(toggled) + (word.divided != 0), &total);
      events += total;
      if constexpr (kThreads == kFewThreads) {
        if (selection.voted) {
          write_from_lanes(tile, word, toggled, event, events, out);
          continue;
        }
      }
      for (uint32_t bits = toggled | word.divided; bits != 0; bits &= bits - 1) {
        const uint32_t bit = bits & (0u - bits);
        const int begin = selection.free_begin(tile + static_cast<int>(threadIdx.x) * 32 + __ffs(bits) - 1);
        if (toggled & bit) out.write(event++, begin, events);
        if (word.divided & bit) out.write(event++, begin + word.take, events);
      }
    }
    __syncthreads();

    const bool forced_end = keys.free_end < keys.end;
    if (forced_end && !kept) {
      if (threadIdx.x == 0) out.write(events, keys.free_end, events + 1);
      ++events, kept = true;
    }
    if (kept) {
      if (threadIdx.x == 0) out.write(events, keys.end, events + 1);
      ++events;
    }
    return events / 2;
  }
};

template <int kThreads>
__global__ void __launch_bounds__(kThreads, 1024 / kThreads) select_keys_kernel(Params p) {
  __shared__ Shared<kThreads> shared;
  const int64_t slab_row = blockIdx.x;
  const int pair = p.first_pair + static_cast<int>(slab_row / p.blocks);
  const int block = p.first_block + static_cast<int>(slab_row % p.blocks);
  const int64_t row = static_cast<int64_t>(pair) * p.query_blocks + block;
  const int batch = pair / p.selection_heads, held = p.rules.held(batch);
  const Chunks chunks(p.offsets, p.num_chunks, batch, p.capacity, held);
  const Candidates keys(p.rules, held, block, chunks.begin(chunks.count));
  const RunWriter out = {p.runs + row * p.run_capacity * 2, p.run_capacity, shared.last};

  // Chunks that fit the registers are all looked at; of more, those in reach. Bounds do not depend on scores: they are
  // found before the kernel that writes those is done.
  const bool few = kThreads == kFewThreads && chunks.count <= kFewThreads * kFewKeys;
  if (!keys.all_kept() && !few && warp_id() < 2) {  // two searches at once: each is a chain of dependent loads
    const int bound = chunks.first_bound_at_or_after(warp_id() == 0 ? keys.free_begin + 1 : keys.free_end);
    if (lane_id() == 0) shared.last[warp_id()] = bound;
  }
  let_next_begin();
  int count;
  if (keys.all_kept()) {
    wait_for_previous();
    count = keys.begin < keys.end;
    if (count > 0 && threadIdx.x == 0) out.write(0, keys.begin, 2), out.write(1, keys.end, 2);
  } else {
    int first = 0, last = chunks.count;
    if (!few) {
      __syncthreads();
      first = max(shared.last[0] - 1, 0), last = min(shared.last[1], last);
      __syncthreads();
    }
    ChunkSelection<kThreads> selection = {keys, chunks, p.scores + slab_row * p.capacity, shared.selection};
    if constexpr (kThreads == kFewThreads) {
      const auto scores_are_there = [] { wait_for_previous(); };
      if (!selection.choose_from_registers(first, last, shared.few, scores_are_there)) {
        selection.choose(first, last);
      }
    } else {
      wait_for_previous();
      selection.choose(first, last);
    }
    count = RunList<kThreads>{selection, shared}.write(first, last, out);
  }
  if (threadIdx.x == 0) {
    if (count >= p.run_capacity) {
      out.runs[2 * p.run_capacity - 2] = shared.last[0];
      out.runs[2 * p.run_capacity - 1] = shared.last[1];
    }
    p.num_runs[row] = min(count, p.run_capacity);
  }
  for (int i = 2 * count + threadIdx.x; i < 2 * p.run_capacity; i += kThreads) out.runs[i] = 0;
}

}  // namespace

cudaError_t run_select_keys(const SelectKeys& x, const Slab& slab, cudaStream_t stream, bool early) {
  const auto clamp = [](int64_t n) { return static_cast<int>(std::min<int64_t>(n, INT32_MAX / 2)); };
  Params p = {};
  p.scores = x.chunk_scores.as<float>();
  p.offsets = x.offsets.as<int>(), p.num_chunks = x.num_chunks.as<int>();
  p.runs = x.runs.as<int>(), p.num_runs = x.num_runs.as<int>();
  p.rules = {clamp(x.seqlen_q),    clamp(x.seqlen_k),     clamp(x.q_block),       clamp(x.choice.budget),
             clamp(x.choice.sink), clamp(x.choice.local), clamp(x.choice.window), clamp(x.choice.dense_tail)};
  p.rules.cache_seqlens = x.cache_seqlens.given() ? x.cache_seqlens.as<int>() : nullptr;
  p.capacity = static_cast<int>(x.chunk_scores.shape[3]), p.run_capacity = static_cast<int>(x.runs.shape[3]);
  p.query_blocks = static_cast<int>(x.runs.shape[2]), p.selection_heads = static_cast<int>(x.runs.shape[1]);
  p.first_pair = static_cast<int>(slab.first_pair), p.first_block = static_cast<int>(slab.first_block);
  p.blocks = static_cast<int>(slab.blocks);
  const int64_t lists = slab.pairs * slab.blocks;
  if (lists == 0) return cudaSuccess;
  // Few lists: a call cannot fill the GPU, so each list gets more threads.
  const auto launch = [&](auto kernel, int threads) {
    if (early) return launch_early(kernel, lists, threads, stream, p);
    kernel<<<lists, threads, 0, stream>>>(p);
    return cudaGetLastError();
  };
  return lists <= 128 ? launch(select_keys_kernel<kFewThreads>, kFewThreads) : launch(select_keys_kernel<256>, 256);
}

int64_t workspace_bytes(const SelectKeys&) { return 0; }

cudaError_t run(const SelectKeys& x, void*, cudaStream_t stream) {
  return run_select_keys(x, {0, x.runs.shape[0] * x.runs.shape[1], 0, x.runs.shape[2]}, stream);
}

}  // namespace dhsa::cuda
