// The tiles of AVX-512 over bfloat16 pairs: vdpbf16ps multiplies 32 pairs of elements where a float32 instruction
// multiplies 16. A pair is four bytes, so that keys are packed, and rows of a broadcast, as if they were float32.
#pragma once

namespace dhsa::cpu::DHSA_ISA {

struct PairProduct {
  static Wide step(Wide a, Wide b, Wide c) { return _mm512_dpbf16_ps(c, (__m512bh)a, (__m512bh)b); }
};

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

inline void gemm_pairs(int64_t m, int64_t k, const void* a, int64_t lda, const void* b, float* c, int64_t ldc,
                       bool accumulate) {
  gemm_all_rows<PairProduct>(m, k / 2, static_cast<const float*>(a), lda / 2, static_cast<const float*>(b), c, ldc,
                             accumulate);
}

constexpr Kernels with_pairs(Kernels table) {
  table.pack_key_pairs = pack_key_pairs;
  table.pack_value_pairs = pack_value_pairs;
  table.round_row = round_row;
  table.gemm_pairs = gemm_pairs;
  return table;
}

}  // namespace dhsa::cpu::DHSA_ISA
