// Stage 1: scores[b, t] = 1 - l.r / max(|l||r|, 1e-6), l and r the means of the `window` keys before and from t, all KV
// heads' channels concatenated; -inf where a whole window does not fit. float32; k is read once.
//
// A thread block scores 28 neighbouring tokens. Its 8 warps share the channels, four to a lane; a lane walks along the
// tokens and keeps, for each, its part of three sums: with s[t] = x[t] + ... + x[t + window - 1],
//   dot[t] = s[t - window].s[t],   left[t] = |s[t - window]|^2,   right[t] = |s[t]|^2 = left[t + window].
// 28 + window = 32 norms: one lane each after the reduction. Windows are summed afresh for every token, never updated
// by subtraction: a NaN or a huge key reaches only the 2 * window - 1 scores that contain it.
#include "cuda/device/load.h"
#include "cuda/device/scan.h"
#include "cuda/dispatch.h"
#include "cuda/launch.h"

namespace dhsa::cuda {
namespace {

constexpr int kTokens = 28;  // scored by one block
constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;

struct Params {
  const void* k;
  float* scores;
  int64_t stride_batch, stride_head, stride_token;
  int seqlen_k, head_dim, channels, window;
};

__device__ inline float4 operator+(float4 a, float4 b) {
  return make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w);
}
__device__ inline float dot4(float4 a, float4 b) { return a.x * b.x + a.y * b.y + a.z * b.z + a.w * b.w; }

// Lane i gets the sum of x[i] over the warp: 31 shuffles for 32 sums. A template, so that x stays in registers.
template <int kStep = 16>
__device__ inline float transpose_sum(float (&x)[32]) {
  const bool upper = lane_id() & kStep;
#pragma unroll
  for (int i = 0; i < kStep; ++i) {
    const float give = upper ? x[i] : x[i + kStep];
    const float keep = upper ? x[i + kStep] : x[i];
    x[i] = keep + __shfl_xor_sync(kFullWarp, give, kStep);
  }
  if constexpr (kStep > 1) return transpose_sum<kStep / 2>(x);
  return x[0];
}

// Four channels of one token as they lie in memory. The load is volatile assembly, or the compiler gathers all rows'
// loads at the top.
template <class T>
struct Row {
  uint32_t raw[sizeof(T)];

