// The exponential of softmax_columns on AVX2.
#pragma once

namespace dhsa::cpu::DHSA_ISA {

// exp(scale x - shift) for what is not positive.
class ShiftedExp {
 public:
  ShiftedExp(float scale, Wide shift) : scale_(wide_set1(scale)), offset_(sub(wide_zero(), shift)) {}
  Wide operator()(Wide x) const { return exp_nonpositive(fma(x, scale_, offset_)); }

 private:
  Wide scale_, offset_;
};

}  // namespace dhsa::cpu::DHSA_ISA
