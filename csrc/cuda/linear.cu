// c = a . b^T + bias in float32 on the tensor cores, by three TF32 products (two where a is exact in TF32).
//
// A block computes 128 x 128 with 8 warps of 64 x 32, over k in steps of 32: cp.async into two shared buffers, one
// loading while the other is multiplied. A row of c depends on its own row of a alone, NaN included.
#include "cuda/device/cp_async.h"
#include "cuda/device/scan.h"
#include "cuda/device/tf32.h"
#include "cuda/dispatch.h"
#include "cuda/linear.h"

namespace dhsa::cuda {
namespace {

constexpr int kBlockM = 128, kBlockN = 128, kBlockK = 32;
constexpr int kStride = kBlockK + 4;  // floats a row: fragment reads (8 rows x 4 columns) touch each bank once
constexpr int kThreads = 256;
constexpr int kWarpM = 64, kWarpN = 32, kWarpsN = kBlockN / kWarpN;

struct Tiles {
  float a[2][kBlockM][kStride], b[2][kBlockN][kStride];
};

// Rows [0, rows) and columns [column, column + 32) of src, zeros beyond.
template <int kRows>
__device__ inline void copy_tile(float (*to)[kStride], const float* src, int64_t row_stride, int rows, int columns,
                                 int column) {
  constexpr int kPieces = kBlockK / 4;
#pragma unroll
  for (int i = threadIdx.x; i < kRows * kPieces; i += kThreads) {
    const int row = i / kPieces, x = i % kPieces * 4;
    const bool valid = row < rows && column + x < columns;
    cp_async_16(smem_address(&to[row][x]), valid ? src + row * row_stride + column + x : src, valid);
  }
}

template <bool kExactA>
__device__ inline void multiply(const float (*a)[kStride], const float (*b)[kStride], float (&acc)[4][4][4]) {
  const int group = lane_id() / 4, member = lane_id() % 4;
#pragma unroll
  for (int column = 0; column < kBlockK; column += 8) {
    uint32_t b_hi[4][2], b_lo[4][2];
#pragma unroll
    for (int n = 0; n < 4; ++n) {
#pragma unroll
      for (int i = 0; i < 2; ++i) split(b[n * 8 + group][column + member + i * 4], b_hi[n][i], b_lo[n][i]);
    }
#pragma unroll
    for (int m = 0; m < 4; ++m) {
      uint32_t a_hi[4], a_lo[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float x = a[m * 16 + group + i % 2 * 8][column + member + i / 2 * 4];
        if constexpr (kExactA) {
          a_hi[i] = __float_as_uint(x);
        } else {
          split(x, a_hi[i], a_lo[i]);
        }
      }
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        if constexpr (!kExactA) mma_tf32(acc[m][n], a_lo, b_hi[n]);
        mma_tf32(acc[m][n], a_hi, b_lo[n]);
        mma_tf32(acc[m][n], a_hi, b_hi[n]);
      }
    }
  }
}

template <bool kExactA>
__global__ void __launch_bounds__(kThreads, 2) linear_kernel(Linear p) {
  extern __shared__ char shared[];
  Tiles& tiles = *reinterpret_cast<Tiles*>(shared);
  const int64_t row0 = static_cast<int64_t>(blockIdx.y) * kBlockM, column0 = static_cast<int64_t>(blockIdx.x) * kBlockN;
  const int rows = min(kBlockM, static_cast<int>(p.m - row0)), columns = min(kBlockN, static_cast<int>(p.n - column0));
  const float* a = p.a + blockIdx.z * p.a_batch + row0 * p.a_row;
  const float* b = p.b + blockIdx.z * p.b_batch + column0 * p.b_row;

  const auto load = [&](int step) {
    copy_tile<kBlockM>(tiles.a[step % 2], a, p.a_row, rows, p.k, step * kBlockK);
    copy_tile<kBlockN>(tiles.b[step % 2], b, p.b_row, columns, p.k, step * kBlockK);
    cp_async_commit();
  };
  const int warp_m = warp_id() / kWarpsN * kWarpM, warp_n = warp_id() % kWarpsN * kWarpN;
  float acc[4][4][4] = {};
  const int steps = (p.k + kBlockK - 1) / kBlockK;
  load(0);
  for (int step = 0; step < steps; ++step) {
    if (step + 1 < steps) {
      load(step + 1);
      cp_async_wait<1>();
    } else {
      cp_async_wait<0>();
    }
    __syncthreads();
    multiply<kExactA>(tiles.a[step % 2] + warp_m, tiles.b[step % 2] + warp_n, acc);
    __syncthreads();
  }

  float* c = p.c + blockIdx.z * p.c_batch + row0 * p.c_row + column0;
#pragma unroll
  for (int n = 0; n < 4; ++n) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int column = warp_n + n * 8 + lane_id() % 4 * 2 + i;
      if (column >= columns) continue;
      const float bias = p.bias == nullptr ? 0.0f : __ldg(p.bias + column0 + column);
#pragma unroll
      for (int m = 0; m < 4; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int row = warp_m + m * 16 + lane_id() / 4 + half * 8;
          if (row < rows) c[row * p.c_row + column] = acc[m][n][half * 2 + i] + bias;
        }
      }
    }
  }
}

template <bool kExactA>
cudaError_t launch(const Linear& p, cudaStream_t stream) {
  const cudaError_t error =
      cudaFuncSetAttribute(linear_kernel<kExactA>, cudaFuncAttributeMaxDynamicSharedMemorySize, sizeof(Tiles));
  if (error != cudaSuccess) return error;
  const dim3 grid(ceil_div(p.n, kBlockN), ceil_div(p.m, kBlockM), p.batches);
  linear_kernel<kExactA><<<grid, kThreads, sizeof(Tiles), stream>>>(p);
  return cudaGetLastError();
}

}  // namespace

cudaError_t run_linear(const Linear& p, cudaStream_t stream) {
  if (p.m == 0 || p.n == 0 || p.batches == 0) return cudaSuccess;
  return p.a_is_16_bit ? launch<true>(p, stream) : launch<false>(p, stream);
}

}  // namespace dhsa::cuda
