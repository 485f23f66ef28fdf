// The products of x86, and the attention of a block of queries with its scores by key, [key][query]: keys are the left
// factor, read where they lie, and the queries are packed once. Softmax then runs down columns, vectors of queries side
// by side, without a sum or a maximum across lanes.
#pragma once

namespace dhsa::cpu::DHSA_ISA {

// c[m][n] from n / kPanel panels of b, as many at a time as the tile has.
template <class Product, Into kInto, class Left>
inline void gemm_all(int64_t m, int64_t k, const Left& left, const float* b, int64_t n, float scale, float* c,
                     int64_t ldc) {
  for (int64_t j = 0; j < n; j += kTileColumns) {
    const int64_t columns = n - j < kTileColumns ? n - j : kTileColumns;
    gemm_columns<Product, kInto>(m, k, left, b + j * k, columns, scale, c + j, ldc);
  }
}

inline void gemm(int64_t m, int64_t k, const float* a, int64_t lda, const float* b, int64_t n, float* c, int64_t ldc,
                 bool accumulate) {
  const RowMajor left{a, lda};
  if (accumulate) {
    gemm_all<FloatProduct, Into::kAdd>(m, k, left, b, n, 1.0f, c, ldc);
  } else {
    gemm_all<FloatProduct, Into::kSet>(m, k, left, b, n, 1.0f, c, ldc);
  }
}

// Scores of `depth` float32, or pairs, of each key. kGroupKeys keys at a time meet kGroupColumns columns.
template <class Product>
inline void dot_listed(const ListedRows& keys, int64_t n, int64_t depth, const float* q, int64_t m, float scale,
                       float* s, int64_t lds) {
  for (int64_t first = 0; first < m; first += kGroupColumns) {
    const int64_t last = first + kGroupColumns < m ? first + kGroupColumns : m;
    for (int64_t j = 0; j < n; j += kGroupKeys) {
      const int64_t rows = n - j < kGroupKeys ? n - j : kGroupKeys;
      for (int64_t i = first; i < last; i += kTileColumns) {
        const int64_t columns = last - i < kTileColumns ? last - i : kTileColumns;
        gemm_columns<Product, Into::kScale>(rows, depth, keys.from(j), q + i * depth, columns, scale, s + j * lds + i,
                                            lds);
      }
    }
  }
}

template <class T>
inline void widen_rows(const T* x, int64_t row_stride, const int32_t* index, int64_t n, int64_t head_dim, float* out) {
  for (int64_t r = 0; r < n; ++r, out += head_dim) {
    const T* row = x + index[r] * row_stride;
    int64_t d = 0;
    for (; d + kWide <= head_dim; d += kWide) store(out + d, wide_load(row + d));
    for (; d < head_dim; d += kLanes) store(out + d, load(row + d));
  }
}

// Half types are widened first: a key's elements are broadcast once for every kTileColumns queries.
template <class T>
void widen_keys(const KeyTile& tile, void* copies) {
  widen_rows(static_cast<const T*>(tile.k), tile.k_row, tile.index, tile.n, tile.head_dim, static_cast<float*>(copies));
}

template <class T>
void dot_columns(const KeyTile& tile, const void* copies, const void* q, int64_t first, int64_t m, float scale,
                 float* s, int64_t lds, Ahead& ahead) {
  const ListedRows in_place{static_cast<const float*>(tile.k), tile.k_row, tile.index, ahead};
  const ListedRows widened{static_cast<const float*>(copies), tile.head_dim, nullptr, ahead};
  dot_listed<FloatProduct>(sizeof(T) == sizeof(float) ? in_place : widened, tile.n, tile.head_dim,
                           static_cast<const float*>(q) + first * tile.head_dim, m, scale, s, lds);
}

inline void mask_columns(float* s, int64_t lds, const int32_t* index, int64_t n, const int32_t* low,
                         const int32_t* high, int64_t m) {
  int32_t most_low = low[0], least_high = high[0];
  for (int64_t i = 1; i < m; ++i) {
    most_low = low[i] > most_low ? low[i] : most_low;
    least_high = high[i] < least_high ? high[i] : least_high;
  }
  for (int64_t j = 0; j < n; ++j) {
    if (most_low < index[j] && index[j] <= least_high) continue;  // every column sees it
    for (int64_t i = 0; i < m; i += kWide) {
      float* at = s + j * lds + i;
      store(at, keep_between(wide_load(at), index[j], low + i, high + i));
    }
  }
}

// Probabilities of a key and of the next one, as they are.
struct AsFloats {
  static constexpr int kAskedLinePairs = 0;  // of lines, beside two vectors; products ask for enough

