// The micro-kernels of one instruction set: plain loops over raw pointers, without threads, allocation or state.
//
// Every ISA folder compiles the same headers of cpu/simd over its own vec.h and tiles.h into one such table, inside a
// namespace of its own and with its own -m flags. This header is the only one that those files share with the rest,
// and it holds no inline function: nothing compiled for a newer machine can be merged into baseline objects.
//
// Packed panels: a matrix of k rows and `panel` columns is stored [k][panel]; wider ones as consecutive panels.
// Arrays of three are indexed by DType: float32, float16, bfloat16. row_stride counts elements.
#pragma once

#include <cstdint>

namespace dhsa::cpu {

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

constexpr int64_t kBlockN = 64;     // keys of a packed tile: K and V tiles of head_dim 128 are 32 KiB each
constexpr int64_t kMaxPanel = 16;   // every panel and vector width divides it, and it divides kBlockN
constexpr int64_t kMaxDepth = 256;  // of a product: the largest head_dim
constexpr int64_t kPairStep = 32;   // what packed pairs may be rounded up to, in head_dim and in keys
constexpr int64_t kAlign = 64;      // bytes, of every scratch array

// The keys of one tile and their values, where they lie: rows index[0..n) of k and v; strides count elements.
struct KeyTile {
  const void *k, *v;
  int64_t k_row, v_row;
  const int32_t* index;
  int64_t n, head_dim;
};

// What the next tile will read, its keys and then its values: kernels ask for it, a few lines at a time while they work
// on this tile, since memory does not read ahead across a list's jumps.
struct Ahead {
  const char *rows, *then;                   // then: the values, null once they are `rows`
  int64_t row_bytes, then_row_bytes, bytes;  // from one row to the next, and of one row
  const int32_t* index;
  int64_t n, asked = 0;                        // rows of the list, and those asked for
  const char *line = nullptr, *end = nullptr;  // of the last of these
};

struct Kernels {
  const char* name;
  int64_t panel;  // columns of a packed panel; divides kMaxPanel

  // With S_t = x[t] + ... + x[t + window - 1], for each t of [0, count): norms[t] += S_t . S_t and, from t = window on,
  // dots[t] += S_{t - window} . S_t. ring: window * head_dim floats. Reads x[0 .. count + window - 2].
  void (*window_products[3])(const void* x, int64_t row_stride, int64_t head_dim, int64_t window, int64_t count,
                             float* ring, float* dots, float* norms);

  // sum[d] += x[0][d] + ... + x[rows - 1][d].
  void (*add_rows[3])(const void* x, int64_t row_stride, int64_t rows, int64_t head_dim, float* sum);
  // out[d] = (x[0][d] + ... + x[rows - 1][d]) / rows in x's type: a float32 sum in the order of the rows, one division,
  // one rounding, so that every ISA gives the same bits.
  void (*mean_rows[3])(const void* x, int64_t row_stride, int64_t rows, int64_t head_dim, void* out);

  // out[r][d] = scale * x[r][d], float32, rows packed at head_dim; and the way back for one row.
  void (*load_rows[3])(const void* x, int64_t row_stride, int64_t rows, int64_t head_dim, float scale, float* out);
  void (*store_row[3])(const float* x, float scale, int64_t head_dim, void* out);

  // Transposes rows index[0..n) of k (index null: rows 0..n) into panels [n_padded / panel][head_dim][panel], zero
  // padded.
  void (*pack_keys[3])(const void* k, int64_t row_stride, const int32_t* index, int64_t n, int64_t n_padded,
                       int64_t head_dim, float* panels);
  // Copies rows index[0..n) of v into panels [ceil(head_dim / panel)][n_padded][panel], zero padded; true if all
  // finite.
  bool (*pack_values[3])(const void* v, int64_t row_stride, const int32_t* index, int64_t n, int64_t n_padded,
                         int64_t head_dim, float* panels);

