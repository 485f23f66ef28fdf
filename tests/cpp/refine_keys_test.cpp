#include "reference.h"

namespace dhsa::test {
namespace {

struct Case {
  DType dtype = DType::kFloat32;
  int64_t heads = 1, kv_heads = 1, lists = 1, seqlen_q = 0, seqlen_k = 0, head_dim = 8;
  int64_t q_block = 1, refine = 1, columns = 1;
  RowChoice choice_of_rows;
  bool mass = false, integers = false;  // integers: every product and sum is exact in float32
  bool with_nan = false;                // in one query
  KeyChoice choice;
  Softmax softmax;
};

void compare(const Case& n) {
  SCOPED_TRACE(testing::Message() << "heads " << n.heads << ", " << n.kv_heads << ", lists " << n.lists << ", lengths "
                                  << n.seqlen_q << ", " << n.seqlen_k << ", q_block " << n.q_block << ", refine "
                                  << n.refine << ", budget " << n.choice.budget << ", window " << n.choice.window
                                  << ", mass " << n.mass << ", q_stride " << n.choice_of_rows.q_stride << ", means "
                                  << (n.choice_of_rows.rows == QueryRows::kMean));
  const int64_t blocks = (n.seqlen_q + n.q_block - 1) / n.q_block, q_stride = n.choice_of_rows.q_stride;
  const int64_t samples = (n.q_block + q_stride - 1) / q_stride;
  const int64_t capacity = refined_run_capacity(n.seqlen_k, n.choice.budget), group = n.heads / n.lists;
  Array q(n.dtype, {2, n.heads, n.seqlen_q, n.head_dim}, true), k(n.dtype, {2, n.kv_heads, n.seqlen_k, n.head_dim});
  n.integers ? q.fill_integers(-2, 2) : q.fill_normal();
  n.integers ? k.fill_integers(-2, 2) : k.fill_normal();
  if (n.with_nan && n.seqlen_q > 0) q.put({0, 0, draw(0, n.seqlen_q - 1), draw(0, n.head_dim - 1)}, kNaN);
  const Chunks chunks(2, n.columns, n.seqlen_k, draw(0, 1) == 0);
  const Array scores = Array(DType::kFloat32, {2, n.lists, blocks, n.columns}).fill_integers(-4, 4);
  const Array row_lse = Array(DType::kFloat32, {2, n.heads, blocks, samples}).fill_normal();
  const Array runs(DType::kInt32, {2, n.lists, blocks, capacity, 2}), num_runs(DType::kInt32, {2, n.lists, blocks});
  RefineKeys p;
  p.q = q.tensor;
  p.k = k.tensor;
  p.chunk_scores = scores.tensor;
  if (n.mass) p.row_lse = row_lse.tensor;
  p.offsets = chunks.offsets.tensor;
  p.num_chunks = chunks.num_chunks.tensor;
  p.q_block = n.q_block;
  p.refine = n.refine;
  p.q_stride = q_stride;
  p.rows = n.choice_of_rows.rows;
  p.choice = n.choice;
  p.softmax = n.softmax;
  p.runs = runs.tensor;
  p.num_runs = num_runs.tensor;
  run_stage(p);
  for (int64_t b = 0; b < 2; ++b) {
    const ChunkRow row(chunks.offsets, chunks.num_chunks, b, n.seqlen_k);
    for (int64_t s = 0; s < n.lists; ++s) {
      for (int64_t j = 0; j < blocks; ++j) {
        const Geometry g(j, n.q_block, n.seqlen_q, n.seqlen_k, n.choice.window);
        std::vector<Row> lse(n.mass ? group : 0);
        for (int64_t h = 0; h < static_cast<int64_t>(lse.size()); ++h) {
          for (int64_t u = 0; u <= (g.last - g.first) / q_stride; ++u) {
            lse[h].push_back(row_lse.at({b, s * group + h, j, u}));
          }
        }
        const Kept kept = refine_keys(g, n.choice, n.seqlen_q, n.refine, row, scores_of(scores, b, s, j), [&] {
          return key_scores(q, k, b, s, n.lists, g, n.choice_of_rows, n.softmax, lse);
        });
        if (!kept.certain && !n.integers) continue;
        const auto want = runs_of(kept.keys, capacity);
        ASSERT_EQ(num_runs.at({b, s, j}), static_cast<double>(want.size())) << "block " << j;
        for (int64_t r = 0; r < capacity; ++r) {
          const auto [begin, end] = r < static_cast<int64_t>(want.size()) ? want[r] : std::pair<int64_t, int64_t>{};
          ASSERT_EQ(runs.at({b, s, j, r, 0}), static_cast<double>(begin)) << "block " << j << ", run " << r;
          ASSERT_EQ(runs.at({b, s, j, r, 1}), static_cast<double>(end)) << "block " << j << ", run " << r;
        }
      }
    }
  }
}

Case random_case() {
  Case n;
  n.dtype = kFloatTypes[draw(0, 2)];
  n.kv_heads = draw(1, 2);
  n.heads = n.kv_heads * draw(1, 3);
  const int64_t lists[] = {1, n.kv_heads, n.heads};
  n.lists = lists[draw(0, 2)];
  n.seqlen_k = draw(0, 110);
  n.seqlen_q = draw(0, n.seqlen_k + 5);
  n.head_dim = 8 * draw(1, 3);
  n.q_block = draw(1, 24);
  n.choice_of_rows = {draw(1, 9), draw(0, 1) == 0 ? QueryRows::kSample : QueryRows::kMean};
  n.refine = draw(1, 5);
  n.columns = draw(1, 20);
  n.choice.sink = draw(0, 8);
  n.choice.local = draw(0, 8);
  n.choice.window = n.softmax.window = draw(0, 1) * draw(1, 60);
  n.choice.dense_tail = draw(0, 2) / 2 * draw(0, 30);
  n.choice.budget = n.choice.sink + n.choice.local + std::min(n.q_block, n.seqlen_q) + draw(0, 20);
  n.softmax.scale = 0.3f;
  return n;
}

TEST(RefineKeys, mass_of_random_shapes_windows_and_caps) {
  for (int round = 0; round < rounds(40); ++round) {
    Case n = random_case();
    n.mass = true;
    n.softmax.softcap = draw(0, 1) == 0 ? 0.0f : 5.0f;
    n.with_nan = draw(0, 3) == 0;
    compare(n);
  }
}

TEST(RefineKeys, dot_of_random_shapes_and_windows) {
  for (int round = 0; round < rounds(30); ++round) compare(random_case());
}

TEST(RefineKeys, dot_with_ties_bit_for_bit) {
  for (int round = 0; round < rounds(60); ++round) {
    Case n = random_case();
    n.integers = true;
    n.kv_heads = n.heads = n.lists = draw(1, 2);  // means over heads would round
    n.q_block = draw(0, 1) == 0 ? 4 : 16;         // their square roots are exact
    n.seqlen_q = n.q_block * draw(0, 3);
    n.choice.budget = n.choice.sink + n.choice.local + n.q_block + draw(0, 20);
    compare(n);
  }
}

TEST(RefineKeys, more_rows_and_candidates_than_are_worked_at_a_time) {
  Case n;
  n.heads = 5, n.seqlen_q = 40, n.seqlen_k = 400, n.q_block = 20, n.refine = 4, n.columns = 60, n.mass = true;
  n.choice.sink = 4, n.choice.local = 8, n.choice.budget = 90;
  n.softmax.scale = 0.3f;
  compare(n);
  n.choice_of_rows = {3, QueryRows::kMean};  // of 20: the block's first row is a mean of two
  compare(n);
}

TEST(RefineKeys, malformed_offsets_read_nothing_outside) {
  for (int round = 0; round < rounds(60); ++round) {
    const int64_t columns = draw(1, 8), capacity = refined_run_capacity(30, 20);
    const Array q = Array(DType::kFloat16, {1, 2, 16, 8}).fill_normal(),
                k = Array(DType::kFloat16, {1, 1, 30, 8}).fill_normal();
    const Array scores = Array(DType::kFloat32, {1, 1, 2, columns}).fill_normal();
    const Array row_lse = Array(DType::kFloat32, {1, 2, 2, 4}).fill_normal();
    const Array runs(DType::kInt32, {1, 1, 2, capacity, 2}), num_runs(DType::kInt32, {1, 1, 2});
    Chunks chunks(1, columns, 30);
    chunks.offsets.fill_malformed(30);
    chunks.num_chunks.fill_malformed(columns);
    RefineKeys p;
    p.q = q.tensor;
    p.k = k.tensor;
    p.chunk_scores = scores.tensor;
    if (draw(0, 1) == 0) p.row_lse = row_lse.tensor;
    p.offsets = chunks.offsets.tensor;
    p.num_chunks = chunks.num_chunks.tensor;
    p.q_block = 8, p.q_stride = 2, p.refine = 3;
    p.rows = draw(0, 1) == 0 ? QueryRows::kSample : QueryRows::kMean;
    p.choice.sink = 3, p.choice.local = 5, p.choice.budget = 20;
    p.runs = runs.tensor;
    p.num_runs = num_runs.tensor;
    run_stage(p);
    for (int64_t j = 0; j < 2; ++j) {
      ASSERT_GE(num_runs.at({0, 0, j}), 0);
      ASSERT_LE(num_runs.at({0, 0, j}), static_cast<double>(capacity));
      for (int64_t r = 0; r < static_cast<int64_t>(num_runs.at({0, 0, j})); ++r) {
        EXPECT_GE(runs.at({0, 0, j, r, 0}), 0);
        EXPECT_LE(runs.at({0, 0, j, r, 1}), 30);
      }
    }
  }
}

}  // namespace
}  // namespace dhsa::test
