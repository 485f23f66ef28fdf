// The router's stages on the host, written from their definitions: sequential, per token, float64. Each is the twin of
// the kernel with the same name.
#pragma once

#include <numeric>

#include "harness.h"

namespace dhsa::test {

constexpr double kMinusInf = -INFINITY;

inline std::vector<double> boundary_scores(const Input& k, int64_t window) {
  std::vector<double> scores(k.batch * k.length, kMinusInf);
  for (int64_t b = 0; b < k.batch; ++b)
    for (int64_t t = window; t <= k.length - window; ++t) {
      double dot = 0, left = 0, right = 0;
      for (int64_t h = 0; h < k.heads; ++h)
        for (int64_t d = 0; d < k.dim; ++d) {
          double l = 0, r = 0;
          for (int64_t i = 0; i < window; ++i) l += k.at(b, h, t - window + i, d), r += k.at(b, h, t + i, d);
          dot += l * r, left += l * l, right += r * r;
        }
      const double square = static_cast<double>(window * window);
      scores[b * k.length + t] = 1 - dot / square / std::max(std::sqrt(left * right) / square, 1e-6);
    }
  return scores;
}

// Greedy, one candidate after the other.
inline void select_boundaries(const std::vector<float>& all_scores, int64_t batch, int64_t seqlen_k, int64_t max_chunks,
                              int64_t radius, float threshold, int64_t segment, int64_t capacity,
                              std::vector<int>* offsets, std::vector<int>* num_chunks) {
  offsets->assign(batch * (capacity + 1), static_cast<int>(seqlen_k));
  num_chunks->assign(batch, 0);
  const int64_t step = segment > 0 ? segment : std::max<int64_t>(seqlen_k, 1);
  for (int64_t b = 0; b < batch; ++b) {
    const float* scores = all_scores.data() + b * seqlen_k;
    int64_t used = 0;
    for (int64_t first = 0; first < seqlen_k; first += step) {
      const int64_t last = std::min(first + step, seqlen_k), n = last - first;
      const int64_t quota = segment > 0 && n < segment ? std::max<int64_t>(1, max_chunks * n / segment) : max_chunks;
      std::vector<int64_t> order;
      for (int64_t t = first; t < last; ++t) {
        if (!std::isnan(scores[t]) && scores[t] != kMinusInf && scores[t] > threshold) order.push_back(t);
      }
      std::stable_sort(order.begin(), order.end(), [&](int64_t x, int64_t y) { return scores[x] > scores[y]; });
      std::vector<char> near(n, 0);
      const auto mark = [&](int64_t cut) {
        for (int64_t t = std::max(first, cut - radius); t <= std::min(last - 1, cut + radius); ++t) near[t - first] = 1;
      };
      mark(first), mark(last);
      std::vector<int64_t> cuts = {first};
      for (int64_t t : order) {
        if (static_cast<int64_t>(cuts.size()) == quota) break;
        if (near[t - first]) continue;
        cuts.push_back(t), mark(t);
      }
      std::sort(cuts.begin(), cuts.end());
      for (int64_t cut : cuts) (*offsets)[b * (capacity + 1) + used++] = static_cast<int>(cut);
    }
    (*num_chunks)[b] = static_cast<int>(used);
  }
}

// x summed over tokens [begin, end) and the heads of selection head s.
inline std::vector<double> pooled_row(const Input& x, int64_t b, int64_t s, int64_t heads, int64_t begin, int64_t end,
                                      PoolScale scale) {
  const int64_t group = std::max<int64_t>(x.heads / heads, 1), shared = std::max<int64_t>(heads / x.heads, 1);
  const double n = static_cast<double>(end - begin);
  const double divisor = group * (scale == PoolScale::kSqrt ? std::sqrt(n) : scale == PoolScale::kMean ? n : 1.0);
  std::vector<double> row(x.dim, 0.0);
  for (int64_t h = s * group / shared; h < s * group / shared + group; ++h)
    for (int64_t t = begin; t < end; ++t)
      for (int64_t d = 0; d < x.dim; ++d) row[d] += x.at(b, h, t, d) / divisor;
  return row;
}

inline std::vector<double> chunk_pool(const Input& x, const std::vector<int>& offsets, const std::vector<int>& counts,
                                      int64_t heads, PoolScale scale) {
  const int64_t capacity = static_cast<int64_t>(offsets.size()) / x.batch - 1;
  std::vector<double> out;
  for (int64_t b = 0; b < x.batch; ++b)
    for (int64_t s = 0; s < heads; ++s)
      for (int64_t c = 0; c < capacity; ++c) {
        const int* o = offsets.data() + b * (capacity + 1);
        const std::vector<double> row =
            c < counts[b] ? pooled_row(x, b, s, heads, o[c], o[c + 1], scale) : std::vector<double>(x.dim, 0.0);
        out.insert(out.end(), row.begin(), row.end());
      }
  return out;
}

// Token by token: forced keys, then candidates by falling score, ties to the lower index.
inline std::vector<int> kept_keys(const float* scores, const int* offsets, int num_chunks, int64_t seqlen_q,
                                  int64_t seqlen_k, int64_t q_block, int64_t block, const KeyChoice& choice) {
  const int64_t p0 = seqlen_k - seqlen_q + block * q_block;
  const int64_t last_query = std::min(seqlen_q, (block + 1) * q_block) - 1, p1 = seqlen_k - seqlen_q + last_query;
  std::vector<double> token(seqlen_k, kMinusInf);
  for (int c = 0; c < num_chunks; ++c)
    for (int t = offsets[c]; t < offsets[c + 1]; ++t) token[t] = std::isnan(scores[c]) ? kMinusInf : scores[c];
  std::vector<int> kept, rest;
  int64_t candidates = 0;
  for (int64_t j = 0; j <= p1; ++j) {
    if (choice.window > 0 && j <= p0 - choice.window) continue;
    ++candidates;
    const bool forced = j < choice.sink || j >= p0 - choice.local + 1 || j >= offsets[num_chunks];
    (forced ? kept : rest).push_back(static_cast<int>(j));
  }
  std::stable_sort(rest.begin(), rest.end(), [&](int x, int y) { return token[x] > token[y]; });
  const bool dense = choice.dense_tail > 0 && last_query >= seqlen_q - choice.dense_tail;
  const int64_t total = dense ? candidates : std::min(choice.budget, candidates);
  for (size_t i = 0; i < rest.size() && static_cast<int64_t>(kept.size()) < total; ++i) kept.push_back(rest[i]);
  std::sort(kept.begin(), kept.end());
  return kept;
}

// Keys as merged runs in R entries; an overflowing list keeps its first R - 1 runs and its last.
inline int write_runs(const std::vector<int>& keys, int64_t capacity, int* runs) {
  std::vector<std::pair<int, int>> list;
  for (int key : keys) {
    if (!list.empty() && list.back().second == key)
      list.back().second = key + 1;
    else
      list.emplace_back(key, key + 1);
  }
  if (static_cast<int64_t>(list.size()) > capacity) list[capacity - 1] = list.back(), list.resize(capacity);
  std::fill(runs, runs + 2 * capacity, 0);
  for (size_t r = 0; r < list.size(); ++r) runs[2 * r] = list[r].first, runs[2 * r + 1] = list[r].second;
  return static_cast<int>(list.size());
}

// Rising offsets of random chunks that fill [0, end).
inline std::vector<int> random_offsets(int64_t end, int64_t seqlen_k, int64_t capacity, int64_t longest, int* count) {
  std::vector<int> offsets = {0};
  while (offsets.back() < end && static_cast<int64_t>(offsets.size()) < capacity) {
    offsets.push_back(static_cast<int>(std::min(end, offsets.back() + random_int(1, longest))));
  }
  if (end > 0 && offsets.back() < end) offsets.push_back(static_cast<int>(end));
  *count = static_cast<int>(offsets.size()) - 1;
  offsets.resize(capacity + 1, static_cast<int>(seqlen_k));
  return offsets;
}

}  // namespace dhsa::test
