#include "cpu/attention.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "cpu/dispatch.h"
#include "dhsa.h"

namespace dhsa::cpu {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

using Four = int32_t __attribute__((vector_size(16)));

// Walks the keys of a list that lie in [low, high), whatever the list holds.
class KeyCursor {
 public:
  KeyCursor(RunList list, int64_t low, int64_t high)
      : next_(list.runs),
        end_of_list_(list.runs + 2 * list.count),
        low_(static_cast<int32_t>(low)),
        high_(static_cast<int32_t>(high)) {}

  // Returns how many keys it wrote, 0 at the end. Whole fours are written: capacity is a multiple of four, or index has
  // room for the next one. at_run is told the first and the last key of each piece of a run.
  template <class F>
  __attribute__((noinline)) int64_t next(int32_t* index, int64_t capacity, const F& at_run) {
    const int32_t* next_run = next_;  // copies, since index could be a part of *this
    int32_t key = key_, last = end_;
    int64_t n = 0;
    while (true) {
      if (key < last) {
        const int64_t count = std::min<int64_t>(capacity - n, last - key);
        at_run(key, key + static_cast<int32_t>(count) - 1);
        Four four = Four{0, 1, 2, 3} + key;
        for (int32_t *to = index + n, *end = to + count; to < end; to += 4, four += 4) {
          std::memcpy(to, &four, sizeof four);
        }
        key += static_cast<int32_t>(count);
        n += count;
      }
      if (n >= capacity || next_run == end_of_list_) break;
      key = std::max(next_run[0], low_);
      last = std::min(next_run[1], high_);
      next_run += 2;
    }
    next_ = next_run;
    key_ = key;
    end_ = last;
    return n;
  }

  void skip(int64_t count) {
    while (count > 0 && advance()) {
      const int64_t step = std::min<int64_t>(count, end_ - key_);
      key_ += static_cast<int32_t>(step);
      count -= step;
    }
  }

 private:
  bool advance() {  // to a run with keys left
    while (key_ >= end_) {
      if (next_ == end_of_list_) return false;
      key_ = std::max(next_[0], low_);
      end_ = std::min(next_[1], high_);
      next_ += 2;
    }
    return true;
  }

  const int32_t *next_, *end_of_list_;
  int32_t low_, high_, key_ = 0, end_ = 0;
};

// The keys that some query at positions [p0, p1] sees.
KeyCursor visible_keys(const AttentionArgs& args, RunList runs, int64_t p0, int64_t p1) {
  const int64_t low = args.softmax.window > 0 ? std::max<int64_t>(0, p0 - args.softmax.window + 1) : 0;
  return KeyCursor(runs, low, std::min(args.seqlen_k, p1 + 1));
}

// The keys of one tile.
struct Keys {
  int32_t* index;
  int64_t n;
  int32_t least, most;

  void take(KeyCursor& cursor, int64_t capacity) {
    least = std::numeric_limits<int32_t>::max(), most = 0;
    n = cursor.next(index, capacity, [this](int32_t first, int32_t last) {
      least = std::min(least, first);
      most = std::max(most, last);
    });
  }
};

// Rows of a tile: `queries` queries from first_query, each of `heads` heads from first_head; row = i * heads + h, so
// that later tiles are for later rows.
struct Rows {
  int64_t b, first_head, heads, first_query, queries, kv_head;

