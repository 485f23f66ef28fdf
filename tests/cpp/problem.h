// Random q, k, v, the attention of a call over given keys, and its comparison with the oracle; for the tests of
// sparse_attention and of the fused calls.
#pragma once

#include "reference.h"

namespace dhsa::test {

struct Shape {
  int64_t batch, heads, kv_heads, seqlen_q, seqlen_k, head_dim;
};

inline Softmax softmax_of(int64_t head_dim, float softcap = 0.0f, int64_t window = 0) {
  return {1.0f / std::sqrt(static_cast<float>(head_dim)), softcap, window};
}

struct Problem {
  Shape shape;
  Array q, k, v, out, lse;
  Softmax softmax;
  double slack = 0;  // added to the bounds: what float32 loses in logits far above 1

  Problem(DType dtype, const Shape& n, bool heads_last, const Softmax& softmax)
      : shape(n),
        q(dtype, {n.batch, n.heads, n.seqlen_q, n.head_dim}, heads_last),
        k(dtype, {n.batch, n.kv_heads, n.seqlen_k, n.head_dim}, heads_last),
        v(dtype, {n.batch, n.kv_heads, n.seqlen_k, n.head_dim}, heads_last),
        out(dtype, {n.batch, n.heads, n.seqlen_q, n.head_dim}, heads_last),
        lse(DType::kFloat32, {n.batch, n.heads, n.seqlen_q}),
        softmax(softmax) {
    q.fill_normal();
    k.fill_normal();
    v.fill_normal();
  }

  template <class P>
  void lend(P* p) {  // to a stage that has all of them
    p->q = q.tensor;
    p->k = k.tensor;
    p->v = v.tensor;
    p->out = out.tensor;
    p->lse = lse.tensor;
    p->softmax = softmax;
  }

  // Row by row the bounds of docs/numerics.md: |out - want| / |want|, and the difference of lse. A row whose values
  // cancel has what rounded probabilities do to them beside it, up to u |p| |v|: half of the bound on their sum.
  void expect_row(int64_t b, int64_t h, int64_t i, const std::vector<int64_t>& keys) const {
    const auto [want, magnitude, want_lse] = attend(q, k, v, b, h, i, keys, softmax);
    const int type = static_cast<int>(q.tensor.dtype);
    const double out_bound[] = {1e-5, 2e-3, 1e-2}, lse_bound[] = {1e-4, 1e-2, 2e-2};
    double error = 0, norm = 0, all = 0;
    for (int64_t d = 0; d < q.dim(3); ++d) {
      const double difference = out.at({b, h, i, d}) - want[d];
      error += difference * difference;
      norm += want[d] * want[d];
      all += magnitude[d] * magnitude[d];
    }
    EXPECT_LE(std::sqrt(error), (out_bound[type] + slack) * std::max(std::sqrt(norm), std::sqrt(all) / 2))
        << "out of b " << b << ", head " << h << ", " << i;
    if (keys.empty() || std::isinf(want_lse)) {
      EXPECT_EQ(lse.at({b, h, i}), want_lse) << "lse of b " << b << ", head " << h << ", " << i;
    } else {
      EXPECT_NEAR(lse.at({b, h, i}), want_lse, lse_bound[type] + slack)
          << "lse of b " << b << ", head " << h << ", " << i;
    }
  }

  Geometry block(int64_t j, int64_t q_block) const {
    return Geometry(j, q_block, shape.seqlen_q, shape.seqlen_k, softmax.window);
  }
  int64_t blocks(int64_t q_block) const { return (shape.seqlen_q + q_block - 1) / q_block; }
};

inline std::vector<int64_t> range(int64_t begin, int64_t end) {
  std::vector<int64_t> keys;
  for (int64_t j = begin; j < end; ++j) keys.push_back(j);
  return keys;
}

// The stage's outputs for 1, 2 and 5 workers, bit for bit.
template <class P>
void expect_same_for_any_workers(Problem* problem, P p) {
  problem->lend(&p);
  run_stage(p, 1);
  for (const int workers : {2, 5}) {
    const Array out = problem->out.copy(), lse = problem->lse.copy();
    problem->out.fill(kNaN);
    problem->lse.fill(kNaN);
    run_stage(p, workers);
    EXPECT_TRUE(out.same_bits(problem->out) && lse.same_bits(problem->lse)) << workers << " workers";
  }
}

}  // namespace dhsa::test
