// Which instruction set runs: the last that the machine has and that pays there, detected once, or the one that
// DHSA_FORCE_ISA=scalar|avx2|avx512|avx512bf16|amx|neon|neonfhm|neonbf16 names.
#pragma once

#include "cpu/kernels.h"

namespace dhsa::cpu {

// Throws std::runtime_error when DHSA_FORCE_ISA names an ISA that was not compiled or that the machine lacks.
const Kernels& active_kernels();

// Makes another ISA the active one, while no stage runs: for tests that compare two in one process. Throws likewise.
void force_isa(const char* name);

}  // namespace dhsa::cpu
