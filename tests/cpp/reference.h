// Each stage in double precision and a few lines, straight from its definition; the oracle of the C++ tests.
#pragma once

#include <set>
#include <utility>

#include "support.h"

namespace dhsa::test {

using Row = std::vector<double>;

inline Row boundary_scores(const Array& k, int64_t b, int64_t window) {
  const int64_t length = k.dim(2);
  Row scores(length, -kInf);
  for (int64_t t = window; t <= length - window; ++t) {
    double dot = 0, left = 0, right = 0;
    for (int64_t c = 0; c < k.dim(1) * k.dim(3); ++c) {
      double l = 0, r = 0;
      for (int64_t w = 0; w < window; ++w) {
        l += k.at({b, c / k.dim(3), t - window + w, c % k.dim(3)}) / static_cast<double>(window);
        r += k.at({b, c / k.dim(3), t + w, c % k.dim(3)}) / static_cast<double>(window);
      }
      dot += l * r, left += l * l, right += r * r;
    }
    scores[t] = 1 - dot / std::max(std::sqrt(left) * std::sqrt(right), 1e-6);
  }
  return scores;
}

inline std::set<int64_t> select_boundaries(const SelectBoundaries& p, const Array& scores, int64_t b) {
  const int64_t length = scores.dim(1), segment = p.segment > 0 ? p.segment : std::max<int64_t>(length, 1);
  std::set<int64_t> cuts{length};
  for (int64_t t = 0; t < length; t += segment) cuts.insert(t);
  std::vector<int64_t> order, taken(length / segment + 1, 0);
  for (int64_t t = 0; t < length; ++t) {
    const double score = scores.at({b, t});
    if (score > static_cast<double>(p.threshold) && score > -kInf) order.push_back(t);
  }
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t x, int64_t y) { return scores.at({b, x}) > scores.at({b, y}); });
  for (const int64_t t : order) {
    const int64_t tokens = std::min(segment, length - t / segment * segment);
    const int64_t quota =
        tokens == segment || p.segment == 0 ? p.max_chunks : std::max<int64_t>(1, p.max_chunks * tokens / segment);
    const auto next = cuts.lower_bound(t - p.nms_radius);
    if (taken[t / segment] >= quota - 1 || (next != cuts.end() && *next <= t + p.nms_radius)) continue;
    cuts.insert(t);
    ++taken[t / segment];
  }
  return cuts;
}

// Sum of x over tokens [begin, end), mean over the heads that selection head s of `lists` reads, times the pool's
// factor.
inline Row pool(const Array& x, int64_t b, int64_t s, int64_t lists, int64_t begin, int64_t end, PoolScale scale) {
  const bool groups = x.dim(1) % lists == 0;
  const int64_t count = groups ? x.dim(1) / lists : 1, first = groups ? s * count : s / (lists / x.dim(1));
  const double n = static_cast<double>(end - begin);
  const double divisor = scale == PoolScale::kSqrt ? std::sqrt(n) : scale == PoolScale::kMean ? n : 1.0;
  Row sum(x.dim(3), 0.0);
  for (int64_t h = first; h < first + count; ++h) {
    for (int64_t t = begin; t < end; ++t) {
      for (int64_t d = 0; d < x.dim(3); ++d) sum[d] += x.at({b, h, t, d}) / (divisor * static_cast<double>(count));
    }
  }
  return sum;
}

inline double dot(const Row& a, const Row& b) {
  double sum = 0;
  for (size_t d = 0; d < a.size(); ++d) sum += a[d] * b[d];
  return sum;
}

inline Row row_of(const Array& x, int64_t b, int64_t h, int64_t t) {
  Row row(x.dim(3));
  for (int64_t d = 0; d < x.dim(3); ++d) row[d] = x.at({b, h, t, d});
  return row;
}

struct Geometry {  // of one query block
  int64_t first, last, p0, p1, window;
  Geometry(int64_t j, int64_t q_block, int64_t seqlen_q, int64_t seqlen_k, int64_t window)
      : first(j * q_block),
        last(std::min(first + q_block, seqlen_q) - 1),
        p0(seqlen_k - seqlen_q + first),
        p1(seqlen_k - seqlen_q + last),
        window(window) {}
  bool candidate(int64_t key) const { return key <= p1 && (window == 0 || key > p0 - window); }
};

inline double ordered(double score) { return std::isnan(score) ? -kInf : score; }

