#include "cpu/caches.h"
#include "problem.h"

namespace dhsa::test {
namespace {

// Lists of random keys, as the runs that hold them.
struct Lists {
  int64_t lists, blocks, capacity;
  Array runs, num_runs;
  std::vector<std::vector<int64_t>> keys;  // [B * S * nQ]

  Lists(const Problem& problem, int64_t lists, int64_t q_block, int64_t mean_run = 4)
      : lists(lists),
        blocks(problem.blocks(q_block)),
        capacity(problem.shape.seqlen_k / 2 + 2),
        runs(DType::kInt32, {problem.shape.batch, lists, blocks, capacity, 2}),
        num_runs(DType::kInt32, {problem.shape.batch, lists, blocks}) {
    for (int64_t list = 0; list < problem.shape.batch * lists * blocks; ++list) {
      keys.emplace_back();
      bool kept = draw(0, 1) == 0;
      for (int64_t j = 0; j < problem.shape.seqlen_k; ++j) {
        if (draw(1, mean_run) == 1) kept = !kept;
        if (kept) keys.back().push_back(j);
      }
      put(list, keys.back());
    }
  }
  void put(int64_t list, const std::vector<int64_t>& from) {
    const auto pairs = runs_of(from, capacity);
    int32_t* run = runs.tensor.as<int32_t>() + list * capacity * 2;
    for (const auto& [begin, end] : pairs) {
      *run++ = static_cast<int32_t>(begin);
      *run++ = static_cast<int32_t>(end);
    }
    num_runs.tensor.as<int32_t>()[list] = static_cast<int32_t>(pairs.size());
  }
  int64_t index(const Problem& problem, int64_t b, int64_t h, int64_t j) const {
    return (b * lists + h / (problem.shape.heads / lists)) * blocks + j;
  }
};

SparseAttention call(Problem* problem, const Lists& lists, int64_t q_block) {
  SparseAttention p;
  problem->lend(&p);
  p.runs = lists.runs.tensor;
  p.num_runs = lists.num_runs.tensor;
  p.q_block = q_block;
  return p;
}

void expect_block(const Problem& problem, const Lists& lists, int64_t j, int64_t q_block) {
  const Geometry g = problem.block(j, q_block);
  for (int64_t b = 0; b < problem.shape.batch; ++b) {
    for (int64_t h = 0; h < problem.shape.heads; ++h) {
      const auto& keys = lists.keys[lists.index(problem, b, h, j)];
      for (int64_t i = g.first; i <= g.last; ++i) problem.expect_row(b, h, i, keys);
    }
  }
}

void compare(DType dtype, const Shape& shape, int64_t lists_count, int64_t q_block, const Softmax& softmax,
             int64_t mean_run = 4) {
  SCOPED_TRACE(testing::Message() << "heads " << shape.heads << ", " << shape.kv_heads << ", lists " << lists_count
                                  << ", lengths " << shape.seqlen_q << ", " << shape.seqlen_k << ", head_dim "
                                  << shape.head_dim << ", q_block " << q_block);
  Problem problem(dtype, shape, draw(0, 1) == 0, softmax);
  problem.slack = std::fabs(softmax.scale) > 1.0f ? 1e-4 : 0.0;
  const Lists lists(problem, lists_count, q_block, mean_run);
  run_stage(call(&problem, lists, q_block));
  for (int64_t j = 0; j < lists.blocks; ++j) expect_block(problem, lists, j, q_block);
}

TEST(SparseAttention, every_type_and_sharing_of_lists) {
  for (const DType dtype : kFloatTypes) {
    for (const int64_t lists : {1, 2, 6}) compare(dtype, {2, 6, 2, 21, 40, 24}, lists, 8, softmax_of(24));
  }
}

TEST(SparseAttention, every_head_dim) {
  for (int64_t head_dim = 8; head_dim <= 256; head_dim += head_dim < 72 ? 8 : 46 / 8 * 8) {
    compare(kFloatTypes[draw(0, 2)], {1, 2, 1, 5, 70, head_dim}, 1, 4, softmax_of(head_dim));
  }
  compare(DType::kFloat32, {1, 2, 1, 5, 70, 256}, 1, 4, softmax_of(256));
}

TEST(SparseAttention, random_shapes_windows_and_caps) {
  for (int round = 0; round < rounds(40); ++round) {
    const int64_t kv_heads = draw(1, 2), heads = kv_heads * draw(1, 4);
    const int64_t lists = draw(0, 2), q_block = draw(1, 20);
    const float softcap = draw(0, 1) == 0 ? 0.0f : static_cast<float>(draw(1, 50));
    compare(kFloatTypes[draw(0, 2)], {draw(1, 2), heads, kv_heads, draw(0, 30), draw(0, 150), 8 * draw(1, 4)},
            lists == 0   ? 1
            : lists == 1 ? kv_heads
                         : heads,
            q_block, softmax_of(16, softcap, draw(0, 1) * draw(1, 120)), draw(2, 9));
  }
}

TEST(SparseAttention, more_rows_than_are_worked_at_a_time) {
  compare(DType::kFloat32, {1, 8, 1, 64, 90, 16}, 1, 64, softmax_of(16));   // 512 rows: queries split
  compare(DType::kBFloat16, {1, 300, 1, 2, 20, 8}, 1, 2, softmax_of(8));    // heads split
  compare(DType::kFloat16, {1, 260, 1, 1, 70, 8}, 1, 1, softmax_of(8));     // one query
  compare(DType::kFloat32, {1, 1, 1, 300, 300, 8}, 1, 300, softmax_of(8));  // one long block
}

TEST(SparseAttention, window_edge_inside_a_tile_that_nothing_else_masks) {
  for (const int64_t q_block : {1, 2, 3, 17}) {
    Problem problem(DType::kFloat32, {1, 2, 1, 40, 250, 8}, true, softmax_of(8, 0.0f, 100));
    Lists lists(problem, 1, q_block);
    for (int64_t j = 0; j < lists.blocks; ++j) lists.put(j, lists.keys[j] = range(0, 250));
    run_stage(call(&problem, lists, q_block));
    for (int64_t j = 0; j < lists.blocks; ++j) expect_block(problem, lists, j, q_block);
  }
}

TEST(SparseAttention, large_logits) {  // sums that only a running maximum keeps finite
  compare(DType::kFloat32, {1, 2, 1, 9, 200, 16}, 1, 4, {20.0f, 0.0f, 0});
  compare(DType::kFloat32, {1, 2, 1, 9, 200, 16}, 1, 4, {-20.0f, 0.0f, 0});
  compare(DType::kFloat32, {1, 2, 1, 9, 200, 16}, 1, 4, {20.0f, 30.0f, 0});
}

TEST(SparseAttention, empty_and_single_token) {
  for (const int64_t seqlen_q : {0, 1, 3}) {
    for (const int64_t seqlen_k : {0, 1})
      compare(DType::kFloat16, {2, 2, 1, seqlen_q, seqlen_k, 8}, 1, 2, softmax_of(8));
  }
  compare(DType::kFloat32, {0, 2, 1, 3, 4, 8}, 1, 2, softmax_of(8));
}

TEST(SparseAttention, rows_outside_the_runs_never_touch_the_block) {
  for (const double poison : {kNaN, kInf, -kInf}) {
    for (const int64_t q_block : {1, 8}) {
      Problem problem(kFloatTypes[draw(0, 2)], {1, 4, 2, 20, 90, 16}, true, softmax_of(16));
      const Lists lists(problem, 2, q_block);
      const Array k = problem.k.copy(), v = problem.v.copy();
      for (int64_t j = 0; j < lists.blocks; ++j) {
        problem.k = k.copy();
        problem.v = v.copy();
        for (int64_t kv = 0; kv < 2; ++kv) {
          const auto& keys = lists.keys[lists.index(problem, 0, 2 * kv, j)];
          for (int64_t t = 0; t < 90; ++t) {
            if (std::binary_search(keys.begin(), keys.end(), t)) continue;
            for (int64_t d = 0; d < 16; ++d) problem.k.put({0, kv, t, d}, poison);
            for (int64_t d = 0; d < 16; ++d) problem.v.put({0, kv, t, d}, poison);
          }
        }
        run_stage(call(&problem, lists, q_block));
        expect_block(problem, lists, j, q_block);
      }
    }
  }
}

TEST(SparseAttention, a_key_never_touches_queries_before_it) {
  for (const int64_t q_block : {1, 8, 32}) {
    Problem problem(kFloatTypes[draw(0, 2)], {1, 4, 2, 32, 80, 16}, false, softmax_of(16));
    const Lists lists(problem, 1, q_block);
    run_stage(call(&problem, lists, q_block));
    const Array out = problem.out.copy();
    const int64_t t = draw(50, 79);
    for (int64_t d = 0; d < 16; ++d) problem.k.put({0, 1, t, d}, normal());
    for (int64_t d = 0; d < 16; ++d) problem.v.put({0, 1, t, d}, normal());
    run_stage(call(&problem, lists, q_block));
    for (int64_t h = 0; h < 4; ++h) {
      for (int64_t i = 0; i + 48 < t; ++i) {
        for (int64_t d = 0; d < 16; ++d) EXPECT_EQ(problem.out.at({0, h, i, d}), out.at({0, h, i, d}));
      }
    }
    // A value that is no number may change the order of sums, but not more. Queries of the block from t on do see it.
    for (int64_t d = 0; d < 16; ++d) problem.v.put({0, 1, t, d}, d % 2 == 0 ? kNaN : kInf);
    run_stage(call(&problem, lists, q_block));
    for (int64_t h = 0; h < 4; ++h) {
      for (int64_t i = 0; i + 48 < t; ++i) {
        problem.expect_row(0, h, i, lists.keys[lists.index(problem, 0, h, i / q_block)]);
      }
    }
  }
}

TEST(SparseAttention, runs_out_of_order_and_out_of_range_are_clamped) {
  for (int round = 0; round < rounds(20); ++round) {
    const int64_t q_block = draw(1, 6), length = 60;
    Problem problem(DType::kFloat32, {1, 2, 1, 12, length, 8}, true, softmax_of(8));
    Lists lists(problem, 1, q_block);
    for (int64_t j = 0; j < lists.blocks; ++j) {
      int32_t* runs = lists.runs.tensor.as<int32_t>() + j * lists.capacity * 2;
      const int64_t a = draw(0, length), b = draw(0, length), begin = std::min(a, b), end = std::max(a, b);
      const int64_t pairs[5][2] = {{end, length + draw(0, 1 << 30)},
                                   {begin, begin},
                                   {end, begin},
                                   {-draw(1, 1 << 30), begin},
                                   {length + 1, length + 9}};
      for (int64_t r = 0; r < 10; ++r) runs[r] = static_cast<int32_t>(pairs[r / 2][r % 2]);
      lists.num_runs.tensor.as<int32_t>()[j] = 5;
      lists.keys[j] = range(0, begin);
      for (const int64_t key : range(end, length)) lists.keys[j].push_back(key);
    }
    run_stage(call(&problem, lists, q_block));
    for (int64_t j = 0; j < lists.blocks; ++j) expect_block(problem, lists, j, q_block);
  }
}

TEST(SparseAttention, malformed_runs_read_nothing_outside) {
  for (int round = 0; round < rounds(60); ++round) {
    const int64_t q_block = draw(1, 6);
    Problem problem(kFloatTypes[draw(0, 2)], {1, 2, 1, 7, 20, 8}, true, softmax_of(8, 0.0f, draw(0, 1) * 5));
    Lists lists(problem, 1, q_block);
    lists.runs.fill_malformed(20);
    lists.num_runs.fill_malformed(lists.capacity);
    run_stage(call(&problem, lists, q_block));
    for (int64_t i = 0; i < problem.lse.size; ++i) {  // what lies outside is NaN
      EXPECT_FALSE(std::isnan(problem.lse.flat(i)));
      for (int64_t d = 0; d < 8; ++d) EXPECT_FALSE(std::isnan(problem.out.at({0, i / 7, i % 7, d})));
    }
  }
}

TEST(SparseAttention, same_bits_of_values_that_are_packed_and_of_those_where_they_lie) {
  const cpu::Caches detected = cpu::caches();
  for (const int64_t head_dim : {16, 24, 80}) {
    Problem problem(DType::kFloat32, {1, 4, 2, 40, 300, head_dim}, true, softmax_of(head_dim));
    const Lists lists(problem, 2, 20);
    const SparseAttention p = call(&problem, lists, 20);
    cpu::force_caches({0, detected.share});
    run_stage(p);
    const Array packed = problem.out.copy();
    cpu::force_caches({64 << 10, detected.share});
    problem.out.fill(-1.0);
    run_stage(p);
    for (int64_t i = 0; i < packed.size; ++i) EXPECT_EQ(problem.out.flat(i), packed.flat(i));
    for (int64_t j = 0; j < lists.blocks; ++j) expect_block(problem, lists, j, 20);
  }
  cpu::force_caches(detected);
}

TEST(SparseAttention, rows_of_a_block_that_see_no_key_of_a_tile) {
  for (const DType dtype : kFloatTypes) {
    for (const int64_t heads : {1, 2}) {  // that share a list
      Problem problem(dtype, {1, 2 * heads, 2, 110, 180, 24}, true, softmax_of(24, 0.0f, draw(0, 1) * 90));
      const Lists lists(problem, 2, 110, 40);
      run_stage(call(&problem, lists, 110));
      expect_block(problem, lists, 0, 110);
    }
  }
}

TEST(SparseAttention, same_answer_whatever_the_caches_hold) {
  const cpu::Caches detected = cpu::caches();
  for (const DType dtype : kFloatTypes) {
    Problem problem(dtype, {1, 8, 1, 70, 120, 24}, true, softmax_of(24));  // 560 rows share the list
    const Lists lists(problem, 1, 70);
    for (const int64_t bytes : {0, 100 << 10, 1 << 30}) {
      cpu::force_caches({detected.first, bytes});
      problem.out.fill(-1.0);
      run_stage(call(&problem, lists, 70));
      expect_block(problem, lists, 0, 70);
    }
  }
  cpu::force_caches(detected);
}

TEST(SparseAttention, same_bits_for_any_number_of_workers) {
  for (const DType dtype : kFloatTypes) {
    Problem problem(dtype, {2, 4, 2, 30, 150, 16}, true, softmax_of(16, 30.0f, 70));
    const Lists lists(problem, 2, 8);
    expect_same_for_any_workers(&problem, call(&problem, lists, 8));
  }
}

}  // namespace
}  // namespace dhsa::test
