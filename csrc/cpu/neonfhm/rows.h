// Rows of float16 in place, by the products of products.h.
#pragma once

namespace dhsa::cpu::DHSA_ISA {

inline void dot_stored_halves(const void* q, int64_t m, const void* k, int64_t row_stride, const int32_t* index,
                              int64_t n, int64_t head_dim, float* scores, int64_t lds) {
  dot_rows_of(static_cast<const Half*>(q), m, static_cast<const Half*>(k), row_stride, index, n, head_dim, scores, lds);
}

// x[0..n) times kUnits[0] as halves. 2^15 is the most that 1 may become: what is below 2^-29 of the largest probability
// rounds more coarsely than to eleven bits, and 2^-40 to nothing, where unscaled 2^-25 would.
constexpr float kUnits[2] = {32768.0f, 1.0f / 32768.0f};

inline void round_to_halves(const float* x, int64_t n, Half* out) {
  uint16_t* to = reinterpret_cast<uint16_t*>(out);
  int64_t j = 0;
  for (; j + 8 <= n; j += 8) {
    const float16x4_t low = vcvt_f16_f32(mul(load(x + j), set1(kUnits[0])));
    vst1q_u16(to + j, vreinterpretq_u16_f16(vcvt_high_f16_f32(low, mul(load(x + j + 4), set1(kUnits[0])))));
  }
  for (; j < n; ++j) to[j] = vget_lane_u16(vreinterpret_u16_f16(vcvt_f16_f32(mul(set1(x[j]), set1(kUnits[0])))), 0);
}

inline void add_weighted_halves(const float* p, int64_t ldp, int64_t m, const void* v, int64_t row_stride,
                                const int32_t* index, int64_t n, int64_t head_dim, float* out) {
  constexpr int64_t kKeys = 256, kRows = 4;
  Half rounded[kRows * kKeys];
  for (int64_t j = 0; j < n; j += kKeys) {
    const int64_t keys = n - j < kKeys ? n - j : kKeys;
    for (int64_t r = 0; r < m; r += kRows) {
      const int64_t rows = m - r < kRows ? m - r : kRows;
      for (int64_t i = 0; i < rows; ++i) round_to_halves(p + (r + i) * ldp + j, keys, rounded + i * kKeys);
      add_weighted_rows_of(rounded, kKeys, rows, static_cast<const Half*>(v), row_stride, index + j, keys, kUnits,
                           head_dim, out + r * head_dim);
    }
  }
}

constexpr Kernels with_half_products(Kernels table) {
  table.dot_stored_rows[1] = dot_stored_halves;
  table.add_weighted_rows[1] = add_weighted_halves;
  return table;
}

}  // namespace dhsa::cpu::DHSA_ISA
