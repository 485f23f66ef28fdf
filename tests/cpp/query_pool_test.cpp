#include "reference.h"

namespace dhsa::test {
namespace {

void compare(DType dtype, int64_t length, int64_t heads, int64_t q_block, PoolScale scale) {
  const Array q = Array(dtype, {2, 8, length, 16}, true).fill_normal();
  const int64_t blocks = (length + q_block - 1) / q_block;
  Array pooled(DType::kFloat32, {2, heads, blocks, 16});
  QueryPool p;
  p.q = q.tensor;
  p.heads = heads;
  p.q_block = q_block;
  p.scale = scale;
  p.pooled = pooled.tensor;
  run_stage(p);
  for (int64_t b = 0; b < 2; ++b) {
    for (int64_t s = 0; s < heads; ++s) {
      for (int64_t j = 0; j < blocks; ++j) {
        const Row want = pool(q, b, s, heads, j * q_block, std::min(length, (j + 1) * q_block), scale);
        for (int64_t d = 0; d < 16; ++d) expect_score(pooled.at({b, s, j, d}), want[d]);
      }
    }
  }
}

TEST(QueryPool, last_block_is_short) {
  for (const int64_t q_block : {1, 7, 16, 100}) {
    for (const int64_t heads : {1, 2, 8}) compare(DType::kBFloat16, 45, heads, q_block, PoolScale::kSqrt);
  }
}

TEST(QueryPool, every_type_and_scale) {
  for (const DType dtype : kFloatTypes) {
    for (const PoolScale scale : {PoolScale::kSqrt, PoolScale::kMean, PoolScale::kSum}) compare(dtype, 33, 4, 8, scale);
  }
}

TEST(QueryPool, empty_and_single_query) {
  compare(DType::kFloat32, 0, 1, 16, PoolScale::kSqrt);
  compare(DType::kFloat32, 1, 8, 16, PoolScale::kSqrt);
}

}  // namespace
}  // namespace dhsa::test
