#include "reference.h"

namespace dhsa::test {
namespace {

void compare(const Array& k, int64_t window, int workers = 3) {
  Array scores(DType::kFloat32, {k.dim(0), k.dim(2)});
  BoundaryScores p;
  p.k = k.tensor;
  p.window = window;
  p.scores = scores.tensor;
  run_stage(p, workers);
  for (int64_t b = 0; b < k.dim(0); ++b) {
    const Row want = boundary_scores(k, b, window);
    for (int64_t t = 0; t < k.dim(2); ++t) expect_score(scores.at({b, t}), want[t]);
  }
}

TEST(BoundaryScores, every_type_and_layout) {
  for (const DType dtype : kFloatTypes) {
    for (const bool heads_last : {false, true}) {
      compare(Array(dtype, {2, 3, 70, 40}, heads_last).fill_normal(), 4);
    }
  }
}

TEST(BoundaryScores, lengths_around_two_windows) {
  for (const int64_t window : {1, 2, 5}) {
    for (int64_t length = 0; length <= 2 * window + 1; ++length) {
      compare(Array(DType::kFloat32, {1, 1, length, 8}).fill_normal(), window);
    }
  }
}

TEST(BoundaryScores, range_seams_of_a_long_row) {
  compare(Array(DType::kFloat16, {1, 2, 1100, 8}).fill_normal(), 7);
  compare(Array(DType::kFloat32, {1, 1, 1030, 8}).fill_normal(), 300);
}

TEST(BoundaryScores, zero_keys_score_one) {
  Array k(DType::kFloat32, {1, 1, 12, 16});
  std::fill_n(k.tensor.as<float>(), k.size, 0.0f);
  compare(k, 3);
}

TEST(BoundaryScores, tiny_keys_are_divided_by_the_floor_of_the_norms) {
  for (const double size : {1e-2, 1e-3, 2e-4, 1e-5}) {
    compare(Array(DType::kFloat32, {1, 2, 20, 8}).fill_normal(size), 2);
  }
}

TEST(BoundaryScores, nan_stays_in_its_windows) {
  Array k(DType::kFloat32, {1, 2, 40, 8}), scores(DType::kFloat32, {1, 40});
  k.fill_normal();
  k.put({0, 1, 20, 3}, kNaN);
  BoundaryScores p;
  p.k = k.tensor;
  p.window = 3;
  p.scores = scores.tensor;
  run_stage(p);
  for (int64_t t = 3; t <= 37; ++t) EXPECT_EQ(std::isnan(scores.at({0, t})), t > 17 && t <= 23) << t;
}

}  // namespace
}  // namespace dhsa::test