  int64_t count() const { return heads * queries; }
};

void load_queries(const AttentionArgs& args, const Rows& rows, float scale, float* to) {
  const auto load_rows = args.kernels->load_rows[args.q.dtype];
  if (rows.heads == 1) {
    load_rows(args.q.at(rows.b, rows.first_head, rows.first_query), args.q.row, rows.queries, args.head_dim, scale, to);
    return;
  }
  for (int64_t i = 0; i < rows.queries; ++i, to += rows.heads * args.head_dim) {
    load_rows(args.q.at(rows.b, rows.first_head, rows.first_query + i), args.q.head, rows.heads, args.head_dim, scale,
              to);
  }
}

// Tiles multiply bfloat16 pairs where the ISA can: queries stay as they are, scores are scaled, and probabilities are
// rounded to the values' type, as tensor cores would have them.
bool uses_pairs(const Kernels& kernels, int type) { return kernels.pack_key_pairs[type] != nullptr; }
bool uses_pairs(const AttentionArgs& args) { return uses_pairs(*args.kernels, args.k.dtype); }

// A strip of columns after the other, as AMX has them, not all at once.
bool uses_strips(const Kernels& kernels, int type) { return uses_pairs(kernels, type) && kernels.pair_columns > 0; }

int64_t keys_of_tile(const Kernels& kernels, int type) {
  return uses_pairs(kernels, type) ? kernels.pair_keys : kBlockN;
}

void copy_queries(const AttentionArgs& args, const Rows& rows, float* copy) {
  uint16_t* to = reinterpret_cast<uint16_t*>(copy);
  for (int64_t i = 0; i < rows.queries; ++i) {
    for (int64_t h = 0; h < rows.heads; ++h, to += args.head_dim) {
      std::memcpy(to, args.q.at(rows.b, rows.first_head + h, rows.first_query + i), args.head_dim * sizeof(uint16_t));
    }
  }
}

// Adds one tile's values to a row, whose probabilities lie at `step`, key by key, leaving out those it does not see:
// for tiles that hold a NaN or an infinity, which a probability of 0 would not silence.
void add_seen_values(const AttentionArgs& args, const Rows& rows, const Keys& keys, const float* probs, int64_t step,
                     int64_t low, int64_t high, float* acc, const AttentionScratch& scratch) {
  int64_t seen = 0;
  for (int64_t j = 0; j < keys.n; ++j) {
    if (keys.index[j] <= low || keys.index[j] > high) continue;
    scratch.seen_index[seen] = keys.index[j];
    scratch.seen_probs[seen++] = probs[j * step];
  }
  args.kernels->add_weighted_rows[args.v.dtype](scratch.seen_probs, kBlockN, 1, args.v.at(rows.b, rows.kv_head, 0),
                                                args.v.row, scratch.seen_index, seen, args.head_dim, acc);
}

// Whether some row may not see some key of the tile.
bool hides_keys(const AttentionArgs& args, const Rows& rows, const Keys& keys) {
  const int64_t p0 = args.seqlen_k - args.seqlen_q + rows.first_query, p1 = p0 + rows.queries - 1;
  return keys.most > p0 || (args.softmax.window > 0 && keys.least <= p1 - args.softmax.window);
}

KeyTile key_tile(const AttentionArgs& args, const Rows& rows, const Keys& keys) {
  return {args.k.at(rows.b, rows.kv_head, 0),
          args.v.at(rows.b, rows.kv_head, 0),
          args.k.row,
          args.v.row,
          keys.index,
          keys.n,
          args.head_dim};
}

// What to ask for beside a tile. Few queries leave no time for it: memory reads ahead along a run by itself.
Ahead rows_ahead(const AttentionArgs& args, const Rows& rows, const Keys& next) {
  return {args.k.at(rows.b, rows.kv_head, 0),
          args.v.at(rows.b, rows.kv_head, 0),
          args.k.row_bytes,
          args.v.row_bytes,
          args.head_dim * element_size(static_cast<DType>(args.k.dtype)),
          next.index,
          rows.count() < kAskingRows ? 0 : next.n};
}

// Packs a tile's values, padded with rows of zeros; true if all are finite.
bool pack_values(const AttentionArgs& args, const KeyTile& tile, int64_t padded, float* panels) {
  const Kernels& kernels = *args.kernels;
  return uses_pairs(args)
             ? kernels.pack_value_pairs[args.v.dtype](tile.v, tile.v_row, tile.index, tile.n, padded, tile.head_dim,
                                                      panels)
             : kernels.pack_values[args.v.dtype](tile.v, tile.v_row, tile.index, tile.n, padded, tile.head_dim, panels);
}

// One tile of keys for every row.
void attend_tile(const AttentionArgs& args, const Rows& rows, const Keys& keys, const AttentionScratch& scratch) {
  const Kernels& kernels = *args.kernels;
  const int64_t head_dim = args.head_dim, padded_dim = round_up(head_dim, kMaxPanel);
  const int64_t n = keys.n, padded = round_up(n, kMaxPanel), m = rows.count();
  const int64_t p0 = args.seqlen_k - args.seqlen_q + rows.first_query;
  std::fill(keys.index + n, keys.index + padded, std::numeric_limits<int32_t>::max());

  const bool pairs = uses_pairs(args);
  const KeyTile tile = key_tile(args, rows, keys);
  const bool finite = pack_values(args, tile, padded, scratch.v_panels);
  if (pairs) {
    kernels.pack_key_pairs[args.k.dtype](tile.k, tile.k_row, tile.index, n, padded, head_dim, scratch.k_panels);
    kernels.gemm_pairs(m, head_dim, scratch.q, head_dim, scratch.k_panels, padded, scratch.probs, kBlockN, false);
  } else {
    kernels.pack_keys[args.k.dtype](tile.k, tile.k_row, tile.index, n, padded, head_dim, scratch.k_panels);
    kernels.gemm(m, head_dim, scratch.q, head_dim, scratch.k_panels, padded, scratch.probs, kBlockN, false);
  }

  const bool masked = padded != n || hides_keys(args, rows, keys);
  const bool key_by_key = masked && !finite;
  for (int64_t r = 0; r < m; ++r) {
    float* s = scratch.probs + r * kBlockN;
    const int64_t p = p0 + r / rows.heads;
    const int64_t low = args.softmax.window > 0 ? std::max<int64_t>(-1, p - args.softmax.window) : -1;
    if (pairs) kernels.scale_row(s, padded, args.softmax.scale);
    if (args.softmax.softcap > 0.0f) kernels.softcap_row(s, padded, args.softmax.softcap);
    if (masked) kernels.mask_row(s, keys.index, padded, static_cast<int32_t>(low), static_cast<int32_t>(p));
    const float shrink = kernels.softmax_row(s, padded, scratch.row_max + r, scratch.row_sum + r);
    float* acc = scratch.acc + r * padded_dim;
    if (shrink != 1.0f) kernels.scale_row(acc, padded_dim, shrink);
    if (key_by_key) {
      add_seen_values(args, rows, keys, s, 1, low, p, acc, scratch);
    } else if (pairs) {
      kernels.round_row(s, padded, s);
    }
  }
  if (key_by_key) return;
  if (pairs) {
    kernels.gemm_pairs(m, padded, scratch.probs, 2 * kBlockN, scratch.v_panels, padded_dim, scratch.acc, padded_dim,
                       true);
    return;
  }
  kernels.gemm(m, padded, scratch.probs, kBlockN, scratch.v_panels, padded_dim, scratch.acc, padded_dim, true);
}

// The same with scores by key, a column for each row, in an ISA that has these kernels: a strip of columns after the
// other, or all at once, and then 16 more floats from one key's scores to the next keep a column from falling into few
// sets of the cache.
void attend_tile_by_columns(const AttentionArgs& args, const Rows& rows, const Keys& keys, const Keys& next,
                            const AttentionScratch& scratch) {
  const Kernels& kernels = *args.kernels;
  const int64_t head_dim = args.head_dim, padded_dim = round_up(head_dim, kMaxPanel);
  const int64_t n = keys.n, m = rows.count(), columns = round_up(m, kMaxPanel);
  const bool pairs = uses_pairs(args), strips = uses_strips(kernels, args.k.dtype);
  const bool few = columns <= kernels.few_columns[args.k.dtype];
  const int64_t strip = strips && !few ? kernels.pair_columns : columns, lds = strips ? strip : columns + kMaxPanel;
  const KeyTile tile = key_tile(args, rows, keys);
  const bool masked = hides_keys(args, rows, keys);
  const bool scaled = args.softmax.softcap > 0.0f || args.softmax.scale <= 0.0f;  // before the softmax, not in it
  const float dot_scale = scaled ? args.softmax.scale : 1.0f, exp_scale = scaled ? 1.0f : args.softmax.scale;
  float* s = scratch.probs;
  Ahead ahead = rows_ahead(args, rows, next);
  // Where every row sees every key, no one asks whether the values are finite.
  const bool listed = args.values_in_place && !masked;
  bool finite = listed;
  float* copies = few ? nullptr : scratch.k_panels;
  if (const auto copy_keys = few ? nullptr : kernels.copy_keys[args.k.dtype]) copy_keys(tile, copies);
  for (int64_t first = 0; first < columns; first += strip) {
    const int64_t count = std::min(strip, columns - first), last = std::min(first + strip, m);
    kernels.dot_columns[args.k.dtype](tile, copies, scratch.q, first, count, dot_scale, s, lds, ahead);
    if (first == 0 && !listed) finite = pack_values(args, tile, pairs ? round_up(n, 2) : n, scratch.v_panels);
    if (args.softmax.softcap > 0.0f) {
      for (int64_t j = 0; j < n; ++j) kernels.softcap_row(s + j * lds, count, args.softmax.softcap);
    }
    if (masked) kernels.mask_columns(s, lds, tile.index, n, scratch.low + first, scratch.high + first, count);
    const bool key_by_key = (masked || pairs) && !finite;  // a probability may round to 0, which an infinity would not
    const auto softmax = pairs && !key_by_key ? kernels.softmax_column_pairs[args.v.dtype] : kernels.softmax_columns;
    softmax(s, lds, n, count, exp_scale, scratch.row_max + first, scratch.row_sum + first, scratch.shrink + first,
            ahead);
    const float* shrink = scratch.shrink;
    const bool shrinks = std::any_of(shrink + first, shrink + last, [](float factor) { return factor != 1.0f; });
    if (shrinks && (pairs || key_by_key)) {  // add_columns shrinks what it adds to
      for (int64_t r = first; r < last; ++r) {
        if (shrink[r] != 1.0f) kernels.scale_row(scratch.acc + r * padded_dim, padded_dim, shrink[r]);
      }
    }
    if (key_by_key) {
      for (int64_t r = first; r < last; ++r) {
        add_seen_values(args, rows, keys, s + r - first, lds, scratch.low[r], scratch.high[r],
                        scratch.acc + r * padded_dim, scratch);
      }
      continue;
    }
    float* acc = scratch.acc + first * padded_dim;
    if (pairs) {
      kernels.add_column_pairs[args.v.dtype](s, lds, n, scratch.v_panels, padded_dim, last - first, acc, padded_dim,
                                             ahead);
    } else if (listed) {
      kernels.add_listed_columns[args.v.dtype](s, lds, tile, last - first, shrinks ? shrink + first : nullptr, acc,
                                               padded_dim, ahead);
    } else {
      kernels.add_columns(s, lds, n, scratch.v_panels, padded_dim, last - first, shrinks ? shrink + first : nullptr,
                          acc, padded_dim, ahead);
    }
  }
}

// Packs the rows' queries, by way of scratch.acc if they are of several heads, and notes which keys each of them sees.
void load_columns(const AttentionArgs& args, const Rows& rows, const AttentionScratch& scratch) {
  const int64_t m = rows.count(), columns = round_up(m, kMaxPanel);
  const int64_t p0 = args.seqlen_k - args.seqlen_q + rows.first_query;
  const bool pairs = uses_pairs(args), copied = rows.heads > 1;
  if (copied) pairs ? copy_queries(args, rows, scratch.acc) : load_queries(args, rows, 1.0f, scratch.acc);
  const void* q = copied ? static_cast<void*>(scratch.acc) : args.q.at(rows.b, rows.first_head, rows.first_query);
  const int64_t stride = copied ? args.head_dim : args.q.row;
  if (pairs) {
    args.kernels->pack_key_pairs[args.q.dtype](q, stride, nullptr, m, columns, args.head_dim, scratch.q);
  } else {
    const int type = copied ? static_cast<int>(DType::kFloat32) : args.q.dtype;
    args.kernels->pack_keys[type](q, stride, nullptr, m, columns, args.head_dim, scratch.q);
  }
  for (int64_t r = 0; r < columns; ++r) {
    const int64_t p = p0 + std::min(r / rows.heads, rows.queries - 1);
    scratch.high[r] = static_cast<int32_t>(p);
    scratch.low[r] =
        static_cast<int32_t>(args.softmax.window > 0 ? std::max<int64_t>(-1, p - args.softmax.window) : -1);
  }
}

// What of a block sees some key of a tile; of types that AMX multiplies, all of it.
struct SeeingRows {
  Rows rows;
  AttentionScratch scratch;

