// The tiles of AVX-512 over bfloat16 pairs: vdpbf16ps multiplies 32 pairs of elements where a float32 instruction
// multiplies 16. A pair, two neighbours in k, is four bytes, so that queries are packed, and keys broadcast, as if they
// were float32: panels of pack_key_pairs are [n_padded / panel][head_dim / 2][panel][2] bfloat16, value panels
// [ceil(head_dim / panel)][n_padded / 2][panel][2].
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

// Keys as they are stored, a pair at a time, by packed pairs of queries.
inline void dot_column_pairs(const KeyTile& tile, const void* q, int64_t m, float scale, float*, float* s,
                             int64_t lds) {
  const ListedRows keys{static_cast<const float*>(tile.k), tile.k_row / 2, tile.index,
                        ahead<BFloat16>(tile.k, tile.k_row, tile), ahead<BFloat16>(tile.v, tile.v_row, tile)};
  dot_listed<PairProduct>(keys, tile.n, tile.head_dim / 2, static_cast<const float*>(q), m, scale, s, lds);
}

inline __m512i round_bits(const float* p) { return _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(wide_load(p))); }

// Probabilities of two keys to pairs, where those of the first key were.
inline void add_column_pairs(float* p, int64_t ldp, int64_t keys, const void* v, int64_t n, int64_t m, float* c,
                             int64_t ldc) {
  for (int64_t j = 0; j < keys; j += 2) {
    float *first = p + j * ldp, *second = first + ldp;
    for (int64_t i = 0; i < m; i += kWide) {
      const __m512i high = j + 1 < keys ? _mm512_slli_epi32(round_bits(second + i), 16) : _mm512_setzero_si512();
      _mm512_storeu_si512(first + i, _mm512_or_si512(round_bits(first + i), high));
    }
  }
  gemm_all<PairProduct, Into::kAdd>(m, (keys + 1) / 2, ColumnMajor{p, 2 * ldp}, static_cast<const float*>(v), n, 1.0f,
                                    c, ldc);
}

constexpr Kernels with_pairs(Kernels table) {
  table.pack_key_pairs = pack_key_pairs;
  table.pack_value_pairs = pack_value_pairs;
  table.dot_columns[2] = dot_column_pairs;
  table.add_column_pairs = add_column_pairs;
  return table;
}

}  // namespace dhsa::cpu::DHSA_ISA
