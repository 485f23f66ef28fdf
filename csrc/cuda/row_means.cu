// QueryRows::kMean: the rows of every query block, each the mean of the q_stride queries that end where a sampled row
// would stand, as a tensor [B, H, nQ, samples, D] of q's type, counted back from the block's last. q is read once, 16
// bytes a lane, eight loads in flight; a sum runs in order of position, so that all backends have the same bits.
#include "cuda/device/load.h"
#include "cuda/device/sampled_rows.h"
#include "cuda/dispatch.h"
#include "cuda/launch.h"
#include "cuda/router.h"

namespace dhsa::cuda {
namespace {

constexpr int kThreads = 256, kBatch = 8;

struct Params {
  const void* q;
  void* rows;
  int64_t q_batch, q_head, q_token, total;  // 16-byte pieces of all rows
  SampledRows sampled;
  int heads, query_blocks, pieces;
};

template <class T>
__global__ void __launch_bounds__(kThreads) row_means_kernel(Params p) {
  const int64_t item = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (item >= p.total) return;
  int64_t row = item / p.pieces;
  const int piece = static_cast<int>(item % p.pieces), sample = static_cast<int>(row % p.sampled.samples);
  row /= p.sampled.samples;
  const int block = static_cast<int>(row % p.query_blocks), head = static_cast<int>(row / p.query_blocks % p.heads);
  const int64_t batch = row / p.query_blocks / p.heads;
  if (!p.sampled.used(block, sample)) return;
  const int last = p.sampled.query(block, sample);
  const int first = max(last - p.sampled.q_stride + 1, block * p.sampled.q_block);
  const T* q = static_cast<const T*>(p.q) + batch * p.q_batch + head * p.q_head + first * p.q_token + piece * kVec<T>;
  const int queries = last - first + 1;
  float sum[kVec<T>] = {};
  for (int done = 0; done < queries; done += kBatch) {
    uint4 raw[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      if (done + i < queries) raw[i] = load16(q + (done + i) * p.q_token);
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      if (done + i >= queries) break;
      float x[kVec<T>];
      widen<T>(raw[i], x);
#pragma unroll
      for (int j = 0; j < kVec<T>; ++j) sum[j] += x[j];
    }
  }
  T* to = static_cast<T*>(p.rows) + item * kVec<T>;
#pragma unroll
  for (int j = 0; j < kVec<T>; ++j) from_float(__fdiv_rn(sum[j], static_cast<float>(queries)), to + j);
}

}  // namespace

int64_t row_means_bytes(const Tensor& q, int64_t q_block, int64_t q_stride) {
  return q.shape[0] * q.shape[1] * ceil_div(q.shape[2], q_block) * ceil_div(q_block, q_stride) * q.shape[3] *
         element_size(q.dtype);
}

cudaError_t run_row_means(const Tensor& q, int64_t q_block, int64_t q_stride, void* rows, cudaStream_t stream) {
  Params p = {};
  p.q = q.data, p.rows = rows, p.q_batch = q.stride[0], p.q_head = q.stride[1], p.q_token = q.stride[2];
  p.sampled = sampled_rows(q.shape[2], q_block, q_stride);
  p.heads = static_cast<int>(q.shape[1]), p.query_blocks = static_cast<int>(ceil_div(q.shape[2], q_block));
  p.pieces = static_cast<int>(q.shape[3] * element_size(q.dtype) / 16);
  p.total = row_means_bytes(q, q_block, q_stride) / 16;
  if (p.total == 0) return cudaSuccess;
  return with_dtype(q.dtype, [&](auto element) {
    row_means_kernel<decltype(element)><<<ceil_div(p.total, kThreads), kThreads, 0, stream>>>(p);
    return cudaGetLastError();
  });
}

}  // namespace dhsa::cuda
