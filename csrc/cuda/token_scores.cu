// Stage 5: scores[b, s, i, t] = the score of the chunk that holds token t, -inf outside every chunk. A public, tested
// operator and the definition of stage 6; sparse_prefill and sparse_decode never materialise it.
#include <algorithm>

#include "cuda/device/chunks.h"
#include "cuda/dispatch.h"
#include "cuda/launch.h"

namespace dhsa::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kRows = 16;  // (selection head, query block) pairs of one thread block: one search serves them all

struct Params {
  const float* chunk_scores;  // [B, rows, C]
  const int *offsets, *num_chunks;
  float* scores;  // [B, rows, Lk]
  int capacity, seqlen_k;
  int64_t rows;  // S * nQ
};

// The chunk that holds `token`, or -1.
__device__ int chunk_of(const Chunks& chunks, int token) {
  int low = 0, high = chunks.count;  // the number of chunks that end at or before token lies in [low, high]
  while (low < high) {
    const int middle = (low + high) / 2;
    if (chunks.end(middle) <= token)
      low = middle + 1;
    else
      high = middle;
  }
  return low < chunks.count && chunks.begin(low) <= token ? low : -1;
}

__global__ void __launch_bounds__(kThreads) token_scores_kernel(Params p) {
  const int token = blockIdx.x * kThreads + threadIdx.x;
  if (token >= p.seqlen_k) return;
  const int64_t batch = blockIdx.z;
  const int chunk = chunk_of(Chunks(p.offsets, p.num_chunks, batch, p.capacity, p.seqlen_k), token);
  for (int64_t first = static_cast<int64_t>(blockIdx.y) * kRows; first < p.rows; first += int64_t{kRows} * gridDim.y) {
    for (int64_t i = first; i < min(first + kRows, p.rows); ++i) {
      const int64_t row = batch * p.rows + i;
      p.scores[row * p.seqlen_k + token] = chunk < 0 ? -INFINITY : p.chunk_scores[row * p.capacity + chunk];
    }
  }
}

}  // namespace

int64_t workspace_bytes(const TokenScores&) { return 0; }

cudaError_t run(const TokenScores& x, void*, cudaStream_t stream) {
  const Tensor& in = x.chunk_scores;
  const int64_t batch = in.shape[0], rows = in.shape[1] * in.shape[2];
  if (batch == 0 || rows == 0 || x.seqlen_k == 0) return cudaSuccess;
  const Params p = {in.as<float>(),
                    x.offsets.as<int>(),
                    x.num_chunks.as<int>(),
                    x.scores.as<float>(),
                    static_cast<int>(in.shape[3]),
                    static_cast<int>(x.seqlen_k),
                    rows};
  const dim3 grid(ceil_div(x.seqlen_k, kThreads), std::min<int64_t>(ceil_div(rows, kRows), 65535), batch);
  token_scores_kernel<<<grid, kThreads, 0, stream>>>(p);
  return cudaGetLastError();
}

}  // namespace dhsa::cuda
