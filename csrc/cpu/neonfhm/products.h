// Products of float16 on NEON with FHM: fmlal multiplies four pairs of halves, exactly, and adds to float32, where
// plain NEON widens each half first. Overloads of neon/registers.h, included before gather.h.
#pragma once

namespace dhsa::cpu::DHSA_ISA {

inline Vec add_products(Vec sum, const float16x8_t* q, float16x8_t k) {
  return vfmlalq_high_f16(vfmlalq_low_f16(sum, k, q[0]), k, q[0]);
}

template <int kLane>
inline void add_scaled(Vec* sum, float16x8_t w, float16x8_t v) {
  sum[0] = vfmlalq_laneq_low_f16(sum[0], v, w, kLane);
  sum[1] = vfmlalq_laneq_high_f16(sum[1], v, w, kLane);
}

// clang-format off
#define DHSA_FMLAL_PRODUCT(s0, s1, k0, k1, low, high, same)                                         \
  "fmlal v" #s0 ".4s, v" #k0 ".4h, v" #same ".4h\n\tfmlal v" #s1 ".4s, v" #k1 ".4h, v" #same ".4h\n\t" \
  "fmlal2 v" #s0 ".4s, v" #k0 ".4h, v" #same ".4h\n\tfmlal2 v" #s1 ".4s, v" #k1 ".4h, v" #same ".4h\n\t"

DHSA_DOT_EIGHTS(Half, Half, DHSA_LOAD_FOUR_OF_Q DHSA_EIGHT_KEYS(DHSA_TWO_KEYS, DHSA_FMLAL_PRODUCT),
                DHSA_LOAD_ONE_OF_Q DHSA_EIGHT_KEYS(DHSA_TWO_TAILS, DHSA_FMLAL_PRODUCT))

#define DHSA_ADD_FMLAL(c0, c1, v, t0, t1, w, lane)                                                  \
  "fmlal v" #c0 ".4s, v" #v ".4h, v" #w ".h[" #lane "]\n\t"                                         \
  "fmlal2 v" #c1 ".4s, v" #v ".4h, v" #w ".h[" #lane "]\n\t"
#define DHSA_ADD_FMLAL_KEY(row, w, lane) DHSA_ADD_HALF_KEY(DHSA_ADD_FMLAL, row, w, lane)

DHSA_ADD_64_COLUMNS(Half, Half, DHSA_TO_UNITS, DHSA_EIGHT_HALF_ROWS(DHSA_ADD_FMLAL_KEY), DHSA_FROM_UNITS)
// clang-format on

#undef DHSA_FMLAL_PRODUCT
#undef DHSA_ADD_FMLAL
#undef DHSA_ADD_FMLAL_KEY

}  // namespace dhsa::cpu::DHSA_ISA
