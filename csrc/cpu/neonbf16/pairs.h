// The tiles of NEON over bfloat16, four neighbours of k at a time: bfmmla adds a 2 x 4 by 4 x 2 product to a 2 x 2
// block of float32, 16 multiply-adds where a float32 instruction has four. Panels are [n / 8][k / 4][8][4] bfloat16, so
// that a register holds two columns; packed rows are [k / 4][8][4].
#pragma once

namespace dhsa::cpu::DHSA_ISA {

// Eight rows of k elements, a multiple of 8, to [k / 4][8][4].
inline void pack_quads(const uint16_t* const* rows, int64_t k, uint16_t* packed) {
  for (int64_t d = 0; d < k; d += 8, packed += 64) {
#pragma GCC unroll 4
    for (int r = 0; r < 8; r += 2) {
      const uint64x2_t x = vreinterpretq_u64_u16(vld1q_u16(rows[r] + d));
      const uint64x2_t y = vreinterpretq_u64_u16(vld1q_u16(rows[r + 1] + d));
      vst1q_u16(packed + 4 * r, vreinterpretq_u16_u64(vzip1q_u64(x, y)));
      vst1q_u16(packed + 32 + 4 * r, vreinterpretq_u16_u64(vzip2q_u64(x, y)));
    }
  }
}

inline void pack_key_pairs(const void* k, int64_t row_stride, const int32_t* index, int64_t n, int64_t n_padded,
                           int64_t head_dim, void* panels) {
  static const uint16_t kZeros[kMaxDepth] = {};  // the row that stands for every missing one
  uint16_t* out = static_cast<uint16_t*>(panels);
  for (int64_t first = 0; first < n_padded; first += kPanel, out += head_dim * kPanel) {
    const uint16_t* rows[kPanel];
    for (int64_t i = 0; i < kPanel; ++i) {
      const int64_t r = first + i;
      rows[i] = r < n ? static_cast<const uint16_t*>(k) + (index ? index[r] : r) * row_stride : kZeros;
    }
    pack_quads(rows, head_dim, out);
  }
}

inline bool pack_value_pairs(const void* v, int64_t row_stride, const int32_t* index, int64_t n, int64_t n_padded,
                             int64_t head_dim, void* panels) {
  static const uint16_t kZeros[kMaxDepth] = {};
  const int64_t padded_dim = (head_dim + kMaxPanel - 1) / kMaxPanel * kMaxPanel;
  uint16x8_t largest = vdupq_n_u16(0);  // of twice the bits, without the sign: 0xff00 and more is no finite number
  for (int64_t r = 0; r < n_padded; r += 4) {
    const uint16_t* rows[4];
    for (int64_t i = 0; i < 4; ++i) {
      rows[i] = r + i < n ? static_cast<const uint16_t*>(v) + index[r + i] * row_stride : kZeros;
    }
    uint16_t* out = static_cast<uint16_t*>(panels) + r * kPanel;
    for (int64_t d = 0; d < head_dim; d += kPanel, out += n_padded * kPanel) {
      const uint16x8x4_t x = {vld1q_u16(rows[0] + d), vld1q_u16(rows[1] + d), vld1q_u16(rows[2] + d),
                              vld1q_u16(rows[3] + d)};
      largest = vmaxq_u16(largest, vmaxq_u16(vmaxq_u16(vshlq_n_u16(x.val[0], 1), vshlq_n_u16(x.val[1], 1)),
                                             vmaxq_u16(vshlq_n_u16(x.val[2], 1), vshlq_n_u16(x.val[3], 1))));
      vst4q_u16(out, x);
    }
    if (head_dim < padded_dim) __builtin_memset(out, 0, 4 * kPanel * sizeof(uint16_t));
  }
  return vmaxvq_u16(largest) < 0xff00;
}

inline void round_row(const float* x, int64_t n, void* out) {
  for (int64_t j = 0; j < n; j += 8) {
    const bfloat16x8_t low = vcvtq_low_bf16_f32(vld1q_f32(x + j));
    const bfloat16x8_t rounded = vcvtq_high_bf16_f32(low, vld1q_f32(x + j + 4));
    vst1q_u16(static_cast<uint16_t*>(out) + j, vreinterpretq_u16_bf16(rounded));
  }
}

// clang-format off
#define DHSA_TWO_ROWS(c0, c1, c2, c3, a)                                                            \
  "bfmmla v" #c0 ".4s, v" #a ".8h, v4.8h\n\t"                                                       \
  "bfmmla v" #c1 ".4s, v" #a ".8h, v5.8h\n\t"                                                       \
  "bfmmla v" #c2 ".4s, v" #a ".8h, v6.8h\n\t"                                                       \
  "bfmmla v" #c3 ".4s, v" #a ".8h, v7.8h\n\t"
#define DHSA_FOUR_STEPS                                                                             \
  "ldp q4, q5, [%[b]], #32\n\t"                                                                     \
  "ldp q0, q1, [%[a]], #32\n\t"                                                                     \
  "ldp q6, q7, [%[b]], #32\n\t"                                                                     \
  "ldp q2, q3, [%[a]], #32\n\t"                                                                     \
  DHSA_TWO_ROWS(16, 17, 18, 19, 0) DHSA_TWO_ROWS(20, 21, 22, 23, 1)                                 \
  DHSA_TWO_ROWS(24, 25, 26, 27, 2) DHSA_TWO_ROWS(28, 29, 30, 31, 3)
#define DHSA_CLEAR(c0, c1, c2, c3)                                                                  \
  "movi v" #c0 ".4s, #0\n\tmovi v" #c1 ".4s, #0\n\tmovi v" #c2 ".4s, #0\n\tmovi v" #c3 ".4s, #0\n\t"
// Two rows of eight columns to 2 x 2 blocks, and back.
#define DHSA_LOAD(c0, c1, c2, c3)                                                                   \
  "ldp q0, q1, [%[from]]\n\tadd %[from], %[from], %[ldc]\n\t"                                       \
  "ldp q2, q3, [%[from]]\n\tadd %[from], %[from], %[ldc]\n\t"                                       \
  "zip1 v" #c0 ".2d, v0.2d, v2.2d\n\tzip2 v" #c1 ".2d, v0.2d, v2.2d\n\t"                            \
  "zip1 v" #c2 ".2d, v1.2d, v3.2d\n\tzip2 v" #c3 ".2d, v1.2d, v3.2d\n\t"
#define DHSA_STORE(c0, c1, c2, c3)                                                                  \
  "zip1 v0.2d, v" #c0 ".2d, v" #c1 ".2d\n\tzip1 v1.2d, v" #c2 ".2d, v" #c3 ".2d\n\t"                \
  "zip2 v2.2d, v" #c0 ".2d, v" #c1 ".2d\n\tzip2 v3.2d, v" #c2 ".2d, v" #c3 ".2d\n\t"                \
  "stp q0, q1, [%[c]]\n\tadd %[c], %[c], %[ldc]\n\t"                                                \
  "stp q2, q3, [%[c]]\n\tadd %[c], %[c], %[ldc]\n\t"
#define DHSA_EACH_TWO_ROWS(step)                                                                    \
  step(16, 17, 18, 19) step(20, 21, 22, 23) step(24, 25, 26, 27) step(28, 29, 30, 31)

// c[8][8] = a . b, or += ; a and b are packed, k is a multiple of 8. A function of its own, so that a disassembly shows
// its loop: eight steps of k, 32 products, 8 loads of pairs and 2 instructions of the loop.
__attribute__((noinline)) inline void gemm_tile_bfmmla_8x8(int64_t k, const uint16_t* a, const uint16_t* b, float* c,
                                                           int64_t ldc, bool accumulate) {
  const float* from = c;
  asm volatile(
      "cbz %w[accumulate], 1f\n\t"
      DHSA_EACH_TWO_ROWS(DHSA_LOAD)
      "b 2f\n"
      "1:\n\t"
      DHSA_EACH_TWO_ROWS(DHSA_CLEAR)
      "2:\n\t"
      DHSA_FOUR_STEPS
      "subs %[k], %[k], #8\n\t"
      DHSA_FOUR_STEPS
      "b.ne 2b\n\t"
      DHSA_EACH_TWO_ROWS(DHSA_STORE)
      : [k] "+r"(k), [a] "+r"(a), [b] "+r"(b), [c] "+r"(c), [from] "+r"(from)
      : [ldc] "r"(ldc * 4), [accumulate] "r"(accumulate)
      : "cc", "memory", "v0", "v1", "v2", "v3", "v4", "v5", "v6", "v7", "v16", "v17", "v18", "v19", "v20", "v21", "v22",
        "v23", "v24", "v25", "v26", "v27", "v28", "v29", "v30", "v31");
}
// clang-format on

#undef DHSA_TWO_ROWS
#undef DHSA_FOUR_STEPS
#undef DHSA_CLEAR
#undef DHSA_LOAD
#undef DHSA_STORE
#undef DHSA_EACH_TWO_ROWS

// Rows are packed eight at a time; rows that are missing are zeros, and their sums go to a tile of their own.
inline void gemm_pairs(int64_t m, int64_t k, const void* a, int64_t lda, const void* b, int64_t n, float* c,
                       int64_t ldc, bool accumulate) {
  static const uint16_t kZeros[kMaxDepth] = {};
  const uint16_t *from = static_cast<const uint16_t*>(a), *panels = static_cast<const uint16_t*>(b);
  for (int64_t r = 0; r < m; r += 8, from += 8 * lda, c += 8 * ldc) {
    const int64_t count = m - r < 8 ? m - r : 8;
    const uint16_t* rows[8];
    for (int64_t i = 0; i < 8; ++i) rows[i] = i < count ? from + i * lda : kZeros;
    uint16_t packed[8 * kMaxDepth];
    pack_quads(rows, k, packed);
    for (int64_t j = 0; j < n; j += kPanel) {
      if (count == 8) {
        gemm_tile_bfmmla_8x8(k, packed, panels + j * k, c + j, ldc, accumulate);
        continue;
      }
      float tile[8 * kPanel];
      gemm_tile_bfmmla_8x8(k, packed, panels + j * k, tile, kPanel, false);
      for (int64_t i = 0; i < count; ++i) {
        float* sums = c + i * ldc + j;
        for (int64_t d = 0; d < kPanel; d += kLanes) {
          const Vec x = load(tile + i * kPanel + d);
          store(sums + d, accumulate ? add(load(sums + d), x) : x);
        }
      }
    }
  }
}

constexpr Kernels with_pairs(Kernels table) {
  table.pack_key_pairs[2] = pack_key_pairs;
  table.pack_value_pairs[2] = pack_value_pairs;
  table.round_row = round_row;
  table.gemm_pairs = gemm_pairs;
  return table;
}

}  // namespace dhsa::cpu::DHSA_ISA
