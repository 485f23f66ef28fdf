// The exponential of softmax_columns beside tiles: what is left of the time is the softmax more than elsewhere.
#pragma once

namespace dhsa::cpu::DHSA_ISA {

// exp(x - shift) for x <= shift, as a power of 2: 14 instructions where exp_nonpositive takes 17. Its relative error
// grows with shift - x to 5e-6 at 2^-126, from where on it is 0; probabilities near 1 are within 2 ulp.
struct FastExp {
  Wide shift;

  Wide operator()(Wide x) const {
    const Wide t = mul(sub(x, shift), wide_set1(1.44269504f));
    const __mmask16 kept = _mm512_cmp_ps_mask(t, wide_set1(-126.0f), _CMP_NLT_UQ);
    const Wide magic = wide_set1(0x1.8p23f);  // beside which t is rounded to whole numbers, the last bits of the sum
    const Wide whole = add(t, magic), r = sub(t, sub(whole, magic));
    Wide p = wide_set1(1.3264727e-3f);
    p = fma(p, r, wide_set1(9.6715126e-3f));
    p = fma(p, r, wide_set1(5.5507337e-2f));
    p = fma(p, r, wide_set1(2.4022242e-1f));
    p = fma(p, r, wide_set1(6.9314698e-1f));
    p = fma(p, r, wide_set1(1.0f));
    const __m512i exponent = _mm512_slli_epi32(_mm512_castps_si512(whole), 23);
    return _mm512_castsi512_ps(_mm512_maskz_add_epi32(kept, _mm512_castps_si512(p), exponent));
  }
};

}  // namespace dhsa::cpu::DHSA_ISA
