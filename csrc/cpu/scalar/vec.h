// The vocabulary of cpu/simd in plain C++: four floats that any compiler may map to its baseline registers.
#pragma once

#include <cmath>
#include <cstdint>

#include "core/half.h"
#include "cpu/kernels.h"

#define DHSA_ISA scalar

namespace dhsa::cpu::scalar {

constexpr int64_t kLanes = 4;
constexpr int64_t kPanel = 8;
constexpr int kUnroll = 1;

struct Vec {
  float lane[kLanes];
};

template <class F>
inline Vec lanewise(F f) {
  return Vec{{f(0), f(1), f(2), f(3)}};
}

inline Vec zero() { return Vec{{0, 0, 0, 0}}; }
inline Vec set1(float x) { return Vec{{x, x, x, x}}; }
inline Vec load(const float* p) { return Vec{{p[0], p[1], p[2], p[3]}}; }
inline Vec load(const Half* p) {
  return lanewise([p](int i) { return float_from_half(p[i].bits); });
}
inline Vec load(const BFloat16* p) {
  return lanewise([p](int i) { return float_from_bfloat16(p[i].bits); });
}
inline void store(float* p, Vec a) {
  for (int64_t i = 0; i < kLanes; ++i) p[i] = a.lane[i];
}
inline void store(Half* p, Vec a) {
  for (int64_t i = 0; i < kLanes; ++i) p[i].bits = half_from_float(a.lane[i]);
}
inline void store(BFloat16* p, Vec a) {
  for (int64_t i = 0; i < kLanes; ++i) p[i].bits = bfloat16_from_float(a.lane[i]);
}
inline Vec add(Vec a, Vec b) {
  return lanewise([=](int i) { return a.lane[i] + b.lane[i]; });
}
inline Vec sub(Vec a, Vec b) {
  return lanewise([=](int i) { return a.lane[i] - b.lane[i]; });
}
inline Vec mul(Vec a, Vec b) {
  return lanewise([=](int i) { return a.lane[i] * b.lane[i]; });
}
inline Vec div(Vec a, Vec b) {
  return lanewise([=](int i) { return a.lane[i] / b.lane[i]; });
}
inline Vec fma(Vec a, Vec b, Vec c) {  // a * b + c
  return lanewise([=](int i) { return a.lane[i] * b.lane[i] + c.lane[i]; });
}
inline Vec add_ln2_times(Vec a, Vec n) {  // a + ln 2 * n, rounded once
  return lanewise([=](int i) { return static_cast<float>(a.lane[i] + 0.6931471805599453 * n.lane[i]); });
}
inline Vec max(Vec a, Vec b) {
  return lanewise([=](int i) { return a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]; });
}
inline Vec abs(Vec a) {
  return lanewise([=](int i) { return std::fabs(a.lane[i]); });
}
inline Vec copy_sign(Vec magnitude, Vec sign) {
  return lanewise([=](int i) { return std::copysign(magnitude.lane[i], sign.lane[i]); });
}
inline Vec select_less(Vec a, Vec b, Vec if_less, Vec otherwise) {  // otherwise where a or b is NaN
  return lanewise([=](int i) { return a.lane[i] < b.lane[i] ? if_less.lane[i] : otherwise.lane[i]; });
}
inline Vec finite_or(Vec a, float fallback) {
  return lanewise([=](int i) { return std::isfinite(a.lane[i]) ? a.lane[i] : fallback; });
}
inline Vec keep_in_range(Vec a, const int32_t* position, int32_t low, int32_t high) {  // -inf outside low < p <= high
  return lanewise([=](int i) { return position[i] > low && position[i] <= high ? a.lane[i] : -INFINITY; });
}
// Adding 1.5 * 2^23 leaves no fraction bit, in the current rounding mode: to nearest even.
inline Vec round(Vec a) {
  return lanewise([=](int i) { return (a.lane[i] + 12582912.0f) - 12582912.0f; });
}
// a in [1/2, 2) over 2^n, n integral and not negative; 0 where n > 126, a where n is NaN.
inline Vec divide_by_power_of_2(Vec a, Vec n) {
  return lanewise([=](int i) {
    if (n.lane[i] > 126.0f) return 0.0f;
    const int32_t exponent = n.lane[i] >= 0.0f ? static_cast<int32_t>(n.lane[i]) : 0;
    return a.lane[i] * float_from_bits(static_cast<uint32_t>(127 - exponent) << 23);
  });
}
inline float first_lane(Vec a) { return a.lane[0]; }
inline float reduce_add(Vec a) { return (a.lane[0] + a.lane[2]) + (a.lane[1] + a.lane[3]); }
inline float reduce_max(Vec a) {
  const Vec b = max(a, Vec{{a.lane[2], a.lane[3], a.lane[0], a.lane[1]}});
  return b.lane[0] > b.lane[1] ? b.lane[0] : b.lane[1];
}

}  // namespace dhsa::cpu::scalar