// The first `count` keys of `keys` by falling score, ties to the lower index, rising.
inline std::vector<int64_t> best(std::vector<int64_t> keys, const Row& score, int64_t count) {
  std::stable_sort(keys.begin(), keys.end(),
                   [&](int64_t x, int64_t y) { return ordered(score[x]) > ordered(score[y]); });
  keys.resize(std::min<int64_t>(count, static_cast<int64_t>(keys.size())));
  std::sort(keys.begin(), keys.end());
  return keys;
}

struct Split {  // a block's candidates: forced ones and the others, and how many of the others are kept
  std::vector<int64_t> forced, others;
  int64_t room;
  Split(const Geometry& g, const KeyChoice& c, int64_t covered) {
    for (int64_t key = 0; key <= g.p1; ++key) {
      if (!g.candidate(key)) continue;
      const bool is_forced = key < c.sink || key >= g.p0 - c.local + 1 || key >= covered;
      (is_forced ? forced : others).push_back(key);
    }
    const int64_t all = static_cast<int64_t>(forced.size() + others.size());
    room = std::max<int64_t>(0, std::min(c.budget, all) - static_cast<int64_t>(forced.size()));
  }
};

// token_scores of one list: score(c) for the tokens of chunk c, -inf outside.
inline Row token_scores(const Array& offsets, const Array& num_chunks, int64_t b, int64_t length,
                        const std::function<double(int64_t)>& score) {
  Row tokens(length, -kInf);
  for (int64_t c = 0; c < static_cast<int64_t>(num_chunks.at({b})); ++c) {
    for (auto t = static_cast<int64_t>(offsets.at({b, c})); t < static_cast<int64_t>(offsets.at({b, c + 1})); ++t) {
      tokens[t] = score(c);
    }
  }
  return tokens;
}

inline int64_t covered(const Array& offsets, const Array& num_chunks, int64_t b) {
  return static_cast<int64_t>(offsets.at({b, static_cast<int64_t>(num_chunks.at({b}))}));
}

inline std::vector<int64_t> select_keys(const Geometry& g, const KeyChoice& c, int64_t seqlen_q, int64_t covered,
                                        const Row& tokens) {
  const Split split(g, c, covered);
  const bool dense = g.last >= seqlen_q - c.dense_tail;
  std::vector<int64_t> kept = best(split.others, tokens, dense ? g.p1 + 1 : split.room);
  kept.insert(kept.end(), split.forced.begin(), split.forced.end());
  std::sort(kept.begin(), kept.end());
  return kept;
}

// Merged runs; past the capacity the first R - 1 and the last stay.
inline std::vector<std::pair<int64_t, int64_t>> runs_of(const std::vector<int64_t>& keys, int64_t capacity) {
  std::vector<std::pair<int64_t, int64_t>> runs;
  for (const int64_t key : keys) {
    if (!runs.empty() && runs.back().second == key) {
      ++runs.back().second;
    } else {
      runs.emplace_back(key, key + 1);
    }
  }
  if (static_cast<int64_t>(runs.size()) > capacity) runs.erase(runs.begin() + capacity - 1, runs.end() - 1);
  return runs;
}

inline double capped(double logit, double softcap) {
  return softcap > 0 ? softcap * std::tanh(logit / softcap) : logit;
}

// out and lse of one query over a list of keys; keys that it may not see are left out.
inline std::pair<Row, double> attend(const Array& q, const Array& k, const Array& v, int64_t b, int64_t h, int64_t i,
                                     const std::vector<int64_t>& keys, const Softmax& softmax) {
  const int64_t kv = h / (q.dim(1) / k.dim(1)), p = k.dim(2) - q.dim(2) + i;
  Row out(q.dim(3), 0.0);
  double sum = 0, peak = -kInf;
  std::vector<std::pair<int64_t, double>> logits;
  for (const int64_t j : keys) {
    if (j > p || (softmax.window > 0 && j <= p - softmax.window)) continue;
    logits.emplace_back(j, capped(softmax.scale * dot(row_of(q, b, h, i), row_of(k, b, kv, j)), softmax.softcap));
    peak = std::max(peak, logits.back().second);
  }
  for (const auto& [j, logit] : logits) sum += std::exp(logit - peak);
  for (const auto& [j, logit] : logits) {
    for (int64_t d = 0; d < q.dim(3); ++d) out[d] += std::exp(logit - peak) / sum * v.at({b, kv, j, d});
  }
  return {out, logits.empty() ? -kInf : peak + std::log(sum)};
}

}  // namespace dhsa::test
