// The hand-written tiles of AVX-512: a 16 x 16 transpose for packing, and a 16 x 16 product tile: 16 accumulators, one
// vector of b and a broadcast operand of a per multiply-add. Sixteen rows fit
// the common blocks of 64 queries; the row loops of cpu/simd keep AVX2's eight floats, which divide every head_dim.
#pragma once

namespace dhsa::cpu::DHSA_ISA {

using Wide = __m512;  // a panel's width

inline Wide load_wide(const float* p, __mmask16 mask) { return _mm512_maskz_loadu_ps(mask, p); }
inline Wide load_wide(const Half* p, __mmask16 mask) { return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, p)); }
inline Wide load_wide(const BFloat16* p, __mmask16 mask) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, p)), 16));
}

// Sixteen columns of four rows: lane L of u_c holds the four rows' elements of column 4 L + c.
struct FourRows {
  Wide u0, u1, u2, u3;
};

template <class T>
inline FourRows interleave(const T* const* rows, int64_t d, __mmask16 mask) {
  const Wide r0 = load_wide(rows[0] + d, mask), r1 = load_wide(rows[1] + d, mask);
  const Wide r2 = load_wide(rows[2] + d, mask), r3 = load_wide(rows[3] + d, mask);
  const __m512d low01 = _mm512_castps_pd(_mm512_unpacklo_ps(r0, r1)),
                high01 = _mm512_castps_pd(_mm512_unpackhi_ps(r0, r1));
  const __m512d low23 = _mm512_castps_pd(_mm512_unpacklo_ps(r2, r3)),
                high23 = _mm512_castps_pd(_mm512_unpackhi_ps(r2, r3));
  return {_mm512_castpd_ps(_mm512_unpacklo_pd(low01, low23)), _mm512_castpd_ps(_mm512_unpackhi_pd(low01, low23)),
          _mm512_castpd_ps(_mm512_unpacklo_pd(high01, high23)), _mm512_castpd_ps(_mm512_unpackhi_pd(high01, high23))};
}

// Columns c, 4 + c, 8 + c and 12 + c, those below `width` (a multiple of four), at kPanel floats' distance.
inline void store_columns(Wide rows0, Wide rows4, Wide rows8, Wide rows12, int64_t width, float* out) {
  const Wide even_low = _mm512_shuffle_f32x4(rows0, rows4, 0x88), odd_low = _mm512_shuffle_f32x4(rows0, rows4, 0xdd);
  const Wide even_high = _mm512_shuffle_f32x4(rows8, rows12, 0x88);
  const Wide odd_high = _mm512_shuffle_f32x4(rows8, rows12, 0xdd);
  _mm512_storeu_ps(out, _mm512_shuffle_f32x4(even_low, even_high, 0x88));
  if (width > 4) _mm512_storeu_ps(out + 4 * kPanel, _mm512_shuffle_f32x4(odd_low, odd_high, 0x88));
  if (width > 8) _mm512_storeu_ps(out + 8 * kPanel, _mm512_shuffle_f32x4(even_low, even_high, 0xdd));
  if (width > 12) _mm512_storeu_ps(out + 12 * kPanel, _mm512_shuffle_f32x4(odd_low, odd_high, 0xdd));
}

template <class T>
void pack_keys(const void* k, int64_t row_stride, const int32_t* index, int64_t n, int64_t n_padded, int64_t head_dim,
               float* panels) {
  static const T kZeros[256] = {};  // the row that stands for every missing one
  for (int64_t first = 0; first < n_padded; first += kPanel, panels += head_dim * kPanel) {
    const T* rows[kPanel];
    for (int64_t i = 0; i < kPanel; ++i) {
      const int64_t r = first + i;
      rows[i] = r < n ? static_cast<const T*>(k) + (index ? index[r] : r) * row_stride : kZeros;
    }
    for (int64_t d = 0; d < head_dim; d += kPanel) {
      const int64_t width = head_dim - d < kPanel ? head_dim - d : kPanel;
      const __mmask16 mask = static_cast<__mmask16>((1u << width) - 1);
      const FourRows a = interleave(rows, d, mask), b = interleave(rows + 4, d, mask);
      const FourRows e = interleave(rows + 8, d, mask), f = interleave(rows + 12, d, mask);
      float* out = panels + d * kPanel;
      store_columns(a.u0, b.u0, e.u0, f.u0, width, out);
      store_columns(a.u1, b.u1, e.u1, f.u1, width, out + kPanel);
      store_columns(a.u2, b.u2, e.u2, f.u2, width, out + 2 * kPanel);
      store_columns(a.u3, b.u3, e.u3, f.u3, width, out + 3 * kPanel);
    }
  }
}

