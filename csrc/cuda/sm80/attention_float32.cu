// sparse_attention for float32 inputs, for correctness only: a warp per query row walks the row's keys one at a time
// with an online softmax; lanes share the head dimension. A row with no key gives out 0, lse -inf.
#include "cuda/device/softmax.h"
#include "cuda/sm80/attention.h"

namespace dhsa::cuda::sm80 {
namespace {

constexpr int kWarps = 8;

__device__ float warp_sum(float x) {
#pragma unroll
  for (int32_t step = 16; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
  return x;
}

template <int kHeadDim>
__global__ void __launch_bounds__(32 * kWarps) float32_kernel(const AttentionParams p) {
  constexpr int kPerLane = kHeadDim / 32;
  const int32_t lane = threadIdx.x % 32;
  const int64_t index = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32;  // [B, H, Lq]
  if (index >= int64_t(p.batch) * p.heads * p.seqlen_q) return;
  const int32_t token = int32_t(index % p.seqlen_q);
  const int32_t head = int32_t(index / p.seqlen_q % p.heads);
  const int64_t batch = index / p.seqlen_q / p.heads;
  const int32_t group = head / p.group, kv_head = group / p.groups_per_kv;
  const int32_t position = p.seqlen_k - p.seqlen_q + token;

  const float* q =
      static_cast<const float*>(p.q) + batch * p.q_stride.batch + head * p.q_stride.head + token * p.q_stride.row;
  const float* k = static_cast<const float*>(p.k) + batch * p.k_stride.batch + kv_head * p.k_stride.head;
  const float* v = static_cast<const float*>(p.v) + batch * p.v_stride.batch + kv_head * p.v_stride.head;
  const int64_t list = (batch * p.select_heads + group / p.groups_per_list) * p.num_blocks + token / p.q_block;
  const int32_t num_runs = max(0, min(p.num_runs[list], p.run_capacity));
  const int32_t key_end = max(0, min(p.seqlen_k, position + 1));
  const int32_t key_begin = p.window > 0 ? max(0, position - p.window + 1) : 0;

  float rq[kPerLane], o[kPerLane] = {};
#pragma unroll
  for (int32_t i = 0; i < kPerLane; ++i) rq[i] = q[32 * i + lane];
  float row_max = kNoMax, row_sum = 0.0f;
  for (int32_t run = 0; run < num_runs; ++run) {
    const int2 keys = p.runs[list * p.run_capacity + run];
    for (int32_t j = max(keys.x, key_begin); j < min(keys.y, key_end); ++j) {
      float dot = 0.0f;
#pragma unroll
      for (int32_t i = 0; i < kPerLane; ++i) dot += rq[i] * k[j * p.k_stride.row + 32 * i + lane];
      float logit = warp_sum(dot) * p.scale;
      if (p.softcap > 0.0f) logit = p.softcap * tanhf(logit / p.softcap);
      const float new_max = fmaxf(row_max, logit);
      const float rescale = expf(row_max - new_max), weight = expf(logit - new_max);
      row_sum = row_sum * rescale + weight;
      row_max = new_max;
#pragma unroll
      for (int32_t i = 0; i < kPerLane; ++i) o[i] = o[i] * rescale + weight * v[j * p.v_stride.row + 32 * i + lane];
    }
  }

  float* out =
      static_cast<float*>(p.out) + batch * p.out_stride.batch + head * p.out_stride.head + token * p.out_stride.row;
#pragma unroll
  for (int32_t i = 0; i < kPerLane; ++i) out[32 * i + lane] = row_sum != 0.0f ? o[i] / row_sum : 0.0f;
  if (lane == 0) p.lse[index] = row_sum != 0.0f ? row_max + logf(row_sum) : -INFINITY;  // NaN stays NaN
}

}  // namespace

template <int kHeadDim>
cudaError_t attention_float32(const AttentionParams& p, cudaStream_t stream) {
  const int64_t rows = int64_t(p.batch) * p.heads * p.seqlen_q;
  const int64_t blocks = (rows + kWarps - 1) / kWarps;
  if (blocks > 0x7fffffff) return cudaErrorInvalidValue;
  float32_kernel<kHeadDim><<<unsigned(blocks), 32 * kWarps, 0, stream>>>(p);
  return cudaGetLastError();
}

template cudaError_t attention_float32<64>(const AttentionParams&, cudaStream_t);
template cudaError_t attention_float32<96>(const AttentionParams&, cudaStream_t);
template cudaError_t attention_float32<128>(const AttentionParams&, cudaStream_t);
template cudaError_t attention_float32<256>(const AttentionParams&, cudaStream_t);

}  // namespace dhsa::cuda::sm80
