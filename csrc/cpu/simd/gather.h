// Rows of a list of keys: packing of values, products of a few rows in place. NEON has its own.
#pragma once

namespace dhsa::cpu::DHSA_ISA {

template <class T>
bool pack_values(const void* v, int64_t row_stride, const int32_t* index, int64_t n, int64_t n_padded, int64_t head_dim,
                 float* panels) {
  Vec poison = zero();  // x * 0 is 0 for every finite x and NaN for the rest
  for (int64_t d0 = 0; d0 < head_dim; d0 += kPanel) {
    const int64_t width = head_dim - d0 < kPanel ? head_dim - d0 : kPanel;
    for (int64_t r = 0; r < n; ++r, panels += kPanel) {
      const T* row = static_cast<const T*>(v) + index[r] * row_stride + d0;
      for (int64_t d = 0; d < width; d += kLanes) {
        const Vec x = load(row + d);
        poison = fma(x, zero(), poison);
        store(panels + d, x);
      }
      for (int64_t d = width; d < kPanel; d += kLanes) store(panels + d, zero());
    }
    for (int64_t i = 0; i < (n_padded - n) * kPanel; i += kLanes) store(panels + i, zero());
    panels += (n_padded - n) * kPanel;
  }
  return reduce_add(poison) == 0.0f;
}

// Rows share each key's loads in fours; a key row is then in the first-level cache for the next four.
template <class T>
void dot_rows(const float* q, int64_t m, const void* k, int64_t row_stride, const int32_t* index, int64_t n,
              int64_t head_dim, float* scores, int64_t lds) {
  for (int64_t j = 0; j < n; ++j) {
    const T* key = static_cast<const T*>(k) + (index ? index[j] : j) * row_stride;
    int64_t r = 0;
    for (; r + 4 <= m; r += 4) {
      const float* row = q + r * head_dim;
      Vec s0 = zero(), s1 = zero(), s2 = zero(), s3 = zero();
      for (int64_t d = 0; d < head_dim; d += kLanes) {
        const Vec x = load(key + d);
        s0 = fma(load(row + d), x, s0);
        s1 = fma(load(row + head_dim + d), x, s1);
        s2 = fma(load(row + 2 * head_dim + d), x, s2);
        s3 = fma(load(row + 3 * head_dim + d), x, s3);
      }
      scores[r * lds + j] = reduce_add(s0);
      scores[(r + 1) * lds + j] = reduce_add(s1);
      scores[(r + 2) * lds + j] = reduce_add(s2);
      scores[(r + 3) * lds + j] = reduce_add(s3);
    }
    for (; r < m; ++r) {
      const float* row = q + r * head_dim;
      Vec s0 = zero(), s1 = zero();
      int64_t d = 0;
      for (; d + 2 * kLanes <= head_dim; d += 2 * kLanes) {
        s0 = fma(load(row + d), load(key + d), s0);
        s1 = fma(load(row + d + kLanes), load(key + d + kLanes), s1);
      }
      for (; d < head_dim; d += kLanes) s0 = fma(load(row + d), load(key + d), s0);
      scores[r * lds + j] = reduce_add(add(s0, s1));
    }
  }
}

// Four keys at a time, so that an accumulator is loaded and stored once for four fused multiply-adds.
template <class T>
void add_weighted_rows(const float* p, int64_t ldp, int64_t m, const void* v, int64_t row_stride, const int32_t* index,
                       int64_t n, int64_t head_dim, float* out) {
  const T* values = static_cast<const T*>(v);
  int64_t j = 0;
  for (; j + 4 <= n; j += 4) {
    const T* v0 = values + index[j] * row_stride;
    const T* v1 = values + index[j + 1] * row_stride;
    const T* v2 = values + index[j + 2] * row_stride;
    const T* v3 = values + index[j + 3] * row_stride;
    for (int64_t r = 0; r < m; ++r) {
      const Vec p0 = set1(p[r * ldp + j]), p1 = set1(p[r * ldp + j + 1]);
      const Vec p2 = set1(p[r * ldp + j + 2]), p3 = set1(p[r * ldp + j + 3]);
      float* row = out + r * head_dim;
      for (int64_t d = 0; d < head_dim; d += kLanes) {
        Vec sum = fma(p0, load(v0 + d), load(row + d));
        sum = fma(p1, load(v1 + d), sum);
        sum = fma(p2, load(v2 + d), sum);
        store(row + d, fma(p3, load(v3 + d), sum));
      }
    }
  }
  for (; j < n; ++j) {
    const T* v0 = values + index[j] * row_stride;
    for (int64_t r = 0; r < m; ++r) {
      const Vec p0 = set1(p[r * ldp + j]);
      float* row = out + r * head_dim;
      for (int64_t d = 0; d < head_dim; d += kLanes) store(row + d, fma(p0, load(v0 + d), load(row + d)));
    }
  }
}

}  // namespace dhsa::cpu::DHSA_ISA
