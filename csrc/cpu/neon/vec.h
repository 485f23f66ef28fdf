// The vocabulary of cpu/simd on the armv8-a baseline: four floats. Halves are converted, in the instructions that every
// AArch64 has; nothing here needs FEAT_FP16. An ISA that adds to these defines DHSA_ISA first.
#pragma once

#include <arm_neon.h>

#include <cstdint>

#include "cpu/kernels.h"

#ifndef DHSA_ISA
#define DHSA_ISA neon
#endif

namespace dhsa::cpu::DHSA_ISA {

constexpr int64_t kLanes = 4;
constexpr int64_t kPanel = 8;
constexpr int kUnroll = 4;  // vectors of a row at once: pairs of loads and stores, and a quarter of the loop's own work

using Vec = float32x4_t;

inline Vec zero() { return vdupq_n_f32(0.0f); }
inline Vec set1(float x) { return vdupq_n_f32(x); }
inline Vec load(const float* p) { return vld1q_f32(p); }
inline Vec load(const Half* p) {
  return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(reinterpret_cast<const uint16_t*>(p))));
}
inline Vec load(const BFloat16* p) {
  return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(reinterpret_cast<const uint16_t*>(p)), 16));
}
inline void store(float* p, Vec a) { vst1q_f32(p, a); }
inline void store(Half* p, Vec a) { vst1_u16(reinterpret_cast<uint16_t*>(p), vreinterpret_u16_f16(vcvt_f16_f32(a))); }
inline void store(BFloat16* p, Vec a) {
  const uint32x4_t bits = vreinterpretq_u32_f32(a);
  const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
  const uint32x4_t rounded = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
  const uint32x4_t quiet = vorrq_u32(bits, vdupq_n_u32(0x400000));  // NaN stays NaN
  vst1_u16(reinterpret_cast<uint16_t*>(p), vshrn_n_u32(vbslq_u32(vceqq_f32(a, a), rounded, quiet), 16));
}
inline Vec add(Vec a, Vec b) { return vaddq_f32(a, b); }
inline Vec sub(Vec a, Vec b) { return vsubq_f32(a, b); }
inline Vec mul(Vec a, Vec b) { return vmulq_f32(a, b); }
inline Vec div(Vec a, Vec b) { return vdivq_f32(a, b); }
inline Vec fma(Vec a, Vec b, Vec c) { return vfmaq_f32(c, a, b); }                // a * b + c
inline Vec add_ln2_times(Vec a, Vec n) { return fma(n, set1(0.693147181f), a); }  // a + ln 2 * n, rounded once
inline Vec max(Vec a, Vec b) { return vmaxq_f32(a, b); }
inline Vec abs(Vec a) { return vabsq_f32(a); }
inline Vec copy_sign(Vec magnitude, Vec sign) { return vbslq_f32(vdupq_n_u32(0x80000000u), sign, magnitude); }
inline Vec select_less(Vec a, Vec b, Vec if_less, Vec otherwise) {  // otherwise where a or b is NaN
  return vbslq_f32(vcltq_f32(a, b), if_less, otherwise);
}
inline Vec finite_or(Vec a, float fallback) {
  return vbslq_f32(vcltq_f32(vabsq_f32(a), set1(__builtin_inff())), a, set1(fallback));
}
inline Vec keep_in_range(Vec a, const int32_t* position, int32_t low, int32_t high) {  // -inf outside low < p <= high
  const int32x4_t p = vld1q_s32(position);
  const uint32x4_t inside = vandq_u32(vcgtq_s32(p, vdupq_n_s32(low)), vcleq_s32(p, vdupq_n_s32(high)));
  return vbslq_f32(inside, a, set1(-__builtin_inff()));
}
inline Vec round(Vec a) { return vrndnq_f32(a); }
// a in [1/2, 2) over 2^n, n integral and not negative: a's exponent less n. All of it saturates, infinity included, so
// that what is too small becomes 0 without a comparison; n = NaN counts as 0.
inline Vec divide_by_power_of_2(Vec a, Vec n) {
  const uint32x4_t exponent = vqshlq_n_u32(vcvtq_u32_f32(n), 23);
  return vreinterpretq_f32_u32(vqsubq_u32(vreinterpretq_u32_f32(a), exponent));
}
inline float first_lane(Vec a) { return vgetq_lane_f32(a, 0); }
inline float reduce_add(Vec a) { return vaddvq_f32(a); }
inline float reduce_max(Vec a) { return vmaxvq_f32(a); }

}  // namespace dhsa::cpu::DHSA_ISA
