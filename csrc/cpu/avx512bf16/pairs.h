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

// Two rows of values, sixteen columns at a time, to pairs, and whether all were finite.
template <class T>
class ValueRows;

template <>
class ValueRows<BFloat16> {
 public:
  static __m256i whole(const BFloat16* x) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)); }
  static __m256i part(const BFloat16* x, __mmask16 lanes) { return _mm256_maskz_loadu_epi16(lanes, x); }
  void put(__m256i x, __m256i y, char* to) {
    alignas(64) static const uint16_t kInterleaved[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                          8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    const __m512i both = _mm512_inserti64x4(_mm512_castsi256_si512(x), y, 1);
    largest_ = _mm512_max_epu16(largest_, _mm512_and_si512(both, _mm512_set1_epi16(0x7fff)));
    _mm512_storeu_si512(to, _mm512_permutexvar_epi16(_mm512_load_si512(kInterleaved), both));
  }
  bool finite() const {  // the least of what is not is an infinity, others are NaN
    return _mm512_cmpge_epu16_mask(largest_, _mm512_set1_epi16(0x7f80)) == 0;
  }

 private:
  __m512i largest_ = _mm512_setzero_si512();
};

// Packs two whole rows, whose panels are panel_bytes apart.
template <class T>
inline void put_rows(const T* x, const T* y, int64_t head_dim, int64_t panel_bytes, char* to, ValueRows<T>* rows) {
  int64_t d = 0;
  for (; d + kPanel <= head_dim; d += kPanel, to += panel_bytes) rows->put(rows->whole(x + d), rows->whole(y + d), to);
  if (d == head_dim) return;
  const __mmask16 lanes = static_cast<__mmask16>((1 << (head_dim - d)) - 1);
  rows->put(rows->part(x + d, lanes), rows->part(y + d, lanes), to);
}

inline bool pack_value_pairs(const void* v, int64_t row_stride, const int32_t* index, int64_t n, int64_t n_padded,
                             int64_t head_dim, void* panels) {
  const auto row = [&](int64_t r) {
    return r < n ? static_cast<const BFloat16*>(v) + index[r] * row_stride : no_row<BFloat16>();
  };
  ValueRows<BFloat16> rows;
  char* to = static_cast<char*>(panels);
  for (int64_t r = 0; r < n_padded; r += 2, to += sizeof(Wide)) {
    put_rows(row(r), row(r + 1), head_dim, n_padded / 2 * static_cast<int64_t>(sizeof(Wide)), to, &rows);
  }
  return rows.finite();
}

// Keys as they are stored, a pair at a time, by packed pairs of queries.
inline void dot_column_pairs(const KeyTile& tile, const void*, const void* q, int64_t first, int64_t m, float scale,
                             float* s, int64_t lds, Ahead& ahead) {
  const ListedRows keys{static_cast<const float*>(tile.k), tile.k_row / 2, tile.index, ahead};
  const int64_t pairs = tile.head_dim / 2;
  dot_listed<PairProduct>(keys, tile.n, pairs, static_cast<const float*>(q) + first * pairs, m, scale, s, lds);
}

inline __m512i round_bits(Wide p) { return _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(p)); }

struct AsPairs {
  static constexpr int kAskedLinePairs = 0;

  static void put(Wide p, Wide next, float* at, float*) {
    _mm512_storeu_si512(at, _mm512_or_si512(round_bits(p), _mm512_slli_epi32(round_bits(next), 16)));
  }
  static void put(Wide p, float* at, float*) { _mm512_storeu_si512(at, round_bits(p)); }
};

inline void add_column_pairs(const float* p, int64_t ldp, int64_t keys, const void* v, int64_t n, int64_t m, float* c,
                             int64_t ldc, Ahead& ahead) {
  gemm_all<PairProduct, Into::kAdd>(m, (keys + 1) / 2, ColumnMajor{p, 2 * ldp, nullptr, ahead},
                                    static_cast<const float*>(v), n, 1.0f, c, ldc);
}

// store_row by the instruction that rounds, to which what is below 2^-126 is 0.
inline void store_rounded_row(const float* x, float scale, int64_t head_dim, void* out) {
  BFloat16* to = static_cast<BFloat16*>(out);
  const auto rounded = [&](int64_t d, __mmask16 lanes) {
    return (__m256i)_mm512_cvtneps_pbh(mul(load_wide(x + d, lanes), wide_set1(scale)));
  };
  int64_t d = 0;
  for (; d + kWide <= head_dim; d += kWide) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + d), rounded(d, 0xffff));
  }
  if (d < head_dim) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + d), _mm256_castsi256_si128(rounded(d, 0xff)));
  }
}

constexpr Kernels with_pairs(Kernels table) {
  table.store_row[2] = store_rounded_row;
  table.pack_key_pairs[2] = pack_key_pairs;
  table.pack_value_pairs[2] = pack_value_pairs;
  table.copy_keys[2] = nullptr;
  table.dot_columns[2] = dot_column_pairs;
  table.softmax_column_pairs[2] = softmax_columns<ShiftedExp, AsPairs>;
  table.add_column_pairs[2] = add_column_pairs;
  return table;
}

}  // namespace dhsa::cpu::DHSA_ISA
