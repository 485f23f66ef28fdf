// The products of a block of queries on AMX: S^T = K Q^T and O += P^T V by blocks of 2 x 2 accumulators, 32 x 32 sums,
// to which two tiles of either factor go. Packed queries and values are tiles as they lie; keys are copied, since a
// list's rows are no fixed distance apart, and probabilities transposed.
#pragma once

namespace dhsa::cpu::DHSA_ISA {

// Sixteen columns of the right factor: [part][pairs][64 bytes]. Rows that the last tile lacks are zeros, as the left
// factor's are: an infinity beyond them is no part of the product.
template <int kParts>
class Panel {
 public:
  Panel(const void* rows, int64_t pairs) : rows_(static_cast<const char*>(rows)), pairs_(pairs) {
    if (pairs % kTileRows != 0) fill_tail();
  }
  const char* tile(int part, int64_t step) const {
    return (step + 1) * kTileRows > pairs_ ? tail_[part] : rows_ + (part * pairs_ + step * kTileRows) * kRowBytes;
  }

 private:
  __attribute__((noinline)) void fill_tail() {
    const int64_t whole = pairs_ / kTileRows * kTileRows;
    __builtin_memset(tail_, 0, sizeof tail_);
    for (int part = 0; part < kParts; ++part) {
      __builtin_memcpy(tail_[part], rows_ + (part * pairs_ + whole) * kRowBytes, (pairs_ - whole) * kRowBytes);
    }
  }

  const char* rows_;
  int64_t pairs_;
  alignas(64) char tail_[kParts][kTileBytes];
};

// Tiles 0 to 3 are the sums, 4 and 5 of the left factor, 6 and 7 of the right one. A block with up to 16 rows, or
// columns, leaves out the tiles of the others.
template <int kParts, class Left>
struct Block {
  Left& left;
  const Panel<kParts>&right0, &right1;
  bool two_rows, two_columns;

  void clear() const { clear_tile<0>(), clear_tile<1>(), clear_tile<2>(), clear_tile<3>(); }
  void load(const float* c, int64_t ldc) const {
    const int64_t bytes = ldc * 4;
    load_tile<0>(c, bytes);
    if (two_columns) load_tile<1>(c + kPanel, bytes);
    if (two_rows) load_tile<2>(c + kTileRows * ldc, bytes);
    if (two_rows && two_columns) load_tile<3>(c + kTileRows * ldc + kPanel, bytes);
  }
  void store(float* c, int64_t ldc) const {
    const int64_t bytes = ldc * 4;
    store_tile<0>(c, bytes);
    if (two_columns) store_tile<1>(c + kPanel, bytes);
    if (two_rows) store_tile<2>(c + kTileRows * ldc, bytes);
    if (two_rows && two_columns) store_tile<3>(c + kTileRows * ldc + kPanel, bytes);
  }
  void add(int64_t steps) const {
    for (int64_t i = 0; i < steps; ++i) {
      load_left(kParts - 1, i);
      load_right(0, i);
      add_products();
      if constexpr (kParts == 2) {
        load_left(0, i);
        add_products();
        load_right(1, i);
        add_products();
      }
    }
  }

 private:
  void load_left(int part, int64_t i) const {
    load_tile<4>(left.tile(part, 0, i), kRowBytes);
    if (two_rows) load_tile<5>(left.tile(part, kTileRows, i), kRowBytes);
  }
  void load_right(int part, int64_t i) const {
    load_tile<6>(right0.tile(part, i), kRowBytes);
    if (two_columns) load_tile<7>(right1.tile(part, i), kRowBytes);
  }
  void add_products() const {
    add_tile_product<0, 4, 6>();
    if (two_columns) add_tile_product<1, 4, 7>();
    if (two_rows) add_tile_product<2, 5, 6>();
    if (two_rows && two_columns) add_tile_product<3, 5, 7>();
  }
};

// Scores where some key or query is not finite, for which a number is no sum of parts: keys widened, queries put
// together panel by panel, products of float32.
inline __attribute__((noinline)) void dot_joined_columns(const KeyTile& tile, const float* q, int64_t m, float scale,
                                                         float* widened, float* s, int64_t lds) {
  widen_rows(static_cast<const Half*>(tile.k), tile.k_row, tile.index, tile.n, tile.head_dim, widened);
  const ListedRows keys{widened, tile.head_dim, nullptr, {}, {}};
  const int64_t part = tile.head_dim / 2 * kPanel;
  alignas(64) float panel[kMaxDepth * kPanel];
  const auto join = [](Wide upper, Wide lower) {  // the lower part of what is not finite is not either
    return _mm512_mask_blend_ps(_mm512_fpclass_ps_mask(upper, 0x99), add(upper, lower), upper);
  };
  const auto first = [](Wide pairs) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(pairs), 16)); };
  for (int64_t i = 0; i < m; i += kPanel, q += 2 * part) {
    for (int64_t d = 0; d < tile.head_dim; d += kStepDepth) {
      const int64_t pairs = tile.head_dim - d < kStepDepth ? (tile.head_dim - d) / 2 : kTileRows;
      for (int64_t j = 0; j < pairs; ++j) {
        const float* at = q + (d / 2 + j) * kPanel;
        const Wide upper = wide_load(at), lower = wide_load(at + part);
        store(panel + (d + j) * kPanel, join(first(upper), first(lower)));
        store(panel + (d + pairs + j) * kPanel, join(upper_bits(upper), upper_bits(lower)));
      }
    }
    gemm_columns<FloatProduct, Into::kScale>(tile.n, tile.head_dim, keys, panel, kPanel, scale, s + i, lds);
  }
}

