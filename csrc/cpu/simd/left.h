// Where a product tile of x86 finds element i of row r of its left factor, which it reads in place; and what becomes of
// a sum. `rows` gives a tile's rows from `first` on, and asks for what the next keys will need.
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
  Ahead& ahead;

  template <int kRows>
  ColumnMajor rows(int64_t first) const {
    ask(ahead, kAskedLines);
    return {a + first, lda, factors ? factors + first : nullptr, ahead};
  }
  const float* at(int64_t r, int64_t i) const { return a + i * lda + r; }
};

// Rows of a list (index null: one after the other): keys of a cache.
struct ListedRows {
  const float* a;
  int64_t stride;
  const int32_t* index;
  Ahead& ahead;

  ListedRows from(int64_t first) const {
    return {index ? a : a + first * stride, stride, index ? index + first : nullptr, ahead};
  }
  template <int kRows>
  RowPointers<kRows> rows(int64_t first) const {
    RowPointers<kRows> pointers;
    for (int r = 0; r < kRows; ++r) pointers.row[r] = a + (index ? index[first + r] : first + r) * stride;
    ask(ahead, kAskedLines);
    return pointers;
  }
};

// c = sum, c = factor * c + sum, c = scale * sum.
enum class Into { kSet, kAdd, kScale };

}  // namespace dhsa::cpu::DHSA_ISA
