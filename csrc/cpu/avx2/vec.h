// The vocabulary of cpu/simd on AVX2, FMA and F16C: eight floats. An ISA that adds to these defines DHSA_ISA first.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "cpu/kernels.h"

#ifndef DHSA_ISA
#define DHSA_ISA avx2
#endif

namespace dhsa::cpu::DHSA_ISA {

constexpr int64_t kLanes = 8;
constexpr int64_t kPanel = 16;
constexpr int kUnroll = 1;

using Vec = __m256;

inline Vec zero() { return _mm256_setzero_ps(); }
inline Vec set1(float x) { return _mm256_set1_ps(x); }
inline Vec load(const float* p) { return _mm256_loadu_ps(p); }
inline Vec load(const Half* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
inline Vec load(const BFloat16* p) {
  const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
inline void store(float* p, Vec a) { _mm256_storeu_ps(p, a); }
inline void store(Half* p, Vec a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT));
}
inline void store(BFloat16* p, Vec a) {
  const __m256i bits = _mm256_castps_si256(a);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));  // NaN stays NaN
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q));
  const __m256i high = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
  const __m128i packed = _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), packed);
}
inline Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
inline Vec sub(Vec a, Vec b) { return _mm256_sub_ps(a, b); }
inline Vec mul(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
inline Vec div(Vec a, Vec b) { return _mm256_div_ps(a, b); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }          // a * b + c
inline Vec add_ln2_times(Vec a, Vec n) { return fma(n, set1(0.693147181f), a); }  // a + ln 2 * n, rounded once
inline Vec max(Vec a, Vec b) { return _mm256_max_ps(a, b); }
inline Vec abs(Vec a) { return _mm256_andnot_ps(set1(-0.0f), a); }
inline Vec copy_sign(Vec magnitude, Vec sign) {
  return _mm256_or_ps(_mm256_andnot_ps(set1(-0.0f), magnitude), _mm256_and_ps(set1(-0.0f), sign));
}
inline Vec select_less(Vec a, Vec b, Vec if_less, Vec otherwise) {  // otherwise where a or b is NaN
  return _mm256_blendv_ps(otherwise, if_less, _mm256_cmp_ps(a, b, _CMP_LT_OQ));
}
inline Vec finite_or(Vec a, float fallback) {
  const Vec finite = _mm256_cmp_ps(abs(a), set1(__builtin_inff()), _CMP_LT_OQ);
  return _mm256_blendv_ps(set1(fallback), a, finite);
}
inline Vec keep_in_range(Vec a, const int32_t* position, int32_t low, int32_t high) {  // -inf outside low < p <= high
  const __m256i p = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(position));
  const __m256i above = _mm256_cmpgt_epi32(p, _mm256_set1_epi32(low));
  const __m256i past = _mm256_cmpgt_epi32(p, _mm256_set1_epi32(high));
  return _mm256_blendv_ps(set1(-__builtin_inff()), a, _mm256_castsi256_ps(_mm256_andnot_si256(past, above)));
}
inline Vec round(Vec a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
// a in [1/2, 2) over 2^n, n integral and not negative: a's exponent less n; 0 where n > 126.
inline Vec divide_by_power_of_2(Vec a, Vec n) {
  const __m256i exponent = _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23);
  const Vec scaled = _mm256_castsi256_ps(_mm256_sub_epi32(_mm256_castps_si256(a), exponent));
  return select_less(set1(126.0f), n, zero(), scaled);
}
inline float first_lane(Vec a) { return _mm256_cvtss_f32(a); }
inline float reduce_add(Vec a) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
inline float reduce_max(Vec a) {
  __m128 s = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  s = _mm_max_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
}

}  // namespace dhsa::cpu::DHSA_ISA
