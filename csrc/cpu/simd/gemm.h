// Products over any number of panels, for an ISA whose tile reads the rows of a in place: one panel after the other.
#pragma once

namespace dhsa::cpu::DHSA_ISA {

inline void gemm(int64_t m, int64_t k, const float* a, int64_t lda, const float* b, int64_t n, float* c, int64_t ldc,
                 bool accumulate) {
  for (int64_t j = 0; j < n; j += kPanel) gemm_panel(m, k, a, lda, b + j * k, c + j, ldc, accumulate);
}

}  // namespace dhsa::cpu::DHSA_ISA
