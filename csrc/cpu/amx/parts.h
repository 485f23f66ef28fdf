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
constexpr int64_t kTileKeys = 256;                 // of a tile: scores of kSide queries are 32 KiB

// Pairs of lines that a strip asks for beside two vectors of exponentials, a transpose and a step of products. float16
// gains nothing: its copies are as slow from a nearer cache.
template <int kParts>
constexpr int kAskedBesideExps = kParts == 1 ? 2 : 0;
template <int kParts>
constexpr int kAskedBesideTranspose = kParts == 1 ? 4 : 0;
template <int kParts>
constexpr int kAskedBesideStep = kParts == 1 ? 2 : 0;

inline int64_t steps_of(int64_t depth) { return (depth + kStepDepth - 1) / kStepDepth; }

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

// A left factor of so many steps in k as tiles, whose bytes are elsewhere: sixteen rows by sixteen, part by part, step
// by step.
template <int kParts>
struct TileRows {
  char* tiles;
  int64_t steps;

  char* tile(int part, int64_t first, int64_t step) const {
    return tiles + ((first / kTileRows * kParts + part) * steps + step) * kTileBytes;
  }
  char* row(int part, int64_t r, int64_t step) const { return tile(part, r, step) + r % kTileRows * kRowBytes; }
};

inline __mmask16 first_lanes(int64_t n) { return static_cast<__mmask16>(n < 16 ? (1 << n) - 1 : 0xffff); }

// One row as row r of the strip, up to a whole number of steps. A step of float16 pairs its first half with its second
// one, which packed queries do too.
inline void copy_row(const BFloat16* row, int64_t head_dim, int64_t r, TileRows<1> to) {
  char* out = to.row(0, r, 0);
  int64_t d = 0;
  for (; d + kStepDepth <= head_dim; d += kStepDepth, out += kTileBytes) {
    _mm512_store_si512(out, _mm512_loadu_si512(row + d));
  }
  if (d < head_dim) _mm512_store_si512(out, _mm512_maskz_loadu_epi32(first_lanes((head_dim - d) / 2), row + d));
}

inline void copy_row(const Half* row, int64_t head_dim, int64_t r, TileRows<2> to) {
  char *upper = to.row(0, r, 0), *lower = to.row(1, r, 0);
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

// Queries as a right factor, [panel][step][part] tiles: sixteen rows at a time as those of a left one, then transposed.
template <class T>
void pack_query_tiles(const void* q, int64_t row_stride, const int32_t* index, int64_t n, int64_t n_padded,
                      int64_t head_dim, void* panels) {
  constexpr int kCount = kParts<T>;
  const int64_t steps = steps_of(head_dim);
  alignas(64) char tiles[kCount * kMaxDepth / kStepDepth * kTileBytes];
  const TileRows<kCount> rows{tiles, steps};
  float* out = static_cast<float*>(panels);
  for (int64_t first = 0; first < n_padded; first += kPanel) {
    for (int64_t r = 0; r < kPanel; ++r) {
      const int64_t at = first + r;
      copy_row(at < n ? static_cast<const T*>(q) + (index ? index[at] : at) * row_stride : no_row<T>(), head_dim, r,
               rows);
    }
    for (int64_t step = 0; step < steps; ++step) {
      for (int part = 0; part < kCount; ++part, out += kTileRows * kPanel) {
        const float* tile = reinterpret_cast<const float*>(rows.tile(part, 0, step));
        pack_keys<float>(tile, kTileRows, nullptr, kPanel, kPanel, kTileRows, out);
      }
    }
  }
}

template <>
class ValueRows<Half> {
 public:
  static Wide whole(const Half* x) { return wide_load(x); }
  static Wide part(const Half* x, __mmask16 lanes) { return load_wide(x, lanes); }
  void put(Wide x, Wide y, char* to) {
    const Wide x_lower = part_of<Part::kLower>(x), y_lower = part_of<Part::kLower>(y);
    poison_ = fma(x_lower, y_lower, poison_);  // an infinity's is NaN too; others' are below 2^8
    _mm512_store_ps(to, pairs_of<Part::kUpper>(x, y));
    _mm512_store_ps(to + kTileBytes, pairs_of<Part::kUpper>(x_lower, y_lower));
  }
  bool finite() const { return _mm512_cmp_ps_mask(poison_, poison_, _CMP_UNORD_Q) == 0; }

 private:
  Wide poison_ = wide_zero();
};

// Values as a right factor, [step][panel][part] tiles: panels of a row lie 1 or 2 KiB apart, not in one set of the
// cache. Rows that the last step lacks are zeros.
template <class T>
bool pack_value_tiles(const void* v, int64_t row_stride, const int32_t* index, int64_t n, int64_t, int64_t head_dim,
                      void* panels) {
  constexpr int64_t kPanelBytes = kParts<T> * kTileBytes;
  const int64_t step_bytes = (head_dim + kPanel - 1) / kPanel * kPanelBytes;
  const auto row = [&](int64_t r) { return r < n ? static_cast<const T*>(v) + index[r] * row_stride : no_row<T>(); };
  ValueRows<T> rows;
  for (int64_t first = 0; first < n; first += kStepDepth) {
    char* step = static_cast<char*>(panels) + first / kStepDepth * step_bytes;
    for (int64_t r = 0; r < kTileRows; ++r) {
      const T *x = row(first + 2 * r), *y = row(first + 2 * r + 1);
      put_rows(x, y, head_dim, kPanelBytes, step + r * kRowBytes, &rows);
    }
  }
  return rows.finite();
}

// Probabilities as pairs, their lower parts, where there are some, in the place of the second key's.
template <class T>
struct AsParts {
  static constexpr int kAskedLinePairs = kAskedBesideExps<kParts<T>>;

  static void put(Wide p, Wide next, float* at, float* next_at) {
    if constexpr (kParts<T> == 1) {
      store(at, pairs_of<Part::kRounded>(p, next));
    } else {
      store(at, pairs_of<Part::kUpper>(p, next));
      store(next_at, pairs_of<Part::kLower>(p, next));
    }
  }
  static void put(Wide p, float* at, float* next_at) { put(p, wide_zero(), at, next_at); }
};

// Sixteen queries' pairs of up to 32 keys, which lie by key, as rows of a tile.
inline void transpose_pairs(const float* pairs, int64_t stride, int64_t keys, char* tile) {
  const auto row = [&](int64_t j) { return wide_load(2 * j < keys ? pairs + j * stride : no_row<float>()); };
  const auto four = [&](int64_t j) { return interleave(row(j), row(j + 1), row(j + 2), row(j + 3)); };
  store_transposed(four(0), four(4), four(8), four(12), kTileRows, reinterpret_cast<float*>(tile));
}

}  // namespace dhsa::cpu::DHSA_ISA
