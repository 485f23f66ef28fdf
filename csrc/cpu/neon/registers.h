// Registers of keys and values on NEON as they lie in memory, and their products with float32 vectors. Included before
// gather.h, so that an ISA that multiplies half types can add overloads.
#pragma once

namespace dhsa::cpu::DHSA_ISA {

// A register of elements as they lie in memory.
inline float32x4_t load_register(const float* p) { return vld1q_f32(p); }
inline float16x8_t load_register(const Half* p) {
  return vreinterpretq_f16_u16(vld1q_u16(reinterpret_cast<const uint16_t*>(p)));
}
inline uint16x8_t load_register(const BFloat16* p) { return vld1q_u16(reinterpret_cast<const uint16_t*>(p)); }

inline float32x4_t set_register(float x) { return vdupq_n_f32(x); }
inline float16x8_t set_register(Half x) { return vreinterpretq_f16_u16(vdupq_n_u16(x.bits)); }

template <class T>
using Register = decltype(load_register(static_cast<const T*>(nullptr)));
template <class T>
constexpr int kElements = 16 / sizeof(T);  // of a register

inline void load_four(const float* p, float32x4_t* x) {
  const float32x4x4_t four = vld1q_f32_x4(p);
  for (int i = 0; i < 4; ++i) x[i] = four.val[i];
}
inline void load_four(const BFloat16* p, uint16x8_t* x) {
  const uint16x8x4_t four = vld1q_u16_x4(reinterpret_cast<const uint16_t*>(p));
  for (int i = 0; i < 4; ++i) x[i] = four.val[i];
}
inline void load_four(const Half* p, float16x8_t* x) {
  const uint16x8x4_t four = vld1q_u16_x4(reinterpret_cast<const uint16_t*>(p));
  for (int i = 0; i < 4; ++i) x[i] = vreinterpretq_f16_u16(four.val[i]);
}

template <int kCount, class T>
inline void load_registers(const T* p, Register<T>* x) {
  if constexpr (kCount % 4 == 0) {
#pragma GCC unroll 4
    for (int i = 0; i < kCount; i += 4) load_four(p + i * kElements<T>, x + i);
  } else {
#pragma GCC unroll 4
    for (int i = 0; i < kCount; ++i) x[i] = load_register(p + i * kElements<T>);
  }
}

// A register's elements in float32.
struct Two {
  Vec low, high;
};
inline Two widen(float16x8_t x) { return {vcvt_f32_f16(vget_low_f16(x)), vcvt_high_f32_f16(x)}; }
inline Two widen(uint16x8_t x) {
  return {vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(x), 16)), vreinterpretq_f32_u32(vshll_high_n_u16(x, 16))};
}

// Eight elements, all of the memory read first: neighbours are read in pairs.
inline Two load_eight(const float* p) { return {load(p), load(p + 4)}; }
template <class T>
inline Two load_eight(const T* p) {
  return widen(load_register(p));
}

// sum += the products of a register of keys with as many elements of q.
inline Vec add_products(Vec sum, const Vec* q, float32x4_t k) { return fma(q[0], k, sum); }
template <class R>
inline Vec add_products(Vec sum, const Vec* q, R k) {
  const Two x = widen(k);
  return fma(q[1], x.high, fma(q[0], x.low, sum));
}

// sum += lane kLane of w times a register of values.
template <int kLane>
inline void add_scaled(Vec* sum, Vec w, float32x4_t v) {
  sum[0] = vfmaq_laneq_f32(sum[0], v, w, kLane);
}
template <int kLane, class R>
inline void add_scaled(Vec* sum, Vec w, R v) {
  const Two x = widen(v);
  sum[0] = vfmaq_laneq_f32(sum[0], x.low, w, kLane);
  sum[1] = vfmaq_laneq_f32(sum[1], x.high, w, kLane);
}

