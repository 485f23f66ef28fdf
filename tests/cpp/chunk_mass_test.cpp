#include "reference.h"

namespace dhsa::test {
namespace {

constexpr double kUnused = kInf;  // what row_lse holds where a block has no more rows

ChunkMass call(const Array& q, const Array& k_mean, const Chunks& chunks, int64_t seqlen_k, int64_t q_block,
               const RowChoice& choice, const Softmax& softmax, const Array& scores, const Array& row_lse) {
  ChunkMass p;
  p.q = q.tensor;
  p.k_mean = k_mean.tensor;
  p.offsets = chunks.offsets.tensor;
  p.num_chunks = chunks.num_chunks.tensor;
  p.seqlen_k = seqlen_k;
  p.q_block = q_block;
  p.q_stride = choice.q_stride;
  p.rows = choice.rows;
  p.softmax = softmax;
  p.scores = scores.tensor;
  p.row_lse = row_lse.tensor;
  return p;
}

void compare(DType dtype, int64_t heads, int64_t lists, int64_t seqlen_q, int64_t seqlen_k, int64_t q_block,
             const RowChoice& choice, const Softmax& softmax, int64_t columns = 13, bool with_nan = false) {
  SCOPED_TRACE(testing::Message() << "heads " << heads << ", lists " << lists << ", lengths " << seqlen_q << ", "
                                  << seqlen_k << ", q_block " << q_block << ", q_stride " << choice.q_stride
                                  << ", means " << (choice.rows == QueryRows::kMean) << ", softcap " << softmax.softcap
                                  << ", window " << softmax.window);
  const int64_t head_dim = 24, blocks = (seqlen_q + q_block - 1) / q_block;
  const int64_t rows = (q_block + choice.q_stride - 1) / choice.q_stride;
  Array q = Array(dtype, {2, heads, seqlen_q, head_dim}, true).fill_normal();
  if (with_nan && seqlen_q > 0) q.put({0, 0, draw(0, seqlen_q - 1), draw(0, head_dim - 1)}, kNaN);
  const Array k_mean = Array(DType::kFloat32, {2, lists, columns, head_dim}).fill_normal();
  const Chunks chunks(2, columns, seqlen_k, draw(0, 1) == 0);
  const Array scores(DType::kFloat32, {2, lists, blocks, columns}), lse(DType::kFloat32, {2, heads, blocks, rows});
  run_stage(call(q, k_mean, chunks, seqlen_k, q_block, choice, softmax, scores, lse));
  for (int64_t b = 0; b < 2; ++b) {
    const ChunkRow row(chunks.offsets, chunks.num_chunks, b, seqlen_k);
    for (int64_t s = 0; s < lists; ++s) {
      for (int64_t j = 0; j < blocks; ++j) {
        const Geometry g(j, q_block, seqlen_q, seqlen_k, softmax.window);
        const int64_t group = heads / lists;
        const Mass want = chunk_mass(q, b, s * group, group, g, choice, softmax, row,
                                     [&](int64_t c) { return row_of(k_mean, b, s, c); });
        for (int64_t c = 0; c < columns; ++c) {
          const double mass = c < row.size() ? want.scores[c] : 0.0, got = scores.at({b, s, j, c});
          EXPECT_LE(std::fabs(got - mass), 1e-7 + 1e-4 * mass) << "chunk " << c << ": got " << got << ", want " << mass;
        }
        for (int64_t h = 0; h < group; ++h) {
          for (int64_t u = 0; u < rows; ++u) {
            const bool used = u < static_cast<int64_t>(want.row_lse[h].size());
            expect_score(lse.at({b, s * group + h, j, u}), used ? want.row_lse[h][u] : kUnused, "row_lse");
          }
        }
      }
    }
  }
}

TEST(ChunkMass, every_type_and_sharing_of_lists) {
  for (const DType dtype : kFloatTypes) {
    for (const QueryRows rows : {QueryRows::kSample, QueryRows::kMean}) {
      for (const int64_t lists : {1, 2, 6}) compare(dtype, 6, lists, 40, 70, 16, {8, rows}, {0.2f, 0.0f, 0});
    }
  }
}

TEST(ChunkMass, random_shapes_windows_and_caps) {
  for (int round = 0; round < rounds(30); ++round) {
    const int64_t seqlen_k = draw(0, 120), lists = draw(1, 2);
    const float softcap = draw(0, 1) == 0 ? 0.0f : static_cast<float>(draw(1, 30));
    compare(kFloatTypes[draw(0, 2)], lists * draw(1, 3), lists, draw(0, seqlen_k + 5), seqlen_k, draw(1, 40),
            {draw(1, 10), draw(0, 1) == 0 ? QueryRows::kSample : QueryRows::kMean},
            {0.3f, softcap, draw(0, 1) * draw(1, 50)}, draw(1, 40), draw(0, 3) == 0);
  }
}

TEST(ChunkMass, more_rows_than_are_worked_at_a_time) {
  for (const QueryRows rows : {QueryRows::kSample, QueryRows::kMean}) {
    compare(DType::kFloat32, 2, 1, 50, 90, 50, {1, rows}, {0.2f, 0.0f, 0});
    compare(DType::kFloat16, 2, 1, 110, 130, 110, {3, rows}, {0.2f, 0.0f, 0});
  }
}

// The sum of a long mean is one chain too: 300 queries, a last row of 44.
TEST(ChunkMass, means_of_hundreds_of_queries) {
  for (const DType dtype : kFloatTypes) {
    compare(dtype, 1, 1, 344, 344, 400, {300, QueryRows::kMean}, {2.0f, 0.0f, 0});
  }
}

TEST(ChunkMass, logits_that_are_no_number_count_as_nothing) {
  const Chunks chunks(1, 6, 30);
  Array q = Array(DType::kFloat32, {1, 1, 30, 8}).fill_normal();
  Array k_mean = Array(DType::kFloat32, {1, 1, 6, 8}).fill_normal();
  for (int64_t d = 0; d < 8; ++d) k_mean.put({0, 0, 0, d}, d == 3 ? kNaN : 1.0);
  for (int64_t d = 0; d < 8; ++d) k_mean.put({0, 0, 1, d}, kInf);
  const Array scores(DType::kFloat32, {1, 1, 1, 6}), lse(DType::kFloat32, {1, 1, 1, 4});
  const Softmax softmax{0.5f, 0.0f, 0};
  run_stage(call(q, k_mean, chunks, 30, 32, {8}, softmax, scores, lse));
  const Mass want = chunk_mass(q, 0, 0, 1, Geometry(0, 32, 30, 30, 0), {8}, softmax,
                               ChunkRow(chunks.offsets, chunks.num_chunks, 0, 30),
                               [&](int64_t c) { return row_of(k_mean, 0, 0, c); });
  for (int64_t c = 0; c < static_cast<int64_t>(want.scores.size()); ++c) expect_score(scores.flat(c), want.scores[c]);
  for (int64_t u = 0; u < 4; ++u) expect_score(lse.flat(u), want.row_lse[0][u]);
}

TEST(ChunkMass, malformed_offsets_read_nothing_outside) {
  for (int round = 0; round < rounds(60); ++round) {
    const int64_t columns = draw(1, 20);
    const Array q = Array(DType::kBFloat16, {1, 2, 20, 8}).fill_normal();
    const Array k_mean = Array(DType::kFloat32, {1, 1, columns, 8}).fill_normal();
    Chunks chunks(1, columns, 20);
    chunks.offsets.fill_malformed(20);
    chunks.num_chunks.fill_malformed(columns);
    const Array scores(DType::kFloat32, {1, 1, 3, columns}), lse(DType::kFloat32, {1, 2, 3, 4});
    const RowChoice choice{2, draw(0, 1) == 0 ? QueryRows::kSample : QueryRows::kMean};
    run_stage(call(q, k_mean, chunks, 20, 8, choice, {0.5f, 0.0f, draw(0, 1) * 6}, scores, lse));
    for (int64_t i = 0; i < scores.size; ++i) EXPECT_TRUE(std::isfinite(scores.flat(i)));
    for (int64_t i = 0; i < lse.size; ++i) EXPECT_FALSE(std::isnan(lse.flat(i)));
  }
}

}  // namespace
}  // namespace dhsa::test
