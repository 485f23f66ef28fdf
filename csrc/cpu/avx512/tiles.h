// The hand-written tiles of AVX-512: a 16 x 16 transpose for packing, a copy of values in panels, and an 8 x 32 product
// tile of 16 accumulators, which divides the common blocks of 64 queries and 64 keys. The row loops of cpu/simd keep
// AVX2's eight floats, which divide every head_dim.
#pragma once

namespace dhsa::cpu::DHSA_ISA {

inline Wide load_wide(const float* p, __mmask16 mask) { return _mm512_maskz_loadu_ps(mask, p); }
inline Wide load_wide(const Half* p, __mmask16 mask) { return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, p)); }
inline Wide load_wide(const BFloat16* p, __mmask16 mask) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, p)), 16));
}

// The row that stands for every missing one.
template <class T>
inline const T* no_row() {
  alignas(64) static const T kZeros[kMaxDepth] = {};
  return kZeros;
}

// Sixteen columns of four rows: lane L of u_c holds the four rows' elements of column 4 L + c.
struct FourRows {
  Wide u0, u1, u2, u3;
};

inline FourRows interleave(Wide r0, Wide r1, Wide r2, Wide r3) {
  const __m512d low01 = _mm512_castps_pd(_mm512_unpacklo_ps(r0, r1)),
                high01 = _mm512_castps_pd(_mm512_unpackhi_ps(r0, r1));
  const __m512d low23 = _mm512_castps_pd(_mm512_unpacklo_ps(r2, r3)),
                high23 = _mm512_castps_pd(_mm512_unpackhi_ps(r2, r3));
  return {_mm512_castpd_ps(_mm512_unpacklo_pd(low01, low23)), _mm512_castpd_ps(_mm512_unpackhi_pd(low01, low23)),
          _mm512_castpd_ps(_mm512_unpacklo_pd(high01, high23)), _mm512_castpd_ps(_mm512_unpackhi_pd(high01, high23))};
}

