#include "reference.h"

namespace dhsa::test {
namespace {

void compare(const Array& x, int64_t heads, PoolScale scale, const Chunks& chunks) {
  const int64_t columns = chunks.offsets.dim(1) - 1;
  Array pooled(DType::kFloat32, {x.dim(0), heads, columns, x.dim(3)});
  ChunkPool p;
  p.x = x.tensor;
  p.offsets = chunks.offsets.tensor;
  p.num_chunks = chunks.num_chunks.tensor;
  p.heads = heads;
  p.scale = scale;
  p.pooled = pooled.tensor;
  run_stage(p);
  for (int64_t b = 0; b < x.dim(0); ++b) {
    for (int64_t s = 0; s < heads; ++s) {
      for (int64_t c = 0; c < columns; ++c) {
        const bool used = c < static_cast<int64_t>(chunks.num_chunks.at({b}));
        const auto begin = static_cast<int64_t>(chunks.offsets.at({b, c}));
        const auto end = static_cast<int64_t>(chunks.offsets.at({b, c + 1}));
        const Row want = used ? pool(x, b, s, heads, begin, end, scale) : Row(x.dim(3), 0.0);
        for (int64_t d = 0; d < x.dim(3); ++d) expect_score(pooled.at({b, s, c, d}), want[d]);
      }
    }
  }
}

TEST(ChunkPool, every_type_scale_and_head_count) {
  for (const DType dtype : kFloatTypes) {
    for (const PoolScale scale : {PoolScale::kSqrt, PoolScale::kMean, PoolScale::kSum}) {
      for (const int64_t heads : {1, 2, 4, 8}) {
        compare(Array(dtype, {2, 4, 60, 24}, true).fill_normal(), heads, scale, Chunks(2, 14, 60));
      }
    }
  }
}

TEST(ChunkPool, one_long_chunk) {
  compare(Array(DType::kFloat32, {1, 1, 5000, 8}).fill_normal(), 1, PoolScale::kSqrt, Chunks(1, 1, 5000));
}

TEST(ChunkPool, no_token) { compare(Array(DType::kFloat32, {1, 2, 0, 8}), 1, PoolScale::kMean, Chunks(1, 3, 0)); }

TEST(ChunkPool, malformed_offsets_read_nothing_outside) {
  for (int round = 0; round < rounds(50); ++round) {
    Array offsets(DType::kInt32, {1, 7}), num_chunks(DType::kInt32, {1}), pooled(DType::kFloat32, {1, 1, 6, 8});
    const Array x = Array(DType::kFloat16, {1, 1, 9, 8}).fill_normal();
    offsets.fill_malformed(9);
    num_chunks.fill_malformed(7);
    ChunkPool p;
    p.x = x.tensor;
    p.offsets = offsets.tensor;
    p.num_chunks = num_chunks.tensor;
    p.pooled = pooled.tensor;
    run_stage(p);
    for (int64_t i = 0; i < pooled.size; ++i) EXPECT_TRUE(std::isfinite(pooled.flat(i)));
  }
}

}  // namespace
}  // namespace dhsa::test
