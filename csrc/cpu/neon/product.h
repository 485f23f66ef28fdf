// The product tiles of NEON over packed rows: c[rows][8] = a[k][rows] . b[k][8], or += ; k is a multiple of 4. In
// assembly, since compilers move accumulators between registers to load pairs (g++ 11 and 12: 115 instructions for 96
// products, not 108) or spill them. Functions of their own, so that a disassembly shows each loop: four steps of k.
#pragma once

namespace dhsa::cpu::DHSA_ISA {

// clang-format off
#define DHSA_FMLA(c0, c1, b0, b1, a, lane)                                                          \
  "fmla v" #c0 ".4s, v" #b0 ".4s, v" #a ".s[" #lane "]\n\t"                                         \
  "fmla v" #c1 ".4s, v" #b1 ".4s, v" #a ".s[" #lane "]\n\t"
#define DHSA_FOUR_ROWS(c0, c1, c2, c3, c4, c5, c6, c7, b0, b1, a)                                   \
  DHSA_FMLA(c0, c1, b0, b1, a, 0) DHSA_FMLA(c2, c3, b0, b1, a, 1) DHSA_FMLA(c4, c5, b0, b1, a, 2)   \
  DHSA_FMLA(c6, c7, b0, b1, a, 3)
#define DHSA_FIRST_ROWS(b0, b1, a) DHSA_FOUR_ROWS(8, 9, 10, 11, 12, 13, 14, 15, b0, b1, a)
#define DHSA_MIDDLE_ROWS(b0, b1, a) DHSA_FOUR_ROWS(16, 17, 18, 19, 20, 21, 22, 23, b0, b1, a)
#define DHSA_LAST_ROWS(b0, b1, a) DHSA_FOUR_ROWS(24, 25, 26, 27, 28, 29, 30, 31, b0, b1, a)
#define DHSA_EACH_ROW_PAIR(step, from) step(8, 9, from) step(10, 11, from) step(12, 13, from) step(14, 15, from)
#define DHSA_EACH_LATER_PAIR(step, from)                                                            \
  step(16, 17, from) step(18, 19, from) step(20, 21, from) step(22, 23, from) step(24, 25, from)    \
  step(26, 27, from) step(28, 29, from) step(30, 31, from)
#define DHSA_CLEAR(c0, c1, unused) "movi v" #c0 ".4s, #0\n\tmovi v" #c1 ".4s, #0\n\t"
#define DHSA_LOAD(c0, c1, from) "ldp q" #c0 ", q" #c1 ", [" from "]\n\tadd " from ", " from ", %[ldc]\n\t"
#define DHSA_STORE(c0, c1, to) "stp q" #c0 ", q" #c1 ", [" to "]\n\tadd " to ", " to ", %[ldc]\n\t"

// Two steps of k of twelve rows: six vectors of a in v2 to v5, v2 and v3 twice; four of b in v0, v1, v6 and v7.
#define DHSA_TWO_STEPS_OF_12                                                                        \
  "ldp q0, q1, [%[b]], #32\n\t"                                                                     \
  "ldp q2, q3, [%[a]], #32\n\t"                                                                     \
  "ldp q4, q5, [%[a]], #32\n\t"                                                                     \
  DHSA_FIRST_ROWS(0, 1, 2)                                                                          \
  "ldp q6, q7, [%[b]], #32\n\t"                                                                     \
  DHSA_MIDDLE_ROWS(0, 1, 3)                                                                         \
  "ldp q2, q3, [%[a]], #32\n\t"                                                                     \
  DHSA_LAST_ROWS(0, 1, 4)                                                                           \
  DHSA_FIRST_ROWS(6, 7, 5) DHSA_MIDDLE_ROWS(6, 7, 2) DHSA_LAST_ROWS(6, 7, 3)

__attribute__((noinline)) inline void gemm_tile_12x8(int64_t k, const float* a, const float* b, float* c, int64_t ldc,
                                                     bool accumulate) {
  const float* from = c;
  asm volatile(
      "cbz %w[accumulate], 1f\n\t"
      DHSA_EACH_ROW_PAIR(DHSA_LOAD, "%[from]") DHSA_EACH_LATER_PAIR(DHSA_LOAD, "%[from]")
      "b 2f\n"
      "1:\n\t"
      DHSA_EACH_ROW_PAIR(DHSA_CLEAR, ) DHSA_EACH_LATER_PAIR(DHSA_CLEAR, )
      "2:\n\t"
      DHSA_TWO_STEPS_OF_12
      "subs %[k], %[k], #4\n\t"
      DHSA_TWO_STEPS_OF_12
      "b.ne 2b\n\t"
      DHSA_EACH_ROW_PAIR(DHSA_STORE, "%[c]") DHSA_EACH_LATER_PAIR(DHSA_STORE, "%[c]")
      : [k] "+r"(k), [a] "+r"(a), [b] "+r"(b), [c] "+r"(c), [from] "+r"(from)
      : [ldc] "r"(ldc * 4), [accumulate] "r"(accumulate)
      : "cc", "memory", "v0", "v1", "v2", "v3", "v4", "v5", "v6", "v7", "v8", "v9", "v10", "v11", "v12", "v13", "v14",
        "v15", "v16", "v17", "v18", "v19", "v20", "v21", "v22", "v23", "v24", "v25", "v26", "v27", "v28", "v29", "v30",
        "v31");
}

#define DHSA_TWO_STEPS_OF_8                                                                         \
  "ldp q0, q1, [%[b]], #32\n\t"                                                                     \
  "ldp q2, q3, [%[a]], #32\n\t"                                                                     \
  DHSA_MIDDLE_ROWS(0, 1, 2)                                                                         \
  "ldp q6, q7, [%[b]], #32\n\t"                                                                     \
  "ldp q4, q5, [%[a]], #32\n\t"                                                                     \
  DHSA_LAST_ROWS(0, 1, 3)                                                                           \
  DHSA_MIDDLE_ROWS(6, 7, 4) DHSA_LAST_ROWS(6, 7, 5)

__attribute__((noinline)) inline void gemm_tile_8x8(int64_t k, const float* a, const float* b, float* c, int64_t ldc,
                                                    bool accumulate) {
  const float* from = c;
  asm volatile(
      "cbz %w[accumulate], 1f\n\t"
      DHSA_EACH_LATER_PAIR(DHSA_LOAD, "%[from]")
      "b 2f\n"
      "1:\n\t"
      DHSA_EACH_LATER_PAIR(DHSA_CLEAR, )
      "2:\n\t"
      DHSA_TWO_STEPS_OF_8
      "subs %[k], %[k], #4\n\t"
      DHSA_TWO_STEPS_OF_8
      "b.ne 2b\n\t"
      DHSA_EACH_LATER_PAIR(DHSA_STORE, "%[c]")
      : [k] "+r"(k), [a] "+r"(a), [b] "+r"(b), [c] "+r"(c), [from] "+r"(from)
      : [ldc] "r"(ldc * 4), [accumulate] "r"(accumulate)
      : "cc", "memory", "v0", "v1", "v2", "v3", "v4", "v5", "v6", "v7", "v16", "v17", "v18", "v19", "v20", "v21", "v22",
        "v23", "v24", "v25", "v26", "v27", "v28", "v29", "v30", "v31");
}
// clang-format on

#undef DHSA_FMLA
#undef DHSA_FOUR_ROWS
#undef DHSA_FIRST_ROWS
#undef DHSA_MIDDLE_ROWS
#undef DHSA_LAST_ROWS
#undef DHSA_EACH_ROW_PAIR
#undef DHSA_EACH_LATER_PAIR
#undef DHSA_CLEAR
#undef DHSA_LOAD
#undef DHSA_STORE
#undef DHSA_TWO_STEPS_OF_12
#undef DHSA_TWO_STEPS_OF_8

}  // namespace dhsa::cpu::DHSA_ISA
