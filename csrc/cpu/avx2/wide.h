// The widest vectors of AVX2, for cpu/simd/columns.h: those of vec.h.
#pragma once

namespace dhsa::cpu::avx2 {

constexpr int kAskedLines = 8;  // beside each product tile
constexpr int64_t kWide = kLanes;
using Wide = Vec;

inline Wide wide_zero() { return zero(); }
inline Wide wide_set1(float x) { return set1(x); }
template <class T>
inline Wide wide_load(const T* p) {
  return load(p);
}

// -inf where not low < position <= high, lane by lane.
inline Wide keep_between(Wide a, int32_t position, const int32_t* low, const int32_t* high) {
  const __m256i p = _mm256_set1_epi32(position);
  const __m256i above = _mm256_cmpgt_epi32(p, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(low)));
  const __m256i past = _mm256_cmpgt_epi32(p, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(high)));
  return _mm256_blendv_ps(set1(-__builtin_inff()), a, _mm256_castsi256_ps(_mm256_andnot_si256(past, above)));
}

}  // namespace dhsa::cpu::avx2
