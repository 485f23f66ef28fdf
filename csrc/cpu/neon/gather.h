// Rows of a list of keys on NEON: packing of values, and products of a few rows in place. Blocks are sized so that
// every accumulator stays in a register while a block of keys is read once: loads of keys in pairs, none of a sum.
#pragma once

namespace dhsa::cpu::DHSA_ISA {

// kSteps times eight elements, each eight as two vectors. All of the memory is read first: neighbours are read in
// pairs.
struct Two {
  Vec low, high;
};
template <int kSteps>
inline void load_steps(const float* p, Two (&x)[kSteps]) {
#pragma GCC unroll 8
  for (int w = 0; w < kSteps; ++w) x[w] = {load(p + 8 * w), load(p + 8 * w + 4)};
}
template <int kSteps>
inline void load_steps(const Half* p, Two (&x)[kSteps]) {
  float16x8_t raw[kSteps];
#pragma GCC unroll 8
  for (int w = 0; w < kSteps; ++w)
    raw[w] = vreinterpretq_f16_u16(vld1q_u16(reinterpret_cast<const uint16_t*>(p) + 8 * w));
#pragma GCC unroll 8
  for (int w = 0; w < kSteps; ++w) x[w] = {vcvt_f32_f16(vget_low_f16(raw[w])), vcvt_high_f32_f16(raw[w])};
}
template <int kSteps>
inline void load_steps(const BFloat16* p, Two (&x)[kSteps]) {
  uint16x8_t raw[kSteps];
#pragma GCC unroll 8
  for (int w = 0; w < kSteps; ++w) raw[w] = vld1q_u16(reinterpret_cast<const uint16_t*>(p) + 8 * w);
#pragma GCC unroll 8
  for (int w = 0; w < kSteps; ++w) {
    x[w] = {vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(raw[w]), 16)),
            vreinterpretq_f32_u32(vshll_high_n_u16(raw[w], 16))};
  }
}

// A number that a lambda's constants are made of.
template <int kValue>
struct Width {
  static constexpr int value = kValue;
};

// Memory reads ahead along a run by itself; where the next keys are no continuation, their rows are asked for here.
template <class T>
inline void prefetch_jump(const T* x, int64_t row_stride, const int32_t* index, int64_t count, int64_t head_dim) {
  if (index[count - 1] - index[-1] == count) return;
  for (int64_t i = 0; i < count; ++i) {
    const char* row = reinterpret_cast<const char*>(x + index[i] * row_stride);
    for (int64_t byte = 0; byte < head_dim * static_cast<int64_t>(sizeof(T)); byte += 64) {
      __builtin_prefetch(row + byte);
    }
  }
}

template <class T>
bool pack_values(const void* v, int64_t row_stride, const int32_t* index, int64_t n, int64_t n_padded, int64_t head_dim,
                 float* panels) {
  Vec poison = zero();  // x * 0 is 0 for every finite x and NaN for the rest
  for (int64_t r = 0; r < n; ++r) {
    const T* row = static_cast<const T*>(v) + index[r] * row_stride;
    float* out = panels + r * kPanel;
    for (int64_t d = 0; d < head_dim; d += kPanel, out += n_padded * kPanel) {
      Two x[1];
      load_steps(row + d, x);
      poison = fma(x[0].high, zero(), fma(x[0].low, zero(), poison));
      store(out, x[0].low);
      store(out + 4, x[0].high);
    }
  }
  for (int64_t d = 0; d < head_dim && n < n_padded; d += kPanel) {
    __builtin_memset(panels + d * n_padded + n * kPanel, 0, (n_padded - n) * kPanel * sizeof(float));
  }
  return reduce_add(poison) == 0.0f;
}