  SeeingRows(const AttentionArgs& args, const Rows& block, const Keys& keys, const AttentionScratch& of_block)
      : rows(block), scratch(of_block) {
    const int64_t p0 = args.seqlen_k - args.seqlen_q + block.first_query;
    if (uses_strips(*args.kernels, args.k.dtype) || keys.least < p0 + kMaxPanel) return;
    const int64_t queries = (keys.least - p0) / kMaxPanel * kMaxPanel, first = queries * block.heads;
    rows.first_query += queries;
    rows.queries -= queries;
    scratch.q += first * args.head_dim / (uses_pairs(args) ? 2 : 1);
    scratch.acc += first * round_up(args.head_dim, kMaxPanel);
    scratch.row_max += first;
    scratch.row_sum += first;
    scratch.shrink += first;
    scratch.low += first;
    scratch.high += first;
  }
};

void attend_rows(const AttentionArgs& args, const Rows& rows, RunList runs, const AttentionScratch& scratch) {
  const bool by_columns = args.kernels->dot_columns[args.k.dtype] != nullptr;
  const int64_t padded_dim = round_up(args.head_dim, kMaxPanel);
  const int64_t p0 = args.seqlen_k - args.seqlen_q + rows.first_query;
  if (by_columns) {
    load_columns(args, rows, scratch);
  } else if (uses_pairs(args)) {
    copy_queries(args, rows, scratch.q);
  } else {
    load_queries(args, rows, args.softmax.scale, scratch.q);
  }
  const int64_t padded_rows = round_up(rows.count(), kMaxPanel);
  std::fill_n(scratch.acc, rows.count() * padded_dim, 0.0f);
  std::fill_n(scratch.row_max, padded_rows, -kInfinity);
  std::fill_n(scratch.row_sum, padded_rows, 0.0f);
  KeyCursor cursor = visible_keys(args, runs, p0, p0 + rows.queries - 1);
  const bool between = uses_pairs(args) && args.kernels->begin_block != nullptr;
  if (between) args.kernels->begin_block();
  const int64_t step = keys_of_tile(*args.kernels, args.k.dtype);
  const int64_t late_step = step > kBlockN ? step : kLateKeys;
  Keys keys{scratch.index, 0, 0, 0}, next{scratch.next_index, 0, 0, 0};
  for (keys.take(cursor, step); keys.n > 0; std::swap(keys, next)) {
    next.take(cursor, keys.most >= p0 - 1 ? late_step : step);
    const SeeingRows seeing(args, rows, keys, scratch);
    by_columns ? attend_tile_by_columns(args, seeing.rows, keys, next, seeing.scratch)
               : attend_tile(args, seeing.rows, keys, seeing.scratch);
  }
  if (between) args.kernels->end_block();
  for (int64_t r = 0; r < rows.count(); ++r) {
    finish_row(args, rows.b, rows.first_head + r % rows.heads, rows.first_query + r / rows.heads, scratch.row_max[r],
               scratch.row_sum[r], scratch.acc + r * padded_dim);
  }
}

void attend_query(const AttentionArgs& args, const Rows& rows, KeyCursor keys, int64_t count, float* row_max,
                  float* row_sum, float* acc, const AttentionScratch& scratch) {
  const Kernels& kernels = *args.kernels;
  const char *k = args.k.at(rows.b, rows.kv_head, 0), *v = args.v.at(rows.b, rows.kv_head, 0);
  const auto dot_stored_rows = kernels.dot_stored_rows[args.k.dtype];
  dot_stored_rows ? copy_queries(args, rows, scratch.q) : load_queries(args, rows, args.softmax.scale, scratch.q);
  std::fill_n(acc, rows.heads * args.head_dim, 0.0f);
  std::fill_n(row_max, rows.heads, -kInfinity);
  std::fill_n(row_sum, rows.heads, 0.0f);
  const int64_t step = std::min(kQueryKeys, args.max_rows / rows.heads * kBlockN);
  // A run's first lines are asked for while others are worked on; memory reads ahead along the run by itself.
  const auto prefetch = [k, v, k_row = args.k.row_bytes, v_row = args.v.row_bytes](int32_t key, int32_t) {
    __builtin_prefetch(k + key * k_row);
    __builtin_prefetch(k + key * k_row + 64);
    __builtin_prefetch(v + key * v_row);
    __builtin_prefetch(v + key * v_row + 64);
  };
  while (const int64_t n = keys.next(scratch.index, std::min(step, count), prefetch)) {
    const int64_t padded = round_up(n, kMaxPanel);
    count -= n;
    if (dot_stored_rows) {
      dot_stored_rows(scratch.q, rows.heads, k, args.k.row, scratch.index, n, args.head_dim, scratch.probs, step);
    } else {
      kernels.dot_rows[args.k.dtype](scratch.q, rows.heads, k, args.k.row, scratch.index, n, args.head_dim,
                                     scratch.probs, step);
    }
    for (int64_t h = 0; h < rows.heads; ++h) {
      float* s = scratch.probs + h * step;
      std::fill(s + n, s + padded, 0.0f);
      if (dot_stored_rows) kernels.scale_row(s, padded, args.softmax.scale);
      if (args.softmax.softcap > 0.0f) kernels.softcap_row(s, padded, args.softmax.softcap);
      std::fill(s + n, s + padded, -kInfinity);
      const float shrink = kernels.softmax_row(s, padded, row_max + h, row_sum + h);
      if (shrink != 1.0f) kernels.scale_row(acc + h * args.head_dim, args.head_dim, shrink);
    }
    kernels.add_weighted_rows[args.v.dtype](scratch.probs, step, rows.heads, v, args.v.row, scratch.index, n,
                                            args.head_dim, acc);
  }
}

}  // namespace