  // c[m][n] = a[m][k] . b, or += , over n / panel panels of b; every element is one chain of k fused multiply-adds in
  // order of k, so its value does not depend on m or on the place in the tile. k is a multiple of 8 and at most
  // kMaxDepth.
  void (*gemm)(int64_t m, int64_t k, const float* a, int64_t lda, const float* b, int64_t n, float* c, int64_t ldc,
               bool accumulate);

  // scores[m][0..n) = q[m] . k[index[n]] in place, without packing: for a few rows. q is [m][head_dim].
  void (*dot_rows[3])(const float* q, int64_t m, const void* k, int64_t row_stride, const int32_t* index, int64_t n,
                      int64_t head_dim, float* scores, int64_t lds);
  // out[m] += sum over n of p[m][n] * v[index[n]]. out is [m][head_dim]. p is finite; beside half types it is in [0, 1]
  // and may be rounded to one.
  void (*add_weighted_rows[3])(const float* p, int64_t ldp, int64_t m, const void* v, int64_t row_stride,
                               const int32_t* index, int64_t n, int64_t head_dim, float* out);

  // s[n] = softcap * tanh(s[n]); n is a multiple of kMaxPanel.
  void (*softcap_row)(float* s, int64_t n, float softcap);
  // s[n] = -inf where not low < position[n] <= high; n is a multiple of kMaxPanel.
  void (*mask_row)(float* s, const int32_t* position, int64_t n, int32_t low, int32_t high);
  // One step of the online softmax: row_max and row_sum take s[0..n) in, s becomes exp(s - row_max); n is a multiple
  // of kMaxPanel. Returns the factor by which the row's accumulator must shrink.
  float (*softmax_row)(float* s, int64_t n, float* row_max, float* row_sum);
  void (*scale_row)(float* x, int64_t n, float factor);

  // z[n] = softcapped z[n] + log_n[n], NaN and infinities as -inf; mass[n] += softmax(z)[n]. Returns logsumexp(z).
  float (*mass_row)(float* z, const float* log_n, int64_t n, float softcap, float* mass);
  // mass[n] += min(1, exp(softcapped s[n] - row_lse)). n is a multiple of kMaxPanel in both.
  void (*bounded_exp_row)(float* s, int64_t n, float softcap, float row_lse, float* mass);

  // Products of bfloat16, null for a type without an instruction for them; the last two are null too where dot_columns
  // and add_column_pairs stand for them. Products are of pairs of neighbours in k (vdpbf16ps) or of two pairs (bfmmla).
  // Panels are at most as large as their namesakes' above with head_dim and keys rounded up to kPairStep, in an order
  // that only the ISA's own products know; value panels reach to a multiple of kMaxPanel columns. Rows of a are
  // bfloat16 with an even lda; sums are float32.
  void (*pack_key_pairs[3])(const void* k, int64_t row_stride, const int32_t* index, int64_t n, int64_t n_padded,
                            int64_t head_dim, void* panels) = {};
  bool (*pack_value_pairs[3])(const void* v, int64_t row_stride, const int32_t* index, int64_t n, int64_t n_padded,
                              int64_t head_dim, void* panels) = {};
  // out[n] = x[n] as bfloat16; n is a multiple of kMaxPanel; out may be x.
  void (*round_row)(const float* x, int64_t n, void* out) = nullptr;
  void (*gemm_pairs)(int64_t m, int64_t k, const void* a, int64_t lda, const void* b, int64_t n, float* c, int64_t ldc,
                     bool accumulate) = nullptr;

