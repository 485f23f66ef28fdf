#include "reference.h"

namespace dhsa::test {
namespace {

Array run_token_scores(const Array& from, const Array& offsets, const Array& num_chunks, int64_t length) {
  Array to(DType::kFloat32, {from.dim(0), from.dim(1), from.dim(2), length});
  TokenScores p;
  p.chunk_scores = from.tensor;
  p.offsets = offsets.tensor;
  p.num_chunks = num_chunks.tensor;
  p.seqlen_k = length;
  p.scores = to.tensor;
  run_stage(p);
  return to;
}

TEST(TokenScores, gaps_and_tails_are_minus_infinity) {
  for (const int64_t length : {0, 1, 50, 300}) {
    const Chunks chunks(2, 9, length, draw(0, 1) == 0);
    const Array from = Array(DType::kFloat32, {2, 2, 3, 9}).fill_normal();
    const Array to = run_token_scores(from, chunks.offsets, chunks.num_chunks, length);
    for (int64_t b = 0; b < 2; ++b) {
      const ChunkRow row(chunks.offsets, chunks.num_chunks, b, length);
      for (int64_t list = 0; list < 6; ++list) {
        const Row want = token_scores(row, scores_of(from, b, list / 3, list % 3));
        for (int64_t t = 0; t < length; ++t) EXPECT_EQ(to.at({b, list / 3, list % 3, t}), want[t]);
      }
    }
  }
}

TEST(TokenScores, malformed_offsets_write_nothing_outside) {
  const Array from = Array(DType::kFloat32, {1, 1, 2, 6}).fill_normal();
  for (int round = 0; round < rounds(50); ++round) {
    Array offsets(DType::kInt32, {1, 7}), num_chunks(DType::kInt32, {1});
    offsets.fill_malformed(9);
    num_chunks.fill_malformed(7);
    const Array to = run_token_scores(from, offsets, num_chunks, 9);
    for (int64_t i = 0; i < to.size; ++i) EXPECT_FALSE(std::isnan(to.flat(i)));
  }
}

}  // namespace
}  // namespace dhsa::test
