// The fused call against the oracle of its stages. A block whose cut-off lies nearer to a score than float32 can tell
// is left out, and each test checks that few are.
#include "problem.h"

namespace dhsa::test {
namespace {

struct Offsets {
  Array offsets, num_chunks;
};

// Stages 1 and 2 as their own calls; their tests compare them with the oracle.
Offsets find_boundaries(const SparsePrefill& p, int64_t batch, int64_t seqlen_k) {
  const int64_t capacity = chunk_capacity(seqlen_k, p.max_chunks, p.segment);
  const Array scores(DType::kFloat32, {batch, seqlen_k});
  Offsets found{{DType::kInt32, {batch, capacity + 1}}, {DType::kInt32, {batch}}};
  run_stage(BoundaryScores{p.k, p.boundary_window, scores.tensor});
  run_stage(SelectBoundaries{scores.tensor, p.max_chunks, p.nms_radius, p.threshold, p.segment, found.offsets.tensor,
                             found.num_chunks.tensor});
  return found;
}

// The keys that block g of list s keeps.
Kept kept_keys(const SparsePrefill& p, const Problem& problem, const ChunkRow& row, int64_t b, int64_t s,
               const Geometry& g) {
  const int64_t lists = p.select_heads, heads = problem.shape.heads / lists;
  KeyChoice choice = p.choice;
  choice.sink = std::min(choice.sink, row.length);
  choice.local = std::min(choice.local, row.length);
  ChunkRow scored = row;
  for (auto& [begin, end] : scored.chunks) {
    if (p.strict && begin <= g.p1 && g.p1 < end) end = g.p1 + 1;
  }
  const auto pooled = [&](int64_t c, PoolScale scale) {
    return pool(problem.k, b, s, lists, scored.chunks[c].first, scored.chunks[c].second, scale);
  };
  Row scores(row.size(), 0.0);
  std::vector<Row> row_lse;
  if (p.score == ChunkScore::kMass) {
    const Mass mass = chunk_mass(problem.q, b, s * heads, heads, g, {p.q_stride, p.rows}, p.softmax, scored,
                                 [&](int64_t c) { return pooled(c, PoolScale::kMean); });
    scores = mass.scores;
    row_lse = mass.row_lse;
  } else {
    const Row query = pool(problem.q, b, s, lists, g.first, g.last + 1, PoolScale::kSqrt);
    for (int64_t c = 0; c < row.size(); ++c) {
      const auto [begin, end] = scored.chunks[c];
      scores[c] = begin < end && begin <= g.p1 ? dot(query, pooled(c, p.pool)) : 0.0;
    }
  }
  if (p.refine == 0) return select_keys(g, choice, problem.shape.seqlen_q, row, scores);
  return refine_keys(g, choice, problem.shape.seqlen_q, p.refine, row, scores, [&] {
    return key_scores(problem.q, problem.k, b, s, lists, g, {p.q_stride, p.rows}, p.softmax, row_lse);
  });
}

struct Count {
  int64_t compared = 0, left_out = 0;
  ~Count() { EXPECT_LE(left_out, 3 + compared / 10); }
};

void compare(SparsePrefill p, Problem* problem, const Offsets* given, Count* count) {
  problem->lend(&p);
  if (given != nullptr) {
    p.offsets = given->offsets.tensor;
    p.num_chunks = given->num_chunks.tensor;
  }
  run_stage(p);
  const Shape& n = problem->shape;
  const Offsets offsets = given != nullptr ? *given : find_boundaries(p, n.batch, n.seqlen_k);
  SCOPED_TRACE(testing::Message() << "heads " << n.heads << ", " << n.kv_heads << ", lists " << p.select_heads
                                  << ", lengths " << n.seqlen_q << ", " << n.seqlen_k << ", q_block " << p.q_block
                                  << ", budget " << p.choice.budget << ", refine " << p.refine << ", mass "
                                  << (p.score == ChunkScore::kMass) << ", strict " << p.strict << ", q_stride "
                                  << p.q_stride << ", means " << (p.rows == QueryRows::kMean) << ", window "
                                  << p.softmax.window << ", dense_tail " << p.choice.dense_tail);
  for (int64_t b = 0; b < n.batch; ++b) {
    const ChunkRow row(offsets.offsets, offsets.num_chunks, b, n.seqlen_k);
    for (int64_t s = 0; s < p.select_heads; ++s) {
      for (int64_t j = 0; j < problem->blocks(p.q_block); ++j) {
        const Geometry g = problem->block(j, p.q_block);
        const Kept kept = kept_keys(p, *problem, row, b, s, g);
        ++(kept.certain ? count->compared : count->left_out);
        if (!kept.certain) continue;
        const int64_t heads = n.heads / p.select_heads;
        for (int64_t h = s * heads; h < (s + 1) * heads; ++h) {
          for (int64_t i = g.first; i <= g.last; ++i) problem->expect_row(b, h, i, kept.keys);
        }
      }
    }
  }
}

SparsePrefill arguments(int64_t budget, int64_t q_block, int64_t select_heads) {
  SparsePrefill p;
  p.max_chunks = 12;
  p.q_block = q_block;
  p.select_heads = select_heads;
  p.threshold = -std::numeric_limits<float>::infinity();
  p.nms_radius = 3;
  p.choice.budget = budget;
  p.choice.sink = 4;
  p.choice.local = 6;
  p.choice.min_chunk = p.nms_radius + 1;
  return p;
}

TEST(SparsePrefill, both_scores_every_pool_and_type) {
  Count count;
  for (const DType dtype : kFloatTypes) {
    for (const PoolScale pool : {PoolScale::kSqrt, PoolScale::kMean, PoolScale::kSum}) {
      for (const ChunkScore score : {ChunkScore::kDot, ChunkScore::kMass}) {
        if (score == ChunkScore::kMass && pool != PoolScale::kSqrt) continue;  // it ignores the pool
        for (const int64_t refine : {0, 3}) {
          for (const QueryRows rows : {QueryRows::kSample, QueryRows::kMean}) {
            Problem problem(dtype, {1, 4, 2, 44, 60, 16}, true, softmax_of(16));
            SparsePrefill p = arguments(32, 16, 2);
            p.pool = pool, p.score = score, p.refine = refine, p.q_stride = 5, p.rows = rows;
            compare(p, &problem, nullptr, &count);
          }
        }
      }
    }
  }
}

TEST(SparsePrefill, random_arguments) {
  Count count;
  for (int round = 0; round < rounds(60); ++round) {
    const int64_t kv_heads = draw(1, 2), heads = kv_heads * draw(1, 3), lists[] = {1, kv_heads, heads};
    const int64_t seqlen_k = draw(0, 100), q_block = draw(1, 20), head_dim = 8 * draw(1, 4);
    const float softcap = draw(0, 1) == 0 ? 0.0f : 20.0f;
    Problem problem(kFloatTypes[draw(0, 2)], {draw(1, 2), heads, kv_heads, draw(0, seqlen_k + 3), seqlen_k, head_dim},
                    draw(0, 1) == 0, softmax_of(head_dim, softcap, draw(0, 1) * draw(1, 60)));
    SparsePrefill p = arguments(0, q_block, lists[draw(0, 2)]);
    p.max_chunks = draw(1, 16);
    p.score = draw(0, 1) == 0 ? ChunkScore::kDot : ChunkScore::kMass;
    p.pool = draw(0, 1) == 0 ? PoolScale::kSqrt : PoolScale::kMean;
    p.refine = draw(0, 1) * draw(1, 4);
    p.q_stride = draw(1, 8);
    p.rows = draw(0, 1) == 0 ? QueryRows::kSample : QueryRows::kMean;
    p.boundary_window = draw(1, 5);
    p.nms_radius = draw(0, 8);
    p.segment = draw(0, 1) * draw(8, 50);
    p.strict = draw(0, 1) == 0;
    p.choice.sink = draw(0, 6);
    p.choice.local = draw(0, 10);
    p.choice.window = problem.softmax.window;
    p.choice.dense_tail = draw(0, 1) * draw(0, 20);
    p.choice.budget = p.choice.sink + p.choice.local + q_block + draw(0, 40);
    const bool given = draw(0, 1) == 0;
    p.choice.min_chunk = given || p.segment > 0 ? 1 : p.nms_radius + 1;
    const Chunks chunks(problem.shape.batch, 14, seqlen_k, draw(0, 1) == 0);
    const Offsets offsets{chunks.offsets, chunks.num_chunks};
    compare(p, &problem, given ? &offsets : nullptr, &count);
  }
}

TEST(SparsePrefill, budget_of_the_length_is_dense_attention) {
  for (const DType dtype : kFloatTypes) {
    for (const int64_t lists : {1, 2, 4}) {
      Problem problem(dtype, {2, 4, 2, 50, 70, 16}, true, softmax_of(16, 10.0f));
      SparsePrefill p = arguments(70, 8, lists);
      problem.lend(&p);
      run_stage(p);
      for (int64_t b = 0; b < 2; ++b) {
        for (int64_t h = 0; h < 4; ++h) {
          for (int64_t i = 0; i < 50; ++i) problem.expect_row(b, h, i, range(0, 70));
        }
      }
    }
  }
}

TEST(SparsePrefill, sink_and_local_longer_than_the_keys) {
  Count count;
  Problem problem(DType::kFloat32, {1, 2, 1, 9, 9, 8}, false, softmax_of(8));
  SparsePrefill p = arguments(30, 4, 1);
  p.choice.sink = p.choice.local = 1000;
  compare(p, &problem, nullptr, &count);
}

TEST(SparsePrefill, strict_scores_the_chunk_of_the_last_query_up_to_it) {
  Count count;
  for (const ChunkScore score : {ChunkScore::kDot, ChunkScore::kMass}) {
    for (const int64_t refine : {0, 2}) {
      for (const int64_t q_block : {1, 5}) {
        Problem problem(DType::kFloat32, {1, 2, 1, 80, 80, 8}, true, softmax_of(8));
        const Chunks chunks(1, 80 / 16, 80);  // the last one is long
        SparsePrefill p = arguments(12, q_block, 1);
        p.score = score, p.refine = refine, p.q_stride = 2, p.strict = true;
        p.choice.sink = p.choice.local = 0, p.choice.min_chunk = 1;
        const Offsets offsets{chunks.offsets, chunks.num_chunks};
        compare(p, &problem, &offsets, &count);
      }
    }
  }
}

TEST(SparsePrefill, many_rows_and_a_dense_tail) {
  Count count;
  Problem problem(DType::kBFloat16, {1, 8, 2, 130, 170, 8}, true, softmax_of(8));
  SparsePrefill p = arguments(100, 64, 2);
  p.choice.dense_tail = 20;
  compare(p, &problem, nullptr, &count);
}

TEST(SparsePrefill, changing_a_token_changes_nothing_before_it) {
  for (const bool whole : {true, false}) {  // at a budget of the length; or strict, block by block of one query
    Problem problem(DType::kFloat32, {1, 2, 1, 60, 60, 16}, true, softmax_of(16));
    const Chunks chunks(1, 10, 60);
    SparsePrefill p = arguments(whole ? 60 : 20, whole ? 16 : 1, 1);
    p.strict = !whole;
    p.choice.min_chunk = 1;
    problem.lend(&p);
    p.offsets = chunks.offsets.tensor;
    p.num_chunks = chunks.num_chunks.tensor;
    for (const ChunkScore score : {ChunkScore::kDot, ChunkScore::kMass}) {
      p.score = score;
      run_stage(p);
      const Array out = problem.out.copy(), lse = problem.lse.copy();
      const int64_t t = draw(1, 59);
      for (int64_t d = 0; d < 16; ++d) problem.k.put({0, 0, t, d}, normal());
      for (int64_t d = 0; d < 16; ++d) problem.v.put({0, 0, t, d}, normal());
      run_stage(p);
      for (int64_t h = 0; h < 2; ++h) {
        for (int64_t i = 0; i < t; ++i) {
          EXPECT_EQ(problem.lse.at({0, h, i}), lse.at({0, h, i})) << "token " << t << ", query " << i;
          for (int64_t d = 0; d < 16; ++d) EXPECT_EQ(problem.out.at({0, h, i, d}), out.at({0, h, i, d}));
        }
      }
    }
  }
}

TEST(SparsePrefill, values_that_are_not_kept_never_touch_the_block) {
  Problem problem(DType::kFloat16, {1, 2, 1, 24, 80, 16}, true, softmax_of(16));
  const Chunks chunks(1, 14, 80);
  SparsePrefill p = arguments(30, 8, 1);
  p.choice.min_chunk = 1;
  p.offsets = chunks.offsets.tensor;
  p.num_chunks = chunks.num_chunks.tensor;
  const Array v = problem.v.copy();
  for (int64_t j = 0; j < 3; ++j) {
    problem.v = v.copy();
    problem.lend(&p);
    const Geometry g = problem.block(j, 8);
    const Kept kept = kept_keys(p, problem, ChunkRow(chunks.offsets, chunks.num_chunks, 0, 80), 0, 0, g);
    for (int64_t t = 0; t < 80; ++t) {
      if (std::binary_search(kept.keys.begin(), kept.keys.end(), t)) continue;
      for (int64_t d = 0; d < 16; ++d) problem.v.put({0, 0, t, d}, d % 2 == 0 ? kNaN : kInf);
    }
    run_stage(p);
    for (int64_t i = g.first; kept.certain && i <= g.last; ++i) problem.expect_row(0, 0, i, kept.keys);
  }
}

TEST(SparsePrefill, malformed_offsets_read_nothing_outside) {
  for (int round = 0; round < rounds(60); ++round) {
    Problem problem(kFloatTypes[draw(0, 2)], {1, 2, 1, 20, 30, 8}, true, softmax_of(8, 0.0f, draw(0, 1) * 9));
    SparsePrefill p = arguments(18, 4, 1);
    problem.lend(&p);
    const int64_t columns = draw(1, 20);
    Chunks chunks(1, columns, 30);
    chunks.offsets.fill_malformed(30);
    chunks.num_chunks.fill_malformed(columns);
    p.offsets = chunks.offsets.tensor;
    p.num_chunks = chunks.num_chunks.tensor;
    p.score = draw(0, 1) == 0 ? ChunkScore::kDot : ChunkScore::kMass;
    p.refine = draw(0, 1) * 2;
    p.strict = draw(0, 1) == 0;
    p.rows = draw(0, 1) == 0 ? QueryRows::kSample : QueryRows::kMean;
    p.choice.window = problem.softmax.window;
    p.choice.min_chunk = draw(1, 9);
    run_stage(p);
    for (int64_t i = 0; i < problem.lse.size; ++i) EXPECT_FALSE(std::isnan(problem.lse.flat(i)));
  }
}

TEST(SparsePrefill, same_bits_for_any_number_of_workers) {
  for (const ChunkScore score : {ChunkScore::kDot, ChunkScore::kMass}) {
    Problem problem(DType::kBFloat16, {2, 4, 2, 90, 120, 16}, true, softmax_of(16));
    SparsePrefill p = arguments(48, 16, 2);
    p.score = score;
    p.refine = score == ChunkScore::kMass ? 3 : 0;
    p.rows = QueryRows::kMean;
    p.choice.dense_tail = 10;
    expect_same_for_any_workers(&problem, p);
  }
}

}  // namespace
}  // namespace dhsa::test
