// exp and tanh over the ISA's vec.h; included by its kernels.cpp only.
#pragma once

namespace dhsa::cpu::DHSA_ISA {

constexpr float kInfinity = __builtin_inff();

inline Vec set_like(Vec, float x) { return set1(x); }

// exp(x) for x <= 0 within 2 ulp, 4 below 1e-10; below -87.3, where that would be subnormal, less than the least normal
// number, and 0 from -89 on; NaN stays NaN. The polynomial's own error, 3e-9, is far below a rounding: one term more
// gains nothing.
template <class V>  // Vec, or an ISA's wider vectors
inline V exp_nonpositive(V x) {
  const V n = round(mul(x, set_like(x, -1.44269504f)));
  const V r = add_ln2_times(x, n);
  V p = set_like(x, 1.3814539416e-3f);
  p = fma(p, r, set_like(x, 8.3687454462e-3f));
  p = fma(p, r, set_like(x, 4.1668388993e-2f));
  p = fma(p, r, set_like(x, 1.6666521132e-1f));
  p = fma(p, r, set_like(x, 4.9999994040e-1f));
  p = fma(mul(r, r), p, add(r, set_like(x, 1.0f)));
  return divide_by_power_of_2(p, n);
}

// tanh(x): (1 - t) / (1 + t) with t = exp(-2|x|); below 0.3, where 1 - t cancels, the odd series to x^9.
inline Vec tanh(Vec x) {
  const Vec magnitude = abs(x);
  const Vec t = exp_nonpositive(mul(magnitude, set1(-2.0f)));
  const Vec large = copy_sign(div(sub(set1(1.0f), t), add(set1(1.0f), t)), x);
  const Vec x2 = mul(x, x);
  Vec p = fma(set1(62.0f / 2835.0f), x2, set1(-17.0f / 315.0f));
  p = fma(p, x2, set1(2.0f / 15.0f));
  p = fma(p, x2, set1(-1.0f / 3.0f));
  const Vec small = fma(mul(p, x2), x, x);
  return select_less(magnitude, set1(0.3f), small, large);
}

}  // namespace dhsa::cpu::DHSA_ISA
