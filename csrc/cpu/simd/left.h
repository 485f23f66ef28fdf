// Where a product tile of x86 finds element i of row r of its left factor, which it reads in place; and what becomes of
// a sum. `rows` gives a tile's rows from `first` on.
#pragma once

namespace dhsa::cpu::DHSA_ISA {

template <int kRows>
struct RowPointers {
  static constexpr const float* factors = nullptr;  // of the rows of c that are added to; null: 1
  const float* row[kRows];

  const float* at(int64_t r, int64_t i) const { return row[r] + i; }
};

// Four pointers reach sixteen rows, for which there are no registers.
struct RowQuads {
  static constexpr const float* factors = nullptr;
  const float *quad0, *quad1, *quad2, *quad3;
  int64_t lda;

  const float* at(int64_t r, int64_t i) const {
    return (r < 4 ? quad0 : r < 8 ? quad1 : r < 12 ? quad2 : quad3) + i + r % 4 * lda;
  }
};

struct RowMajor {
  const float* a;
  int64_t lda;

  template <int kRows>
  auto rows(int64_t first) const {
    const float* top = a + first * lda;
    if constexpr (kRows > 8) {
      return RowQuads{top, top + 4 * lda, top + 8 * lda, top + 12 * lda, lda};
    } else {
      RowPointers<kRows> pointers;
      for (int r = 0; r < kRows; ++r) pointers.row[r] = top + r * lda;
      return pointers;
    }
  }
};

// The rows are columns of memory: probabilities by key.
struct ColumnMajor {
  const float* a;
  int64_t lda;
  const float* factors;

  template <int kRows>
  ColumnMajor rows(int64_t first) const {
    return {a + first, lda, factors ? factors + first : nullptr};
  }
  const float* at(int64_t r, int64_t i) const { return a + i * lda + r; }
};

// Rows of a list that will be read soon: memory does not read ahead across its jumps by itself.
struct Ahead {
  const char* rows;
  int64_t row_bytes, bytes;  // from one row to the next, and of one row
  const int32_t* index;
  int64_t n;

  Ahead from(int64_t first) const { return {rows, row_bytes, bytes, index ? index + first : nullptr, n - first}; }
  void ask(int64_t first, int64_t count) const {
    const int64_t end = first + count < n ? first + count : n;
    for (int64_t r = first; r < end; ++r) {
      for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(rows + index[r] * row_bytes + at, 0, kAskedInto);
    }
  }
};

// Rows of a list (index null: one after the other): keys of a cache. While a tile's rows are worked on, `keys` of the
// next tile and `values` of this one are asked for.
struct ListedRows {
  const float* a;
  int64_t stride;
  const int32_t* index;
  Ahead keys, values;

  ListedRows from(int64_t first) const {
    return {index ? a : a + first * stride, stride, index ? index + first : nullptr, keys.from(first),
            values.from(first)};
  }
  template <int kRows>
  RowPointers<kRows> rows(int64_t first) const {
    RowPointers<kRows> pointers;
    for (int r = 0; r < kRows; ++r) pointers.row[r] = a + (index ? index[first + r] : first + r) * stride;
    keys.ask(first + kRows, kRows);
    values.ask(first, kRows);
    return pointers;
  }
};

// c = sum, c = factor * c + sum, c = scale * sum.
enum class Into { kSet, kAdd, kScale };

}  // namespace dhsa::cpu::DHSA_ISA
