// Types that every backend and adapter shares: a tensor that carries its shape, and the enums of the schemas.
#pragma once

#include <cstdint>

namespace dhsa {

enum class DType : int32_t { kFloat32, kFloat16, kBFloat16, kInt32 };

inline int64_t element_size(DType dtype) { return dtype == DType::kFloat32 || dtype == DType::kInt32 ? 4 : 2; }

// A strided view, owned by the adapter. Strides count elements. `data` may be null where the tensor has no element,
// or, for an optional argument, where it was not given (ndim is 0 then).
struct Tensor {
  void* data = nullptr;
  DType dtype = DType::kFloat32;
  int32_t ndim = 0;
  int64_t shape[5] = {0, 0, 0, 0, 0};
  int64_t stride[5] = {0, 0, 0, 0, 0};

  bool given() const { return ndim != 0; }
  template <class T>
  T* as() const {
    return static_cast<T*>(data);
  }
};

// chunk_pool: a chunk of n tokens gives sum / sqrt(n), sum / n or sum.
enum class PoolScale : int32_t { kSqrt, kMean, kSum };

// How a query block scores the chunks: chunk_scores ("dot") or chunk_mass ("mass").
enum class ChunkScore : int32_t { kDot, kMass };

// The rows by which chunk_mass and refine_keys know a query block. "sample": its last query and every q_stride-th
// before it. "mean": the means of the q_stride queries that end there, a block's first row of those it has; summed in
// float32 in order of position, divided, rounded to q's type.
enum class QueryRows : int32_t { kSample, kMean };

// The arguments of select_keys and refine_keys that say which keys a query block keeps.
struct KeyChoice {
  int64_t budget = 0;      // keys kept by a block, the forced ones included
  int64_t sink = 16;       // forced: keys [0, sink)
  int64_t local = 64;      // forced: keys >= p0 - local + 1
  int64_t window = 0;      // sliding window of the attention in keys; 0 = none
  int64_t dense_tail = 0;  // blocks that hold one of the last dense_tail queries keep every candidate
  int64_t min_chunk = 1;   // the caller's promise: no chunk is shorter
};

// The arguments that turn a product q.k into a logit, and the logit's reach.
struct Softmax {
  float scale = 1.0f;    // softmax_scale
  float softcap = 0.0f;  // logits become softcap * tanh(logit / softcap); 0 = off
  int64_t window = 0;    // query at p sees keys j with p - window < j <= p; 0 = every j <= p
};

}  // namespace dhsa
