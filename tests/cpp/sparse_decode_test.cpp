#include "problem.h"

namespace dhsa::test {
namespace {

struct Cache {
  Array k_pooled;
  Chunks chunks;

  Cache(const Problem& problem, int64_t lists, int64_t columns, bool to_the_end)
      : k_pooled(DType::kFloat32, {problem.shape.batch, lists, columns, problem.shape.head_dim}),
        chunks(problem.shape.batch, columns, problem.shape.seqlen_k, to_the_end) {
    k_pooled.fill_normal();
  }
  void lend(SparseDecode* p) const {
    p->k_pooled = k_pooled.tensor;
    p->offsets = chunks.offsets.tensor;
    p->num_chunks = chunks.num_chunks.tensor;
  }
};

Kept kept_keys(const SparseDecode& p, const Problem& problem, const Cache& cache, int64_t b, int64_t s, int64_t i) {
  const int64_t lists = cache.k_pooled.dim(1), heads = problem.shape.heads / lists;
  const Geometry g = problem.block(i, 1);
  const ChunkRow row(cache.chunks.offsets, cache.chunks.num_chunks, b, problem.shape.seqlen_k);
  KeyChoice choice = p.choice;
  choice.sink = std::min(choice.sink, row.length);
  choice.local = std::min(choice.local, row.length);
  Row scores(row.size());
  std::vector<Row> row_lse;
  if (p.score == ChunkScore::kMass) {
    const Mass mass = chunk_mass(problem.q, b, s * heads, heads, g, {}, p.softmax, row,
                                 [&](int64_t c) { return row_of(cache.k_pooled, b, s, c); });
    scores = mass.scores;
    row_lse = mass.row_lse;
  } else {
    const Row query = pool(problem.q, b, s, lists, i, i + 1, PoolScale::kSqrt);
    for (int64_t c = 0; c < row.size(); ++c) scores[c] = dot(query, row_of(cache.k_pooled, b, s, c));
  }
  if (p.refine == 0) return select_keys(g, choice, problem.shape.seqlen_q, row, scores);
  return refine_keys(g, choice, problem.shape.seqlen_q, p.refine, row, scores,
                     [&] { return key_scores(problem.q, problem.k, b, s, lists, g, {}, p.softmax, row_lse); });
}

struct Count {
  int64_t compared = 0, left_out = 0;
  ~Count() { EXPECT_LE(left_out, 3 + compared / 10); }
};

void compare(SparseDecode p, Problem* problem, int64_t lists, int64_t columns, bool to_the_end, Count* count) {
  const Cache cache(*problem, lists, columns, to_the_end);
  problem->lend(&p);
  cache.lend(&p);
  run_stage(p);
  const Shape& n = problem->shape;
  SCOPED_TRACE(testing::Message() << "heads " << n.heads << ", " << n.kv_heads << ", lists " << lists << ", lengths "
                                  << n.seqlen_q << ", " << n.seqlen_k << ", budget " << p.choice.budget << ", refine "
                                  << p.refine << ", mass " << (p.score == ChunkScore::kMass) << ", window "
                                  << p.softmax.window);
  for (int64_t b = 0; b < n.batch; ++b) {
    for (int64_t s = 0; s < lists; ++s) {
      for (int64_t i = 0; i < n.seqlen_q; ++i) {
        const Kept kept = kept_keys(p, *problem, cache, b, s, i);
        ++(kept.certain ? count->compared : count->left_out);
        if (!kept.certain) continue;
        for (int64_t h = 0; h < n.heads / lists; ++h) {
          problem->expect_row(b, s * (n.heads / lists) + h, i, kept.keys);
        }
      }
    }
  }
}

SparseDecode arguments(int64_t budget) {
  SparseDecode p;
  p.choice.sink = 3;
  p.choice.local = 5;
  p.choice.budget = budget;
  return p;
}

TEST(SparseDecode, random_arguments) {
  Count count;
  for (int round = 0; round < rounds(80); ++round) {
    const int64_t kv_heads = draw(1, 3), heads = kv_heads * draw(1, 5), lists[] = {1, kv_heads, heads};
    const int64_t head_dim = 8 * draw(1, 5);
    const float softcap = draw(0, 1) == 0 ? 0.0f : 15.0f;
    Problem problem(kFloatTypes[draw(0, 2)], {draw(1, 2), heads, kv_heads, draw(0, 16), draw(0, 120), head_dim},
                    draw(0, 1) == 0, softmax_of(head_dim, softcap, draw(0, 1) * draw(1, 60)));
    SparseDecode p = arguments(0);
    p.score = draw(0, 1) == 0 ? ChunkScore::kDot : ChunkScore::kMass;
    p.refine = draw(0, 1) * draw(1, 4);
    p.choice.sink = draw(0, 6);
    p.choice.local = draw(0, 10);
    p.choice.window = problem.softmax.window;
    p.choice.budget = p.choice.sink + p.choice.local + draw(0, 40);
    compare(p, &problem, lists[draw(0, 2)], draw(1, 20), draw(0, 1) == 0, &count);
  }
}

TEST(SparseDecode, keys_split_into_parts) {
  Count count;
  for (const DType dtype : kFloatTypes) {
    Problem problem(dtype, {1, 2, 1, 2, 1500, 8}, true, softmax_of(8));
    compare(arguments(1400), &problem, 1, 150, true, &count);
    compare(arguments(513), &problem, 2, 150, true, &count);
  }
  Problem many(DType::kFloat32, {1, 1, 1, 1, 9000, 8}, true, softmax_of(8));  // more than 16 parts of 512
  compare(arguments(9000), &many, 1, 700, true, &count);
}

TEST(SparseDecode, many_heads_on_one_list) {
  Count count;
  Problem problem(DType::kFloat16, {1, 300, 1, 1, 70, 8}, true, softmax_of(8));
  compare(arguments(40), &problem, 1, 12, true, &count);
}

TEST(SparseDecode, queries_together_equal_queries_one_by_one) {
  for (const int64_t length : {60, 1300}) {
    Problem problem(kFloatTypes[draw(0, 2)], {1, 4, 2, 5, length, 16}, true, softmax_of(16));
    const Cache cache(problem, 2, 40, false);
    SparseDecode p = arguments(length * 2 / 3);
    p.score = draw(0, 1) == 0 ? ChunkScore::kDot : ChunkScore::kMass;
    // The new keys belong to no chunk.
    for (int64_t c = 0; c <= 40; ++c) {
      cache.chunks.offsets.tensor.as<int32_t>()[c] =
          std::min(cache.chunks.offsets.tensor.as<int32_t>()[c], static_cast<int32_t>(length - 5));
    }
    problem.lend(&p);
    cache.lend(&p);
    run_stage(p);
    const Array out = problem.out.copy(), lse = problem.lse.copy();
    problem.out.fill(kNaN);
    problem.lse.fill(kNaN);
    for (int64_t i = 0; i < 5; ++i) {
      SparseDecode one = p;
      one.q.data = p.q.as<char>() + i * p.q.stride[2] * element_size(p.q.dtype);
      one.out.data = p.out.as<char>() + i * p.out.stride[2] * element_size(p.q.dtype);
      one.lse.data = p.lse.as<float>() + i;
      one.q.shape[2] = one.out.shape[2] = one.lse.shape[2] = 1;
      one.k.shape[2] = one.v.shape[2] = length - 4 + i;
      run_stage(one);
    }
    EXPECT_TRUE(out.same_bits(problem.out));
    EXPECT_TRUE(lse.same_bits(problem.lse));
  }
}

TEST(SparseDecode, malformed_offsets_read_nothing_outside) {
  for (int round = 0; round < rounds(60); ++round) {
    Problem problem(kFloatTypes[draw(0, 2)], {1, 2, 1, 3, 30, 8}, true, softmax_of(8, 0.0f, draw(0, 1) * 9));
    const int64_t columns = draw(1, 20);
    Cache cache(problem, 1, columns, true);
    cache.chunks.offsets.fill_malformed(30);
    cache.chunks.num_chunks.fill_malformed(columns);
    SparseDecode p = arguments(16);
    p.score = draw(0, 1) == 0 ? ChunkScore::kDot : ChunkScore::kMass;
    p.refine = draw(0, 1) * 2;
    p.choice.window = problem.softmax.window;
    p.choice.min_chunk = draw(1, 9);
    problem.lend(&p);
    cache.lend(&p);
    run_stage(p);
    for (int64_t i = 0; i < problem.lse.size; ++i) EXPECT_FALSE(std::isnan(problem.lse.flat(i)));
  }
}

TEST(SparseDecode, same_bits_for_any_number_of_workers) {
  for (const DType dtype : kFloatTypes) {
    Problem problem(dtype, {2, 4, 2, 3, 1100, 16}, true, softmax_of(16));
    const Cache cache(problem, 2, 80, false);
    SparseDecode p = arguments(800);
    cache.lend(&p);
    expect_same_for_any_workers(&problem, p);
  }
}

}  // namespace
}  // namespace dhsa::test
