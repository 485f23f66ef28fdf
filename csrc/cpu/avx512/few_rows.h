// dot_rows and add_weighted_rows of gather.h for machines with AVX-512: keys and values in place, sixteen elements at a
// time, four rows of them with up to four queries.
#pragma once

namespace dhsa::cpu::DHSA_ISA {

// Rows j to j + 3 of a list of n; zeros for those that it lacks.
template <class T>
struct FourListed {
  const T* row[4];

  FourListed(const void* x, int64_t row_stride, const int32_t* index, int64_t j, int64_t n) {
    for (int i = 0; i < 4; ++i) {
      const int64_t at = j + i;
      row[i] = at < n ? static_cast<const T*>(x) + (index ? index[at] : at) * row_stride : no_row<T>();
    }
  }
};

// step(d, load) for every sixteen elements, the last eight of a head_dim by a masked load.
template <class F>
inline void each_wide(int64_t head_dim, const F& step) {
  int64_t d = 0;
  for (; d + kWide <= head_dim; d += kWide) step(d, [](const auto* x) { return wide_load(x); });
  if (d < head_dim) step(d, [](const auto* x) { return load_wide(x, 0xff); });
}

inline __m128 sums_of(Wide a, Wide b, Wide c, Wide d) {
  const FourRows columns = interleave(a, b, c, d);
  const Wide sums = add(add(columns.u0, columns.u1), add(columns.u2, columns.u3));
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(sums), _mm512_extractf32x8_ps(sums, 1));
  return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

template <int kRows, class T>
inline void dot_four(const float* q, const FourListed<T>& keys, int64_t head_dim, __mmask8 listed, float* scores,
                     int64_t lds) {
  Wide sums[kRows][4];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) sums[r][0] = sums[r][1] = sums[r][2] = sums[r][3] = wide_zero();
  each_wide(head_dim, [&](int64_t d, auto load) {
    const Wide k0 = load(keys.row[0] + d), k1 = load(keys.row[1] + d);
    const Wide k2 = load(keys.row[2] + d), k3 = load(keys.row[3] + d);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const Wide x = load(q + r * head_dim + d);
      sums[r][0] = fma(x, k0, sums[r][0]);
      sums[r][1] = fma(x, k1, sums[r][1]);
      sums[r][2] = fma(x, k2, sums[r][2]);
      sums[r][3] = fma(x, k3, sums[r][3]);
    }
  });
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
    _mm_mask_storeu_ps(scores + r * lds, listed, sums_of(sums[r][0], sums[r][1], sums[r][2], sums[r][3]));
  }
}

template <class T>
void dot_rows_wide(const float* q, int64_t m, const void* k, int64_t row_stride, const int32_t* index, int64_t n,
                   int64_t head_dim, float* scores, int64_t lds) {
  for (int64_t j = 0; j < n; j += 4) {
    const FourListed<T> keys(k, row_stride, index, j, n);
    const __mmask8 listed = static_cast<__mmask8>(n - j < 4 ? (1 << (n - j)) - 1 : 0xf);
    int64_t r = 0;
    for (; r + 4 <= m; r += 4) dot_four<4>(q + r * head_dim, keys, head_dim, listed, scores + r * lds + j, lds);
    for (; r < m; ++r) dot_four<1>(q + r * head_dim, keys, head_dim, listed, scores + r * lds + j, lds);
  }
}

// weights[r][i] times row i of the values.
template <int kRows, class T>
inline void add_four(const float (*weights)[4], const FourListed<T>& values, int64_t head_dim, float* out) {
  Wide p[kRows][4];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) p[r][i] = wide_set1(weights[r][i]);
  }
  each_wide(head_dim, [&](int64_t d, auto load) {
    const Wide v0 = load(values.row[0] + d), v1 = load(values.row[1] + d);
    const Wide v2 = load(values.row[2] + d), v3 = load(values.row[3] + d);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      float* to = out + r * head_dim + d;
      const Wide sum = fma(p[r][1], v1, fma(p[r][0], v0, load(to)));
      const Wide all = fma(p[r][3], v3, fma(p[r][2], v2, sum));
      d + kWide <= head_dim ? store(to, all) : store(to, _mm512_castps512_ps256(all));
    }
  });
}

template <class T>
void add_weighted_rows_wide(const float* p, int64_t ldp, int64_t m, const void* v, int64_t row_stride,
                            const int32_t* index, int64_t n, int64_t head_dim, float* out) {
  for (int64_t j = 0; j < n; j += 4) {
    const FourListed<T> values(v, row_stride, index, j, n);
    for (int64_t r = 0; r < m; r += 4) {
      const int64_t rows = m - r < 4 ? m - r : 4;
      float weights[4][4];
      for (int64_t i = 0; i < rows; ++i) {
        for (int64_t t = 0; t < 4; ++t) weights[i][t] = j + t < n ? p[(r + i) * ldp + j + t] : 0.0f;
      }
      float* to = out + r * head_dim;
      if (rows == 4) {
        add_four<4>(weights, values, head_dim, to);
      } else {
        for (int64_t i = 0; i < rows; ++i) add_four<1>(weights + i, values, head_dim, to + i * head_dim);
      }
    }
  }
}

constexpr Kernels with_few_rows(Kernels table) {
  table.dot_rows[0] = dot_rows_wide<float>;
  table.dot_rows[1] = dot_rows_wide<Half>;
  table.dot_rows[2] = dot_rows_wide<BFloat16>;
  table.add_weighted_rows[0] = add_weighted_rows_wide<float>;
  table.add_weighted_rows[1] = add_weighted_rows_wide<Half>;
  table.add_weighted_rows[2] = add_weighted_rows_wide<BFloat16>;
  return table;
}

}  // namespace dhsa::cpu::DHSA_ISA