  __device__ void load(const T* p, bool inside) {
    for (uint32_t& word : raw) word = 0;
    if (!inside) return;
    if constexpr (sizeof(T) == 4) {
      asm volatile("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];"
                   : "=r"(raw[0]), "=r"(raw[1]), "=r"(raw[2]), "=r"(raw[3])
                   : "l"(p));
    } else {
      asm volatile("ld.global.nc.v2.u32 {%0, %1}, [%2];" : "=r"(raw[0]), "=r"(raw[1]) : "l"(p));
    }
  }
  __device__ float4 wide() const {
    float x[4];
    if constexpr (sizeof(T) == 4) {
      widen(make_uint4(raw[0], raw[1], raw[2], raw[3]), x);
    } else {
      widen_pair<T>(raw[0], x), widen_pair<T>(raw[1], x + 2);
    }
    return make_float4(x[0], x[1], x[2], x[3]);
  }
};

struct Sums {
  float dot[32] = {}, left[32] = {}, right[32] = {};
};

// Adds four channels' part, window a constant: rings of the last rows stay in registers. Rows come in batches of seven,
// the next batch on its way while this one is summed; all 35 at once would spill.
template <class T, int kWindow>
__device__ inline void add_channels(const T* k, int64_t stride_token, int first, int seqlen_k, Sums& sums) {
  static_assert(kTokens + kWindow <= 32, "one lane a norm");
  constexpr int kBatch = 7, kRows = kTokens + 2 * kWindow - 1;
  static_assert(kRows % kBatch == 0, "whole batches");
  Row<T> batch[2][kBatch];
  const auto load = [&](int row) {
    const int token = first - kWindow + row;
    batch[row / kBatch % 2][row % kBatch].load(k + token * stride_token, token >= 0 && token < seqlen_k);
  };
  float4 x[kWindow], s[kWindow + 1];
#pragma unroll
  for (int row = 0; row < kBatch; ++row) load(row);
#pragma unroll
  for (int row = 0; row < kRows; ++row) {
    if (row % kBatch == 0) {
#pragma unroll
      for (int next = row + kBatch; next < row + 2 * kBatch; ++next) {
        if (next < kRows) load(next);
      }
    }
    x[row % kWindow] = batch[row / kBatch % 2][row % kBatch].wide();
    const int t = row - kWindow + 1;  // the window that starts at row t is whole now
    if (t < 0) continue;
    float4& sum = s[t % (kWindow + 1)];
    sum = x[t % kWindow];
#pragma unroll
    for (int i = 1; i < kWindow; ++i) sum = sum + x[(t + i) % kWindow];
    sums.left[t] += dot4(sum, sum);
    if (t >= kWindow) sums.dot[t - kWindow] += dot4(s[(t + 1) % (kWindow + 1)], sum);
  }
}

// The same for any window, from the cache: 2 * window loads a token.
template <class T>
__device__ inline void add_channels(const T* k, int64_t stride_token, int first, int seqlen_k, int window, Sums& sums) {
#pragma unroll
  for (int t = 0; t < kTokens; ++t) {
    const int token = first + t;
    if (token < window || token > seqlen_k - window) continue;
    float4 l = make_float4(0, 0, 0, 0), r = l;
    for (int i = 0; i < window; ++i) {
      l = l + load4(k + (token - window + i) * stride_token);
      r = r + load4(k + (token + i) * stride_token);
    }
    sums.dot[t] += dot4(l, r), sums.left[t] += dot4(l, l), sums.right[t] += dot4(r, r);
  }
}

// kWindow = 0: window is a run-time number.
template <class T, int kWindow>
__global__ void __launch_bounds__(kThreads, 2) boundary_scores_kernel(Params p) {
  const int first = blockIdx.x * kTokens;
  const T* k = static_cast<const T*>(p.k) + blockIdx.y * p.stride_batch;
  Sums sums;
  for (int channel = threadIdx.x * 4; channel < p.channels; channel += kThreads * 4) {
    const T* column = k + channel / p.head_dim * p.stride_head + channel % p.head_dim;
    if constexpr (kWindow > 0) {
      add_channels<T, kWindow>(column, p.stride_token, first, p.seqlen_k, sums);
    } else {
      add_channels<T>(column, p.stride_token, first, p.seqlen_k, p.window, sums);
    }
  }

  __shared__ float parts[3][kWarps][32];
  parts[0][warp_id()][lane_id()] = transpose_sum(sums.dot);
  parts[1][warp_id()][lane_id()] = transpose_sum(sums.left);
  if constexpr (kWindow == 0) parts[2][warp_id()][lane_id()] = transpose_sum(sums.right);
  __syncthreads();

  const int t = threadIdx.x, token = first + t;
  if (t >= kTokens || token >= p.seqlen_k) return;
  float dot = 0, left = 0, right = 0;
  for (int w = 0; w < kWarps; ++w) {
    dot += parts[0][w][t], left += parts[1][w][t];
    right += kWindow > 0 ? parts[1][w][t + kWindow] : parts[2][w][t];
  }
  const bool whole = token >= p.window && token <= p.seqlen_k - p.window;
  const float square = static_cast<float>(p.window) * p.window;  // sums to means
  const float norms = fmaxf(sqrtf(left) * sqrtf(right) / square, 1e-6f);
  p.scores[static_cast<int64_t>(blockIdx.y) * p.seqlen_k + token] = whole ? 1.0f - dot / square / norms : -INFINITY;
}

}  // namespace

int64_t workspace_bytes(const BoundaryScores&) { return 0; }

cudaError_t run(const BoundaryScores& x, void*, cudaStream_t stream) {
  const int64_t batch = x.k.shape[0], heads = x.k.shape[1], seqlen_k = x.k.shape[2], head_dim = x.k.shape[3];
  if (batch == 0 || seqlen_k == 0) return cudaSuccess;
  Params p = {x.k.data,
              x.scores.as<float>(),
              x.k.stride[0],
              x.k.stride[1],
              x.k.stride[2],
              static_cast<int>(seqlen_k),
              static_cast<int>(head_dim),
              static_cast<int>(heads * head_dim),
              static_cast<int>(x.window)};
  const dim3 grid(ceil_div(seqlen_k, kTokens), batch);
  return with_dtype(x.k.dtype, [&](auto element) {
    using T = decltype(element);
    if (x.window == 4) {
      boundary_scores_kernel<T, 4><<<grid, kThreads, 0, stream>>>(p);
    } else {
      boundary_scores_kernel<T, 0><<<grid, kThreads, 0, stream>>>(p);
    }
    return cudaGetLastError();
  });
}

}  // namespace dhsa::cuda