template <class T>
inline FourRows interleave(const T* const* rows, int64_t d, __mmask16 mask) {
  return interleave(load_wide(rows[0] + d, mask), load_wide(rows[1] + d, mask), load_wide(rows[2] + d, mask),
                    load_wide(rows[3] + d, mask));
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

// The columns of sixteen rows, those below `width`, as rows of out.
inline void store_transposed(const FourRows& rows0, const FourRows& rows4, const FourRows& rows8,
                             const FourRows& rows12, int64_t width, float* out) {
  store_columns(rows0.u0, rows4.u0, rows8.u0, rows12.u0, width, out);
  store_columns(rows0.u1, rows4.u1, rows8.u1, rows12.u1, width, out + kPanel);
  store_columns(rows0.u2, rows4.u2, rows8.u2, rows12.u2, width, out + 2 * kPanel);
  store_columns(rows0.u3, rows4.u3, rows8.u3, rows12.u3, width, out + 3 * kPanel);
}

template <class T>
void pack_keys(const void* k, int64_t row_stride, const int32_t* index, int64_t n, int64_t n_padded, int64_t head_dim,
               float* panels) {
  for (int64_t first = 0; first < n_padded; first += kPanel, panels += head_dim * kPanel) {
    const T* rows[kPanel];
    for (int64_t i = 0; i < kPanel; ++i) {
      const int64_t r = first + i;
      rows[i] = r < n ? static_cast<const T*>(k) + (index ? index[r] : r) * row_stride : no_row<T>();
    }
    for (int64_t d = 0; d < head_dim; d += kPanel) {
      const int64_t width = head_dim - d < kPanel ? head_dim - d : kPanel;
      const __mmask16 mask = static_cast<__mmask16>((1u << width) - 1);
      store_transposed(interleave(rows, d, mask), interleave(rows + 4, d, mask), interleave(rows + 8, d, mask),
                       interleave(rows + 12, d, mask), width, panels + d * kPanel);
    }
  }
}

// pack_values of gather.h, a panel's row at a time.
template <class T>
bool pack_values_wide(const void* v, int64_t row_stride, const int32_t* index, int64_t n, int64_t n_padded,
                      int64_t head_dim, float* panels) {
  __mmask16 poison = 0;
  for (int64_t d0 = 0; d0 < head_dim; d0 += kPanel) {
    const __mmask16 columns = head_dim - d0 < kPanel ? 0xff : 0xffff;
    for (int64_t r = 0; r < n; ++r, panels += kPanel) {
      const Wide x = load_wide(static_cast<const T*>(v) + index[r] * row_stride + d0, columns);
      poison |= _mm512_fpclass_ps_mask(x, 0x99);  // either NaN, either infinity
      _mm512_storeu_ps(panels, x);
    }
    for (int64_t r = n; r < n_padded; ++r, panels += kPanel) _mm512_storeu_ps(panels, wide_zero());
  }
  return poison == 0;
}

struct FloatProduct {
  static Wide step(Wide a, Wide b, Wide c) { return _mm512_fmadd_ps(a, b, c); }
};

// A right factor of k rows: packed in panels, or where its rows lie.
struct PackedPanels {
  const float* panel;

  PackedPanels next_panel(int64_t k) const { return {panel + k * kPanel}; }
  const float* row(int64_t i) const { return panel + i * kPanel; }
};

struct RowPanels {
  const float* const* rows;
  int64_t column;

  RowPanels next_panel(int64_t) const { return {rows, column + kPanel}; }
  const float* row(int64_t i) const { return rows[i] + column; }
};

// Eight rows by two neighbouring panels: 10 loads go with 16 products, where 16 rows by one panel need 17, as many
// cycles on machines that load 64 bytes once a cycle; those are for a last panel. Row r's sums are low_r and high_r, or
// low_r and those of row 8 + r high_r. Named registers: an array of vectors is spilled by some compilers. A function of
// its own: inlined into its callers' loops, g++ 12 keeps counters in memory.
template <class Product, Into kInto, int kRows, bool kTwo, class Rows, class Right>
__attribute__((noinline)) void gemm_rows(int64_t k, const Rows& a, const Right& b, float scale, float* c, int64_t ldc) {
  Wide c0{}, c1{}, c2{}, c3{}, c4{}, c5{}, c6{}, c7{}, d0{}, d1{}, d2{}, d3{}, d4{}, d5{}, d6{}, d7{};
#define DHSA_ROWS(step)                                                                                           \
  step(0, c0, d0) step(1, c1, d1) step(2, c2, d2) step(3, c3, d3) step(4, c4, d4) step(5, c5, d5) step(6, c6, d6) \
      step(7, c7, d7)
#define DHSA_HIGH(r) (kTwo ? kRows > r : kRows > 8 + r)
#define DHSA_LOAD(r, low, high)                      \
  if (kRows > r) low = _mm512_loadu_ps(c + r * ldc); \
  if (DHSA_HIGH(r)) high = _mm512_loadu_ps(kTwo ? c + r * ldc + kPanel : c + (8 + r) * ldc);
#define DHSA_SHRINK(r, low, high)                                        \
  if (kRows > r) low = _mm512_mul_ps(low, _mm512_set1_ps(a.factors[r])); \
  if (DHSA_HIGH(r)) high = _mm512_mul_ps(high, _mm512_set1_ps(a.factors[kTwo ? r : 8 + r]));
#define DHSA_PRODUCT(r, low, high)                                                                    \
  if (kRows > r) {                                                                                    \
    const Wide x = _mm512_set1_ps(*a.at(r, i));                                                       \
    low = Product::step(x, low_b, low);                                                               \
    if (DHSA_HIGH(r)) high = Product::step(kTwo ? x : _mm512_set1_ps(*a.at(8 + r, i)), high_b, high); \
  }
#define DHSA_SCALE(r, low, high)                                  \
  if (kRows > r) low = _mm512_mul_ps(low, _mm512_set1_ps(scale)); \
  if (DHSA_HIGH(r)) high = _mm512_mul_ps(high, _mm512_set1_ps(scale));
#define DHSA_STORE(r, low, high)                     \
  if (kRows > r) _mm512_storeu_ps(c + r * ldc, low); \
  if (DHSA_HIGH(r)) _mm512_storeu_ps(kTwo ? c + r * ldc + kPanel : c + (8 + r) * ldc, high);
  if (kInto == Into::kAdd) {
    DHSA_ROWS(DHSA_LOAD)
    if (a.factors != nullptr) {
      DHSA_ROWS(DHSA_SHRINK)
    }
  }
  const Right next = kTwo ? b.next_panel(k) : b;
  for (int64_t i = 0; i < k; ++i) {
    const Wide low_b = _mm512_loadu_ps(b.row(i)), high_b = kTwo ? _mm512_loadu_ps(next.row(i)) : low_b;
    DHSA_ROWS(DHSA_PRODUCT)
  }
  if (kInto == Into::kScale) {
    DHSA_ROWS(DHSA_SCALE)
  }
  DHSA_ROWS(DHSA_STORE)
#undef DHSA_HIGH
#undef DHSA_ROWS
#undef DHSA_LOAD
#undef DHSA_SHRINK
#undef DHSA_PRODUCT
#undef DHSA_SCALE
#undef DHSA_STORE
}

template <class Product, Into kInto, bool kTwo, class Left, class Right>
inline void gemm_all_rows(int64_t m, int64_t k, const Left& left, const Right& b, float scale, float* c, int64_t ldc) {
  int64_t r = 0;
  if constexpr (!kTwo) {
    for (; r + 16 <= m; r += 16) {
      gemm_rows<Product, kInto, 16, kTwo>(k, left.template rows<16>(r), b, scale, c + r * ldc, ldc);
    }
  }
  for (; r + 8 <= m; r += 8) {
    gemm_rows<Product, kInto, 8, kTwo>(k, left.template rows<8>(r), b, scale, c + r * ldc, ldc);
  }
  for (; r + 4 <= m; r += 4) {
    gemm_rows<Product, kInto, 4, kTwo>(k, left.template rows<4>(r), b, scale, c + r * ldc, ldc);
  }
  for (; r < m; ++r) gemm_rows<Product, kInto, 1, kTwo>(k, left.template rows<1>(r), b, scale, c + r * ldc, ldc);
}

inline void scale_row_wide(float* x, int64_t n, float factor) {
  const Wide f = _mm512_set1_ps(factor);
  int64_t d = 0;
  for (; d + kWide <= n; d += kWide) _mm512_storeu_ps(x + d, _mm512_mul_ps(_mm512_loadu_ps(x + d), f));
  if (d < n) store(x + d, mul(load(x + d), set1(factor)));
}

constexpr int64_t kTileColumns = 2 * kPanel;
constexpr int64_t kGroupColumns = 64, kGroupKeys = 8;  // which the first-level cache holds

template <class Product, Into kInto, class Left, class Right>
inline void gemm_panels(int64_t m, int64_t k, const Left& left, const Right& b, int64_t columns, float scale, float* c,
                        int64_t ldc) {
  if (columns == kTileColumns) {
    gemm_all_rows<Product, kInto, true>(m, k, left, b, scale, c, ldc);
  } else {
    gemm_all_rows<Product, kInto, false>(m, k, left, b, scale, c, ldc);
  }
}

template <class Product, Into kInto, class Left>
inline void gemm_columns(int64_t m, int64_t k, const Left& left, const float* b, int64_t columns, float scale, float* c,
                         int64_t ldc) {
  gemm_panels<Product, kInto>(m, k, left, PackedPanels{b}, columns, scale, c, ldc);
}

// Values where they lie: another load for sixteen products, but no copy of 32 KiB.
inline void add_listed_columns(const float* p, int64_t ldp, const KeyTile& tile, int64_t m, const float* shrink,
                               float* c, int64_t ldc, Ahead& ahead) {
  const float* rows[kBlockN];
  for (int64_t i = 0; i < tile.n; ++i) rows[i] = static_cast<const float*>(tile.v) + tile.index[i] * tile.v_row;
  const ColumnMajor weights{p, ldp, shrink, ahead};
  for (int64_t j = 0; j < tile.head_dim; j += kTileColumns) {
    const int64_t columns = tile.head_dim - j < kTileColumns ? tile.head_dim - j : kTileColumns;
    gemm_panels<FloatProduct, Into::kAdd>(m, tile.n, weights, RowPanels{rows, j}, columns, 1.0f, c + j, ldc);
  }
}

constexpr Kernels with_wide_rows(Kernels table) {
  table.scale_row = scale_row_wide;
  table.add_listed_columns[0] = add_listed_columns;
  table.pack_values[0] = pack_values_wide<float>;
  table.pack_values[1] = pack_values_wide<Half>;
  table.pack_values[2] = pack_values_wide<BFloat16>;
  return table;
}

}  // namespace dhsa::cpu::DHSA_ISA
