// The hand-written tiles of AVX2: an 8 x 8 transpose for packing, and a 6 x 16 product tile: 12 accumulators, 2 vectors
// of b and 2 broadcasts fill the 16 registers, and 12 fused multiply-adds go with 8 loads.
#pragma once

namespace dhsa::cpu::avx2 {

// Columns d .. d + 7 of eight rows to eight vectors of one column each, written at kPanel floats' distance.
template <class T>
inline void transpose_8x8(const T* const* rows, int64_t d, float* out) {
  const Vec r0 = load(rows[0] + d), r1 = load(rows[1] + d), r2 = load(rows[2] + d), r3 = load(rows[3] + d);
  const Vec r4 = load(rows[4] + d), r5 = load(rows[5] + d), r6 = load(rows[6] + d), r7 = load(rows[7] + d);
  const Vec a0 = _mm256_unpacklo_ps(r0, r1), a1 = _mm256_unpackhi_ps(r0, r1);
  const Vec a2 = _mm256_unpacklo_ps(r2, r3), a3 = _mm256_unpackhi_ps(r2, r3);
  const Vec a4 = _mm256_unpacklo_ps(r4, r5), a5 = _mm256_unpackhi_ps(r4, r5);
  const Vec a6 = _mm256_unpacklo_ps(r6, r7), a7 = _mm256_unpackhi_ps(r6, r7);
  const Vec b0 = _mm256_shuffle_ps(a0, a2, 0x44), b1 = _mm256_shuffle_ps(a0, a2, 0xee);
  const Vec b2 = _mm256_shuffle_ps(a1, a3, 0x44), b3 = _mm256_shuffle_ps(a1, a3, 0xee);
  const Vec b4 = _mm256_shuffle_ps(a4, a6, 0x44), b5 = _mm256_shuffle_ps(a4, a6, 0xee);
  const Vec b6 = _mm256_shuffle_ps(a5, a7, 0x44), b7 = _mm256_shuffle_ps(a5, a7, 0xee);
  store(out + 0 * kPanel, _mm256_permute2f128_ps(b0, b4, 0x20));
  store(out + 1 * kPanel, _mm256_permute2f128_ps(b1, b5, 0x20));
  store(out + 2 * kPanel, _mm256_permute2f128_ps(b2, b6, 0x20));
  store(out + 3 * kPanel, _mm256_permute2f128_ps(b3, b7, 0x20));
  store(out + 4 * kPanel, _mm256_permute2f128_ps(b0, b4, 0x31));
  store(out + 5 * kPanel, _mm256_permute2f128_ps(b1, b5, 0x31));
  store(out + 6 * kPanel, _mm256_permute2f128_ps(b2, b6, 0x31));
  store(out + 7 * kPanel, _mm256_permute2f128_ps(b3, b7, 0x31));
}

template <class T>
void pack_keys(const void* k, int64_t row_stride, const int32_t* index, int64_t n, int64_t n_padded, int64_t head_dim,
               float* panels) {
  static const T kZeros[256] = {};  // the row that stands for every missing one
  for (int64_t first = 0; first < n_padded; first += kPanel, panels += head_dim * kPanel) {
    for (int64_t half = 0; half < kPanel; half += 8) {
      const T* rows[8];
      for (int64_t i = 0; i < 8; ++i) {
        const int64_t r = first + half + i;
        rows[i] = r < n ? static_cast<const T*>(k) + (index ? index[r] : r) * row_stride : kZeros;
      }
      for (int64_t d = 0; d < head_dim; d += 8) transpose_8x8(rows, d, panels + d * kPanel + half);
    }
  }
}

struct FloatProduct {
  static Vec step(Vec a, Vec b, Vec c) { return fma(a, b, c); }
};

// Named registers: an array of vectors is spilled by some compilers. A function of its own: inlined into its callers'
// loops, g++ 12 keeps the loop's counters in memory.
template <class Product, Into kInto, int kRows, class Rows>
__attribute__((noinline)) void gemm_rows(int64_t k, const Rows& a, const float* b, float scale, float* c, int64_t ldc) {
  Vec c00 = zero(), c01 = zero(), c10 = zero(), c11 = zero(), c20 = zero(), c21 = zero();
  Vec c30 = zero(), c31 = zero(), c40 = zero(), c41 = zero(), c50 = zero(), c51 = zero();
#define DHSA_ROWS(step) \
  step(0, c00, c01) step(1, c10, c11) step(2, c20, c21) step(3, c30, c31) step(4, c40, c41) step(5, c50, c51)
#define DHSA_LOAD(r, low, high)   \
  if (kRows > r) {                \
    low = load(c + r * ldc);      \
    high = load(c + r * ldc + 8); \
  }
#define DHSA_SHRINK(r, low, high)         \
  if (kRows > r) {                        \
    low = mul(low, set1(a.factors[r]));   \
    high = mul(high, set1(a.factors[r])); \
  }
#define DHSA_PRODUCT(r, low, high)                 \
  if (kRows > r) {                                 \
    const Vec x = _mm256_broadcast_ss(a.at(r, i)); \
    low = Product::step(x, b0, low);               \
    high = Product::step(x, b1, high);             \
  }
#define DHSA_SCALE(r, low, high)   \
  if (kRows > r) {                 \
    low = mul(low, set1(scale));   \
    high = mul(high, set1(scale)); \
  }
#define DHSA_STORE(r, low, high)  \
  if (kRows > r) {                \
    store(c + r * ldc, low);      \
    store(c + r * ldc + 8, high); \
  }
  if (kInto == Into::kAdd) {
    DHSA_ROWS(DHSA_LOAD)
    if (a.factors != nullptr) {
      DHSA_ROWS(DHSA_SHRINK)
    }
  }
  for (int64_t i = 0; i < k; ++i) {
    const Vec b0 = load(b + i * kPanel), b1 = load(b + i * kPanel + 8);
    DHSA_ROWS(DHSA_PRODUCT)
  }
  if (kInto == Into::kScale) {
    DHSA_ROWS(DHSA_SCALE)
  }
  DHSA_ROWS(DHSA_STORE)
#undef DHSA_ROWS
#undef DHSA_LOAD
#undef DHSA_SHRINK
#undef DHSA_PRODUCT
#undef DHSA_SCALE
#undef DHSA_STORE
}

// Rows r to r + count, at most kMost of them.
template <class Product, Into kInto, int kMost, class Left>
inline void gemm_few_rows(int64_t count, int64_t k, const Left& left, int64_t r, const float* b, float scale, float* c,
                          int64_t ldc) {
  if constexpr (kMost > 0) {
    if (count < kMost) return gemm_few_rows<Product, kInto, kMost - 1>(count, k, left, r, b, scale, c, ldc);
    gemm_rows<Product, kInto, kMost>(k, left.template rows<kMost>(r), b, scale, c + r * ldc, ldc);
  }
}

constexpr int64_t kTileColumns = kPanel;  // gemm_columns takes as many columns of b at once
constexpr int64_t kGroupColumns = kTileColumns, kGroupKeys = kBlockN;

// The last rows are two tiles of like height: 64 end with five and five, since the eight chains of four rows would just
// fill two multipliers of four cycles.
template <class Product, Into kInto, class Left>
inline void gemm_columns(int64_t m, int64_t k, const Left& left, const float* b, int64_t, float scale, float* c,
                         int64_t ldc) {
  int64_t r = 0;
  for (; m - r > 10; r += 6) gemm_rows<Product, kInto, 6>(k, left.template rows<6>(r), b, scale, c + r * ldc, ldc);
  const int64_t first = m - r > 6 ? (m - r + 1) / 2 : m - r;
  gemm_few_rows<Product, kInto, 6>(first, k, left, r, b, scale, c, ldc);
  gemm_few_rows<Product, kInto, 5>(m - r - first, k, left, r + first, b, scale, c, ldc);
}

}  // namespace dhsa::cpu::avx2
