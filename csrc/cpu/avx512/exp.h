// The exponentials of softmax_columns on AVX-512, powers of 2: 2^t is a polynomial of t's fraction, scaled by its
// floor.
#pragma once

namespace dhsa::cpu::DHSA_ISA {

constexpr float kLog2E = 1.44269504f;

inline Wide fraction_of(Wide t) { return _mm512_reduce_ps(t, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC); }

// exp(scale x - shift) within 1.4e-7 for what is not positive: 10 instructions where exp_nonpositive takes 14. exp(0)
// is 1; below -87.3, where that would be subnormal, it is 0.
class ShiftedExp {
 public:
  ShiftedExp(float scale, Wide shift) : scale_(wide_set1(scale)), offset_(sub(wide_zero(), shift)) {}

  Wide operator()(Wide x) const {
    const Wide t = mul(fma(x, scale_, offset_), wide_set1(kLog2E)), r = fraction_of(t);
    Wide p = fma(r, wide_set1(1.867130262e-3f), wide_set1(9.017029916e-3f));  // 2^r for r of [0, 1): minimax, 1 at 0
    p = fma(p, r, wide_set1(5.579991339e-2f));
    p = fma(p, r, wide_set1(0.2401644501f));
    p = fma(p, r, wide_set1(0.6931513118f));
    p = fma(p, r, wide_set1(1.0f));
    return _mm512_maskz_scalef_ps(_mm512_cmp_ps_mask(t, wide_set1(-126.0f), _CMP_NLT_UQ), p, t);
  }

 private:
  Wide scale_, offset_;
};

// The same within 3e-6, and an ulp of shift, in 8 instructions: enough for probabilities of sixteen bits.
class FastExp {
 public:
  FastExp(float scale, Wide shift) : factor_(wide_set1(scale * kLog2E)), offset_(mul(shift, wide_set1(-kLog2E))) {}

  Wide operator()(Wide x) const {
    const Wide t = fma(x, factor_, offset_), r = fraction_of(t);
    Wide p = fma(r, wide_set1(0.0134267007f), wide_set1(0.0522424467f));
    p = fma(p, r, wide_set1(0.241280213f));
    p = fma(p, r, wide_set1(0.693044841f));
    return _mm512_scalef_ps(fma(p, r, wide_set1(1.0f)), t);
  }

 private:
  Wide factor_, offset_;
};

}  // namespace dhsa::cpu::DHSA_ISA
