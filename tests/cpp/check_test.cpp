// Sentences of check(), word for word; tests/test_errors.py has a row for each that a Python caller can meet.
#include <stdexcept>

#include "problem.h"

namespace dhsa::test {
namespace {

template <class P>
std::string sentence(const P& p) {
  try {
    check(p);
  } catch (const std::invalid_argument& error) {
    return error.what();
  }
  return "nothing thrown";
}

// A valid call of sparse_attention and of sparse_prefill over one set of tensors.
struct Valid {
  Problem problem{DType::kFloat16, {2, 4, 2, 20, 30, 16}, true, softmax_of(16)};
  Array runs{DType::kInt32, {2, 2, 3, 5, 2}}, num_runs{DType::kInt32, {2, 2, 3}};
  SparseAttention attention;
  SparsePrefill prefill;

  Valid() {
    problem.lend(&attention);
    attention.q_block = 8;
    attention.runs = runs.tensor;
    attention.num_runs = num_runs.tensor;
    problem.lend(&prefill);
    prefill.q_block = 8;
    prefill.max_chunks = 4;
    prefill.select_heads = 2;
    prefill.threshold = 0.0f;
    prefill.choice.sink = 2, prefill.choice.local = 3, prefill.choice.budget = 12;
  }
};

TEST(Check, valid_calls_pass) {
  const Valid valid;
  EXPECT_EQ(sentence(valid.attention), "nothing thrown");
  EXPECT_EQ(sentence(valid.prefill), "nothing thrown");
}

TEST(Check, shapes_and_types) {
  Valid valid;
  SparseAttention p = valid.attention;
  p.k.ndim = 3;
  EXPECT_EQ(sentence(p),
            "dhsa::sparse_attention: k: expected 4 dimensions [batch, heads, length, head_dim], got 3: "
            "[2, 2, 30]");
  p = valid.attention;
  p.k.dtype = DType::kBFloat16;
  EXPECT_EQ(sentence(p), "dhsa::sparse_attention: k: expected float16 as q, got bfloat16");
  p = valid.attention;
  p.q.dtype = DType::kInt32;
  EXPECT_EQ(sentence(p), "dhsa::sparse_attention: q: expected float32, float16 or bfloat16, got int32");
  p = valid.attention;
  p.k.shape[1] = 3;
  EXPECT_EQ(sentence(p),
            "dhsa::sparse_attention: k: expected a number of heads that divides q's, got 3 for 4 query heads");
  p = valid.attention;
  p.v.shape[2] = 29;
  EXPECT_EQ(sentence(p), "dhsa::sparse_attention: v: expected shape [2, 2, 30, 16], got [2, 2, 29, 16]");
  for (const int64_t head_dim : {0, 4, 20, 264}) {
    p = valid.attention;
    p.q.shape[3] = head_dim;
    EXPECT_EQ(sentence(p), "dhsa::sparse_attention: q: expected a head_dim that is a multiple of 8 up to 256, got " +
                               std::to_string(head_dim));
  }
}

TEST(Check, memory) {
  Valid valid;
  SparseAttention p = valid.attention;
  p.q.stride[3] = 2;
  EXPECT_EQ(sentence(p), "dhsa::sparse_attention: q: expected a contiguous last dimension, got stride 2");
  p = valid.attention;
  p.v.stride[2] = 36;
  EXPECT_EQ(sentence(p),
            "dhsa::sparse_attention: v: expected strides that are multiples of 16 bytes, got 36 elements "
            "in dimension 2");
  p = valid.attention;
  p.q.data = p.q.as<char>() + 2;
  EXPECT_EQ(sentence(p),
            "dhsa::sparse_attention: q: expected a data pointer that is a multiple of 16 bytes, got 2 bytes "
            "past");
  p = valid.attention;
  p.k.data = nullptr;
  EXPECT_EQ(sentence(p), "dhsa::sparse_attention: k: expected data, got none");
  p = valid.attention;
  p.num_runs.stride[1] = 4;
  EXPECT_EQ(sentence(p), "dhsa::sparse_attention: num_runs: expected a contiguous tensor, got strides [6, 4, 1]");
}

TEST(Check, lists_and_blocks) {
  Valid valid;
  SparseAttention p = valid.attention;
  p.q_block = 10;
  EXPECT_EQ(sentence(p), "dhsa::sparse_attention: runs: expected ceil(Lq / q_block) = 2 query blocks, got 3");
  p = valid.attention;
  const Array three_lists(DType::kInt32, {2, 3, 3, 5, 2});
  p.runs = three_lists.tensor;
  EXPECT_EQ(sentence(p),
            "dhsa::sparse_attention: runs: expected 1, 2 (KV heads) or 4 (query heads) selection heads, "
            "got 3");
  p = valid.attention;
  p.q_block = 0;
  EXPECT_EQ(sentence(p), "dhsa::sparse_attention: q_block: expected an integer >= 1, got 0");
}

TEST(Check, budget_one_below_its_bound) {
  Valid valid;
  valid.prefill.choice.budget = 11;
  EXPECT_EQ(sentence(valid.prefill),
            "dhsa::sparse_prefill: budget: expected at least sink + local + min(q_block, Lq) - 1 = 12, got 11");
  valid.prefill.choice.sink = valid.prefill.choice.local = 1 << 20;  // clamped to the 30 keys there are
  EXPECT_EQ(sentence(valid.prefill),
            "dhsa::sparse_prefill: budget: expected at least sink + local + min(q_block, Lq) - 1 = 67, got 11");
}

TEST(Check, offsets_without_num_chunks) {
  Valid valid;
  const Chunks chunks(2, 5, 30);
  valid.prefill.offsets = chunks.offsets.tensor;
  EXPECT_EQ(sentence(valid.prefill),
            "dhsa::sparse_prefill: num_chunks: expected offsets and num_chunks, both or neither, got one");
}

TEST(Check, numbers_that_are_none) {
  Valid valid;
  valid.prefill.threshold = std::numeric_limits<float>::quiet_NaN();
  EXPECT_EQ(sentence(valid.prefill), "dhsa::sparse_prefill: threshold: expected a number, got nan");
  valid.attention.softmax.scale = std::numeric_limits<float>::quiet_NaN();
  EXPECT_EQ(sentence(valid.attention), "dhsa::sparse_attention: scale: expected a number, got nan");
}

TEST(Check, seventeen_queries_to_decode) {
  Problem problem(DType::kFloat32, {1, 2, 1, 17, 30, 8}, true, softmax_of(8));
  SparseDecode p;
  problem.lend(&p);
  EXPECT_EQ(sentence(p), "dhsa::sparse_decode: q: expected at most 16 queries, got 17");
}

TEST(Check, capacities_follow_from_arguments) {
  EXPECT_EQ(chunk_capacity(100, 7, 0), 7);
  EXPECT_EQ(chunk_capacity(100, 7, 30), 3 * 7 + 2);  // the last 10 tokens: max(1, 7 * 10 / 30)
  EXPECT_EQ(chunk_capacity(91, 7, 30), 3 * 7 + 1);
  EXPECT_EQ(chunk_capacity(0, 7, 30), 0);
  EXPECT_EQ(run_capacity(100, 64, 9), 64 / 9 + 1 + 3);
  EXPECT_EQ(run_capacity(5, 64, 1), 5 + 3);
  EXPECT_EQ(refined_run_capacity(101, 1000), 51);
  EXPECT_EQ(refined_run_capacity(101, 20), 20);
  EXPECT_EQ(refined_run_capacity(0, 20), 1);
}

}  // namespace
}  // namespace dhsa::test
