// softmax_columns to the parts of probabilities: fewer instructions for an exponential, exact enough for sixteen bits,
// and two vectors of queries at a time, all that a row of a strip has.
#pragma once

namespace dhsa::cpu::DHSA_ISA {

// exp(scale x - shift) as a power of 2: 8 instructions where exp_nonpositive takes 17. Its relative error is 3e-6, and
// an ulp of shift; exp(0) is 1, exp(-inf) 0.
class FastExp {
 public:
  FastExp(float scale, Wide shift) : factor_(wide_set1(scale * kLog2E)), offset_(mul(shift, wide_set1(-kLog2E))) {}

  Wide operator()(Wide x) const {
    const Wide t = fma(x, factor_, offset_), r = _mm512_reduce_ps(t, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
    Wide p = fma(r, wide_set1(0.0134267007f), wide_set1(0.0522424467f));  // 2^r for r of [0, 1): minimax, 1 at 0
    p = fma(p, r, wide_set1(0.241280213f));
    p = fma(p, r, wide_set1(0.693044841f));
    return _mm512_scalef_ps(fma(p, r, wide_set1(1.0f)), t);  // by 2 to the floor of t
  }

 private:
  static constexpr float kLog2E = 1.44269504f;
  Wide factor_, offset_;
};

template <class As, int kVectors>
inline void softmax_vectors(float* s, int64_t lds, int64_t n, float scale, float* row_max, float* row_sum,
                            float* shrink) {
  Wide even[kVectors], odd[kVectors], sum[kVectors];
#pragma GCC unroll 2
  for (int v = 0; v < kVectors; ++v) even[v] = odd[v] = wide_set1(-kInfinity);
  for (int64_t j = 0; j < n; j += 2) {
    const float *at = s + j * lds, *next = j + 1 < n ? at + lds : at;
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
      even[v] = max(wide_load(at + v * kWide), even[v]);
      odd[v] = max(wide_load(next + v * kWide), odd[v]);
    }
  }
  Wide shift[kVectors];
#pragma GCC unroll 2
  for (int v = 0; v < kVectors; ++v) {
    const Wide old_max = wide_load(row_max + v * kWide);
    const Wide peak = max(mul(max(even[v], odd[v]), wide_set1(scale)), old_max);
    // A row without a key yet: exp(-inf - 0) = 0.
    shift[v] = select_less(wide_set1(-kInfinity), peak, peak, wide_zero());
    const Wide factor = exp_nonpositive(sub(old_max, shift[v]));
    sum[v] = mul(wide_load(row_sum + v * kWide), factor);
    store(row_max + v * kWide, peak);
    store(shrink + v * kWide, factor);
  }
  const FastExp exp[2] = {{scale, shift[0]}, {scale, shift[kVectors - 1]}};
  int64_t j = 0;
  for (; j + 2 <= n; j += 2) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
      float *at = s + j * lds + v * kWide, *next_at = at + lds;
      const Wide p = exp[v](wide_load(at)), next = exp[v](wide_load(next_at));
      As::put(p, next, at, next_at);
      sum[v] = add(sum[v], add(p, next));
    }
  }
#pragma GCC unroll 2
  for (int v = 0; v < kVectors; ++v) {
    if (j < n) {
      float* at = s + j * lds + v * kWide;
      const Wide p = exp[v](wide_load(at));
      As::put(p, at, at + lds);
      sum[v] = add(sum[v], p);
    }
    store(row_sum + v * kWide, sum[v]);
  }
}

template <class As>
void softmax_strips(float* s, int64_t lds, int64_t n, int64_t m, float scale, float* row_max, float* row_sum,
                    float* shrink) {
  for (int64_t i = 0; i < m; i += 2 * kWide) {
    const auto softmax = m - i > kWide ? softmax_vectors<As, 2> : softmax_vectors<As, 1>;
    softmax(s + i, lds, n, scale, row_max + i, row_sum + i, shrink + i);
  }
}

}  // namespace dhsa::cpu::DHSA_ISA
