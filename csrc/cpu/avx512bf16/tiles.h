// The tiles of AVX-512 over bfloat16 pairs: vdpbf16ps multiplies 32 pairs of elements where a float32 instruction
// multiplies 16. A pair, two neighbours in k, is four bytes, so that keys are packed, and rows of a broadcast, as if
// they were float32: key panels are [n_padded / panel][head_dim / 2][panel][2] bfloat16, value panels [ceil(head_dim /
// panel)][n_padded / 2][panel][2].
#pragma once

namespace dhsa::cpu::DHSA_ISA {

inline Wide dot_pairs(Wide a, Wide b, Wide c) { return _mm512_dpbf16_ps(c, (__m512bh)a, (__m512bh)b); }

// Two neighbouring panels for up to eight rows: 10 loads go with 16 products. One panel for 16 rows needs 17 loads, as
// many cycles on machines that load 64 bytes once a cycle.
template <int kRows, bool kTwo>
inline void gemm_pair_rows(int64_t k, const float* a, int64_t lda, const float* b, float* c, int64_t ldc,
                           bool accumulate) {
  Wide c0{}, c1{}, c2{}, c3{}, c4{}, c5{}, c6{}, c7{}, d0{}, d1{}, d2{}, d3{}, d4{}, d5{}, d6{}, d7{};
#define DHSA_ROWS(step)                                                                                           \
  step(0, c0, d0) step(1, c1, d1) step(2, c2, d2) step(3, c3, d3) step(4, c4, d4) step(5, c5, d5) step(6, c6, d6) \
      step(7, c7, d7)
#define DHSA_LOAD(r, low, high)                      \
  if (kRows > r) low = _mm512_loadu_ps(c + r * ldc); \
  if (kRows > r && kTwo) high = _mm512_loadu_ps(c + r * ldc + kPanel);
#define DHSA_PRODUCT(r, low, high)                                 \
  if (kRows > r) {                                                 \
    const Wide x = _mm512_set1_ps((r < 4 ? a0 : a4)[r % 4 * lda]); \
    low = dot_pairs(x, low_b, low);                                \
    if (kTwo) high = dot_pairs(x, high_b, high);                   \
  }
#define DHSA_STORE(r, low, high)                     \
  if (kRows > r) _mm512_storeu_ps(c + r * ldc, low); \
  if (kRows > r && kTwo) _mm512_storeu_ps(c + r * ldc + kPanel, high);
  if (accumulate) {
    DHSA_ROWS(DHSA_LOAD)
  }
  const float *a0 = a, *a4 = a + 4 * lda, *next = b + (kTwo ? k * kPanel : 0);
  for (int64_t i = 0; i < k; ++i, ++a0, ++a4, b += kPanel, next += kPanel) {
    const Wide low_b = _mm512_loadu_ps(b), high_b = _mm512_loadu_ps(next);
    DHSA_ROWS(DHSA_PRODUCT)
  }
  DHSA_ROWS(DHSA_STORE)
#undef DHSA_ROWS
#undef DHSA_LOAD
#undef DHSA_PRODUCT
#undef DHSA_STORE
}

template <bool kTwo>
inline void gemm_pair_panels(int64_t m, int64_t k, const float* a, int64_t lda, const float* b, float* c, int64_t ldc,
                             bool accumulate) {
  int64_t r = 0;
  for (; r + 8 <= m; r += 8) gemm_pair_rows<8, kTwo>(k, a + r * lda, lda, b, c + r * ldc, ldc, accumulate);
  for (; r + 4 <= m; r += 4) gemm_pair_rows<4, kTwo>(k, a + r * lda, lda, b, c + r * ldc, ldc, accumulate);
  for (; r < m; ++r) gemm_pair_rows<1, kTwo>(k, a + r * lda, lda, b, c + r * ldc, ldc, accumulate);
}

inline void pack_key_pairs(const void* k, int64_t row_stride, const int32_t* index, int64_t n, int64_t n_padded,
                           int64_t head_dim, void* panels) {
  pack_keys<float>(k, row_stride / 2, index, n, n_padded, head_dim / 2, static_cast<float*>(panels));
}

inline bool pack_value_pairs(const void* v, int64_t row_stride, const int32_t* index, int64_t n, int64_t n_padded,
                             int64_t head_dim, void* panels) {
  const BFloat16* values = static_cast<const BFloat16*>(v);
  const __m256i exponent = _mm256_set1_epi16(0x7f80);  // all of its bits: an infinity or a NaN
  __mmask16 poison = 0;
  char* out = static_cast<char*>(panels);
  for (int64_t d0 = 0; d0 < head_dim; d0 += kPanel) {
    const __mmask16 columns = head_dim - d0 < kPanel ? 0xff : 0xffff;
    for (int64_t r = 0; r < n_padded; r += 2, out += sizeof(Wide)) {
      const __mmask16 first = r < n ? columns : 0, second = r + 1 < n ? columns : 0;
      const __m256i x = _mm256_maskz_loadu_epi16(first, values + (first ? index[r] * row_stride + d0 : 0));
      const __m256i y = _mm256_maskz_loadu_epi16(second, values + (second ? index[r + 1] * row_stride + d0 : 0));
      poison |= _mm256_cmpeq_epi16_mask(_mm256_and_si256(x, exponent), exponent);
      poison |= _mm256_cmpeq_epi16_mask(_mm256_and_si256(y, exponent), exponent);
      const __m512i high = _mm512_slli_epi32(_mm512_cvtepu16_epi32(y), 16);
      _mm512_storeu_si512(out, _mm512_or_si512(_mm512_cvtepu16_epi32(x), high));
    }
  }
  return poison == 0;
}

inline void round_row(const float* x, int64_t n, void* out) {
  for (int64_t j = 0; j < n; j += kPanel) {
    const __m256bh rounded = _mm512_cvtneps_pbh(_mm512_loadu_ps(x + j));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(static_cast<BFloat16*>(out) + j), (__m256i)rounded);
  }
}

inline void gemm_pairs(int64_t m, int64_t k, const void* a, int64_t lda, const void* b, int64_t n, float* c,
                       int64_t ldc, bool accumulate) {
  const float *rows = static_cast<const float*>(a), *panels = static_cast<const float*>(b);
  int64_t j = 0;
  for (; j + 2 * kPanel <= n; j += 2 * kPanel) {
    gemm_pair_panels<true>(m, k / 2, rows, lda / 2, panels + j * k / 2, c + j, ldc, accumulate);
  }
  if (j < n) gemm_pair_panels<false>(m, k / 2, rows, lda / 2, panels + j * k / 2, c + j, ldc, accumulate);
}

constexpr Kernels with_pairs(Kernels table) {
  table.pack_key_pairs = pack_key_pairs;
  table.pack_value_pairs = pack_value_pairs;
  table.round_row = round_row;
  table.gemm_pairs = gemm_pairs;
  return table;
}

}  // namespace dhsa::cpu::DHSA_ISA
