#include "reference.h"

namespace dhsa::test {
namespace {

void compare(const Array& scores, int64_t max_chunks, int64_t radius, int64_t segment,
             float threshold = -std::numeric_limits<float>::infinity()) {
  const int64_t batch = scores.dim(0), length = scores.dim(1);
  const int64_t capacity = chunk_capacity(length, max_chunks, segment);
  Array offsets(DType::kInt32, {batch, capacity + 1}), num_chunks(DType::kInt32, {batch});
  SelectBoundaries p;
  p.scores = scores.tensor;
  p.max_chunks = max_chunks;
  p.nms_radius = radius;
  p.segment = segment;
  p.threshold = threshold;
  p.offsets = offsets.tensor;
  p.num_chunks = num_chunks.tensor;
  run_stage(p);
  for (int64_t b = 0; b < batch; ++b) {
    const std::set<int64_t> want = select_boundaries(p, scores, b);
    ASSERT_EQ(num_chunks.at({b}), static_cast<double>(want.size()) - 1);
    auto cut = want.begin();
    for (int64_t c = 0; c <= capacity; ++c) {
      EXPECT_EQ(offsets.at({b, c}), static_cast<double>(cut == want.end() ? length : *cut)) << "column " << c;
      if (cut != want.end()) ++cut;
    }
  }
}

Array random_scores(int64_t length) {
  Array scores(DType::kFloat32, {2, length});
  for (int64_t b = 0; b < 2; ++b) {
    for (int64_t t = 0; t < length; ++t) {
      const int64_t kind = draw(0, 19);
      scores.put({b, t}, kind == 0 ? kNaN : kind == 1 ? -kInf : kind == 2 ? kInf : std::round(4 * normal()) / 4);
    }
  }
  return scores;
}

TEST(SelectBoundaries, random_scores_with_ties_nan_and_infinities) {
  for (int round = 0; round < rounds(60); ++round) {
    const int64_t length = draw(0, 200), segment = draw(0, 1) * draw(1, 80);
    compare(random_scores(length), draw(1, 40), draw(0, 12), segment,
            draw(0, 1) == 0 ? 0.25f : -std::numeric_limits<float>::infinity());
  }
}

TEST(SelectBoundaries, constant_and_ramp_scores) {
  for (const double slope : {0.0, 1.0, -1.0}) {
    Array scores(DType::kFloat32, {1, 300});
    for (int64_t t = 0; t < 300; ++t) scores.put({0, t}, slope * static_cast<double>(t));
    compare(scores, 300, 4, 0);
    compare(scores, 7, 4, 0);
    compare(scores, 9, 2, 64);
  }
}

TEST(SelectBoundaries, minus_zero_ties_with_zero) {
  Array scores(DType::kFloat32, {1, 30});
  for (int64_t t = 0; t < 30; ++t) scores.put({0, t}, t % 2 == 0 ? -0.0 : 0.0);
  compare(scores, 3, 5, 0);
}

TEST(SelectBoundaries, radius_longer_than_the_row) { compare(random_scores(20), 5, 1000, 0); }
TEST(SelectBoundaries, radius_zero) { compare(random_scores(64), 64, 0, 0); }
TEST(SelectBoundaries, segment_longer_than_the_row) { compare(random_scores(20), 16, 1, 64); }
TEST(SelectBoundaries, empty_and_single_token) {
  compare(random_scores(0), 3, 8, 0);
  compare(random_scores(0), 3, 8, 16);
  compare(random_scores(1), 3, 8, 0);
}

}  // namespace
}  // namespace dhsa::test