  static void put(Wide p, Wide next, float* at, float* next_at) {
    store(at, p);
    store(next_at, next);
  }
  static void put(Wide p, float* at, float*) { store(at, p); }
};

// A maximum that rises by up to this is kept, so that what was added up need not shrink: probabilities reach e^4 then,
// their arguments' rounding 4e-7 of them.
constexpr float kKeptRise = 4.0f;

// Of kVectors vectors of queries side by side.
template <class Exp, class As, int kVectors>
inline void softmax_vectors(float* s, int64_t lds, int64_t n, float scale, float* row_max, float* row_sum,
                            float* shrink, Ahead& ahead) {
  constexpr int kRows = 4 / kVectors;  // of keys at once: four chains of maxima
  Wide peak[kRows][kVectors], shift[kVectors], sum[kVectors];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) peak[r][v] = wide_set1(-kInfinity);
  }
  int64_t j = 0;
  for (; j + kRows <= n; j += kRows) {
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) peak[r][v] = max(wide_load(s + (j + r) * lds + v * kWide), peak[r][v]);
    }
  }
  for (; j < n; ++j) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) peak[0][v] = max(wide_load(s + j * lds + v * kWide), peak[0][v]);
  }
#pragma GCC unroll 2
  for (int v = 0; v < kVectors; ++v) {
#pragma GCC unroll 4
    for (int r = 1; r < kRows; ++r) peak[0][v] = max(peak[0][v], peak[r][v]);
    const Wide old_max = wide_load(row_max + v * kWide), tile_max = mul(peak[0][v], wide_set1(scale));
    const Wide new_max = select_less(add(old_max, wide_set1(kKeptRise)), tile_max, tile_max, old_max);
    // A row without a key yet: exp(-inf - 0) = 0, and nothing to shrink.
    shift[v] = select_less(wide_set1(-kInfinity), new_max, new_max, wide_zero());
    const Wide factor =
        select_less(wide_set1(-kInfinity), old_max, exp_nonpositive(sub(old_max, shift[v])), wide_set1(1.0f));
    sum[v] = mul(wide_load(row_sum + v * kWide), factor);
    store(row_max + v * kWide, new_max);
    store(shrink + v * kWide, factor);
  }
  const Exp exp[2] = {{scale, shift[0]}, {scale, shift[kVectors - 1]}};
  for (j = 0; j + 2 <= n; j += 2) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
      float *at = s + j * lds + v * kWide, *next_at = at + lds;
      const Wide p = exp[v](wide_load(at)), next = exp[v](wide_load(next_at));
      As::put(p, next, at, next_at);
      sum[v] = add(sum[v], add(p, next));
    }
    if constexpr (As::kAskedLinePairs > 0) ask<kLinePair>(ahead, As::kAskedLinePairs);
  }
#pragma GCC unroll 2
  for (int v = 0; v < kVectors; ++v) {
    if (j < n) {
      float* at = s + j * lds + v * kWide;
      const Wide p = exp[v](wide_load(at));
      As::put(p, at, at + lds);
      sum[v] = add(sum[v], p);
    }
    store(row_sum + v * kWide, sum[v]);
  }
}

// Up to kVectors vectors of queries at a time.
template <class Exp, class As, int kVectors = 1>
void softmax_columns(float* s, int64_t lds, int64_t n, int64_t m, float scale, float* row_max, float* row_sum,
                     float* shrink, Ahead& ahead) {
  for (int64_t i = 0; i < m; i += kVectors * kWide) {
    const auto softmax = m - i < kVectors * kWide ? softmax_vectors<Exp, As, 1> : softmax_vectors<Exp, As, kVectors>;
    softmax(s + i, lds, n, scale, row_max + i, row_sum + i, shrink + i, ahead);
  }
}

inline void add_columns(const float* p, int64_t ldp, int64_t keys, const float* v, int64_t n, int64_t m,
                        const float* shrink, float* c, int64_t ldc, Ahead& ahead) {
  gemm_all<FloatProduct, Into::kAdd>(m, keys, ColumnMajor{p, ldp, shrink, ahead}, v, n, 1.0f, c, ldc);
}

constexpr Kernels with_columns(Kernels table) {
  table.copy_keys[1] = widen_keys<Half>;
  table.copy_keys[2] = widen_keys<BFloat16>;
  table.dot_columns[0] = dot_columns<float>;
  table.dot_columns[1] = dot_columns<Half>;
  table.dot_columns[2] = dot_columns<BFloat16>;
  table.mask_columns = mask_columns;
  table.softmax_columns = softmax_columns<ShiftedExp, AsFloats>;
  table.add_columns = add_columns;
  return table;
}

}  // namespace dhsa::cpu::DHSA_ISA
