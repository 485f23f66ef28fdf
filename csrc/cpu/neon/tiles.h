// The hand-written tiles of NEON: a 4 x 4 transpose for packing, and product tiles over panels of 8 columns.
//
//   12 x 8  rows of a packed to [k][12]: 24 accumulators, and 8 registers for vectors of a, read by lane, and of b.
//           Four steps of k are 96 fused multiply-adds, 10 loads of pairs and 2 instructions of the loop. Packing 12
//           rows costs about an instruction per element, and every panel of b shares it.
//   8 x 8   the same over rows packed to [k][8], for what 12 does not divide: 64, 8 and 2.
//   8, 4, 2 or 1 rows where they lie, for few rows or few panels: four steps of k in 8 vectors of a, read by lane.
#pragma once

namespace dhsa::cpu::DHSA_ISA {

// Columns d .. d + 3 of four rows to four vectors of one column each, written at kStride floats' distance.
template <int64_t kStride, class T>
inline void transpose_4x4(const T* const* rows, int64_t d, float* out) {
  const Vec r0 = load(rows[0] + d), r1 = load(rows[1] + d), r2 = load(rows[2] + d), r3 = load(rows[3] + d);
  const float64x2_t a0 = vreinterpretq_f64_f32(vtrn1q_f32(r0, r1)), a1 = vreinterpretq_f64_f32(vtrn2q_f32(r0, r1));
  const float64x2_t a2 = vreinterpretq_f64_f32(vtrn1q_f32(r2, r3)), a3 = vreinterpretq_f64_f32(vtrn2q_f32(r2, r3));
  store(out, vreinterpretq_f32_f64(vtrn1q_f64(a0, a2)));
  store(out + kStride, vreinterpretq_f32_f64(vtrn1q_f64(a1, a3)));
  store(out + 2 * kStride, vreinterpretq_f32_f64(vtrn2q_f64(a0, a2)));
  store(out + 3 * kStride, vreinterpretq_f32_f64(vtrn2q_f64(a1, a3)));
}

template <class T>
void pack_keys(const void* k, int64_t row_stride, const int32_t* index, int64_t n, int64_t n_padded, int64_t head_dim,
               float* panels) {
  static const T kZeros[256] = {};  // the row that stands for every missing one
  for (int64_t first = 0; first < n_padded; first += kPanel, panels += head_dim * kPanel) {
    for (int64_t half = 0; half < kPanel; half += 4) {
      const T* rows[4];
      for (int64_t i = 0; i < 4; ++i) {
        const int64_t r = first + half + i;
        rows[i] = r < n ? static_cast<const T*>(k) + (index ? index[r] : r) * row_stride : kZeros;
      }
      for (int64_t d = 0; d < head_dim; d += 4) transpose_4x4<kPanel>(rows, d, panels + d * kPanel + half);
    }
  }
}

// a[r][0..k) of kRows rows to [k][kRows]; k is a multiple of 8.
template <int kRows>
inline void pack_rows(const float* a, int64_t lda, int64_t k, float* packed) {
  for (int64_t r = 0; r < kRows; r += 4, a += 4 * lda) {
    const float* const rows[4] = {a, a + lda, a + 2 * lda, a + 3 * lda};
    for (int64_t i = 0; i < k; i += 8) {
      transpose_4x4<kRows>(rows, i, packed + i * kRows + r);
      transpose_4x4<kRows>(rows, i + 4, packed + (i + 4) * kRows + r);
    }
  }
}

// Named registers: an array of vectors is spilled (0.7 instead of 2 multiply-adds per cycle on a Neoverse N1).
template <int kRows>
inline void gemm_rows(int64_t k, const float* a, int64_t lda, const float* b, float* c, int64_t ldc, bool accumulate) {
  Vec c00 = zero(), c01 = zero(), c10 = zero(), c11 = zero(), c20 = zero(), c21 = zero(), c30 = zero(), c31 = zero();
  Vec c40 = zero(), c41 = zero(), c50 = zero(), c51 = zero(), c60 = zero(), c61 = zero(), c70 = zero(), c71 = zero();
#define DHSA_ROWS(step)                                                                                       \
  step(0, c00, c01) step(1, c10, c11) step(2, c20, c21) step(3, c30, c31) step(4, c40, c41) step(5, c50, c51) \
      step(6, c60, c61) step(7, c70, c71)
#define DHSA_LOAD(r, low, high)   \
  if (kRows > r) {                \
    low = load(c + r * ldc);      \
    high = load(c + r * ldc + 4); \
  }
#define DHSA_ROW_OF_A(r, low, high) const Vec a##r = kRows > r ? load(a + r * lda + i) : zero();
#define DHSA_PRODUCT(lane)                                                                \
  {                                                                                       \
    const Vec b0 = load(b + (i + lane) * kPanel), b1 = load(b + (i + lane) * kPanel + 4); \
    DHSA_ROWS(DHSA_PRODUCT_##lane)                                                        \
  }
#define DHSA_PRODUCT_LANE(r, low, high, lane)     \
  if (kRows > r) {                                \
    low = vfmaq_laneq_f32(low, b0, a##r, lane);   \
    high = vfmaq_laneq_f32(high, b1, a##r, lane); \
  }
#define DHSA_PRODUCT_0(r, low, high) DHSA_PRODUCT_LANE(r, low, high, 0)
#define DHSA_PRODUCT_1(r, low, high) DHSA_PRODUCT_LANE(r, low, high, 1)
#define DHSA_PRODUCT_2(r, low, high) DHSA_PRODUCT_LANE(r, low, high, 2)
#define DHSA_PRODUCT_3(r, low, high) DHSA_PRODUCT_LANE(r, low, high, 3)
#define DHSA_STORE(r, low, high)  \
  if (kRows > r) {                \
    store(c + r * ldc, low);      \
    store(c + r * ldc + 4, high); \
  }
  if (accumulate) {
    DHSA_ROWS(DHSA_LOAD)
  }
  for (int64_t i = 0; i < k; i += 4) {
    DHSA_ROWS(DHSA_ROW_OF_A)
    DHSA_PRODUCT(0)
    DHSA_PRODUCT(1)
    DHSA_PRODUCT(2)
    DHSA_PRODUCT(3)
  }
  DHSA_ROWS(DHSA_STORE)
#undef DHSA_ROWS
#undef DHSA_LOAD
#undef DHSA_ROW_OF_A
#undef DHSA_PRODUCT
#undef DHSA_PRODUCT_LANE
#undef DHSA_PRODUCT_0
#undef DHSA_PRODUCT_1
#undef DHSA_PRODUCT_2
#undef DHSA_PRODUCT_3
#undef DHSA_STORE
}

// Up to eight rows at a time, where they lie.
inline void gemm_few_rows(int64_t m, int64_t k, const float* a, int64_t lda, const float* b, float* c, int64_t ldc,
                          bool accumulate) {
  int64_t r = 0;
  for (; r + 8 <= m; r += 8) gemm_rows<8>(k, a + r * lda, lda, b, c + r * ldc, ldc, accumulate);
  for (; r + 4 <= m; r += 4) gemm_rows<4>(k, a + r * lda, lda, b, c + r * ldc, ldc, accumulate);
  for (; r + 2 <= m; r += 2) gemm_rows<2>(k, a + r * lda, lda, b, c + r * ldc, ldc, accumulate);
  if (r < m) gemm_rows<1>(k, a + r * lda, lda, b, c + r * ldc, ldc, accumulate);
}

template <int kRows>
inline void gemm_packed_rows(int64_t k, const float* a, int64_t lda, const float* b, int64_t n, float* c, int64_t ldc,
                             bool accumulate) {
  float packed[kMaxDepth * kRows];
  pack_rows<kRows>(a, lda, k, packed);
  for (int64_t j = 0; j < n; j += kPanel) {
    (kRows == 12 ? gemm_tile_12x8 : gemm_tile_8x8)(k, packed, b + j * k, c + j, ldc, accumulate);
  }
}

// Rows are packed if there are panels enough to pay for it; 16 that are left are two tiles of eight, not one of twelve
// and one of four.
inline void gemm(int64_t m, int64_t k, const float* a, int64_t lda, const float* b, int64_t n, float* c, int64_t ldc,
                 bool accumulate) {
  int64_t r = 0;
  if (n >= 4 * kPanel) {
    for (; m - r >= 12 && m - r != 16; r += 12) {
      gemm_packed_rows<12>(k, a + r * lda, lda, b, n, c + r * ldc, ldc, accumulate);
    }
    for (; m - r >= 8; r += 8) gemm_packed_rows<8>(k, a + r * lda, lda, b, n, c + r * ldc, ldc, accumulate);
  }
  for (int64_t j = 0; j < n && r < m; j += kPanel) {
    gemm_few_rows(m - r, k, a + r * lda, lda, b + j * k, c + r * ldc + j, ldc, accumulate);
  }
}

}  // namespace dhsa::cpu::DHSA_ISA
