// Rows of a list of keys on NEON: packing of values, and products of a few rows in place. Blocks are sized so that
// every accumulator stays in a register while a block of keys is read once, four registers a load where it can be.
#pragma once

#include <type_traits>

namespace dhsa::cpu::DHSA_ISA {

// A number that a lambda's constants are made of.
template <int kValue>
struct Constant {
  static constexpr int value = kValue;
};

template <class T>
bool pack_values(const void* v, int64_t row_stride, const int32_t* index, int64_t n, int64_t n_padded, int64_t head_dim,
                 float* panels) {
  Vec poison = zero();  // x * 0 is 0 for every finite x and NaN for the rest
  const auto copy = [&](Two x, float* out) {
    poison = fma(x.high, zero(), fma(x.low, zero(), poison));
    store(out, x.low);
    store(out + 4, x.high);
  };
  const int64_t panel = n_padded * kPanel;
  for (int64_t r = 0; r < n; ++r) {
    const T* row = static_cast<const T*>(v) + index[r] * row_stride;
    float* out = panels + r * kPanel;
    int64_t d = 0;
    for (; d + 2 * kPanel <= head_dim; d += 2 * kPanel, out += 2 * panel) {
      const Two x = load_eight(row + d), y = load_eight(row + d + kPanel);
      copy(x, out);
      copy(y, out + panel);
    }
    if (d < head_dim) copy(load_eight(row + d), out);
  }
  for (int64_t d = 0; d < head_dim && n < n_padded; d += kPanel) {
    __builtin_memset(panels + d * n_padded + n * kPanel, 0, (n_padded - n) * kPanel * sizeof(float));
  }
  return reduce_add(poison) == 0.0f;
}

// scores[r][0..kKeys) = q[r] . keys. Every product is one chain over each lane and then (s0 + s1) + (s2 + s3), as in
// dot_eights: it does not depend on the block that it lies in.
template <int kRows, int kKeys, class Q, class T>
inline void dot_block(const Q* q, const T* const* keys, int64_t head_dim, float* scores, int64_t lds) {
  constexpr int kPerRegister = kElements<T> / kElements<Q>;  // registers of q to one of a key
  constexpr int kCount = 2 / kPerRegister;                   // registers of a key at once
  constexpr int kWidth = kCount * kElements<T>;
  const T* at[kKeys];
  Vec sum[kRows][kKeys];
#pragma GCC unroll 4
  for (int i = 0; i < kKeys; ++i) {
    at[i] = keys[i];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) sum[r][i] = zero();
  }
  const auto step = [&](int64_t offset, auto count) {
    constexpr int kRegisters = decltype(count)::value;
    Register<Q> x[kRows][kRegisters * kPerRegister];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) load_registers<kRegisters * kPerRegister>(q + r * head_dim, x[r]);
    q += kRegisters * kElements<T>;
#pragma GCC unroll 4
    for (int i = 0; i < kKeys; ++i) {
      Register<T> y[kRegisters];
      load_registers<kRegisters>(at[i] + offset, y);
#pragma GCC unroll 2
      for (int w = 0; w < kRegisters; ++w) {
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) sum[r][i] = add_products(sum[r][i], x[r] + w * kPerRegister, y[w]);
      }
    }
  };
  int64_t left = head_dim;
  for (; left >= 32; left -= 32) {
#pragma GCC unroll 4
    for (int w = 0; w < 32; w += kWidth) step(w, Constant<kCount>{});
#pragma GCC unroll 4
    for (int i = 0; i < kKeys; ++i) at[i] += 32;
  }
  for (; left > 0; left -= 8) {
    step(0, Constant<8 / kElements<T>>{});
#pragma GCC unroll 4
    for (int i = 0; i < kKeys; ++i) at[i] += 8;
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
    if constexpr (kKeys == 1) {
      scores[r * lds] = reduce_add(sum[r][0]);
    } else {
      store(scores + r * lds, vpaddq_f32(vpaddq_f32(sum[r][0], sum[r][1]), vpaddq_f32(sum[r][2], sum[r][3])));
    }
  }
}

