// The tiles of the scalar ISA: loops whose trip counts are constants, for the compiler to vectorise at baseline.
#pragma once

namespace dhsa::cpu::scalar {

inline float widen(float x) { return x; }
inline float widen(Half x) { return float_from_half(x.bits); }
inline float widen(BFloat16 x) { return float_from_bfloat16(x.bits); }

template <class T>
void pack_keys(const void* k, int64_t row_stride, const int32_t* index, int64_t n, int64_t n_padded, int64_t head_dim,
               float* panels) {
  for (int64_t first = 0; first < n_padded; first += kPanel, panels += head_dim * kPanel) {
    for (int64_t c = 0; c < kPanel; ++c) {
      const int64_t r = first + c;
      const T* row = r < n ? static_cast<const T*>(k) + (index ? index[r] : r) * row_stride : nullptr;
      for (int64_t d = 0; d < head_dim; ++d) panels[d * kPanel + c] = row ? widen(row[d]) : 0.0f;
    }
  }
}

template <int kRows>
inline void gemm_rows(int64_t k, const float* a, int64_t lda, const float* b, float* c, int64_t ldc, bool accumulate) {
  float sum[kRows][kPanel] = {};
  if (accumulate) {
    for (int r = 0; r < kRows; ++r) {
      for (int j = 0; j < kPanel; ++j) sum[r][j] = c[r * ldc + j];
    }
  }
  for (int64_t i = 0; i < k; ++i) {
    for (int r = 0; r < kRows; ++r) {
      for (int j = 0; j < kPanel; ++j) sum[r][j] += a[r * lda + i] * b[i * kPanel + j];
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int j = 0; j < kPanel; ++j) c[r * ldc + j] = sum[r][j];
  }
}

inline void gemm_panel(int64_t m, int64_t k, const float* a, int64_t lda, const float* b, float* c, int64_t ldc,
                       bool accumulate) {
  int64_t r = 0;
  for (; r + 2 <= m; r += 2) gemm_rows<2>(k, a + r * lda, lda, b, c + r * ldc, ldc, accumulate);
  if (r < m) gemm_rows<1>(k, a + r * lda, lda, b, c + r * ldc, ldc, accumulate);
}

}  // namespace dhsa::cpu::scalar