// scores[r][0..kKeys) = q[r] . keys. Every product is one chain over each lane and then (s0 + s1) + (s2 + s3), so that
// it does not depend on the block that it lies in.
template <int kRows, int kKeys, class T>
inline void dot_block(const float* q, const T* const* keys, int64_t head_dim, float* scores, int64_t lds) {
  constexpr int kWidth = kRows == 1 ? 16 : 8;  // elements at once: pairs of loads from half types
  const T* at[kKeys];
  Vec sum[kRows][kKeys];
#pragma GCC unroll 8
  for (int i = 0; i < kKeys; ++i) {
    at[i] = keys[i];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) sum[r][i] = zero();
  }
  const auto step = [&](int64_t d, auto width) {
    constexpr int kSteps = decltype(width)::value / 8;
    Two x[kRows][kSteps];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      load_steps(q + r * head_dim, x[r]);
    }
#pragma GCC unroll 8
    for (int i = 0; i < kKeys; ++i) {
      Two y[kSteps];
      load_steps(at[i] + d, y);
#pragma GCC unroll 2
      for (int w = 0; w < kSteps; ++w) {
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) sum[r][i] = fma(x[r][w].high, y[w].high, fma(x[r][w].low, y[w].low, sum[r][i]));
      }
    }
    q += 8 * kSteps;
  };
  int64_t left = head_dim;
  for (; left >= 4 * kWidth; left -= 4 * kWidth) {
#pragma GCC unroll 4
    for (int w = 0; w < 4; ++w) step(w * kWidth, Width<kWidth>{});
#pragma GCC unroll 8
    for (int i = 0; i < kKeys; ++i) at[i] += 4 * kWidth;
  }
  for (; left > 0; left -= 8) {
    step(0, Width<8>{});
#pragma GCC unroll 8
    for (int i = 0; i < kKeys; ++i) at[i] += 8;
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
    if constexpr (kKeys == 1) {
      scores[r * lds] = reduce_add(sum[r][0]);
    } else {
#pragma GCC unroll 2
      for (int i = 0; i < kKeys; i += 4) {
        store(scores + r * lds + i,
              vpaddq_f32(vpaddq_f32(sum[r][i], sum[r][i + 1]), vpaddq_f32(sum[r][i + 2], sum[r][i + 3])));
      }
    }
  }
}

template <class T>
inline const T* row_at(const T* x, int64_t row_stride, int64_t index) {
  const T* row = reinterpret_cast<const T*>(
      reinterpret_cast<const char*>(x) + index * (row_stride * static_cast<int64_t>(sizeof(T))));  // one multiply-add
  asm("" : "+r"(row));  // pairs of loads know no sum of registers: the address is to be in one
  return row;
}

template <int kRows, int kKeys, class T>
inline void dot_keys(const float* q, const T* k, int64_t row_stride, const int32_t* index, int64_t j, int64_t head_dim,
                     float* scores, int64_t lds) {
  const T* keys[kKeys];
  for (int i = 0; i < kKeys; ++i) keys[i] = row_at(k, row_stride, index ? index[j + i] : j + i);
  dot_block<kRows, kKeys>(q, keys, head_dim, scores + j, lds);
}

// Blocks of keys outside, so that the heads of a group share a block's rows in the first-level cache.
template <int kKeys, class T>
inline int64_t dot_all_rows(const float* q, int64_t m, const T* k, int64_t row_stride, const int32_t* index, int64_t j,
                            int64_t n, int64_t head_dim, float* scores, int64_t lds) {
  for (; j + kKeys <= n; j += kKeys) {
    if (index && j > 0 && j + 2 * kKeys <= n) prefetch_jump(k, row_stride, index + j + kKeys, kKeys, head_dim);
    int64_t r = 0;
    for (; r + 4 <= m; r += 4) {
      for (int half = 0; half < kKeys; half += kKeys < 4 ? kKeys : 4) {
        dot_keys<4, (kKeys < 4 ? kKeys : 4)>(q + r * head_dim, k, row_stride, index, j + half, head_dim,
                                             scores + r * lds, lds);
      }
    }
    for (; r < m; ++r) dot_keys<1, kKeys>(q + r * head_dim, k, row_stride, index, j, head_dim, scores + r * lds, lds);
  }
  return j;
}

