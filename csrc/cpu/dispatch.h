// Which instruction set runs: detected once, or forced by DHSA_FORCE_ISA=scalar|avx2|avx512|avx512bf16|neon|neonbf16.
#pragma once

#include "cpu/kernels.h"

namespace dhsa::cpu {

// Throws std::runtime_error when DHSA_FORCE_ISA names an ISA that was not compiled or that the machine lacks.
const Kernels& active_kernels();

}  // namespace dhsa::cpu
