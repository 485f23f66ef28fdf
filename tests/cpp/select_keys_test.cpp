#include "reference.h"

namespace dhsa::test {
namespace {

// Runs the stage and compares every list bit for bit, the zeros behind it included.
void compare(const Array& scores, const Chunks& chunks, int64_t seqlen_q, int64_t seqlen_k, int64_t q_block,
             const KeyChoice& choice) {
  const int64_t batch = scores.dim(0), lists = scores.dim(1), blocks = scores.dim(2);
  const int64_t capacity = run_capacity(scores.dim(3), choice.budget, choice.min_chunk);
  Array runs(DType::kInt32, {batch, lists, blocks, capacity, 2}), num_runs(DType::kInt32, {batch, lists, blocks});
  SelectKeys p;
  p.chunk_scores = scores.tensor;
  p.offsets = chunks.offsets.tensor;
  p.num_chunks = chunks.num_chunks.tensor;
  p.seqlen_q = seqlen_q;
  p.seqlen_k = seqlen_k;
  p.q_block = q_block;
  p.choice = choice;
  p.runs = runs.tensor;
  p.num_runs = num_runs.tensor;
  run_stage(p);
  SCOPED_TRACE(testing::Message() << "lengths " << seqlen_q << ", " << seqlen_k << ", q_block " << q_block
                                  << ", budget " << choice.budget << ", sink " << choice.sink << ", local "
                                  << choice.local << ", window " << choice.window << ", dense_tail "
                                  << choice.dense_tail << ", min_chunk " << choice.min_chunk);
  for (int64_t b = 0; b < batch; ++b) {
    const ChunkRow row(chunks.offsets, chunks.num_chunks, b, seqlen_k);
    for (int64_t s = 0; s < lists; ++s) {
      for (int64_t j = 0; j < blocks; ++j) {
        const Geometry g(j, q_block, seqlen_q, seqlen_k, choice.window);
        const auto want = runs_of(select_keys(g, choice, seqlen_q, row, scores_of(scores, b, s, j)).keys, capacity);
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

Array random_scores(int64_t blocks, int64_t columns) {
  Array scores(DType::kFloat32, {2, 2, blocks, columns});
  for (int64_t i = 0; i < scores.size; ++i) {
    const int64_t kind = draw(0, 29);
    const double tied = static_cast<double>(draw(-3, 3)) / 2;
    scores.tensor.as<float>()[i] = static_cast<float>(kind == 0   ? kNaN
                                                      : kind == 1 ? -kInf
                                                      : kind == 2 ? kInf
                                                      : kind == 3 ? -0.0
                                                      : kind < 12 ? normal()
                                                                  : tied);
  }
  return scores;
}

int64_t least_budget(const KeyChoice& c, int64_t seqlen_q, int64_t q_block) {
  return std::max<int64_t>(0, c.sink + c.local + std::min(q_block, seqlen_q) - 1);
}

TEST(SelectKeys, random_ties_nan_and_infinities) {
  for (int round = 0; round < rounds(300); ++round) {
    const int64_t seqlen_k = draw(0, 120), seqlen_q = draw(0, seqlen_k + 10), q_block = draw(1, 20);
    KeyChoice choice;
    choice.sink = draw(0, 10);
    choice.local = draw(0, 12);
    choice.window = draw(0, 1) * draw(1, 60);
    choice.dense_tail = draw(0, 2) / 2 * draw(0, 30);
    choice.min_chunk = draw(0, 3) > 0 ? 1 : draw(2, 20);  // a broken promise now and then
    choice.budget = least_budget(choice, seqlen_q, q_block) + draw(0, 4) * draw(0, 12);
    const int64_t columns = draw(1, 25), blocks = (seqlen_q + q_block - 1) / q_block;
    compare(random_scores(blocks, columns), Chunks(2, columns, seqlen_k, draw(0, 1) == 0), seqlen_q, seqlen_k, q_block,
            choice);
  }
}

TEST(SelectKeys, budget_at_its_bound_and_around_the_candidates) {
  for (const int64_t more : {0, 1, 100 - 30, 100 - 29, 100 - 28, 1000}) {
    KeyChoice choice;
    choice.sink = 8, choice.local = 15;
    choice.budget = 30 + more;  // 30 = 8 + 15 + 8 - 1
    compare(random_scores(13, 20), Chunks(2, 20, 100), 100, 100, 8, choice);
  }
}

TEST(SelectKeys, constant_scores_keep_the_lowest_keys) {
  KeyChoice choice;
  choice.sink = 0, choice.local = 0, choice.budget = 40;
  compare(Array(DType::kFloat32, {2, 2, 10, 30}).fill(0.5), Chunks(2, 30, 150), 80, 150, 8, choice);
}

TEST(SelectKeys, no_chunk_keeps_every_key) {  // keys that belong to no chunk are forced
  KeyChoice choice;
  choice.sink = 0, choice.local = 4, choice.budget = 11;
  Chunks chunks(2, 3, 40);
  chunks.offsets.fill(0);
  chunks.num_chunks.fill(0);
  compare(random_scores(5, 3), chunks, 40, 40, 8, choice);
}

TEST(SelectKeys, overflowing_list_keeps_its_first_runs_and_its_last) {
  const int64_t columns = 50, length = 100;
  Chunks chunks(2, columns, length);
  Array scores(DType::kFloat32, {2, 2, 3, columns});
  for (int64_t i = 0; i < scores.size; ++i) scores.tensor.as<float>()[i] = static_cast<float>(i % columns % 2);
  for (int64_t b = 0; b < 2; ++b) {
    chunks.num_chunks.put({b}, columns);
    for (int64_t c = 0; c <= columns; ++c) chunks.offsets.put({b, c}, static_cast<double>(2 * c));
  }
  for (const int64_t min_chunk : {1, 3, 10, 60}) {
    KeyChoice choice;
    choice.sink = 0, choice.local = 4, choice.budget = 50, choice.min_chunk = min_chunk;
    compare(scores, chunks, 12, length, 4, choice);
  }
}

TEST(SelectKeys, malformed_offsets_write_nothing_outside) {
  for (int round = 0; round < rounds(100); ++round) {
    const int64_t columns = draw(1, 8), capacity = run_capacity(columns, 20, 4);
    const Array scores = random_scores(4, columns);
    Array offsets(DType::kInt32, {2, columns + 1}), num_chunks(DType::kInt32, {2});
    Array runs(DType::kInt32, {2, 2, 4, capacity, 2}), num_runs(DType::kInt32, {2, 2, 4});
    offsets.fill_malformed(30);
    num_chunks.fill_malformed(columns);
    SelectKeys p;
    p.chunk_scores = scores.tensor;
    p.offsets = offsets.tensor;
    p.num_chunks = num_chunks.tensor;
    p.seqlen_q = p.seqlen_k = 30;
    p.q_block = 8;
    p.choice.sink = 3, p.choice.local = 5, p.choice.budget = 20, p.choice.min_chunk = 4;
    p.runs = runs.tensor;
    p.num_runs = num_runs.tensor;
    run_stage(p);
    for (int64_t i = 0; i < num_runs.size; ++i) {
      EXPECT_GE(num_runs.flat(i), 0);
      EXPECT_LE(num_runs.flat(i), static_cast<double>(capacity));
    }
    for (int64_t i = 0; i < runs.size; ++i) {
      EXPECT_GE(runs.flat(i), 0);
      EXPECT_LE(runs.flat(i), 30);
    }
  }
}

}  // namespace
}  // namespace dhsa::test
