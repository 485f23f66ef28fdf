// The factors of AMX's products. A bfloat16 number is one part. A float16 number is the sum of two bfloat16, exactly:
// its upper eight bits and the other three; a probability is cut to sixteen bits beside them. Of the four products of
// parts that of the two lower ones, below 2^-14 of the whole, is left out.
#pragma once

namespace dhsa::cpu::DHSA_ISA {

template <class T>
constexpr int kParts = 1;
template <>
constexpr int kParts<Half> = 2;

constexpr int64_t kSide = 2 * kTileRows;           // rows, and columns, that a block of four accumulators has
constexpr int64_t kStepDepth = 2 * kRowBytes / 4;  // of k, that a tile has

enum class Part { kRounded, kUpper, kLower };

inline Wide upper_bits(Wide x) {
  return _mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(static_cast<int>(0xffff0000))));
}

// A number whose upper half is, as bfloat16, the part of x. Rounding is to the nearest, halves up.
template <Part kPart>
inline Wide part_of(Wide x) {
  if constexpr (kPart == Part::kRounded) {
    return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(x), _mm512_set1_epi32(0x8000)));
  } else if constexpr (kPart == Part::kLower) {
    return sub(x, upper_bits(x));
  } else {
    return x;
  }
}

// The parts of x and y as pairs, x's first.
template <Part kPart>
inline Wide pairs_of(Wide x, Wide y) {
  const __m512i first = _mm512_srli_epi32(_mm512_castps_si512(part_of<kPart>(x)), 16);
  return _mm512_castsi512_ps(_mm512_mask_blend_epi16(0xaaaaaaaa, first, _mm512_castps_si512(part_of<kPart>(y))));
}

// Up to kRows rows of the left factor as tiles: part by part, sixteen rows by sixteen, step by step in k.
template <int kParts, int64_t kRows, int64_t kDepth>
class TileRows {
 public:
  char* tile(int part, int64_t first, int64_t step) { return tiles_[part][first / kTileRows][step]; }
  char* row(int part, int64_t r, int64_t step) { return tile(part, r, step) + r % kTileRows * kRowBytes; }

 private:
  alignas(64) char tiles_[kParts][kRows / kTileRows][kDepth / kStepDepth][kTileBytes];
};

inline __mmask16 first_lanes(int64_t n) { return static_cast<__mmask16>(n < 16 ? (1 << n) - 1 : 0xffff); }

// One row as row r of the strip, up to a whole number of steps. A step of float16 pairs its first half with its second
// one, which packed queries do too.
template <int64_t kRows>
inline void copy_row(const BFloat16* row, int64_t head_dim, int64_t r, TileRows<1, kRows, kMaxDepth>* to) {
  char* out = to->row(0, r, 0);
  int64_t d = 0;
  for (; d + kStepDepth <= head_dim; d += kStepDepth, out += kTileBytes) {
    _mm512_store_si512(out, _mm512_loadu_si512(row + d));
  }
  if (d < head_dim) _mm512_store_si512(out, _mm512_maskz_loadu_epi32(first_lanes((head_dim - d) / 2), row + d));
}

template <int64_t kRows>
inline void copy_row(const Half* row, int64_t head_dim, int64_t r, TileRows<2, kRows, kMaxDepth>* to) {
  char *upper = to->row(0, r, 0), *lower = to->row(1, r, 0);
  const auto step = [&](int64_t d, Wide x, Wide y) {
    _mm512_store_ps(upper + d / kStepDepth * kTileBytes, pairs_of<Part::kUpper>(x, y));
    _mm512_store_ps(lower + d / kStepDepth * kTileBytes, pairs_of<Part::kLower>(x, y));
  };
  int64_t d = 0;
  for (; d + kStepDepth <= head_dim; d += kStepDepth) step(d, wide_load(row + d), wide_load(row + d + kTileRows));
  if (d == head_dim) return;
  const int64_t pairs = (head_dim - d) / 2;
  step(d, load_wide(row + d, first_lanes(pairs)), load_wide(row + d + pairs, first_lanes(pairs)));
}

// Sixteen rows at a time, each part as [head_dim / 2][panel][2] bfloat16.
inline void pack_split_keys(const void* k, int64_t row_stride, const int32_t* index, int64_t n, int64_t n_padded,
                            int64_t head_dim, void* panels) {
  float* out = static_cast<float*>(panels);
  TileRows<2, kPanel, kMaxDepth> rows;
  for (int64_t first = 0; first < n_padded; first += kPanel) {
    for (int64_t r = 0; r < kPanel; ++r) {
      const int64_t at = first + r;
      const Half* row = at < n ? static_cast<const Half*>(k) + (index ? index[at] : at) * row_stride : no_row<Half>();
      copy_row(row, head_dim, r, &rows);
    }
    for (int part = 0; part < 2; ++part) {
      for (int64_t d = 0; d < head_dim; d += kStepDepth) {
        const int64_t pairs = head_dim - d < kStepDepth ? (head_dim - d) / 2 : kTileRows;
        const float* tile = reinterpret_cast<const float*>(rows.tile(part, 0, d / kStepDepth));
        pack_keys<float>(tile, kTileRows, nullptr, kPanel, kPanel, pairs, out);
        out += pairs * kPanel;
      }
    }
  }
}

// Both parts of a panel, one after the other, as pack_value_pairs has them. The lower part of what is not finite is
// NaN.
inline bool pack_split_values(const void* v, int64_t row_stride, const int32_t* index, int64_t n, int64_t n_padded,
                              int64_t head_dim, void* panels) {
  const int64_t part = n_padded / 2 * kPanel;
  const auto row = [&](int64_t r) {
    return r < n ? static_cast<const Half*>(v) + index[r] * row_stride : no_row<Half>();
  };
  __mmask16 poison = 0;
  for (int64_t r = 0; r < n_padded; r += 2) {
    const Half *first = row(r), *second = row(r + 1);
    float* out = static_cast<float*>(panels) + r / 2 * kPanel;
    const auto panel = [&](Wide x, Wide y) {
      const Wide x_lower = part_of<Part::kLower>(x), y_lower = part_of<Part::kLower>(y);
      poison |= _mm512_cmp_ps_mask(x_lower, y_lower, _CMP_UNORD_Q);
      store(out, pairs_of<Part::kUpper>(x, y));
      store(out + part, pairs_of<Part::kUpper>(x_lower, y_lower));
      out += 2 * part;
    };
    int64_t d = 0;
    for (; d + kPanel <= head_dim; d += kPanel) panel(wide_load(first + d), wide_load(second + d));
    if (d < head_dim)
      panel(load_wide(first + d, first_lanes(head_dim - d)), load_wide(second + d, first_lanes(head_dim - d)));
  }
  return poison == 0;
}

// Sixteen queries' probabilities of up to 32 keys, which lie by key, as rows of a tile.
template <Part kPart>
inline void pack_probabilities(const float* p, int64_t ldp, int64_t keys, char* tile) {
  const auto row = [&](int64_t j) { return wide_load(j < keys ? p + j * ldp : no_row<float>()); };
  const auto pair = [&](int64_t j) { return pairs_of<kPart>(row(j), row(j + 1)); };
  const auto four = [&](int64_t j) { return interleave(pair(j), pair(j + 2), pair(j + 4), pair(j + 6)); };
  store_transposed(four(0), four(8), four(16), four(24), kTileRows, reinterpret_cast<float*>(tile));
}

}  // namespace dhsa::cpu::DHSA_ISA