template <class T>
void dot_rows(const float* q, int64_t m, const void* k, int64_t row_stride, const int32_t* index, int64_t n,
              int64_t head_dim, float* scores, int64_t lds) {
  const T* keys = static_cast<const T*>(k);
  const int64_t j = dot_all_rows<8>(q, m, keys, row_stride, index, 0, n, head_dim, scores, lds);
  dot_all_rows<1>(q, m, keys, row_stride, index, j, n, head_dim, scores, lds);
}

// out[r][0..8 * kSteps) += p[r] . v: the sums of kRows rows stay in registers over all keys.
template <int kRows, int kSteps, class T>
inline void add_weighted_columns(const float* p, int64_t ldp, const T* v, int64_t row_stride, const int32_t* index,
                                 int64_t n, float* out, int64_t head_dim) {
  Two sum[kRows][kSteps];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
    load_steps(out + r * head_dim, sum[r]);
  }
  const auto add_key = [&](const T* row, const Vec* weights, auto lane) {
    constexpr int kAtOnce = kSteps < 2 ? 1 : 2;
#pragma GCC unroll 8
    for (int first = 0; first < kSteps; first += kAtOnce) {
      Two x[kAtOnce];
      load_steps(row + 8 * first, x);
#pragma GCC unroll 2
      for (int w = 0; w < kAtOnce; ++w) {
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) {
          Two& s = sum[r][first + w];
          s.low = vfmaq_laneq_f32(s.low, x[w].low, weights[r], decltype(lane)::value);
          s.high = vfmaq_laneq_f32(s.high, x[w].high, weights[r], decltype(lane)::value);
        }
      }
    }
  };
  Vec weights[kRows];
  int64_t j = 0;
  for (; j + 4 <= n; j += 4) {
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) weights[r] = load(p + r * ldp + j);
    add_key(row_at(v, row_stride, index[j]), weights, Width<0>{});
    add_key(row_at(v, row_stride, index[j + 1]), weights, Width<1>{});
    add_key(row_at(v, row_stride, index[j + 2]), weights, Width<2>{});
    add_key(row_at(v, row_stride, index[j + 3]), weights, Width<3>{});
  }
  for (; j < n; ++j) {
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) weights[r] = set1(p[r * ldp + j]);
    add_key(row_at(v, row_stride, index[j]), weights, Width<0>{});
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int w = 0; w < kSteps; ++w) {
      store(out + r * head_dim + 8 * w, sum[r][w].low);
      store(out + r * head_dim + 8 * w + 4, sum[r][w].high);
    }
  }
}

template <int kRows, class T>
inline void add_weighted_all_columns(const float* p, int64_t ldp, const T* v, int64_t row_stride, const int32_t* index,
                                     int64_t n, float* out, int64_t head_dim) {
  constexpr int kSteps = 8 / kRows;  // 16 accumulators
  int64_t d = 0;
  for (; d + 8 * kSteps <= head_dim; d += 8 * kSteps) {
    add_weighted_columns<kRows, kSteps>(p, ldp, v + d, row_stride, index, n, out + d, head_dim);
  }
  for (; d < head_dim; d += 8) add_weighted_columns<kRows, 1>(p, ldp, v + d, row_stride, index, n, out + d, head_dim);
}

template <class T>
void add_weighted_rows(const float* p, int64_t ldp, int64_t m, const void* v, int64_t row_stride, const int32_t* index,
                       int64_t n, int64_t head_dim, float* out) {
  const T* values = static_cast<const T*>(v);
  for (int64_t j = 8; j + 8 <= n; j += 8) prefetch_jump(values, row_stride, index + j, 8, head_dim);
  int64_t r = 0;
  for (; r + 4 <= m; r += 4) {
    add_weighted_all_columns<4>(p + r * ldp, ldp, values, row_stride, index, n, out + r * head_dim, head_dim);
  }
  for (; r < m; ++r) {
    add_weighted_all_columns<1>(p + r * ldp, ldp, values, row_stride, index, n, out + r * head_dim, head_dim);
  }
}

}  // namespace dhsa::cpu::DHSA_ISA