// Rows of a tensor by their indices, at one multiply-add each.
template <class T>
class RowTable {
 public:
  RowTable(const T* x, int64_t row_stride)
      : x_(reinterpret_cast<const char*>(x)), row_bytes_(row_stride * static_cast<int64_t>(sizeof(T))) {
    asm("" : "+r"(row_bytes_));  // else a shift is taken out of it, and the multiply-add becomes two instructions
  }

  const T* operator[](int32_t index) const {
    // Unsigned, since loads of pairs extend by zeros.
    const T* row = reinterpret_cast<const T*>(x_ + static_cast<int64_t>(static_cast<uint32_t>(index)) * row_bytes_);
    asm("" : "+r"(row));  // pairs of loads know no sum of registers: the address is to be in one
    return row;
  }
  int64_t row_bytes() const { return row_bytes_; }

 private:
  const char* x_;
  int64_t row_bytes_;
};

// Four rows, four keys at a time.
template <class Q, class T>
__attribute__((noinline)) void dot_four_rows(const Q* q, const RowTable<T>& rows, const int32_t* index, int64_t n,
                                             int64_t head_dim, float* scores, int64_t lds) {
  int64_t j = 0;
  for (; j + 4 <= n; j += 4) {
    const T* const keys[4] = {rows[index[j]], rows[index[j + 1]], rows[index[j + 2]], rows[index[j + 3]]};
    dot_block<4, 4>(q, keys, head_dim, scores + j, lds);
  }
  for (; j < n; ++j) {
    const T* const key = rows[index[j]];
    dot_block<4, 1>(q, &key, head_dim, scores + j, lds);
  }
}

template <class Q, class T>
__attribute__((noinline)) void dot_one_row(const Q* q, const RowTable<T>& rows, const int32_t* index, int64_t n,
                                           int64_t head_dim, float* scores) {
  int64_t j = n / 8 * 8;
  if (j > 0) dot_eights(q, rows[0], rows.row_bytes(), index, j, head_dim, scores);
  for (; j < n; ++j) {
    const T* const key = rows[index[j]];
    dot_block<1, 1>(q, &key, head_dim, scores + j, 0);
  }
}

// Strips of keys outside, so that the heads of a group share a strip's rows in the first-level cache.
template <class Q, class T>
inline void dot_rows_of(const Q* q, int64_t m, const T* k, int64_t row_stride, const int32_t* index, int64_t n,
                        int64_t head_dim, float* scores, int64_t lds) {
  constexpr int64_t kStrip = 64;
  const RowTable<T> rows(k, row_stride);
  if (m == 1 && index != nullptr) return dot_one_row(q, rows, index, n, head_dim, scores);
  for (int64_t first = 0; first < n; first += kStrip, scores += kStrip) {
    const int64_t count = n - first < kStrip ? n - first : kStrip;
    int32_t consecutive[kStrip];
    for (int64_t i = 0; index == nullptr && i < count; ++i) consecutive[i] = static_cast<int32_t>(first + i);
    const int32_t* keys = index != nullptr ? index + first : consecutive;
    int64_t r = 0;
    for (; r + 4 <= m; r += 4) dot_four_rows(q + r * head_dim, rows, keys, count, head_dim, scores + r * lds, lds);
    for (; r < m; ++r) dot_one_row(q + r * head_dim, rows, keys, count, head_dim, scores + r * lds);
  }
}

template <class T>
void dot_rows(const float* q, int64_t m, const void* k, int64_t row_stride, const int32_t* index, int64_t n,
              int64_t head_dim, float* scores, int64_t lds) {
  dot_rows_of(q, m, static_cast<const T*>(k), row_stride, index, n, head_dim, scores, lds);
}

// What p is given in, and its inverse: float32 as it is, a half type in units of the ISA's own.
constexpr float kOne[2] = {1.0f, 1.0f};

