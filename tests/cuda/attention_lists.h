// The cases of attention_test, and the run lists they ask for: chunk-like runs, aligned blocks, single keys,
// everything, long runs that begin anywhere, a band with sinks, malformed entries, and a dense tail.
#pragma once

#include <algorithm>
#include <cstdint>
#include <random>
#include <utility>
#include <vector>

#include "core/types.h"

namespace dhsa::test {

enum class Lists { kRuns, kAligned, kSingle, kDense, kLong, kBand, kMalformed, kTail };
inline const char* const kListNames[] = {"runs", "aligned", "single", "dense", "long", "band", "malformed", "tail"};

struct Case {
  DType dtype = DType::kBFloat16;
  int64_t batch = 1, heads = 4, heads_kv = 1, select_heads = 1, seqlen_q = 100, seqlen_k = 100, head_dim = 128;
  int64_t q_block = 64, window = 0;
  float softcap = 0, scale = 0;  // scale 0: 1 / sqrt(head_dim)
  bool transposed = true;        // [B, L, heads, D] in memory, with gaps between rows
  Lists lists = Lists::kRuns;
  int64_t budget = 64;
  unsigned seed = 1;
};

using Runs = std::vector<std::pair<int32_t, int32_t>>;

struct HostLists {
  std::vector<int32_t> runs, num_runs;
  int64_t capacity = 1;
  Runs holes;       // keys in no list, which may hold NaN
  double keys = 0;  // kept and seen by the block's last query, all lists
  double run_count = 0;
};

// The runs without the holes' keys; both rise.
inline Runs cut(const Runs& runs, const Runs& holes) {
  Runs pieces;
  for (auto [begin, end] : runs) {
    for (const auto& hole : holes) {
      if (hole.second <= begin) continue;
      if (hole.first >= end) break;
      if (begin < hole.first) pieces.push_back({begin, hole.first});
      begin = std::min(hole.second, end);
    }
    if (begin < end) pieces.push_back({begin, end});
  }
  return pieces;
}

// A wide hole, or many small ones, so that runs of some tiles' length begin and end beside one.
inline Runs make_holes(std::mt19937& rng, int64_t seqlen_k, bool many) {
  Runs holes;
  if (!many) {
    const int64_t begin = seqlen_k * 3 / 10, end = begin + seqlen_k / 8;
    if (begin < end) holes.push_back({int32_t(begin), int32_t(end)});
    return holes;
  }
  for (int64_t j = 1 + int64_t(rng() % 80); j + 3 < seqlen_k; j += 70 + int64_t(rng() % 200)) {
    holes.push_back({int32_t(j), int32_t(j + 1 + int64_t(rng() % 3))});
  }
  return holes;
}

inline Runs merged(std::vector<int32_t> keys) {
  std::sort(keys.begin(), keys.end());
  Runs runs;
  for (const int32_t key : keys) {
    if (!runs.empty() && runs.back().second == key) {
      ++runs.back().second;
    } else {
      runs.push_back({key, key + 1});
    }
  }
  return runs;
}

// Rising runs, those that touch as one, empty ones left out.
inline Runs merged_runs(const Runs& runs) {
  Runs out;
  for (const auto& run : runs) {
    if (run.second <= run.first) continue;
    if (!out.empty() && run.first <= out.back().second) {
      out.back().second = std::max(out.back().second, run.second);
    } else {
      out.push_back(run);
    }
  }
  return out;
}

// `unit` aligned pieces of random lengths, from [0, end), until `budget` keys are kept; sink and local keys first.
inline Runs pick(std::mt19937& rng, int64_t end, int64_t p0, int64_t budget, int64_t sink, int64_t local,
                 int64_t shortest, int64_t longest) {
  if (end <= budget) return end > 0 ? Runs{{0, int32_t(end)}} : Runs{};
  std::vector<char> kept(end, 0);
  int64_t left = budget;
  const auto keep = [&](int64_t begin, int64_t past) {
    for (int64_t j = std::max<int64_t>(begin, 0); j < std::min(past, end) && left > 0; ++j) {
      if (!kept[j]) kept[j] = 1, --left;
    }
  };
  keep(0, sink);
  keep(p0 - local + 1, end);
  std::vector<std::pair<int64_t, int64_t>> chunks;
  for (int64_t j = 0; j < end;) {
    const int64_t n = shortest + int64_t(rng() % unsigned(longest - shortest + 1));
    chunks.push_back({j, j + n});
    j += n;
  }
  while (left > 0 && !chunks.empty()) {
    const size_t i = rng() % chunks.size();
    keep(chunks[i].first, chunks[i].second);
    chunks[i] = chunks.back();
    chunks.pop_back();
  }
  Runs runs;
  for (int64_t j = 0; j < end; ++j) {
    if (!kept[j]) continue;
    if (!runs.empty() && runs.back().second == j) {
      ++runs.back().second;
    } else {
      runs.push_back({int32_t(j), int32_t(j + 1)});
    }
  }
  return runs;
}

inline HostLists make_lists(const Case& c) {
  std::mt19937 rng(c.seed * 7919 + 13);
  const int64_t blocks = (c.seqlen_q + c.q_block - 1) / c.q_block;
  HostLists out;
  std::vector<Runs> lists;
  const bool timing = c.seqlen_k > 4096;
  if (!timing && c.seqlen_k > 20 && c.lists != Lists::kMalformed) {
    const bool many =
        c.lists == Lists::kLong || c.lists == Lists::kBand || (c.lists == Lists::kDense && rng() % 2 == 0);
    out.holes = make_holes(rng, c.seqlen_k, many);
  }
  for (int64_t i = 0; i < c.batch * c.select_heads * blocks; ++i) {
    const int64_t block = i % blocks, p0 = c.seqlen_k - c.seqlen_q + block * c.q_block;
    const int64_t p1 = std::min(p0 + c.q_block, c.seqlen_k) - 1;
    // In checks, a third of the lists also name keys that the causal mask must hide.
    const int64_t end = !timing && rng() % 3 == 0 ? c.seqlen_k : std::max<int64_t>(p1 + 1, 0);
    Runs runs;
    switch (c.lists) {
      case Lists::kRuns:
        runs = timing ? pick(rng, end, p0, c.budget, 128, 128, 9, 23) : pick(rng, end, p0, c.budget, 3, 7, 1, 40);
        break;
      case Lists::kAligned:
        runs = pick(rng, end, p0, c.budget, timing ? 128 : 16, 1, timing ? 128 : 16, timing ? 128 : 16);
        break;
      case Lists::kLong:
        runs = pick(rng, end, p0, 4 * c.budget, 5, 7, 40, 300);
        break;
      case Lists::kBand:
        runs = merged_runs({{0, int32_t(std::min<int64_t>(5, end))},
                            {int32_t(std::max<int64_t>(0, p0 - 150)), int32_t(std::max<int64_t>(0, end))}});
        break;
      case Lists::kSingle: {
        std::vector<int32_t> keys;
        if (end <= 2 * c.budget) {
          for (int64_t j = 0; j < std::min(end, c.budget); ++j) keys.push_back(int32_t(end <= c.budget ? j : 2 * j));
        } else {
          std::vector<char> taken(end / 2, 0);
          while (int64_t(keys.size()) < c.budget) {
            const size_t j = rng() % taken.size();
            if (!taken[j]) taken[j] = 1, keys.push_back(int32_t(2 * j));
          }
        }
        runs = merged(keys);
        break;
      }
      case Lists::kDense:
        runs = end > 0 ? Runs{{0, int32_t(end)}} : Runs{};
        break;
      case Lists::kTail:
        runs = c.seqlen_q - 64 < (block + 1) * c.q_block ? Runs{{0, int32_t(std::max<int64_t>(end, 0))}}
                                                         : pick(rng, end, p0, c.budget, 128, 128, 9, 23);
        break;
      case Lists::kMalformed:
        for (int j = 0; j < 9; ++j) {
          const int32_t odd[] = {INT32_MIN,
                                 -5,
                                 0,
                                 3,
                                 int32_t(c.seqlen_k / 2),
                                 int32_t(c.seqlen_k - 1),
                                 int32_t(c.seqlen_k),
                                 int32_t(c.seqlen_k + 100),
                                 INT32_MAX};
          runs.push_back({odd[rng() % 9], odd[rng() % 9]});
        }
        break;
    }
    if (!timing && c.lists != Lists::kMalformed) {
      if (rng() % 9 == 0) runs.clear();  // a block with no key
      runs = cut(runs, out.holes);
    }
    out.capacity = std::max<int64_t>(out.capacity, runs.size());
    for (const auto& run : runs) out.keys += run.second - run.first;
    out.run_count += runs.size();
    lists.push_back(runs);
  }
  out.runs.assign(lists.size() * out.capacity * 2, 0);
  for (size_t i = 0; i < lists.size(); ++i) {
    int32_t count = int32_t(lists[i].size());
    if (c.lists == Lists::kMalformed) count = int32_t(rng() % 40) - 10;
    out.num_runs.push_back(count);
    for (size_t j = 0; j < lists[i].size(); ++j) {
      out.runs[(i * out.capacity + j) * 2] = lists[i][j].first;
      out.runs[(i * out.capacity + j) * 2 + 1] = lists[i][j].second;
    }
  }
  return out;
}

}  // namespace dhsa::test