  // A block of queries with its scores by key, s[n][lds], null in an ISA without it. The columns are queries, packed
  // once: as pack_keys packs rows, or pack_key_pairs where the type has one. These kernels take m of them, a multiple
  // of kMaxPanel: those of types with pairs up to pair_columns, if that is not 0, and at most pair_keys keys, 256 or
  // less.
  // Where begin_block is not null, dot_columns and add_column_pairs of types with pairs lie between it and end_block,
  // on one thread.
  int64_t pair_keys = kBlockN, pair_columns = 0;
  // Up to so many columns of the type are one strip, whose keys dot_columns copies itself, a few at a time.
  int64_t few_columns[3] = {};
  void (*begin_block)() = nullptr;
  void (*end_block)() = nullptr;
  // Keys as dot_columns wants them, copies[n][head_dim] floats with both rounded up to kPairStep; null for a type that
  // it reads in place. Its copies are null where the columns are few.
  void (*copy_keys[3])(const KeyTile& keys, void* copies) = {};
  // s[n][0..m) = scale * k[index[n]] . q, of the packed queries from the first one on.
  void (*dot_columns[3])(const KeyTile& keys, const void* copies, const void* q_panels, int64_t first, int64_t m,
                         float scale, float* s, int64_t lds, Ahead& ahead) = {};
  // s[n][m] = -inf where not low[m] < index[n] <= high[m].
  void (*mask_columns)(float* s, int64_t lds, const int32_t* index, int64_t n, const int32_t* low, const int32_t* high,
                       int64_t m) = nullptr;
  // softmax_row of each column of scale * s; shrink[m] is its factor, 1 if there was no key before. scale > 0. row_max
  // may stay up to 4 below a column's maximum.
  void (*softmax_columns)(float* s, int64_t lds, int64_t n, int64_t m, float scale, float* row_max, float* row_sum,
                          float* shrink, Ahead& ahead) = nullptr;
  // c[m][n] = shrink[m] * c[m][n] + sum over keys of p[key][m] * v[key][n], of n / panel value panels; shrink null: 1.
  // Here m is any number of rows.
  void (*add_columns)(const float* p, int64_t ldp, int64_t keys, const float* v_panels, int64_t n, int64_t m,
                      const float* shrink, float* c, int64_t ldc, Ahead& ahead) = nullptr;
  // The same of values where they lie, which have a multiple of kMaxPanel columns; null for a type that is packed.
  void (*add_listed_columns[3])(const float* p, int64_t ldp, const KeyTile& tile, int64_t m, const float* shrink,
                                float* c, int64_t ldc, Ahead& ahead) = {};
  // softmax_columns and add_columns, without shrink, for value pairs that are finite: probabilities rounded to the
  // type, a key's and the next one's where both were, in an order that only the ISA's own products know. After an odd
  // number of keys s has one more row.
  void (*softmax_column_pairs[3])(float* s, int64_t lds, int64_t n, int64_t m, float scale, float* row_max,
                                  float* row_sum, float* shrink, Ahead& ahead) = {};
  void (*add_column_pairs[3])(const float* p, int64_t ldp, int64_t keys, const void* v_panels, int64_t n, int64_t m,
                              float* c, int64_t ldc, Ahead& ahead) = {};

  // dot_rows with q of the keys' own half type, [m][head_dim], null in an ISA without products of that type.
  void (*dot_stored_rows[3])(const void* q, int64_t m, const void* k, int64_t row_stride, const int32_t* index,
                             int64_t n, int64_t head_dim, float* scores, int64_t lds) = {};
};

extern const Kernels kScalarKernels;
#if defined(DHSA_HAVE_AVX2)
extern const Kernels kAvx2Kernels;
#endif
#if defined(DHSA_HAVE_AVX512)
extern const Kernels kAvx512Kernels;
#endif
#if defined(DHSA_HAVE_AVX512BF16)
extern const Kernels kAvx512bf16Kernels;
#endif
#if defined(DHSA_HAVE_AMX)
extern const Kernels kAmxKernels;
#endif
#if defined(DHSA_HAVE_NEON)
extern const Kernels kNeonKernels;
#endif
#if defined(DHSA_HAVE_NEONFHM)
extern const Kernels kNeonfhmKernels;
#endif
#if defined(DHSA_HAVE_NEONBF16)
extern const Kernels kNeonbf16Kernels;
#endif

}  // namespace dhsa::cpu