// clang-format off
// dot_eights(q, k, row_bytes, index, n, head_dim, scores): scores[i] = q . k[index[i]] for i of [0, n), n a multiple of
// 8 and not 0; each product is one chain over each lane in order of head_dim and then (s0 + s1) + (s2 + s3). In
// assembly, since compilers copy what a load of four registers brought, and spill. Two of eight keys at a time, so that
// their chains interleave: v0 to v7 hold keys, v8 to v15 q, v16 to v23 sums, v24 to v27 what is widened. Steps are of 32
// elements, then of 8.
#define DHSA_TWO_KEYS(PRODUCT, k0, k1, s0, s1)                                                      \
  "ld1 {v0.16b-v3.16b}, [%[" #k0 "]], #64\n\tld1 {v4.16b-v7.16b}, [%[" #k1 "]], #64\n\t"            \
  PRODUCT(s0, s1, 0, 4, 8, 9, 8) PRODUCT(s0, s1, 1, 5, 10, 11, 9)                                   \
  PRODUCT(s0, s1, 2, 6, 12, 13, 10) PRODUCT(s0, s1, 3, 7, 14, 15, 11)
#define DHSA_TWO_TAILS(PRODUCT, k0, k1, s0, s1)                                                     \
  "ldr q0, [%[" #k0 "]], #16\n\tldr q4, [%[" #k1 "]], #16\n\t" PRODUCT(s0, s1, 0, 4, 8, 9, 8)
#define DHSA_TWO_LONG_TAILS(PRODUCT, k0, k1, s0, s1)                                                \
  "ldp q0, q1, [%[" #k0 "]], #32\n\tldp q4, q5, [%[" #k1 "]], #32\n\t"                              \
  PRODUCT(s0, s1, 0, 4, 8, 9, 8) PRODUCT(s0, s1, 1, 5, 10, 11, 9)
#define DHSA_EIGHT_KEYS(TWO_KEYS, PRODUCT)                                                          \
  TWO_KEYS(PRODUCT, k0, k1, 16, 17) TWO_KEYS(PRODUCT, k2, k3, 18, 19)                               \
  TWO_KEYS(PRODUCT, k4, k5, 20, 21) TWO_KEYS(PRODUCT, k6, k7, 22, 23)
#define DHSA_LOAD_FOUR_OF_Q "ld1 {v8.16b-v11.16b}, [%[at]], #64\n\t"
#define DHSA_LOAD_EIGHT_OF_Q DHSA_LOAD_FOUR_OF_Q "ld1 {v12.16b-v15.16b}, [%[at]], #64\n\t"
#define DHSA_LOAD_TWO_OF_Q "ldp q8, q9, [%[at]], #32\n\t"
#define DHSA_LOAD_ONE_OF_Q "ldr q8, [%[at]], #16\n\t"
#define DHSA_TWO_ADDRESSES(x, y)                                                                    \
  "ldp %w[" #x "], %w[" #y "], [%[index]], #8\n\t"                                                  \
  "madd %[" #x "], %[" #x "], %[bytes], %[k]\n\tmadd %[" #y "], %[" #y "], %[bytes], %[k]\n\t"
#define DHSA_DOT_EIGHTS(Q, T, STEP, TAIL)                                                           \
  inline void dot_eights(const Q* q, const T* k, int64_t row_bytes, const int32_t* index, int64_t n, \
                         int64_t head_dim, float* scores) {                                         \
    int64_t k0, k1, k2, k3, k4, k5, k6, k7, left;                                                   \
    const Q* at;                                                                                    \
    asm volatile(                                                                                   \
        "1:\n\t"                                                                                    \
        DHSA_TWO_ADDRESSES(k0, k1) DHSA_TWO_ADDRESSES(k2, k3)                                       \
        DHSA_TWO_ADDRESSES(k4, k5) DHSA_TWO_ADDRESSES(k6, k7)                                       \
        "movi v16.4s, #0\n\tmovi v17.4s, #0\n\tmovi v18.4s, #0\n\tmovi v19.4s, #0\n\t"              \
        "movi v20.4s, #0\n\tmovi v21.4s, #0\n\tmovi v22.4s, #0\n\tmovi v23.4s, #0\n\t"              \
        "mov %[at], %[q]\n\t"                                                                       \
        "mov %[left], %[steps]\n\t"                                                                 \
        "cbz %[left], 3f\n"                                                                         \
        "2:\n\t"                                                                                    \
        STEP                                                                                        \
        "subs %[left], %[left], #1\n\t"                                                             \
        "b.ne 2b\n"                                                                                 \
        "3:\n\t"                                                                                    \
        "cbz %[tails], 5f\n\t"                                                                      \
        "mov %[left], %[tails]\n"                                                                   \
        "4:\n\t"                                                                                    \
        TAIL                                                                                        \
        "subs %[left], %[left], #1\n\t"                                                             \
        "b.ne 4b\n"                                                                                 \
        "5:\n\t"                                                                                    \
        "faddp v16.4s, v16.4s, v17.4s\n\tfaddp v18.4s, v18.4s, v19.4s\n\t"                          \
        "faddp v20.4s, v20.4s, v21.4s\n\tfaddp v22.4s, v22.4s, v23.4s\n\t"                          \
        "faddp v16.4s, v16.4s, v18.4s\n\tfaddp v20.4s, v20.4s, v22.4s\n\t"                          \
        "stp q16, q20, [%[scores]], #32\n\t"                                                        \
        "subs %[n], %[n], #8\n\t"                                                                   \
        "b.ne 1b\n\t"                                                                               \
        : [k0] "=&r"(k0), [k1] "=&r"(k1), [k2] "=&r"(k2), [k3] "=&r"(k3), [k4] "=&r"(k4),           \
          [k5] "=&r"(k5), [k6] "=&r"(k6), [k7] "=&r"(k7), [left] "=&r"(left), [at] "=&r"(at),       \
          [index] "+r"(index), [n] "+r"(n), [scores] "+r"(scores)                                   \
        : [q] "r"(q), [k] "r"(k), [bytes] "r"(row_bytes), [steps] "r"(head_dim / 32),               \
          [tails] "r"(head_dim % 32 / 8)                                                            \
        : "cc", "memory", "v0", "v1", "v2", "v3", "v4", "v5", "v6", "v7", "v8", "v9", "v10", "v11", \
          "v12", "v13", "v14", "v15", "v16", "v17", "v18", "v19", "v20", "v21", "v22", "v23",       \
          "v24", "v25", "v26", "v27");                                                              \
  }