// Queries, sums and scores of so many rows lie in seven eighths of the core's caches, beside a tile's keys and values,
// as they are stored and as they are packed. Where strips of rows share copies of keys, up to 512 pay.
int64_t rows_at_once(const Kernels& kernels, DType type, int64_t head_dim) {
  const int index = static_cast<int>(type);
  const bool strips = uses_strips(kernels, index);
  const int64_t packed = uses_pairs(kernels, index) ? sizeof(uint16_t) : sizeof(float);
  const int64_t padded_dim = round_up(head_dim, kMaxPanel), scores = strips ? 0 : kBlockN;
  const int64_t tile = 2 * keys_of_tile(kernels, index) * padded_dim * (packed + element_size(type));
  const int64_t row = padded_dim * packed + (padded_dim + scores) * sizeof(float);
  return std::clamp<int64_t>((caches().share / 8 * 7 - tile) / row / 64 * 64, strips ? 256 : 64, strips ? 512 : 256);
}

void finish_row(const AttentionArgs& args, int64_t b, int64_t head, int64_t query, float row_max, float row_sum,
                const float* acc) {
  const bool empty = row_sum == 0.0f;
  args.kernels->store_row[args.out.dtype](acc, empty ? 0.0f : 1.0f / row_sum, args.head_dim,
                                          args.out.at(b, head, query));
  args.lse[b * args.lse_batch + head * args.lse_head + query * args.lse_row] =
      empty ? -kInfinity : row_max + std::log(row_sum);
}

