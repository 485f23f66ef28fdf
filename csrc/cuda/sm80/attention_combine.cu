// Merges the partial answers of key lists that were split among thread blocks:
//
//   lse = ln sum_s e^lse_s,   out = sum_s e^(lse_s - lse) out_s
//
// A warp per row of the tail blocks; rows whose list was not split were written already and are left alone.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cuda/device/softmax.h"
#include "cuda/sm80/attention.h"

namespace dhsa::cuda::sm80 {
namespace {

constexpr int kWarps = 8;

__device__ void store(__nv_bfloat16* out, float x) { *out = __float2bfloat16(x); }
__device__ void store(__half* out, float x) { *out = __float2half(x); }

template <class T, int kHeadDim>
__global__ void __launch_bounds__(32 * kWarps) combine_kernel(const AttentionParams p) {
  const int32_t lane = threadIdx.x % 32;
  int64_t index = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32;
  const int64_t rows = int64_t(p.q_block) * p.group;
  if (index >= rows * p.tail_blocks * p.num_groups * p.batch) return;
  const int32_t row = int32_t(index % rows);
  const int64_t list = index / rows;  // [B, num_groups, tail_blocks]
  const int32_t tail_block = int32_t(list % p.tail_blocks);
  const int32_t group = int32_t(list / p.tail_blocks % p.num_groups);
  const int32_t batch = int32_t(list / p.tail_blocks / p.num_groups);
  const int32_t token = (p.num_blocks - p.tail_blocks + tail_block) * p.q_block + row / p.group;
  if (token >= p.seqlen_q) return;
  const int32_t splits = p.split_count[list * p.block_tiles + row / p.block_rows];
  if (splits <= 1) return;

  const int64_t first = list * p.max_splits * rows + row;
  const float mine = lane < splits ? p.partial_lse[first + lane * rows] : -INFINITY;  // max_splits <= 32
  float top = mine;
#pragma unroll
  for (int32_t step = 16; step > 0; step /= 2) top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, step));
  float weight = mine == -INFINITY ? 0.0f : __expf(mine - top);
  float sum = weight;
#pragma unroll
  for (int32_t step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
  weight *= sum > 0.0f ? 1.0f / sum : 0.0f;

  float out[kHeadDim / 32] = {};
  for (int32_t s = 0; s < splits; ++s) {
    const float by = __shfl_sync(0xffffffffu, weight, s);
    const float* partial = p.partial_out + (first + s * rows) * kHeadDim;
#pragma unroll
    for (int32_t i = 0; i < kHeadDim / 32; ++i) out[i] += by * partial[32 * i + lane];
  }
  const int32_t head = group * p.group + row % p.group;
  T* place = static_cast<T*>(p.out) + batch * p.out_stride.batch + head * p.out_stride.head + token * p.out_stride.row;
#pragma unroll
  for (int32_t i = 0; i < kHeadDim / 32; ++i) store(place + 32 * i + lane, out[i]);
  if (lane == 0) {
    p.lse[(int64_t(batch) * p.heads + head) * p.seqlen_q + token] = sum > 0.0f ? top + __logf(sum) : -INFINITY;
  }
}

}  // namespace

template <class T, int kHeadDim>
cudaError_t attention_combine(const AttentionParams& p, cudaStream_t stream) {
  const int64_t rows = int64_t(p.batch) * p.num_groups * p.tail_blocks * p.q_block * p.group;
  if (rows == 0) return cudaSuccess;
  const int64_t blocks = (rows + kWarps - 1) / kWarps;
  combine_kernel<T, kHeadDim><<<unsigned(blocks), 32 * kWarps, 0, stream>>>(p);
  return cudaGetLastError();
}

template cudaError_t attention_combine<__nv_bfloat16, 64>(const AttentionParams&, cudaStream_t);
template cudaError_t attention_combine<__nv_bfloat16, 96>(const AttentionParams&, cudaStream_t);
template cudaError_t attention_combine<__nv_bfloat16, 128>(const AttentionParams&, cudaStream_t);
template cudaError_t attention_combine<__nv_bfloat16, 256>(const AttentionParams&, cudaStream_t);
template cudaError_t attention_combine<__half, 64>(const AttentionParams&, cudaStream_t);
template cudaError_t attention_combine<__half, 96>(const AttentionParams&, cudaStream_t);
template cudaError_t attention_combine<__half, 128>(const AttentionParams&, cudaStream_t);
template cudaError_t attention_combine<__half, 256>(const AttentionParams&, cudaStream_t);

}  // namespace dhsa::cuda::sm80