// out[r][0..kColumns) += p[r] . v: the sums of kRows rows stay in registers over all keys, times units[0]. Lanes of p
// are read from a register: four keys of float32, eight of a half type.
template <int kRows, int kColumns, class W, class T>
inline void add_weighted_columns(const W* p, int64_t ldp, const RowTable<T>& rows, int64_t d, const int32_t* index,
                                 int64_t n, const float* units, float* out, int64_t head_dim) {
  constexpr int kRegisters = kColumns / kElements<T>, kVectors = kElements<T> / 4;
  constexpr bool kScaled = !std::is_same_v<W, float>;
  out += d;
  Vec sum[kRows][kColumns / 4];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int c = 0; c < kColumns / 4; ++c) {
      sum[r][c] = load(out + r * head_dim + 4 * c);
      if (kScaled) sum[r][c] = mul(sum[r][c], set1(units[0]));
    }
  }
  const auto add_key = [&](int32_t key, const Register<W>* weights, auto lane) {
    Register<T> x[kRegisters];
    load_registers<kRegisters>(rows[key] + d, x);
#pragma GCC unroll 4
    for (int i = 0; i < kRegisters; ++i) {
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) add_scaled<decltype(lane)::value>(&sum[r][i * kVectors], weights[r], x[i]);
    }
  };
  Register<W> weights[kRows];
  int64_t j = 0;
  for (; j + kElements<W> <= n; j += kElements<W>) {
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) weights[r] = load_register(p + r * ldp + j);
    add_key(index[j], weights, Constant<0>{});
    add_key(index[j + 1], weights, Constant<1>{});
    add_key(index[j + 2], weights, Constant<2>{});
    add_key(index[j + 3], weights, Constant<3>{});
    if constexpr (kElements<W> == 8) {
      add_key(index[j + 4], weights, Constant<4>{});
      add_key(index[j + 5], weights, Constant<5>{});
      add_key(index[j + 6], weights, Constant<6>{});
      add_key(index[j + 7], weights, Constant<7>{});
    }
  }
  for (; j < n; ++j) {
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) weights[r] = set_register(p[r * ldp + j]);
    add_key(index[j], weights, Constant<0>{});
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int c = 0; c < kColumns / 4; ++c) {
      store(out + r * head_dim + 4 * c, kScaled ? mul(sum[r][c], set1(units[1])) : sum[r][c]);
    }
  }
}

template <class W, class T>
__attribute__((noinline)) void add_weighted_four(const W* p, int64_t ldp, const RowTable<T>& rows, const int32_t* index,
                                                 int64_t n, const float* units, float* out, int64_t head_dim) {
  int64_t d = 0;
  for (; d + 16 <= head_dim; d += 16) add_weighted_columns<4, 16>(p, ldp, rows, d, index, n, units, out, head_dim);
  if (d < head_dim) add_weighted_columns<4, 8>(p, ldp, rows, d, index, n, units, out, head_dim);
}

// One row: 64 columns at a time and eights of keys, then what is left of either.
template <class W, class T>
__attribute__((noinline)) void add_weighted_one(const W* p, const RowTable<T>& rows, const int32_t* index, int64_t n,
                                                const float* units, float* out, int64_t head_dim) {
  const int64_t eights = n / 8 * 8;
  int64_t d = 0;
  for (; eights > 0 && d + 64 <= head_dim; d += 64) {
    add_64_columns(p, rows[0] + d, rows.row_bytes(), index, eights, units, out + d);
  }
  for (int64_t c = d; c < head_dim; c += 8) {
    add_weighted_columns<1, 8>(p, 0, rows, c, index, eights, units, out, head_dim);
  }
  for (int64_t c = 0; eights < n && c < head_dim; c += 8) {
    add_weighted_columns<1, 8>(p + eights, 0, rows, c, index + eights, n - eights, units, out, head_dim);
  }
}

template <class W, class T>
inline void add_weighted_rows_of(const W* p, int64_t ldp, int64_t m, const T* v, int64_t row_stride,
                                 const int32_t* index, int64_t n, const float* units, int64_t head_dim, float* out) {
  const RowTable<T> rows(v, row_stride);
  int64_t r = 0;
  for (; r + 4 <= m; r += 4) add_weighted_four(p + r * ldp, ldp, rows, index, n, units, out + r * head_dim, head_dim);
  for (; r < m; ++r) add_weighted_one(p + r * ldp, rows, index, n, units, out + r * head_dim, head_dim);
}

template <class T>
void add_weighted_rows(const float* p, int64_t ldp, int64_t m, const void* v, int64_t row_stride, const int32_t* index,
                       int64_t n, int64_t head_dim, float* out) {
  add_weighted_rows_of(p, ldp, m, static_cast<const T*>(v), row_stride, index, n, kOne, head_dim, out);
}

}  // namespace dhsa::cpu::DHSA_ISA
