#include "reference.h"

namespace dhsa::test {
namespace {

void compare(int64_t rows, int64_t columns, int64_t head_dim) {
  const Array q = Array(DType::kFloat32, {2, 2, rows, head_dim}).fill_normal();
  const Array k = Array(DType::kFloat32, {2, 2, columns, head_dim}).fill_normal();
  Array scores(DType::kFloat32, {2, 2, rows, columns});
  ChunkScores p;
  p.q_pooled = q.tensor;
  p.k_pooled = k.tensor;
  p.scores = scores.tensor;
  run_stage(p);
  for (int64_t list = 0; list < 4; ++list) {
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = 0; c < columns; ++c) {
        const Row a = row_of(q, list / 2, list % 2, r), b = row_of(k, list / 2, list % 2, c);
        expect_score(scores.at({list / 2, list % 2, r, c}), dot(a, b));
      }
    }
  }
}

TEST(ChunkScores, every_tile_tail) {
  for (int64_t rows = 1; rows <= 14; ++rows) compare(rows, draw(1, 70), 8 * draw(1, 5));
}
TEST(ChunkScores, more_rows_and_columns_than_a_work_item) { compare(259, 130, 16); }
TEST(ChunkScores, head_dim_256) { compare(7, 33, 256); }
TEST(ChunkScores, no_row_or_no_column) {
  compare(0, 5, 8);
  compare(5, 0, 8);
}

}  // namespace
}  // namespace dhsa::test