#define DHSA_FLOAT_PRODUCT(s0, s1, k0, k1, low, high, same)                                         \
  "fmla v" #s0 ".4s, v" #k0 ".4s, v" #same ".4s\n\tfmla v" #s1 ".4s, v" #k1 ".4s, v" #same ".4s\n\t"
#define DHSA_WIDE_PRODUCT(widen, widen2, shift, s0, s1, k0, k1, low, high)                          \
  widen " v24.4s, v" #k0 ".4h" shift "\n\t" widen " v25.4s, v" #k1 ".4h" shift "\n\t"               \
  widen2 " v26.4s, v" #k0 ".8h" shift "\n\t" widen2 " v27.4s, v" #k1 ".8h" shift "\n\t"             \
  "fmla v" #s0 ".4s, v24.4s, v" #low ".4s\n\tfmla v" #s1 ".4s, v25.4s, v" #low ".4s\n\t"            \
  "fmla v" #s0 ".4s, v26.4s, v" #high ".4s\n\tfmla v" #s1 ".4s, v27.4s, v" #high ".4s\n\t"
#define DHSA_HALF_PRODUCT(s0, s1, k0, k1, low, high, same)                                          \
  DHSA_WIDE_PRODUCT("fcvtl", "fcvtl2", "", s0, s1, k0, k1, low, high)
#define DHSA_BFLOAT16_PRODUCT(s0, s1, k0, k1, low, high, same)                                      \
  DHSA_WIDE_PRODUCT("shll", "shll2", ", #16", s0, s1, k0, k1, low, high)

DHSA_DOT_EIGHTS(float, float,
                DHSA_LOAD_FOUR_OF_Q DHSA_EIGHT_KEYS(DHSA_TWO_KEYS, DHSA_FLOAT_PRODUCT)
                DHSA_LOAD_FOUR_OF_Q DHSA_EIGHT_KEYS(DHSA_TWO_KEYS, DHSA_FLOAT_PRODUCT),
                DHSA_LOAD_TWO_OF_Q DHSA_EIGHT_KEYS(DHSA_TWO_LONG_TAILS, DHSA_FLOAT_PRODUCT))
DHSA_DOT_EIGHTS(float, Half, DHSA_LOAD_EIGHT_OF_Q DHSA_EIGHT_KEYS(DHSA_TWO_KEYS, DHSA_HALF_PRODUCT),
                DHSA_LOAD_TWO_OF_Q DHSA_EIGHT_KEYS(DHSA_TWO_TAILS, DHSA_HALF_PRODUCT))
DHSA_DOT_EIGHTS(float, BFloat16, DHSA_LOAD_EIGHT_OF_Q DHSA_EIGHT_KEYS(DHSA_TWO_KEYS, DHSA_BFLOAT16_PRODUCT),
                DHSA_LOAD_TWO_OF_Q DHSA_EIGHT_KEYS(DHSA_TWO_TAILS, DHSA_BFLOAT16_PRODUCT))

