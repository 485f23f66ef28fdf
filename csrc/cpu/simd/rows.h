// Rows between memory and registers: conversion to and from float32.
#pragma once

namespace dhsa::cpu::DHSA_ISA {

template <class T>
void load_rows(const void* x, int64_t row_stride, int64_t rows, int64_t head_dim, float scale, float* out) {
  const Vec factor = set1(scale);
  const T* row = static_cast<const T*>(x);
  for (int64_t r = 0; r < rows; ++r, row += row_stride, out += head_dim) {
    for (int64_t d = 0; d < head_dim; d += kLanes) store(out + d, mul(load(row + d), factor));
  }
}

template <class T>
void store_row(const float* x, float scale, int64_t head_dim, void* out) {
  const Vec factor = set1(scale);
  for (int64_t d = 0; d < head_dim; d += kLanes) store(static_cast<T*>(out) + d, mul(load(x + d), factor));
}

inline void scale_row(float* x, int64_t n, float factor) {
  const Vec f = set1(factor);
  constexpr int kVectors = 8 / kLanes;  // of the eight that divide every n
  for (int64_t d = 0; d < n; d += 8) {
    Vec y[kVectors];
#pragma GCC unroll 8
    for (int u = 0; u < kVectors; ++u) y[u] = mul(load(x + d + u * kLanes), f);
#pragma GCC unroll 8
    for (int u = 0; u < kVectors; ++u) store(x + d + u * kLanes, y[u]);
  }
}

}  // namespace dhsa::cpu::DHSA_ISA
