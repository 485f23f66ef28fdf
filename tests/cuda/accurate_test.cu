// The accurate mode on the GPU: chunk_mass and refine_keys against float64 twins on the host, the fused calls against
// their stages, and times.
//   accurate_test [all | small | time | profile | list] [a test's name, a length or decode]
// small: shapes for compute-sanitizer; profile: one call of each stage, for ncu; list: the names of small's tests
#include <set>

#include "core/half.h"
#include "cuda/router.h"
#include "router_reference.h"

namespace dhsa::test {
namespace {

bool small_run = false;

struct Shape {
  int64_t batch, heads, heads_kv, lists, seqlen_q, seqlen_k, dim, q_block, q_stride;
  int64_t window = 0;
  float softcap = 0;
  QueryRows rows = QueryRows::kSample;
};

std::string name_of(const Shape& s, DType dtype) {
  char text[200];
  std::snprintf(text, sizeof(text), "B%ld H%ld/%ld S%ld L%ld/%ld D%ld q_block %ld/%ld%s window %ld softcap %g dtype %d",
                s.batch, s.heads, s.heads_kv, s.lists, s.seqlen_q, s.seqlen_k, s.dim, s.q_block, s.q_stride,
                s.rows == QueryRows::kMean ? " means" : "", s.window, s.softcap, static_cast<int>(dtype));
  return text;
}

// Everything that the two stages read and write.
struct Problem {
  Shape shape;
  DType dtype;
  Input q, k;
  int64_t capacity, blocks, samples;
  std::vector<int> offsets, counts;
  std::vector<float> means;
  Array<int> d_offsets, d_counts;
  Array<float> d_means, scores, row_lse;
  ChunkMass mass;

