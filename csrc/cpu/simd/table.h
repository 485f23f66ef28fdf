// Fills the ISA's table from the headers above; the last include of its kernels.cpp.
#pragma once

namespace dhsa::cpu::DHSA_ISA {

// The same micro-kernel for the three input types, in DType's order.
#define DHSA_EACH_TYPE(function) {function<float>, function<Half>, function<BFloat16>}

constexpr Kernels make_table(const char* name) {
  return Kernels{name,
                 kPanel,
                 DHSA_EACH_TYPE(window_products),
                 DHSA_EACH_TYPE(add_rows),
                 DHSA_EACH_TYPE(mean_rows),
                 DHSA_EACH_TYPE(load_rows),
                 DHSA_EACH_TYPE(store_row),
                 DHSA_EACH_TYPE(pack_keys),
                 DHSA_EACH_TYPE(pack_values),
                 gemm,
                 DHSA_EACH_TYPE(dot_rows),
                 DHSA_EACH_TYPE(add_weighted_rows),
                 softcap_row,
                 mask_row,
                 softmax_row,
                 scale_row,
                 mass_row,
                 bounded_exp_row};
}

#undef DHSA_EACH_TYPE

}  // namespace dhsa::cpu::DHSA_ISA