// add_64_columns(p, v, row_bytes, index, n, units, out): out[0..64) += p . v[index[0..n)], n a multiple of 8 and not 0.
// The sums stay in v16 to v31 over all keys, times `units`, in which p is given; v0 to v7 hold a value row, v8 to v11
// what is widened, v12 and v13 eight elements of p.
#define DHSA_EACH_SUM(step)                                                                         \
  step(16, 17, 0) step(18, 19, 32) step(20, 21, 64) step(22, 23, 96) step(24, 25, 128)              \
  step(26, 27, 160) step(28, 29, 192) step(30, 31, 224)
#define DHSA_LOAD_SUMS(c0, c1, at) "ldp q" #c0 ", q" #c1 ", [%[out], #" #at "]\n\t"
#define DHSA_STORE_SUMS(c0, c1, at) "stp q" #c0 ", q" #c1 ", [%[out], #" #at "]\n\t"
#define DHSA_SCALE_SUMS(c0, c1, at)                                                                 \
  "fmul v" #c0 ".4s, v" #c0 ".4s, v14.s[0]\n\tfmul v" #c1 ".4s, v" #c1 ".4s, v14.s[0]\n\t"
#define DHSA_TO_UNITS "ldr s14, [%[units]]\n\t" DHSA_EACH_SUM(DHSA_SCALE_SUMS)
#define DHSA_FROM_UNITS "ldr s14, [%[units], #4]\n\t" DHSA_EACH_SUM(DHSA_SCALE_SUMS)
#define DHSA_TWO_VALUES(ADD_KEY, w, lane0, lane1)                                                     \
  "ldp %w[x], %w[y], [%[index]], #8\n\t"                                                            \
  "madd %[x], %[x], %[bytes], %[v]\n\tmadd %[y], %[y], %[bytes], %[v]\n\t"                          \
  ADD_KEY(x, w, lane0) ADD_KEY(y, w, lane1)
#define DHSA_EIGHT_FLOAT_ROWS(ADD_KEY)                                                              \
  "ldp q12, q13, [%[p]], #32\n\t" DHSA_TWO_VALUES(ADD_KEY, 12, 0, 1) DHSA_TWO_VALUES(ADD_KEY, 12, 2, 3)           \
  DHSA_TWO_VALUES(ADD_KEY, 13, 0, 1) DHSA_TWO_VALUES(ADD_KEY, 13, 2, 3)
#define DHSA_EIGHT_HALF_ROWS(ADD_KEY)                                                               \
  "ldr q12, [%[p]], #16\n\t" DHSA_TWO_VALUES(ADD_KEY, 12, 0, 1) DHSA_TWO_VALUES(ADD_KEY, 12, 2, 3)      \
  DHSA_TWO_VALUES(ADD_KEY, 12, 4, 5) DHSA_TWO_VALUES(ADD_KEY, 12, 6, 7)
#define DHSA_ADD_FLOATS(c, v, w, lane) "fmla v" #c ".4s, v" #v ".4s, v" #w ".s[" #lane "]\n\t"
#define DHSA_ADD_FLOAT_KEY(row, w, lane)                                                            \
  "ld1 {v0.16b-v3.16b}, [%[" #row "]], #64\n\tld1 {v4.16b-v7.16b}, [%[" #row "]], #64\n\t"          \
  DHSA_ADD_FLOATS(16, 0, w, lane) DHSA_ADD_FLOATS(17, 1, w, lane) DHSA_ADD_FLOATS(18, 2, w, lane)   \
  DHSA_ADD_FLOATS(19, 3, w, lane) DHSA_ADD_FLOATS(20, 4, w, lane) DHSA_ADD_FLOATS(21, 5, w, lane)   \
  DHSA_ADD_FLOATS(22, 6, w, lane) DHSA_ADD_FLOATS(23, 7, w, lane)                                   \
  "ld1 {v0.16b-v3.16b}, [%[" #row "]], #64\n\tld1 {v4.16b-v7.16b}, [%[" #row "]]\n\t"               \
  DHSA_ADD_FLOATS(24, 0, w, lane) DHSA_ADD_FLOATS(25, 1, w, lane) DHSA_ADD_FLOATS(26, 2, w, lane)   \
  DHSA_ADD_FLOATS(27, 3, w, lane) DHSA_ADD_FLOATS(28, 4, w, lane) DHSA_ADD_FLOATS(29, 5, w, lane)   \
  DHSA_ADD_FLOATS(30, 6, w, lane) DHSA_ADD_FLOATS(31, 7, w, lane)