template <class T>
void dot_tiled_columns(const KeyTile& tile, const void* q, int64_t m, float scale, float* widened, float* s,
                       int64_t lds) {
  constexpr int kCount = kParts<T>;
  const int64_t pairs = tile.head_dim / 2, steps = (tile.head_dim + kStepDepth - 1) / kStepDepth;
  const Wide factor = wide_set1(scale);
  const auto panel = [&](int64_t i) { return static_cast<const float*>(q) + i * kCount * pairs; };
  TileRows<kCount, kSide, kMaxDepth> keys;
  __mmask16 poison = 0;
  for (int64_t first = 0; first < tile.n; first += kSide) {
    const int64_t rows = tile.n - first < kSide ? tile.n - first : kSide;
    for (int64_t r = 0; r < rows; ++r) {
      copy_row(static_cast<const T*>(tile.k) + tile.index[first + r] * tile.k_row, tile.head_dim, r, &keys);
    }
    for (int64_t i = 0; i < m; i += kSide) {
      const bool two_columns = m - i > kPanel;
      const Panel<kCount> q0(panel(i), pairs), q1(panel(two_columns ? i + kPanel : i), pairs);
      const Block<kCount, decltype(keys)> block{keys, q0, q1, rows > kTileRows, two_columns};
      alignas(64) float sums[kSide * kSide];
      block.clear();
      block.add(steps);
      block.store(sums, kSide);
      for (int64_t r = 0; r < rows; ++r) {
        float* out = s + (first + r) * lds + i;
        for (int64_t column = 0; column < (two_columns ? kSide : kPanel); column += kPanel) {
          const Wide x = mul(wide_load(sums + r * kSide + column), factor);
          if (kCount == 2) poison |= _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
          store(out + column, x);
        }
      }
    }
  }
  if constexpr (kCount == 2) {
    if (poison != 0) dot_joined_columns(tile, static_cast<const float*>(q), m, scale, widened, s, lds);
  }
}

template <class T>
void add_tiled_columns(float* p, int64_t ldp, int64_t keys, const void* v, int64_t n, int64_t m, float* c,
                       int64_t ldc) {
  const int64_t pairs = (keys + 1) / 2, steps = (keys + kStepDepth - 1) / kStepDepth;
  const auto panel = [&](int64_t d) { return static_cast<const float*>(v) + d * kParts<T> * pairs; };
  TileRows<kParts<T>, kSide, kBlockN> weights;
  for (int64_t i = 0; i < m; i += kSide) {
    const int64_t rows = m - i < kSide ? m - i : kSide;
    const bool two_rows = rows > kTileRows, whole = rows % kTileRows == 0;
    for (int64_t j = 0; j < keys; j += kStepDepth) {
      for (int64_t half = 0; half <= two_rows; ++half) {
        const float* at = p + j * ldp + i + half * kTileRows;
        if constexpr (kParts<T> == 1) {
          pack_probabilities<Part::kRounded>(at, ldp, keys - j, weights.tile(0, half * kTileRows, j / kStepDepth));
        } else {
          pack_probabilities<Part::kUpper>(at, ldp, keys - j, weights.tile(0, half * kTileRows, j / kStepDepth));
          pack_probabilities<Part::kLower>(at, ldp, keys - j, weights.tile(1, half * kTileRows, j / kStepDepth));
        }
      }
    }
    for (int64_t d = 0; d < n; d += kSide) {
      const bool two_columns = n - d > kPanel;
      const Panel<kParts<T>> v0(panel(d), pairs), v1(panel(two_columns ? d + kPanel : d), pairs);
      const Block<kParts<T>, decltype(weights)> block{weights, v0, v1, two_rows, two_columns};
      float* out = c + i * ldc + d;
      if (whole) {
        block.load(out, ldc);
        block.add(steps);
        block.store(out, ldc);
        continue;
      }
      alignas(64) float sums[kSide * kSide];  // of which the last rows are no one's
      block.clear();
      block.add(steps);
      block.store(sums, kSide);
      for (int64_t r = 0; r < rows; ++r) {
        for (int64_t column = 0; column < (two_columns ? kSide : kPanel); column += kPanel) {
          float* at = out + r * ldc + column;
          store(at, add(wide_load(at), wide_load(sums + r * kSide + column)));
        }
      }
    }
  }
}

constexpr Kernels with_tiles(Kernels table) {
  table.softmax_columns = softmax_columns<FastExp>;
  table.begin_block = begin_tiles;
  table.end_block = end_tiles;
  table.dot_columns[2] = dot_tiled_columns<BFloat16>;
  table.add_column_pairs[2] = add_tiled_columns<BFloat16>;
  table.pack_key_pairs[1] = pack_split_keys;
  table.pack_value_pairs[1] = pack_split_values;
  table.dot_columns[1] = dot_tiled_columns<Half>;
  table.add_column_pairs[1] = add_tiled_columns<Half>;
  return table;
}

}  // namespace dhsa::cpu::DHSA_ISA
