// The products of a block of queries on AMX: S^T = K Q^T and O += P^T V by blocks of 2 x 2 accumulators, 32 x 32 sums,
// to which two tiles of either factor go. Packed queries and values are tiles as they lie; keys are copied, since a
// list's rows are no fixed distance apart, and probabilities transposed.
#pragma once

namespace dhsa::cpu::DHSA_ISA {

// Sixteen columns of the right factor as tiles.
struct TileColumns {
  const char* tiles;
  int64_t step_bytes;

  const char* tile(int part, int64_t step) const { return tiles + step * step_bytes + part * kTileBytes; }
};

// Tiles 0 to 3 are the sums, 4 and 5 of the left factor, 6 and 7 of the right one. A block with up to 16 rows, or
// columns, leaves out the tiles of the others.
template <int kParts>
struct Block {
  TileRows<kParts> left;
  int64_t first;  // row of the left factor
  TileColumns right0, right1;
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
  void add(int64_t steps, Ahead& ahead) const {
    for (int64_t i = 0; i < steps; ++i) {
      ask<kLinePair>(ahead, kAskedBesideStep<kParts>);
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
    load_tile<4>(left.tile(part, first, i), kRowBytes);
    if (two_rows) load_tile<5>(left.tile(part, first + kTileRows, i), kRowBytes);
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

template <class T>
TileRows<kParts<T>> key_tiles(const void* copies, int64_t head_dim) {
  return {static_cast<char*>(const_cast<void*>(copies)), steps_of(head_dim)};
}

// Keys from `first` on as rows from 0 on.
template <class T>
void copy_few_keys(const KeyTile& tile, int64_t first, int64_t n, TileRows<kParts<T>> to) {
  for (int64_t r = 0; r < n; ++r) {
    copy_row(static_cast<const T*>(tile.k) + tile.index[first + r] * tile.k_row, tile.head_dim, r, to);
  }
}

template <class T>
void copy_keys(const KeyTile& tile, void* copies) {
  copy_few_keys<T>(tile, 0, tile.n, key_tiles<T>(copies, tile.head_dim));
}

// Scores where some key or query is not finite, for which a number is no sum of parts: keys widened, queries put
// together panel by panel, products of float32.
inline __attribute__((noinline)) void dot_joined_columns(const KeyTile& tile, const float* q, int64_t m, float scale,
                                                         float* s, int64_t lds, Ahead& ahead) {
  const int64_t steps = steps_of(tile.head_dim), part = kTileBytes / 4;
  alignas(64) float panel[kMaxDepth * kPanel], widened[kSide * kMaxDepth];
  const auto join = [](Wide upper, Wide lower) {  // the lower part of what is not finite is not either
    return _mm512_mask_blend_ps(_mm512_fpclass_ps_mask(upper, 0x99), add(upper, lower), upper);
  };
  const auto first = [](Wide pairs) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(pairs), 16)); };
  for (int64_t i = 0; i < m; i += kPanel, q += 2 * steps * part) {
    for (int64_t d = 0; d < tile.head_dim; d += kStepDepth) {
      const int64_t pairs = tile.head_dim - d < kStepDepth ? (tile.head_dim - d) / 2 : kTileRows;
      for (int64_t j = 0; j < pairs; ++j) {
        const float* at = q + 2 * d / kStepDepth * part + j * kPanel;
        const Wide upper = wide_load(at), lower = wide_load(at + part);
        store(panel + (d + j) * kPanel, join(first(upper), first(lower)));
        store(panel + (d + pairs + j) * kPanel, join(upper_bits(upper), upper_bits(lower)));
      }
    }
    for (int64_t j = 0; j < tile.n; j += kSide) {
      const int64_t n = tile.n - j < kSide ? tile.n - j : kSide;
      widen_rows(static_cast<const Half*>(tile.k), tile.k_row, tile.index + j, n, tile.head_dim, widened);
      const ListedRows keys{widened, tile.head_dim, nullptr, ahead};
      gemm_columns<FloatProduct, Into::kScale>(n, tile.head_dim, keys, panel, kPanel, scale, s + j * lds + i, lds);
    }
  }
}

// Whether all are numbers: a key with a NaN or an infinity has no other score, a query none with any key.
inline bool scores_are_numbers(const float* s, int64_t lds, int64_t n, int64_t m) {
  Wide sums[4] = {wide_load(s), wide_zero(), wide_zero(), wide_zero()};
  for (int64_t j = 1; j < n; ++j) sums[j % 4] = add(sums[j % 4], wide_load(s + j * lds));
  for (int64_t i = kPanel; i < m; i += kPanel) sums[0] = add(sums[0], wide_load(s + i));
  const Wide sum = add(add(sums[0], sums[1]), add(sums[2], sums[3]));
  return _mm512_cmp_ps_mask(sum, sum, _CMP_UNORD_Q) == 0;
}

template <class T>
void dot_tiled_columns(const KeyTile& tile, const void* copies, const void* q, int64_t first, int64_t m, float scale,
                       float* s, int64_t lds, Ahead& ahead) {
  constexpr int kCount = kParts<T>;
  const TileRows<kCount> keys = key_tiles<T>(copies, tile.head_dim);
  const int64_t panel_bytes = keys.steps * kCount * kTileBytes;
  const char* queries = static_cast<const char*>(q) + first / kPanel * panel_bytes;
  alignas(64) char few_tiles[kCount * kSide * kMaxDepth * sizeof(T)];
  const TileRows<kCount> few{few_tiles, keys.steps};
  for (int64_t j = 0; j < tile.n; j += kSide) {
    const int64_t rows = tile.n - j < kSide ? tile.n - j : kSide;
    if (copies == nullptr) copy_few_keys<T>(tile, j, rows, few);
    for (int64_t i = 0; i < m; i += kSide) {
      const bool two_columns = m - i > kPanel;
      const int64_t columns = two_columns ? kSide : kPanel;
      const TileColumns right{queries + i / kPanel * panel_bytes, kCount * kTileBytes};
      const TileColumns next{right.tiles + panel_bytes, right.step_bytes};
      const Block<kCount> block{copies ? keys : few, copies ? j : 0, right, next, rows > kTileRows, two_columns};
      float* out = s + j * lds + i;
      block.clear();
      block.add(keys.steps, ahead);
      if (rows % kTileRows == 0) {
        block.store(out, lds);
      } else {
        alignas(64) float sums[kSide * kSide];
        block.store(sums, kSide);
        for (int64_t r = 0; r < rows; ++r) {
          for (int64_t c = 0; c < columns; c += kPanel) store(out + r * lds + c, wide_load(sums + r * kSide + c));
        }
      }
    }
  }
  if constexpr (kCount == 2) {
    if (!scores_are_numbers(s, lds, tile.n, m)) {
      return dot_joined_columns(tile, reinterpret_cast<const float*>(queries), m, scale, s, lds, ahead);
    }
  }
  if (scale == 1.0f) return;
  for (int64_t j = 0; j < tile.n; ++j) scale_row_wide(s + j * lds, m, scale);
}

template <class T>
void add_tiled_columns(const float* p, int64_t ldp, int64_t keys, const void* v, int64_t n, int64_t m, float* c,
                       int64_t ldc, Ahead& ahead) {
  constexpr int64_t kPanelBytes = kParts<T> * kTileBytes;
  const int64_t steps = steps_of(keys), step_bytes = n / kPanel * kPanelBytes;
  alignas(64) char tiles[kSide / kTileRows * kParts<T> * (kTileKeys / kStepDepth) * kTileBytes];
  const TileRows<kParts<T>> weights{tiles, steps};
  for (int64_t i = 0; i < m; i += kSide) {
    const int64_t rows = m - i < kSide ? m - i : kSide;
    const bool two_rows = rows > kTileRows, whole = rows % kTileRows == 0;
    for (int64_t r = 0; r < rows; r += kTileRows) {
      for (int part = 0; part < kParts<T>; ++part) {
        for (int64_t step = 0; step < steps; ++step) {
          const int64_t j = step * kStepDepth;
          ask<kLinePair>(ahead, kAskedBesideTranspose<kParts<T>>);
          transpose_pairs(p + (j + part) * ldp + i + r, 2 * ldp, keys - j, weights.tile(part, r, step));
        }
      }
    }
    for (int64_t d = 0; d < n; d += kSide) {
      const bool two_columns = n - d > kPanel;
      const TileColumns right{static_cast<const char*>(v) + d / kPanel * kPanelBytes, step_bytes};
      const TileColumns next{right.tiles + kPanelBytes, step_bytes};
      const Block<kParts<T>> block{weights, 0, right, next, two_rows, two_columns};
      float* out = c + i * ldc + d;
      if (whole) {
        block.load(out, ldc);
        block.add(steps, ahead);
        block.store(out, ldc);
        continue;
      }
      alignas(64) float sums[kSide * kSide];  // of which the last rows are no one's
      block.clear();
      block.add(steps, ahead);
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
  table.pair_keys = kTileKeys;
  table.pair_columns = kSide;
  table.few_columns[2] = 2 * kSide;
  table.begin_block = begin_tiles;
  table.end_block = end_tiles;
  table.pack_key_pairs[2] = pack_query_tiles<BFloat16>;
  table.pack_value_pairs[2] = pack_value_tiles<BFloat16>;
  table.copy_keys[2] = copy_keys<BFloat16>;
  table.dot_columns[2] = dot_tiled_columns<BFloat16>;
  table.softmax_column_pairs[2] = softmax_columns<FastExp, AsParts<BFloat16>, 2>;
  table.add_column_pairs[2] = add_tiled_columns<BFloat16>;
  table.pack_key_pairs[1] = pack_query_tiles<Half>;
  table.pack_value_pairs[1] = pack_value_tiles<Half>;
  table.copy_keys[1] = copy_keys<Half>;
  table.dot_columns[1] = dot_tiled_columns<Half>;
  table.softmax_column_pairs[1] = softmax_columns<FastExp, AsParts<Half>, 2>;
  table.add_column_pairs[1] = add_tiled_columns<Half>;
  return table;
}

}  // namespace dhsa::cpu::DHSA_ISA