  Problem(const Shape& s, DType dtype, Layout layout, int64_t longest = 40, bool tail = true)
      : shape(s),
        dtype(dtype),
        q(s.batch, s.heads, s.seqlen_q, s.dim, dtype, layout),
        k(s.batch, s.heads_kv, s.seqlen_k, s.dim, dtype, layout),
        capacity(std::max<int64_t>(s.seqlen_k / 3, 3)),
        blocks(cuda::ceil_div(s.seqlen_q, s.q_block)),
        samples(cuda::ceil_div(s.q_block, s.q_stride)),
        d_offsets(s.batch, capacity + 1),
        d_counts(s.batch),
        d_means(s.batch, s.lists, capacity, s.dim),
        scores(s.batch, s.lists, blocks, capacity),
        row_lse(s.batch, s.heads, blocks, samples) {
    for (int64_t b = 0; b < s.batch; ++b) {
      const int64_t covered = tail && s.seqlen_k > 0 ? random_int(s.seqlen_k / 2, s.seqlen_k) : s.seqlen_k;
      int count = 0;
      std::vector<int> row = random_offsets(covered, s.seqlen_k, capacity, longest, &count);
      offsets.insert(offsets.end(), row.begin(), row.end()), counts.push_back(count);
    }
    for (double x : chunk_pool(k, offsets, counts, s.lists, PoolScale::kMean)) means.push_back(static_cast<float>(x));
    d_offsets.set(offsets), d_counts.set(counts), d_means.set(means);
    mass.q = q.view, mass.k_mean = d_means.view, mass.offsets = d_offsets.view, mass.num_chunks = d_counts.view;
    mass.seqlen_k = s.seqlen_k, mass.q_block = s.q_block, mass.q_stride = s.q_stride;
    mass.rows = s.rows;
    mass.softmax = {static_cast<float>(1 / std::sqrt(static_cast<double>(s.dim))), s.softcap, s.window};
    mass.scores = scores.view, mass.row_lse = row_lse.view;
  }
  int64_t p0(int64_t block) const { return shape.seqlen_k - shape.seqlen_q + block * shape.q_block; }
  int64_t last_query(int64_t block) const { return std::min(shape.seqlen_q, (block + 1) * shape.q_block) - 1; }
  int64_t p1(int64_t block) const { return shape.seqlen_k - shape.seqlen_q + last_query(block); }
  // Row i of block j, counted back from its last; empty: the block has none.
  std::vector<double> row(int64_t b, int64_t h, int64_t j, int64_t i) const {
    const int64_t last = last_query(j) - i * shape.q_stride, begin = j * shape.q_block;
    if (last < begin) return {};
    const int64_t first = shape.rows == QueryRows::kMean ? std::max(last - shape.q_stride + 1, begin) : last;
    std::vector<double> row(shape.dim);
    for (int64_t d = 0; d < shape.dim; ++d) {
      float sum = 0;
      for (int64_t query = first; query <= last; ++query) sum += static_cast<float>(q.at(b, h, query, d));
      const float mean = sum / static_cast<float>(last - first + 1);
      row[d] = dtype == DType::kFloat16    ? float_from_half(half_from_float(mean))
               : dtype == DType::kBFloat16 ? float_from_bfloat16(bfloat16_from_float(mean))
                                           : mean;
    }
    return row;
  }
  double logit(double dot) const {
    const double s = mass.softmax.scale * dot;
    return shape.softcap > 0 ? shape.softcap * std::tanh(s / shape.softcap) : s;
  }
};

// chunk_mass by its definition. strict: the chunk that holds p1 ends at p1 + 1.
void reference_mass(const Problem& x, bool strict, std::vector<double>* scores, std::vector<double>* row_lse) {
  const Shape& s = x.shape;
  const int64_t per_list = s.heads / s.lists;
  scores->assign(s.batch * s.lists * x.blocks * x.capacity, 0);
  row_lse->assign(s.batch * s.heads * x.blocks * x.samples, INFINITY);
  for (int64_t b = 0; b < s.batch; ++b)
    for (int64_t list = 0; list < s.lists; ++list)
      for (int64_t j = 0; j < x.blocks; ++j) {
        const int* o = x.offsets.data() + b * (x.capacity + 1);
        std::vector<double> z(x.capacity), sizes(x.capacity);
        std::vector<std::vector<double>> means(x.capacity);
        for (int c = 0; c < x.counts[b]; ++c) {
          const bool held = o[c] < o[c + 1] && o[c] <= x.p1(j) && (s.window == 0 || o[c + 1] > x.p0(j) - s.window + 1);
          const bool cut = strict && held && o[c + 1] > x.p1(j) + 1;
          sizes[c] = held ? (cut ? x.p1(j) + 1 : o[c + 1]) - o[c] : 0;
          const float* mean = x.means.data() + ((b * s.lists + list) * x.capacity + c) * s.dim;
          means[c].assign(mean, mean + s.dim);
          if (cut) means[c] = pooled_row(x.k, b, list, s.lists, o[c], x.p1(j) + 1, PoolScale::kMean);
        }
        int64_t rows = 0;
        double* out = scores->data() + ((b * s.lists + list) * x.blocks + j) * x.capacity;
        for (int64_t h = list * per_list; h < (list + 1) * per_list; ++h)
          for (int64_t i = 0; i < x.samples; ++i) {
            const std::vector<double> row = x.row(b, h, j, i);
            if (row.empty()) continue;
            ++rows;
            double top = kMinusInf, sum = 0;
            for (int c = 0; c < x.counts[b]; ++c) {
              double dot = 0;
              for (int64_t d = 0; d < s.dim; ++d) dot += row[d] * means[c][d];
              z[c] = sizes[c] > 0 ? x.logit(dot) + std::log(sizes[c]) : kMinusInf;
              if (!std::isfinite(z[c])) z[c] = kMinusInf;
              top = std::max(top, z[c]);
            }
            if (top > kMinusInf)
              for (int c = 0; c < x.counts[b]; ++c) sum += std::exp(z[c] - top);
            for (int c = 0; c < x.counts[b] && sum > 0; ++c) {
              if (z[c] > kMinusInf) out[c] += std::exp(z[c] - top) / sum / sizes[c];
            }
            (*row_lse)[((b * s.heads + h) * x.blocks + j) * x.samples + i] = sum > 0 ? top + std::log(sum) : kMinusInf;
          }
        for (int c = 0; c < x.counts[b]; ++c) out[c] /= std::max<int64_t>(rows, 1);
      }
}

void check_mass(Problem& x, const std::string& what) {
  x.scores.buffer.poison(), x.row_lse.buffer.poison();
  run_stage(x.mass, what);
  std::vector<double> scores, row_lse;
  reference_mass(x, false, &scores, &row_lse);
  const std::vector<float> got = x.scores.get();
  expect_scores(got, scores, what + ": scores");
  expect_scores(x.row_lse.get(), row_lse, what + ": row_lse");
  double worst = 0;  // against the block's largest score: mass is spread thin
  for (size_t list = 0; list < scores.size() / std::max<int64_t>(x.capacity, 1); ++list) {
    const double* row = scores.data() + list * x.capacity;
    const double largest = *std::max_element(row, row + x.capacity);
    for (int64_t c = 0; c < x.capacity; ++c) {
      const double error = std::fabs(got[list * x.capacity + c] - row[c]) / (1e-4 * largest + 1e-30);
      worst = error <= worst ? worst : std::isnan(error) ? INFINITY : error;
    }
  }
  expect(worst <= 1, what + ": scores off by " + std::to_string(worst) + " of 1e-4 of the largest");
  expect(x.scores.buffer.guard_intact() && x.row_lse.buffer.guard_intact(), what + ": wrote past an output");
}

const std::vector<Shape>& shapes() {
  static const std::vector<Shape> all = [] {
    std::vector<Shape> sampled = {
        {1, 4, 1, 1, 64, 64, 64, 64, 8},
        {2, 8, 2, 2, 200, 200, 128, 64, 8},
        {1, 8, 2, 1, 130, 300, 128, 64, 8},
        {1, 8, 2, 8, 130, 300, 128, 32, 8},
        {1, 6, 2, 2, 77, 333, 96, 16, 5},
        {1, 4, 1, 1, 150, 150, 256, 64, 8, 70, 0},
        {1, 4, 4, 4, 300, 300, 64, 128, 8, 0, 20.0f},
        {1, 8, 4, 4, 257, 700, 128, 64, 8, 130, 30.0f},
        {1, 4, 2, 2, 90, 40, 64, 32, 8},      // some queries before the first key
        {1, 16, 4, 4, 2, 500, 128, 1, 1},     // decode
        {2, 4, 2, 1, 16, 333, 64, 1, 1, 50},  //
        {1, 16, 1, 1, 300, 300, 64, 64, 1},   // 1,024 rows a block
        {1, 4, 2, 2, 1, 1, 64, 64, 8},
        {1, 4, 2, 2, 0, 64, 64, 64, 8},
        {1, 4, 2, 2, 64, 0, 64, 64, 8},
        {1, 8, 2, 2, 300, 5000, 128, 64, 8},  // two splits of chunks
        // From 256 rows a list on the tensor cores take chunk_mass:
        {1, 8, 2, 2, 700, 900, 128, 64, 8},            // four octets of rows a block
        {2, 8, 2, 2, 530, 530, 64, 64, 8, 90, 25.0f},  //
        {1, 6, 2, 2, 900, 400, 96, 64, 8},             // three octets; queries before the first key
        {1, 4, 4, 4, 2100, 2100, 128, 64, 8, 300},     // one octet
        {1, 8, 4, 4, 280, 380, 256, 16, 1},            // a block fills half a warpgroup's 64 rows
        {1, 16, 1, 1, 200, 390, 256, 64, 8},           // a block spans both warpgroups of a tile
        {1, 32, 1, 1, 100, 350, 128, 32, 4, 60},       // and at head_dim 128
        {1, 16, 2, 2, 130, 6000, 64, 32, 2},           // few tiles: chunks in splits
        {1, 8, 2, 2, 700, 900, 128, 64, 16},           // two octets
        {1, 4, 1, 1, 1090, 1090, 256, 64, 16},         //
        {1, 8, 2, 2, 1100, 1300, 128, 128, 64},        // one octet, as the accurate preset has on long prompts
        {2, 8, 2, 2, 1100, 1100, 256, 64, 32},
    };
    std::vector<Shape> both = sampled;
    for (Shape shape : sampled) {
      shape.rows = QueryRows::kMean;
      if (shape.q_stride > 1) both.push_back(shape);
    }
    return both;
  }();
  return all;
}

constexpr DType kDTypes[] = {DType::kBFloat16, DType::kFloat16, DType::kFloat32};

void test_mass() {
  for (const Shape& s : shapes()) {
    if (small_run && s.seqlen_k > 400) continue;
    for (DType dtype : kDTypes) {
      const Layout layout = random_int(0, 1) ? Layout::kHeadsFirst : Layout::kTokensFirst;
      Problem x(s, dtype, layout, s.seqlen_k > 1000 ? 4 : 40);
      check_mass(x, "chunk_mass " + name_of(s, dtype));
    }
  }
}

// Means of any size, and means and queries that are NaN or infinite.
void test_mass_of_odd_values() {
  for (DType dtype : kDTypes) {
    Problem x({1, 8, 2, 2, 128, 128, 64, 64, 8}, dtype, Layout::kHeadsFirst, 12, false);
    for (int64_t c = 0; c < x.counts[0]; ++c) {
      const float factor = c % 5 == 0 ? 1e-6f : c % 5 == 1 ? 3e4f : 1.0f;
      for (int64_t d = 0; d < 64; ++d) x.means[c * 64 + d] *= factor;
    }
    x.means[3 * 64 + 5] = NAN, x.means[4 * 64 + 63] = INFINITY;
    x.d_means.set(x.means);
    x.mass.softmax.scale = 1e-5f;  // the largest logits stay near 10
    check_mass(x, "chunk_mass of odd means, dtype " + std::to_string(static_cast<int>(dtype)));
  }
  Problem x({1, 8, 2, 2, 64, 128, 64, 64, 8}, DType::kBFloat16, Layout::kHeadsFirst, 12, false);
  std::vector<__nv_bfloat16> q;
  for (float value : x.q.host) q.push_back(__float2bfloat16(value));
  const size_t row = 63 * 64;  // head 0's last query: a sampled row
  q[row + 7] = __float2bfloat16(NAN), x.q.host[row + 7] = NAN;
  x.q.buffer.upload(q);
  check_mass(x, "chunk_mass of a NaN query");
}

// What the tensor cores' logsumexp guesses wrong: logits far above and far below those of the first chunks, rows that
// one chunk takes whole, products that overflow float32, and rows with a NaN or an infinity.
void test_mass_of_odd_rows() {
  for (DType dtype : {DType::kBFloat16, DType::kFloat16}) {
    const std::string type = ", dtype " + std::to_string(static_cast<int>(dtype));
    for (float scale : {2.0f, -1.0f, 1e-6f}) {
      Problem x({1, 8, 2, 2, 600, 900, 64, 64, 8}, dtype, Layout::kHeadsFirst, 12, false);
      x.mass.softmax.scale = scale;
      check_mass(x, "chunk_mass of scale " + std::to_string(scale) + type);
    }
    for (bool later : {false, true}) {  // the chunk that the reference is taken from, or one that it does not know
      Problem x({1, 8, 2, 2, 600, 900, 64, 64, 8}, dtype, Layout::kHeadsFirst, 12, false);
      for (int64_t list = 0; list < 2; ++list)
        for (int64_t d = 0; d < 64; ++d) x.means[(list * x.capacity + (later ? 20 : 0)) * 64 + d] *= 300;
      x.d_means.set(x.means);
      check_mass(x, std::string("chunk_mass of one heavy chunk, ") + (later ? "late" : "first") + type);
    }
    Problem x({1, 8, 2, 2, 600, 900, 64, 64, 8}, dtype, Layout::kHeadsFirst, 12, false);
    const auto set_row = [&](int64_t head, int64_t query, float value) {
      for (int64_t d = 0; d < 64; d += 13) x.q.host[(head * 600 + query) * 64 + d] = value;
    };
    set_row(0, 63, NAN), set_row(3, 127, INFINITY), set_row(5, 191, 0.0f), set_row(6, 255, 6e4f);
    if (dtype == DType::kBFloat16) {
      std::vector<__nv_bfloat16> q;
      for (float& value : x.q.host) q.push_back(__float2bfloat16(value)), value = __bfloat162float(q.back());
      x.q.buffer.upload(q);
    } else {
      std::vector<__half> q;
      for (float& value : x.q.host) q.push_back(__float2half(value)), value = __half2float(q.back());
      x.q.buffer.upload(q);
    }
    x.mass.softmax.scale = 1e-3f;
    check_mass(x, "chunk_mass of odd rows" + type);
  }
}

// The kept keys of refine_keys, and the second scores of the candidates (-1: not on the short list).
std::set<int> reference_refine(const Problem& x, const RefineKeys& stage, const float* chunk_scores,
                               const float* row_lse, int64_t b, int64_t list, int64_t j, std::vector<double>* second) {
  const Shape& s = x.shape;
  const int* o = x.offsets.data() + b * (x.capacity + 1);
  KeyChoice none = stage.choice;
  none.budget = 0;  // the forced keys alone
  const std::vector<int> forced = kept_keys(chunk_scores, o, x.counts[b], s.seqlen_q, s.seqlen_k, s.q_block, j, none);
  std::set<int> kept(forced.begin(), forced.end());
  second->assign(s.seqlen_k, -1);
  const auto with_budget = [&](int64_t budget) {
    KeyChoice choice = stage.choice;
    choice.budget = budget;
    return kept_keys(chunk_scores, o, x.counts[b], s.seqlen_q, s.seqlen_k, s.q_block, j, choice);
  };
  const bool dense = stage.choice.dense_tail > 0 && x.last_query(j) >= s.seqlen_q - stage.choice.dense_tail;
  const int64_t spare = std::max<int64_t>(stage.choice.budget - static_cast<int64_t>(forced.size()), 0);
  const std::vector<int> short_list = with_budget(forced.size() + stage.refine * spare);
  if (dense) return {short_list.begin(), short_list.end()};
  std::vector<int> order;
  const int64_t per_list = s.heads / s.lists, group = s.heads / s.heads_kv;
  std::vector<std::vector<double>> rows;
  for (int64_t h = list * per_list; h < (list + 1) * per_list; ++h)
    for (int64_t i = 0; i < x.samples; ++i) rows.push_back(x.row(b, h, j, i));
  for (int key : short_list) {
    if (kept.count(key)) continue;
    order.push_back(key);
    double sum = 0;
    if (row_lse == nullptr) {
      const std::vector<double> pooled =
          pooled_row(x.q, b, list, s.lists, j * s.q_block, x.last_query(j) + 1, PoolScale::kSqrt);
      const std::vector<double> reduced = pooled_row(x.k, b, list, s.lists, key, key + 1, PoolScale::kSum);
      for (int64_t d = 0; d < s.dim; ++d) sum += pooled[d] * reduced[d];
    } else {
      for (int64_t h = list * per_list; h < (list + 1) * per_list; ++h)
        for (int64_t i = 0; i < x.samples; ++i) {
          const std::vector<double>& row = rows[(h - list * per_list) * x.samples + i];
          if (row.empty()) continue;
          double dot = 0;
          for (int64_t d = 0; d < s.dim; ++d) dot += row[d] * x.k.at(b, h / group, key, d);
          const double lse = row_lse[((b * s.heads + h) * x.blocks + j) * x.samples + i];
          sum += std::min(1.0, std::exp(x.logit(dot) - lse));
        }
    }
    (*second)[key] = sum;
  }
  std::stable_sort(order.begin(), order.end(), [&](int m, int n) { return (*second)[m] > (*second)[n]; });
  for (size_t i = 0; i < order.size() && static_cast<int64_t>(i) < spare; ++i) kept.insert(order[i]);
  return kept;
}

void check_refine(Problem& x, int64_t budget, int64_t refine, bool pooled, KeyChoice choice, const std::string& what) {
  const Shape& s = x.shape;
  RefineKeys stage;
  stage.q = x.q.view, stage.k = x.k.view, stage.chunk_scores = x.scores.view;
  if (!pooled) stage.row_lse = x.row_lse.view;
  stage.offsets = x.d_offsets.view, stage.num_chunks = x.d_counts.view;
  stage.q_block = s.q_block, stage.refine = refine, stage.q_stride = s.q_stride, stage.rows = s.rows;
  stage.choice = choice, stage.choice.budget = budget, stage.choice.window = s.window;
  stage.softmax = x.mass.softmax;
  const int64_t capacity = refined_run_capacity(s.seqlen_k, budget);
  Array<int> runs(s.batch, s.lists, x.blocks, capacity, 2), num_runs(s.batch, s.lists, x.blocks);
  stage.runs = runs.view, stage.num_runs = num_runs.view;
  run_stage(stage, what);
  expect(runs.buffer.guard_intact() && num_runs.buffer.guard_intact(), what + ": wrote past an output");
  const std::vector<int> got_runs = runs.get(), got_num = num_runs.get();
  const std::vector<float> scores = x.scores.get(), row_lse = x.row_lse.get();
  int64_t differing = 0;
  for (int64_t b = 0; b < s.batch; ++b)
    for (int64_t list = 0; list < s.lists; ++list)
      for (int64_t j = 0; j < x.blocks; ++j) {
        const int64_t index = (b * s.lists + list) * x.blocks + j;
        std::vector<double> second;
        const std::set<int> want = reference_refine(x, stage, scores.data() + index * x.capacity,
                                                    pooled ? nullptr : row_lse.data(), b, list, j, &second);
        std::vector<int> keys;
        const int* run = got_runs.data() + index * capacity * 2;
        for (int r = 0; r < std::min<int64_t>(std::max(got_num[index], 0), capacity); ++r)
          for (int key = std::max(run[2 * r], 0); key < std::min<int64_t>(run[2 * r + 1], s.seqlen_k); ++key)
            keys.push_back(key);
        std::vector<int> canonical(2 * capacity);
        const int count = write_runs(keys, capacity, canonical.data());
        const bool is_canonical = count == got_num[index] && std::equal(canonical.begin(), canonical.end(), run);
        expect(is_canonical, what + ": list " + std::to_string(index) + " is not canonical");
        const std::set<int> got(keys.begin(), keys.end());
        if (got == want) continue;
        ++differing;
        double largest = 0, lost = -INFINITY, won = INFINITY;
        bool listed = got.size() == want.size();
        for (double score : second) largest = std::max(largest, std::fabs(score));
        for (int key : want)
          if (!got.count(key)) lost = std::max(lost, second[key]);
        for (int key : got)
          if (!want.count(key)) won = std::min(won, second[key]), listed &= pooled || second[key] >= 0;
        expect(listed && lost - won <= 2e-4 * largest,
               what + ": list " + std::to_string(index) + " keeps " + std::to_string(got.size()) + " of " +
                   std::to_string(want.size()) + " keys, off by " + std::to_string((lost - won) / largest));
      }
  expect(differing * 10 <= s.batch * s.lists * x.blocks + 10, what + ": near ties in too many lists");
}

void test_refine() {
  for (const Shape& s : shapes()) {
    if (small_run && s.seqlen_k > 400) continue;
    if (s.seqlen_k == 0) continue;
    for (DType dtype : kDTypes)
      for (bool pooled : {false, true}) {
        if (small_run && pooled && dtype == DType::kFloat16) continue;
        Problem x(s, dtype, random_int(0, 1) ? Layout::kHeadsFirst : Layout::kTokensFirst, 24);
        run_stage(x.mass, "chunk_mass for refine_keys");
        KeyChoice choice;
        choice.sink = std::min<int64_t>(4, s.seqlen_k), choice.local = std::min<int64_t>(8, s.seqlen_k);
        const int64_t least = choice.sink + choice.local + std::min(s.q_block, s.seqlen_q) - 1;
        for (int64_t refine : {1, 3}) {
          choice.dense_tail = refine == 3 && !pooled ? 5 : 0;
          check_refine(x, least + random_int(0, 40), refine, pooled, choice,
                       "refine_keys " + name_of(s, dtype) + (pooled ? " pooled" : " rows") + " refine " +
                           std::to_string(refine));
        }
      }
  }
}

// Tied scores: the lower index wins, exactly.
void test_refine_ties() {
  Problem x({1, 4, 2, 2, 64, 400, 64, 16, 4}, DType::kBFloat16, Layout::kHeadsFirst, 24);
  run_stage(x.mass, "chunk_mass for ties");
  std::vector<float> infinite(x.row_lse.get().size(), -INFINITY);  // min(1, exp(s + inf)) = 1 for every key
  x.row_lse.set(infinite);
  KeyChoice choice;
  choice.sink = 2, choice.local = 4;
  check_refine(x, 60, 3, false, choice, "refine_keys of tied scores");
}

// A short list of more than one tile of 8,192 entries, and more chunks than one tile.
void test_long_refine() {
  Shape s = {1, 4, 2, 2, 64, 40000, 64, 64, 8};
  Problem x(s, DType::kBFloat16, Layout::kHeadsFirst, 4);
  run_stage(x.mass, "chunk_mass of many chunks");
  KeyChoice choice;
  check_refine(x, 6000, 3, false, choice, "refine_keys of 17,000 candidates");
}

void test_malformed_offsets() {
  for (int trial = 0; trial < 12; ++trial) {
    const DType dtype = kDTypes[trial % 3];
    Problem x({1, 8, 2, 2, 256, 256, 64, 64, 8}, dtype, Layout::kHeadsFirst, 24);
    for (int& o : x.offsets) o = static_cast<int>(random_int(-1000, 1000));
    x.d_offsets.set(x.offsets), x.d_counts.set({static_cast<int>(trial % 2 ? 100000 : random_int(-5, 90))});
    run_stage(x.mass, "chunk_mass of malformed offsets");
    RefineKeys stage;
    stage.q = x.q.view, stage.k = x.k.view, stage.chunk_scores = x.scores.view, stage.row_lse = x.row_lse.view;
    stage.offsets = x.d_offsets.view, stage.num_chunks = x.d_counts.view, stage.refine = 3;
    stage.choice.sink = 4, stage.choice.local = 8, stage.choice.budget = 100, stage.softmax = x.mass.softmax;
    Array<int> runs(1, 2, 4, 100, 2), num_runs(1, 2, 4);
    stage.runs = runs.view, stage.num_runs = num_runs.view;
    run_stage(stage, "refine_keys of malformed offsets");
    expect(runs.buffer.guard_intact() && num_runs.buffer.guard_intact() && x.scores.buffer.guard_intact(),
           "malformed offsets: wrote past an output");
    for (int n : num_runs.get()) expect(n >= 0 && n <= 100, "malformed offsets: num_runs out of range");
  }
}

// --- The fused calls -------------------------------------------------------------------------------------------------

struct Attended {
  Array<float> lse;
  Buffer out;
  Tensor view;
  Attended(const Input& q)
      : lse(q.batch, q.heads, q.length), out(q.batch * q.heads * q.length * q.dim * element_size(q.view.dtype)) {
    view = cuda::contiguous(out.data(), q.view.dtype, q.batch, q.heads, q.length, q.dim);
  }
};

// The share of rows whose lse agrees to 1e-3: blocks with a near tie may keep other keys.
double agreeing_rows(const std::vector<float>& x, const std::vector<float>& y) {
  size_t same = 0;
  for (size_t i = 0; i < x.size(); ++i) same += x[i] == y[i] || std::fabs(x[i] - y[i]) <= 1e-3;
  return x.empty() ? 1 : static_cast<double>(same) / x.size();
}

// sparse_prefill with given chunks against host chunk_mass (strict or not) -> refine_keys or select_keys -> attention.
void test_prefill_equals_its_stages() {
  for (const Shape& s : shapes()) {
    if (s.seqlen_k == 0 || s.seqlen_q == 0 || s.q_block == 1 || (small_run && s.seqlen_k > 400)) continue;
    for (DType dtype : kDTypes)
      for (int variant = 0; variant < 5; ++variant) {
        if (small_run && variant > 1) continue;
        const bool strict = variant % 2 == 1, mass = variant < 4;
        const int64_t refine = variant < 2 || variant == 4 ? 3 : 0;
        const std::string what = "prefill " + name_of(s, dtype) + " variant " + std::to_string(variant);
        Problem x(s, dtype, Layout::kTokensFirst, 24);
        Input v(s.batch, s.heads_kv, s.seqlen_k, s.dim, dtype, Layout::kTokensFirst);
        KeyChoice choice;
        choice.sink = std::min<int64_t>(4, s.seqlen_k), choice.local = std::min<int64_t>(8, s.seqlen_k);
        choice.window = s.window;
        choice.budget = choice.sink + choice.local + std::min(s.q_block, s.seqlen_q) + 40;

        Attended whole(x.q), staged(x.q);
        SparsePrefill prefill;
        prefill.q = x.q.view, prefill.k = x.k.view, prefill.v = v.view, prefill.q_block = s.q_block;
        prefill.select_heads = s.lists, prefill.score = mass ? ChunkScore::kMass : ChunkScore::kDot;
        prefill.refine = refine, prefill.q_stride = s.q_stride, prefill.rows = s.rows;
        prefill.choice = choice, prefill.strict = strict;
        prefill.offsets = x.d_offsets.view, prefill.num_chunks = x.d_counts.view, prefill.softmax = x.mass.softmax;
        prefill.threshold = -INFINITY, prefill.out = whole.view, prefill.lse = whole.lse.view;
        run_stage(prefill, what);
        expect(whole.out.guard_intact() && whole.lse.buffer.guard_intact(), what + ": wrote past an output");

        if (mass) {
          std::vector<double> scores, row_lse;
          reference_mass(x, strict, &scores, &row_lse);
          x.scores.set(std::vector<float>(scores.begin(), scores.end()));
          x.row_lse.set(std::vector<float>(row_lse.begin(), row_lse.end()));
        } else {
          Array<float> q_pooled(s.batch, s.lists, x.blocks, s.dim), k_pooled(s.batch, s.lists, x.capacity, s.dim);
          QueryPool query_pool = {x.q.view, s.lists, s.q_block, PoolScale::kSqrt, q_pooled.view};
          ChunkPool pool = {x.k.view, x.d_offsets.view, x.d_counts.view, s.lists, PoolScale::kSqrt, k_pooled.view};
          run_stage(query_pool, what), run_stage(pool, what);
          run_stage(ChunkScores{q_pooled.view, k_pooled.view, x.scores.view}, what);
        }
        const int64_t capacity =
            refine > 0 ? refined_run_capacity(s.seqlen_k, choice.budget) : run_capacity(x.capacity, choice.budget, 1);
        Array<int> runs(s.batch, s.lists, x.blocks, capacity, 2), num_runs(s.batch, s.lists, x.blocks);
        if (refine > 0) {
          RefineKeys stage = {x.q.view,         x.k.view,        x.scores.view, mass ? x.row_lse.view : Tensor(),
                              x.d_offsets.view, x.d_counts.view, s.q_block,     refine,
                              s.q_stride,       s.rows,          choice,        x.mass.softmax,
                              runs.view,        num_runs.view};
          run_stage(stage, what);
        } else {
          SelectKeys stage = {x.scores.view, x.d_offsets.view, x.d_counts.view, s.seqlen_q,   s.seqlen_k,
                              s.q_block,     choice,           runs.view,       num_runs.view};
          run_stage(stage, what);
        }
        SparseAttention attention = {x.q.view,  x.k.view,       v.view,      runs.view,      num_runs.view,
                                     s.q_block, x.mass.softmax, staged.view, staged.lse.view};
        run_stage(attention, what);
        const double same = agreeing_rows(whole.lse.get(), staged.lse.get());
        expect(same >= 0.9, what + ": " + std::to_string(100 * same) + " % of the rows agree");
      }
  }
}

// The sm_90a and sm_80 attention want q_block 16 or more; decode has its own kernels.
void test_decode_equals_its_stages() {
  for (const Shape& s : shapes()) {
    if (s.q_block != 1) continue;
    for (DType dtype : kDTypes)
      for (int variant = 0; variant < 3; ++variant) {
        const bool mass = variant < 2;
        const int64_t refine = variant == 1 ? 0 : 3;
        const std::string what = "decode " + name_of(s, dtype) + " variant " + std::to_string(variant);
        Problem x(s, dtype, Layout::kHeadsFirst, 24);
        Input v(s.batch, s.heads_kv, s.seqlen_k, s.dim, dtype, Layout::kHeadsFirst);
        KeyChoice choice;
        choice.sink = 4, choice.local = 8, choice.window = s.window, choice.budget = 60;
        Attended whole(x.q);
        SparseDecode decode;
        decode.q = x.q.view, decode.k = x.k.view, decode.v = v.view, decode.k_pooled = x.d_means.view;
        decode.offsets = x.d_offsets.view, decode.num_chunks = x.d_counts.view;
        decode.score = mass ? ChunkScore::kMass : ChunkScore::kDot, decode.refine = refine;
        decode.choice = choice, decode.softmax = x.mass.softmax;
        decode.out = whole.view, decode.lse = whole.lse.view;
        run_stage(decode, what);

        std::vector<double> scores, row_lse;
        if (mass) {
          reference_mass(x, false, &scores, &row_lse);
          x.scores.set(std::vector<float>(scores.begin(), scores.end()));
          x.row_lse.set(std::vector<float>(row_lse.begin(), row_lse.end()));
        } else {
          Array<float> q_pooled(s.batch, s.lists, x.blocks, s.dim);
          run_stage(QueryPool{x.q.view, s.lists, 1, PoolScale::kSqrt, q_pooled.view}, what);
          run_stage(ChunkScores{q_pooled.view, x.d_means.view, x.scores.view}, what);
        }
        std::vector<float> want;
        const std::vector<float> host_scores = x.scores.get(), host_lse = x.row_lse.get();
        RefineKeys stage;
        stage.refine = refine, stage.choice = choice;
        for (int64_t b = 0; b < s.batch; ++b)
          for (int64_t h = 0; h < s.heads; ++h)
            for (int64_t u = 0; u < s.seqlen_q; ++u) {
              const int64_t list = h / (s.heads / s.lists);
              const float* row = host_scores.data() + ((b * s.lists + list) * x.blocks + u) * x.capacity;
              std::set<int> keys;
              std::vector<double> second;
              if (refine > 0) {
                keys = reference_refine(x, stage, row, mass ? host_lse.data() : nullptr, b, list, u, &second);
              } else {
                const std::vector<int> kept = kept_keys(row, x.offsets.data() + b * (x.capacity + 1), x.counts[b],
                                                        s.seqlen_q, s.seqlen_k, 1, u, choice);
                keys.insert(kept.begin(), kept.end());
              }
              double sum = 0;
              for (int key : keys) {
                double dot = 0;
                for (int64_t d = 0; d < s.dim; ++d)
                  dot += x.q.at(b, h, u, d) * x.k.at(b, h / (s.heads / s.heads_kv), key, d);
                sum += std::exp(x.logit(dot));
              }
              want.push_back(static_cast<float>(std::log(sum)));
            }
        const double same = agreeing_rows(whole.lse.get(), want);
        expect(same >= 0.9, what + ": " + std::to_string(100 * same) + " % of the rows agree");
      }
  }
}

// A captured prefill, replayed with new inputs, equals direct calls bit for bit.
void test_graph_replay() {
  Input q(1, 8, 400, 128, DType::kBFloat16, Layout::kTokensFirst),
      k(1, 2, 400, 128, DType::kBFloat16, Layout::kTokensFirst),
      v(1, 2, 400, 128, DType::kBFloat16, Layout::kTokensFirst);
  Attended direct(q), replayed(q);
  SparsePrefill prefill;
  prefill.q = q.view, prefill.k = k.view, prefill.v = v.view, prefill.max_chunks = 25, prefill.select_heads = 2;
  prefill.score = ChunkScore::kMass, prefill.refine = 4, prefill.threshold = -INFINITY;
  prefill.q_stride = 16, prefill.rows = QueryRows::kMean;
  prefill.choice.budget = 200, prefill.softmax.scale = 0.088f, prefill.choice.min_chunk = 9;
  SparsePrefill captured = prefill;
  prefill.out = direct.view, prefill.lse = direct.lse.view;
  captured.out = replayed.view, captured.lse = replayed.lse.view;
  Buffer scratch = workspace(cuda::workspace_bytes(captured));
  Graph graph(1, [&](cudaStream_t stream) { CUDA_CHECK(cuda::run(captured, scratch.data(), stream)); });
  for (int round = 0; round < 3; ++round) {
    q.fill(), k.fill(), v.fill();
    scratch.poison();
    graph.replay();
    run_stage(prefill, "accurate prefill");
    expect_equal(replayed.out.download<uint16_t>(), direct.out.download<uint16_t>(),
                 "graph replay of the accurate mode");
  }
}

// --- Times -----------------------------------------------------------------------------------------------------------

template <class Stage>
double time_stage(const Stage& stage, int repeats) {
  Buffer scratch = workspace(cuda::workspace_bytes(stage));
  Graph graph(repeats, [&](cudaStream_t stream) { CUDA_CHECK(cuda::run(stage, scratch.data(), stream)); });
  return graph.microseconds(5) / 1e3;
}

void time_prefill(int64_t length, bool profile = false) {
  constexpr DType kType = DType::kBFloat16;
  Input q(1, 32, length, 128, kType, Layout::kTokensFirst, false),
      k(1, 8, length, 128, kType, Layout::kTokensFirst, false),
      v(1, 8, length, 128, kType, Layout::kTokensFirst, false);
  Attended out(q);
  SparsePrefill x;
  x.q = q.view, x.k = k.view, x.v = v.view, x.max_chunks = length / 16, x.threshold = -INFINITY;
  x.softmax.scale = 0.08838835f, x.choice.min_chunk = 9, x.out = out.view, x.lse = out.lse.view;
  SparsePrefill paper = x;
  x.select_heads = 8, x.score = ChunkScore::kMass, x.choice.budget = 1024;
  x.refine = length > 16384 ? 4 : 8, x.q_stride = length > 16384 ? 32 : 8, x.rows = QueryRows::kMean;
  paper.q_block = 128, paper.choice.budget = 2048, paper.choice.sink = paper.choice.local = 128;
  paper.choice.dense_tail = 64;

  const int64_t capacity = length / 16, blocks = length / 64;
  Array<float> boundary(1, length), means(1, 8, capacity, 128), scores(1, 8, blocks, capacity),
      row_lse(1, 32, blocks, length > 16384 ? 2 : 8);
  Array<int> offsets(1, capacity + 1), counts(1), runs(1, 8, blocks, 1024, 2), num_runs(1, 8, blocks);
  BoundaryScores s1 = {k.view, 4, boundary.view};
  SelectBoundaries s2 = {boundary.view, capacity, 8, -INFINITY, 0, offsets.view, counts.view};
  ChunkPool s3 = {k.view, offsets.view, counts.view, 8, PoolScale::kMean, means.view};
  ChunkMass s4 = {q.view,     means.view, offsets.view, counts.view, length,      64,
                  x.q_stride, x.rows,     x.softmax,    scores.view, row_lse.view};
  RefineKeys s6 = {q.view,   k.view,     scores.view, row_lse.view, offsets.view, counts.view, 64,
                   x.refine, x.q_stride, x.rows,      x.choice,     x.softmax,    runs.view,   num_runs.view};
  SparseAttention s7 = {q.view, k.view, v.view, runs.view, num_runs.view, 64, x.softmax, out.view, out.lse.view};
  if (profile) {  // one call of each stage
    run_stage(s1, "profile"), run_stage(s2, "profile"), run_stage(s3, "profile");
    return run_stage(s4, "profile"), run_stage(s6, "profile");
  }
  const int repeats = length > 40000 ? 1 : 5;
  const double t1 = time_stage(s1, repeats), t2 = time_stage(s2, repeats), t3 = time_stage(s3, repeats);
  const double t4 = time_stage(s4, repeats), t6 = time_stage(s6, repeats), t7 = time_stage(s7, repeats);
  const double whole = time_stage(x, repeats), whole_paper = time_stage(paper, repeats);
  std::printf(
      "%6ld/1024 S=8 q_block 64: boundaries %.3f, pool %.3f, chunk_mass %.3f (zeroing %.0f MB too), refine_keys %.3f, "
      "attention %.3f, whole %.3f, router %.3f ms; workspace %.0f MiB; paper preset/2048 whole %.3f ms, ratio %.3f\n",
      static_cast<long>(length), t1 + t2, t3, t4, capacity * blocks * 8 * 4e-6, t6, t7, whole, whole - t7,
      cuda::workspace_bytes(x) / 1048576.0, whole_paper, whole / whole_paper);
  std::fflush(stdout);
}

void time_decode(int64_t length) {
  constexpr DType kType = DType::kBFloat16;
  Input q(1, 32, 1, 128, kType, Layout::kHeadsFirst, false), k(1, 8, length, 128, kType, Layout::kHeadsFirst, false),
      v(1, 8, length, 128, kType, Layout::kHeadsFirst, false);
  Attended out(q);
  const int64_t capacity = length / 16;
  std::vector<int> even;
  for (int64_t c = 0; c <= capacity; ++c) even.push_back(static_cast<int>(16 * c));
  Array<int> offsets(1, capacity + 1), counts(1);
  offsets.set(even), counts.set({static_cast<int>(capacity)});
  Array<float> means(1, 8, capacity, 128);
  run_stage(ChunkPool{k.view, offsets.view, counts.view, 8, PoolScale::kMean, means.view}, "decode pool");
  SparseDecode x;
  x.q = q.view, x.k = k.view, x.v = v.view, x.k_pooled = means.view, x.offsets = offsets.view;
  x.num_chunks = counts.view, x.score = ChunkScore::kMass, x.refine = 4, x.choice.budget = 1024;
  x.choice.min_chunk = 9, x.softmax.scale = 0.08838835f, x.out = out.view, x.lse = out.lse.view;
  const double whole = time_stage(x, 50);
  x.score = ChunkScore::kDot, x.refine = 0;
  std::printf("decode %6ld/1024 S=8: accurate %.1f us, dot %.1f us\n", static_cast<long>(length), whole * 1e3,
              time_stage(x, 50) * 1e3);
}

int run_all(const std::string& mode, const std::string& only) {
  cudaDeviceProp device;
  CUDA_CHECK(cudaGetDeviceProperties(&device, 0));
  std::printf("%s, compiled for %s\n", device.name, cuda::archs_compiled());
  if (!cuda::device_supported(device.major, device.minor)) return std::printf("not built for this GPU\n"), 2;
  if (mode == "time") {
    for (int64_t length : {8192, 32768, 131072}) {
      if (only.empty() || only == std::to_string(length)) time_prefill(length);
    }
    if (only.empty() || only == "decode") time_decode(131072);
    return 0;
  }
  if (mode == "profile") return time_prefill(32768, true), 0;
  small_run = mode == "small" || mode == "list";
  const std::pair<const char*, void (*)()> tests[] = {{"chunk_mass", test_mass},
                                                      {"chunk_mass of odd values", test_mass_of_odd_values},
                                                      {"chunk_mass of odd rows", test_mass_of_odd_rows},
                                                      {"refine_keys", test_refine},
                                                      {"refine_keys of ties", test_refine_ties},
                                                      {"refine_keys of long lists", test_long_refine},
                                                      {"malformed offsets", test_malformed_offsets},
                                                      {"prefill equals its stages", test_prefill_equals_its_stages},
                                                      {"decode equals its stages", test_decode_equals_its_stages},
                                                      {"graph replay", test_graph_replay}};
  for (const auto& [label, test] : tests) {
    if ((small_run && test == test_long_refine) || (!only.empty() && only != label)) continue;
    if (mode == "list") {
      std::printf("%s\n", label);
      continue;
    }
    const int before = failures(), checked = checks();
    test();
    std::printf("%-28s %6d checks, %d failed\n", label, checks() - checked, failures() - before);
    std::fflush(stdout);
  }
  return failures() == 0 ? 0 : 1;
}

}  // namespace
}  // namespace dhsa::test

int main(int argc, char** argv) { return dhsa::test::run_all(argc > 1 ? argv[1] : "all", argc > 2 ? argv[2] : ""); }
