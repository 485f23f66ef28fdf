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

inline Row scores_of(const Array& x, int64_t b, int64_t s, int64_t j) {  // the last dimension of [B, S, nQ, C]
  Row scores(x.dim(3));
  for (int64_t c = 0; c < x.dim(3); ++c) scores[c] = x.at({b, s, j, c});
  return scores;
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

// Keys that are kept, rising. They are certain if no other key's score lies so near the cut-off that float32 could
// choose differently: within 1e-4 times the block's largest score.
struct Kept {
  std::vector<int64_t> keys;
  bool certain = true;
};

// The first `count` keys of `keys` by falling score, ties to the lower index.
inline Kept best(std::vector<int64_t> keys, const Row& score, int64_t count) {
  std::stable_sort(keys.begin(), keys.end(),
                   [&](int64_t x, int64_t y) { return ordered(score[x]) > ordered(score[y]); });
  Kept kept;
  if (count > 0 && count < static_cast<int64_t>(keys.size())) {
    double largest = 0;
    for (const double x : score) largest = std::max(largest, std::isfinite(x) ? std::fabs(x) : 0);
    const double last = ordered(score[keys[count - 1]]), next = ordered(score[keys[count]]);
    const auto near = [&](double a, double b) { return a != b && std::fabs(a - b) <= 1e-4 * largest; };
    kept.certain = !near(last, next);
    for (const int64_t key : keys) kept.certain &= last != next || !near(ordered(score[key]), last);
  }
  keys.resize(std::min<int64_t>(count, static_cast<int64_t>(keys.size())));
  std::sort(keys.begin(), keys.end());
  kept.keys = keys;
  return kept;
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
  Kept with(Kept kept) const {  // the forced keys beside those
    kept.keys.insert(kept.keys.end(), forced.begin(), forced.end());
    std::sort(kept.keys.begin(), kept.keys.end());
    return kept;
  }
};

// One batch row's chunks, as half-open ranges inside [0, length).
struct ChunkRow {
  std::vector<std::pair<int64_t, int64_t>> chunks;
  int64_t length, covered = 0;  // keys from `covered` on belong to no chunk

  ChunkRow(const Array& offsets, const Array& num_chunks, int64_t b, int64_t length) : length(length) {
    const auto at = [&](int64_t c) { return std::min(length, static_cast<int64_t>(offsets.at({b, c}))); };
    for (int64_t c = 0; c < static_cast<int64_t>(num_chunks.at({b})); ++c) chunks.emplace_back(at(c), at(c + 1));
    covered = at(static_cast<int64_t>(chunks.size()));
  }
  int64_t size() const { return static_cast<int64_t>(chunks.size()); }
};

// Each token its chunk's score, -inf outside.
inline Row token_scores(const ChunkRow& row, const Row& chunk_scores) {
  Row tokens(row.length, -kInf);
  for (int64_t c = 0; c < row.size(); ++c) {
    for (int64_t t = row.chunks[c].first; t < row.chunks[c].second; ++t) tokens[t] = chunk_scores[c];
  }
  return tokens;
}

inline bool dense(const Geometry& g, const KeyChoice& c, int64_t seqlen_q) { return g.last >= seqlen_q - c.dense_tail; }

inline Kept select_keys(const Geometry& g, const KeyChoice& c, int64_t seqlen_q, const ChunkRow& row,
                        const Row& chunk_scores) {
  const Split split(g, c, row.covered);
  const int64_t room = dense(g, c, seqlen_q) ? row.length : split.room;
  return split.with(best(split.others, token_scores(row, chunk_scores), room));
}

inline double capped(double logit, double softcap) {
  return softcap > 0 ? softcap * std::tanh(logit / softcap) : logit;
}

inline double log_sum_exp(const Row& x) {
  const double peak = x.empty() ? -kInf : *std::max_element(x.begin(), x.end());
  double sum = 0;
  for (const double value : x) sum += std::exp(value - peak);
  return peak == -kInf ? -kInf : peak + std::log(sum);
}

struct Mass {
  Row scores;                // [C]
  std::vector<Row> row_lse;  // [heads][rows]
};

// The rows by which a block is known: which of its queries, or means of them.
struct RowChoice {
  int64_t q_stride = 1;
  QueryRows rows = QueryRows::kSample;
};

inline double rounded(DType dtype, float x) {
  return dtype == DType::kFloat16    ? float_from_half(half_from_float(x))
         : dtype == DType::kBFloat16 ? float_from_bfloat16(bfloat16_from_float(x))
                                     : x;
}

// Row u of block g, counted back from the last. A mean is the one float32 computation here: its bits are part of the
// definition.
inline Row block_row(const Array& q, int64_t b, int64_t h, const Geometry& g, int64_t u, const RowChoice& choice) {
  const int64_t last = g.last - u * choice.q_stride;
  if (choice.rows == QueryRows::kSample) return row_of(q, b, h, last);
  const int64_t first = std::max(g.first, last - choice.q_stride + 1);
  Row row(q.dim(3));
  for (int64_t d = 0; d < q.dim(3); ++d) {
    float sum = 0;
    for (int64_t i = first; i <= last; ++i) sum += static_cast<float>(q.at({b, h, i, d}));
    row[d] = rounded(q.tensor.dtype, sum / static_cast<float>(last - first + 1));
  }
  return row;
}

// chunk_mass of the query heads [first, first + heads); mean(c) is the chunk's mean key.
inline Mass chunk_mass(const Array& q, int64_t b, int64_t first, int64_t heads, const Geometry& g,
                       const RowChoice& choice, const Softmax& softmax, const ChunkRow& row,
                       const std::function<Row(int64_t)>& mean) {
  Mass mass{Row(row.size(), 0.0), std::vector<Row>(heads)};
  const int64_t rows = (g.last - g.first) / choice.q_stride + 1;
  const double votes = static_cast<double>(heads * rows);
  for (int64_t h = 0; h < heads; ++h) {
    for (int64_t u = 0; u < rows; ++u) {
      const Row query = block_row(q, b, first + h, g, u, choice);
      Row z(row.size(), -kInf);
      for (int64_t c = 0; c < row.size(); ++c) {
        const auto [begin, end] = row.chunks[c];
        if (begin == end || begin > g.p1 || (g.window > 0 && end <= g.p0 - g.window + 1)) continue;
        const double logit = capped(softmax.scale * dot(query, mean(c)), softmax.softcap);
        z[c] = std::isfinite(logit) ? logit + std::log(static_cast<double>(end - begin)) : -kInf;
      }
      const double lse = log_sum_exp(z);
      mass.row_lse[h].push_back(lse);
      for (int64_t c = 0; c < row.size(); ++c) {
        if (z[c] == -kInf) continue;
        mass.scores[c] +=
            std::exp(z[c] - lse) / votes / static_cast<double>(row.chunks[c].second - row.chunks[c].first);
      }
    }
  }
  return mass;
}

// The scores that refine_keys gives to tokens, for list s of `lists`. row_lse empty: score "dot".
inline Row key_scores(const Array& q, const Array& k, int64_t b, int64_t s, int64_t lists, const Geometry& g,
                      const RowChoice& choice, const Softmax& softmax, const std::vector<Row>& row_lse) {
  const int64_t heads = q.dim(1) / lists, group = q.dim(1) / k.dim(1);
  Row scores(k.dim(2), 0.0);
  if (row_lse.empty()) {
    const Row query = pool(q, b, s, lists, g.first, g.last + 1, PoolScale::kSqrt);
    for (int64_t j = 0; j <= g.p1; ++j) scores[j] = dot(query, pool(k, b, s, lists, j, j + 1, PoolScale::kSum));
    return scores;
  }
  for (int64_t h = 0; h < heads; ++h) {
    for (size_t u = 0; u < row_lse[h].size(); ++u) {
      const Row query = block_row(q, b, s * heads + h, g, static_cast<int64_t>(u), choice);
      for (int64_t j = 0; j <= g.p1; ++j) {
        const double logit = softmax.scale * dot(query, row_of(k, b, (s * heads + h) / group, j));
        const double share = std::exp(capped(logit, softmax.softcap) - row_lse[h][u]);
        scores[j] += std::isnan(share) ? kNaN : std::min(1.0, share);
      }
    }
  }
  return scores;
}

inline Kept refine_keys(const Geometry& g, const KeyChoice& c, int64_t seqlen_q, int64_t refine, const ChunkRow& row,
                        const Row& chunk_scores, const std::function<Row()>& key_scores) {
  const Split split(g, c, row.covered);
  if (dense(g, c, seqlen_q)) return split.with({split.others});
  const Kept coarse = best(split.others, token_scores(row, chunk_scores), refine * split.room);
  const bool all = static_cast<int64_t>(coarse.keys.size()) <= split.room;
  Kept fine = all ? coarse : best(coarse.keys, key_scores(), split.room);
  fine.certain &= coarse.certain;
  return split.with(fine);
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

// out and lse of one query over a list of keys; keys that it may not see are left out.
struct Attended {
  Row out, magnitude;  // sum of p v, and of p |v|
  double lse;
};

inline Attended attend(const Array& q, const Array& k, const Array& v, int64_t b, int64_t h, int64_t i,
                       const std::vector<int64_t>& keys, const Softmax& softmax) {
  const int64_t kv = h / (q.dim(1) / k.dim(1)), p = k.dim(2) - q.dim(2) + i;
  const Row query = row_of(q, b, h, i);
  Row out(q.dim(3), 0.0), magnitude(q.dim(3), 0.0), logits;
  std::vector<int64_t> seen;
  for (const int64_t j : keys) {
    if (j > p || (softmax.window > 0 && j <= p - softmax.window)) continue;
    seen.push_back(j);
    logits.push_back(capped(softmax.scale * dot(query, row_of(k, b, kv, j)), softmax.softcap));
  }
  const double lse = log_sum_exp(logits);
  for (size_t n = 0; n < seen.size(); ++n) {
    const Row value = row_of(v, b, kv, seen[n]);
    for (int64_t d = 0; d < q.dim(3); ++d) {
      const double term = std::exp(logits[n] - lse) * value[d];
      out[d] += term;
      magnitude[d] += std::abs(term);
    }
  }
  return {out, magnitude, lse};
}

}  // namespace dhsa::test