struct FloatProduct {
  static Wide step(Wide a, Wide b, Wide c) { return _mm512_fmadd_ps(a, b, c); }
};

// Named registers: an array of vectors is spilled by some compilers. Four pointers reach all rows of a.
template <class Product, int kRows>
inline void gemm_rows(int64_t k, const float* a, int64_t lda, const float* b, float* c, int64_t ldc, bool accumulate) {
  Wide c0{}, c1{}, c2{}, c3{}, c4{}, c5{}, c6{}, c7{}, c8{}, c9{}, c10{}, c11{}, c12{}, c13{}, c14{}, c15{};
#define DHSA_ROWS(step)                                                                                       \
  step(0, c0) step(1, c1) step(2, c2) step(3, c3) step(4, c4) step(5, c5) step(6, c6) step(7, c7) step(8, c8) \
      step(9, c9) step(10, c10) step(11, c11) step(12, c12) step(13, c13) step(14, c14) step(15, c15)
#define DHSA_LOAD(r, sum) \
  if (kRows > r) sum = _mm512_loadu_ps(c + r * ldc);
#define DHSA_PRODUCT(r, sum) \
  if (kRows > r)             \
    sum = Product::step(_mm512_set1_ps((r < 4 ? a0 : r < 8 ? a4 : r < 12 ? a8 : a12)[r % 4 * lda]), bi, sum);
#define DHSA_STORE(r, sum) \
  if (kRows > r) _mm512_storeu_ps(c + r * ldc, sum);
  if (accumulate) {
    DHSA_ROWS(DHSA_LOAD)
  }
  const float *a0 = a, *a4 = a + 4 * lda, *a8 = a + 8 * lda, *a12 = a + 12 * lda;
  for (int64_t i = 0; i < k; ++i, ++a0, ++a4, ++a8, ++a12, b += kPanel) {
    const Wide bi = _mm512_loadu_ps(b);
    DHSA_ROWS(DHSA_PRODUCT)
  }
  DHSA_ROWS(DHSA_STORE)
#undef DHSA_ROWS
#undef DHSA_LOAD
#undef DHSA_PRODUCT
#undef DHSA_STORE
}

template <class Product>
inline void gemm_all_rows(int64_t m, int64_t k, const float* a, int64_t lda, const float* b, float* c, int64_t ldc,
                          bool accumulate) {
  int64_t r = 0;
  for (; r + 16 <= m; r += 16) gemm_rows<Product, 16>(k, a + r * lda, lda, b, c + r * ldc, ldc, accumulate);
  for (; r + 8 <= m; r += 8) gemm_rows<Product, 8>(k, a + r * lda, lda, b, c + r * ldc, ldc, accumulate);
  for (; r + 4 <= m; r += 4) gemm_rows<Product, 4>(k, a + r * lda, lda, b, c + r * ldc, ldc, accumulate);
  for (; r < m; ++r) gemm_rows<Product, 1>(k, a + r * lda, lda, b, c + r * ldc, ldc, accumulate);
}

inline void gemm_panel(int64_t m, int64_t k, const float* a, int64_t lda, const float* b, float* c, int64_t ldc,
                       bool accumulate) {
  gemm_all_rows<FloatProduct>(m, k, a, lda, b, c, ldc, accumulate);
}

}  // namespace dhsa::cpu::DHSA_ISA
