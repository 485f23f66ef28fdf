// Stages 1, 3 and 4: window sums of neighbouring keys and their products, row sums of chunks, means of queries.
#pragma once

namespace dhsa::cpu::DHSA_ISA {

// The sums are taken afresh for every t, window rows at a time from cache: no running sum that could drift, or that a
// NaN would poison beyond its own windows.
template <class T>
void window_products(const void* x, int64_t row_stride, int64_t head_dim, int64_t window, int64_t count, float* ring,
                     float* dots, float* norms) {
  const T* row = static_cast<const T*>(x);
  float* slot = ring;
  for (int64_t t = 0; t < count; ++t, row += row_stride) {
    Vec dot = zero(), norm = zero();
    for (int64_t d = 0; d < head_dim; d += kLanes) {
      Vec sum = load(row + d);
      for (int64_t w = 1; w < window; ++w) sum = add(sum, load(row + w * row_stride + d));
      norm = fma(sum, sum, norm);
      if (t >= window) dot = fma(load(slot + d), sum, dot);
      store(slot + d, sum);
    }
    norms[t] += reduce_add(norm);
    if (t >= window) dots[t] += reduce_add(dot);
    slot = (t + 1) % window == 0 ? ring : slot + head_dim;
  }
}

// Partial sums of 128 rows bound the error of long chunks; two vectors of d at a time keep a cache line whole.
template <class T>
void add_rows(const void* x, int64_t row_stride, int64_t rows, int64_t head_dim, float* sum) {
  for (int64_t first = 0; first < rows; first += 128) {
    const int64_t count = rows - first < 128 ? rows - first : 128;
    const T* block = static_cast<const T*>(x) + first * row_stride;
    int64_t d = 0;
    for (; d + 2 * kLanes <= head_dim; d += 2 * kLanes) {
      Vec s0 = zero(), s1 = zero();
      for (int64_t r = 0; r < count; ++r) {
        s0 = add(s0, load(block + r * row_stride + d));
        s1 = add(s1, load(block + r * row_stride + d + kLanes));
      }
      store(sum + d, add(load(sum + d), s0));
      store(sum + d + kLanes, add(load(sum + d + kLanes), s1));
    }
    for (; d < head_dim; d += kLanes) {
      Vec s0 = zero();
      for (int64_t r = 0; r < count; ++r) s0 = add(s0, load(block + r * row_stride + d));
      store(sum + d, add(load(sum + d), s0));
    }
  }
}

template <class T>
void mean_rows(const void* x, int64_t row_stride, int64_t rows, int64_t head_dim, void* out) {
  const Vec count = set1(static_cast<float>(rows));
  for (int64_t d = 0; d < head_dim; d += kLanes) {
    const T* from = static_cast<const T*>(x) + d;
    Vec sum = load(from);
    for (int64_t r = 1; r < rows; ++r) sum = add(sum, load(from + r * row_stride));
    store(static_cast<T*>(out) + d, div(sum, count));
  }
}

}  // namespace dhsa::cpu::DHSA_ISA