#define DHSA_ADD_HALF_KEY(ADD, row, w, lane)                                                        \
  "ld1 {v0.16b-v3.16b}, [%[" #row "]], #64\n\tld1 {v4.16b-v7.16b}, [%[" #row "]]\n\t"               \
  ADD(16, 17, 0, 8, 9, w, lane) ADD(18, 19, 1, 10, 11, w, lane) ADD(20, 21, 2, 8, 9, w, lane)       \
  ADD(22, 23, 3, 10, 11, w, lane) ADD(24, 25, 4, 8, 9, w, lane) ADD(26, 27, 5, 10, 11, w, lane)     \
  ADD(28, 29, 6, 8, 9, w, lane) ADD(30, 31, 7, 10, 11, w, lane)
#define DHSA_ADD_WIDE(widen, widen2, shift, c0, c1, v, t0, t1, w, lane)                             \
  widen " v" #t0 ".4s, v" #v ".4h" shift "\n\t" widen2 " v" #t1 ".4s, v" #v ".8h" shift "\n\t"      \
  DHSA_ADD_FLOATS(c0, t0, w, lane) DHSA_ADD_FLOATS(c1, t1, w, lane)
#define DHSA_ADD_HALVES(c0, c1, v, t0, t1, w, lane)                                                 \
  DHSA_ADD_WIDE("fcvtl", "fcvtl2", "", c0, c1, v, t0, t1, w, lane)
#define DHSA_ADD_BFLOAT16S(c0, c1, v, t0, t1, w, lane)                                              \
  DHSA_ADD_WIDE("shll", "shll2", ", #16", c0, c1, v, t0, t1, w, lane)
#define DHSA_ADD_HALVES_KEY(row, w, lane) DHSA_ADD_HALF_KEY(DHSA_ADD_HALVES, row, w, lane)
#define DHSA_ADD_BFLOAT16S_KEY(row, w, lane) DHSA_ADD_HALF_KEY(DHSA_ADD_BFLOAT16S, row, w, lane)
#define DHSA_ADD_64_COLUMNS(W, T, BEGIN, EIGHT_ROWS, END)                                           \
  inline void add_64_columns(const W* p, const T* v, int64_t row_bytes, const int32_t* index,       \
                             int64_t n, const float* units, float* out) {                           \
    int64_t x, y;                                                                                   \
    asm volatile(                                                                                   \
        DHSA_EACH_SUM(DHSA_LOAD_SUMS)                                                               \
        BEGIN                                                                                       \
        "1:\n\t"                                                                                    \
        EIGHT_ROWS                                                                                  \
        "subs %[n], %[n], #8\n\t"                                                                   \
        "b.ne 1b\n\t"                                                                               \
        END                                                                                         \
        DHSA_EACH_SUM(DHSA_STORE_SUMS)                                                              \
        : [p] "+r"(p), [index] "+r"(index), [n] "+r"(n), [x] "=&r"(x), [y] "=&r"(y)                 \
        : [v] "r"(v), [bytes] "r"(row_bytes), [units] "r"(units), [out] "r"(out)                    \
        : "cc", "memory", "v0", "v1", "v2", "v3", "v4", "v5", "v6", "v7", "v8", "v9", "v10", "v11", \
          "v12", "v13", "v14", "v16", "v17", "v18", "v19", "v20", "v21", "v22", "v23", "v24",       \
          "v25", "v26", "v27", "v28", "v29", "v30", "v31");                                         \
  }

DHSA_ADD_64_COLUMNS(float, float, , DHSA_EIGHT_FLOAT_ROWS(DHSA_ADD_FLOAT_KEY), )
DHSA_ADD_64_COLUMNS(float, Half, , DHSA_EIGHT_FLOAT_ROWS(DHSA_ADD_HALVES_KEY), )
DHSA_ADD_64_COLUMNS(float, BFloat16, , DHSA_EIGHT_FLOAT_ROWS(DHSA_ADD_BFLOAT16S_KEY), )
// clang-format on

}  // namespace dhsa::cpu::DHSA_ISA
