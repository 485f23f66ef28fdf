// The widest vectors of AVX-512, for cpu/simd/columns.h: sixteen floats, a panel's width.
#pragma once

namespace dhsa::cpu::DHSA_ISA {

constexpr int kAskedLines = 16;  // beside each product tile
constexpr int64_t kWide = 16;
using Wide = __m512;

inline Wide wide_zero() { return _mm512_setzero_ps(); }
inline Wide wide_set1(float x) { return _mm512_set1_ps(x); }
inline Wide set_like(Wide, float x) { return _mm512_set1_ps(x); }
inline Wide wide_load(const float* p) { return _mm512_loadu_ps(p); }
inline Wide wide_load(const Half* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline Wide wide_load(const BFloat16* p) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
inline void store(float* p, Wide a) { _mm512_storeu_ps(p, a); }
inline Wide add(Wide a, Wide b) { return _mm512_add_ps(a, b); }
inline Wide sub(Wide a, Wide b) { return _mm512_sub_ps(a, b); }
inline Wide mul(Wide a, Wide b) { return _mm512_mul_ps(a, b); }
inline Wide fma(Wide a, Wide b, Wide c) { return _mm512_fmadd_ps(a, b, c); }
inline Wide add_ln2_times(Wide a, Wide n) { return fma(n, _mm512_set1_ps(0.693147181f), a); }
inline Wide max(Wide a, Wide b) { return _mm512_max_ps(a, b); }
inline Wide select_less(Wide a, Wide b, Wide if_less, Wide otherwise) {  // otherwise where a or b is NaN
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), otherwise, if_less);
}
inline Wide round(Wide a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
// a over 2^n; 0 where n > 126.
inline Wide divide_by_power_of_2(Wide a, Wide n) {
  const __mmask16 kept = _mm512_cmp_ps_mask(n, _mm512_set1_ps(126.0f), _CMP_NGT_UQ);
  return _mm512_maskz_scalef_ps(kept, a, _mm512_sub_ps(_mm512_setzero_ps(), n));
}

// -inf where not low < position <= high, lane by lane.
inline Wide keep_between(Wide a, int32_t position, const int32_t* low, const int32_t* high) {
  const __m512i p = _mm512_set1_epi32(position);
  const __mmask16 above = _mm512_cmpgt_epi32_mask(p, _mm512_loadu_si512(low));
  const __mmask16 kept = _mm512_mask_cmple_epi32_mask(above, p, _mm512_loadu_si512(high));
  return _mm512_mask_blend_ps(kept, _mm512_set1_ps(-__builtin_inff()), a);
}

}  // namespace dhsa::cpu::DHSA_ISA