void attend_part(const AttentionArgs& args, int64_t b, int64_t group, int64_t query, RunList runs, int64_t first_rank,
                 int64_t last_rank, float* row_max, float* row_sum, float* acc, const AttentionScratch& scratch) {
  const int64_t heads = args.heads.heads(), p = args.seqlen_k - args.seqlen_q + query;
  for (int64_t h = 0; h < heads; h += args.max_rows) {
    const Rows rows{b, group * heads + h, std::min(args.max_rows, heads - h), query, 1, args.heads.kv_head(group)};
    KeyCursor keys = visible_keys(args, runs, p, p);
    keys.skip(first_rank);
    attend_query(args, rows, keys, last_rank - first_rank, row_max + h, row_sum + h, acc + h * args.head_dim, scratch);
  }
}

void attend_block(const AttentionArgs& args, int64_t b, int64_t group, const Block& block, RunList runs,
                  const AttentionScratch& scratch) {
  const int64_t heads = args.heads.heads(), kv_head = args.heads.kv_head(group);
  const int64_t head_step = std::min(heads, args.max_rows), query_step = args.max_rows / head_step;
  for (int64_t h = 0; h < heads; h += head_step) {
    for (int64_t i = block.first; i <= block.last; i += query_step) {
      const Rows rows{
          b, group * heads + h, std::min(head_step, heads - h), i, std::min(query_step, block.last + 1 - i), kv_head};
      if (rows.queries > 1) {
        attend_rows(args, rows, runs, scratch);
        continue;
      }
      const int64_t p = args.seqlen_k - args.seqlen_q + i;
      attend_query(args, rows, visible_keys(args, runs, p, p), args.seqlen_k, scratch.row_max, scratch.row_sum,
                   scratch.acc, scratch);
      for (int64_t r = 0; r < rows.heads; ++r) {
        finish_row(args, b, rows.first_head + r, i, scratch.row_max[r], scratch.row_sum[r],
                   scratch.acc + r * args.head_dim);
      }
    }
  }
}

int64_t workspace_bytes(const SparseAttention& p, int workers) {
  return workers * scratch_bytes<AttentionScratch>(active_kernels(), p.k.dtype, p.q.shape[3]);
}

void run(const SparseAttention& p, void* workspace, const Executor& executor) {
  const int64_t lists = p.runs.shape[1], blocks = p.runs.shape[2], capacity = p.runs.shape[3];
  const AttentionArgs args(active_kernels(), p, lists);
  const int64_t groups = args.heads.groups();
  executor.run(p.q.shape[0] * groups * blocks, [&](int64_t item, int worker) {
    const int64_t b = item / (groups * blocks), group = item / blocks % groups, j = item % blocks;
    const int64_t list = (b * lists + args.heads.list(group)) * blocks + j;
    const int64_t count = std::clamp<int64_t>(p.num_runs.as<const int32_t>()[list], 0, capacity);
    attend_block(args, b, group, Block(j, p.q_block, args.seqlen_q, args.seqlen_k, p.softmax.window),
                 {p.runs.as<const int32_t>() + list * capacity * 2, count},
                 worker_scratch<AttentionScratch>(workspace, worker, *args.kernels, p.k.dtype, p.q.shape[3]));
  });
}

}  // namespace dhsa::cpu
