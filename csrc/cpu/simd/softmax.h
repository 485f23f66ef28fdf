// Stages 4, 6 and 7: logits of one row to probabilities. Rows are padded: n is a multiple of kMaxPanel.
#pragma once

namespace dhsa::cpu::DHSA_ISA {

inline Vec softcapped(Vec s, float softcap) {
  return softcap > 0.0f ? mul(set1(softcap), tanh(mul(s, set1(1.0f / softcap)))) : s;
}

inline void softcap_row(float* s, int64_t n, float softcap) {
  for (int64_t j = 0; j < n; j += kLanes) store(s + j, softcapped(load(s + j), softcap));
}

inline void mask_row(float* s, const int32_t* position, int64_t n, int32_t low, int32_t high) {
  for (int64_t j = 0; j < n; j += kLanes) store(s + j, keep_in_range(load(s + j), position + j, low, high));
}

inline float softmax_row(float* s, int64_t n, float* row_max, float* row_sum) {
  Vec peak = load(s);
  for (int64_t j = 0; j < n; j += kUnroll * kLanes) {
    Vec x[kUnroll];
#pragma GCC unroll 4
    for (int u = 0; u < kUnroll; ++u) x[u] = load(s + j + u * kLanes);
#pragma GCC unroll 4
    for (int u = 0; u < kUnroll; ++u) peak = max(peak, x[u]);
  }
  const float tile_max = reduce_max(peak);
  const float old_max = *row_max;
  const float new_max = tile_max > old_max ? tile_max : old_max;
  const float shift = new_max == -kInfinity ? 0.0f : new_max;  // a row without a key yet: exp(-inf - 0) = 0
  Vec sum = zero();
  for (int64_t j = 0; j < n; j += kUnroll * kLanes) {
    Vec p[kUnroll];
#pragma GCC unroll 4
    for (int u = 0; u < kUnroll; ++u) p[u] = exp_nonpositive(sub(load(s + j + u * kLanes), set1(shift)));
#pragma GCC unroll 4
    for (int u = 0; u < kUnroll; ++u) {
      store(s + j + u * kLanes, p[u]);
      sum = add(sum, p[u]);
    }
  }
  const float shrink = old_max == new_max ? 1.0f : first_lane(exp_nonpositive(set1(old_max - shift)));
  *row_max = new_max;
  *row_sum = *row_sum * shrink + reduce_add(sum);
  return shrink;
}

inline float mass_row(float* z, const float* log_n, int64_t n, float softcap, float* mass) {
  Vec peak = set1(-kInfinity);
  for (int64_t j = 0; j < n; j += kLanes) {
    const Vec value = finite_or(add(softcapped(load(z + j), softcap), load(log_n + j)), -kInfinity);
    store(z + j, value);
    peak = max(peak, value);
  }
  const float row_max = reduce_max(peak);
  if (row_max == -kInfinity) return -kInfinity;
  Vec sum = zero();
  for (int64_t j = 0; j < n; j += kLanes) {
    const Vec p = exp_nonpositive(sub(load(z + j), set1(row_max)));
    store(z + j, p);
    sum = add(sum, p);
  }
  const float row_sum = reduce_add(sum);
  const Vec inverse = set1(1.0f / row_sum);
  for (int64_t j = 0; j < n; j += kLanes) store(mass + j, fma(load(z + j), inverse, load(mass + j)));
  return row_max + __builtin_logf(row_sum);
}

// min(1, exp(x)) is exp(min(x, 0)); a NaN goes through and marks its key.
inline void bounded_exp_row(float* s, int64_t n, float softcap, float row_lse, float* mass) {
  for (int64_t j = 0; j < n; j += kLanes) {
    const Vec x = sub(softcapped(load(s + j), softcap), set1(row_lse));
    const Vec p = exp_nonpositive(select_less(zero(), x, zero(), x));
    store(mass + j, add(load(mass + j), p));
  }
}

}  // namespace dhsa::cpu::DHSA_ISA
