// Host helpers of the launchers: a dtype as a type, a head_dim as a constant, and a workspace handed out in pieces.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "dhsa.h"

namespace dhsa::cuda {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Calls f with a value of the tensor's element type.
template <class F>
cudaError_t with_dtype(DType dtype, F f) {
  switch (dtype) {
    case DType::kFloat32:
      return f(float());
    case DType::kFloat16:
      return f(__half());
    case DType::kBFloat16:
      return f(__nv_bfloat16());
    case DType::kInt32:
      break;
  }
  return cudaErrorInvalidValue;
}

// Calls f with the head_dim as a constant (`.value`), where kernels are compiled for it.
template <class F>
cudaError_t with_head_dim(int64_t head_dim, F f) {
  switch (head_dim) {
    case 64:
      return f(std::integral_constant<int, 64>());
    case 96:
      return f(std::integral_constant<int, 96>());
    case 128:
      return f(std::integral_constant<int, 128>());
    case 256:
      return f(std::integral_constant<int, 256>());
    default:
      return cudaErrorInvalidValue;
  }
}

// Pieces of a workspace, each 256-byte aligned. Built over null, it only counts: workspace_bytes() and run() share one
// layout function.
class Arena {
 public:
  explicit Arena(void* base) : base_(static_cast<char*>(base)) {}

  template <class T>
  T* take(int64_t count) {
    T* piece = base_ == nullptr ? nullptr : reinterpret_cast<T*>(base_ + used_);
    used_ += ceil_div(count * static_cast<int64_t>(sizeof(T)), 256) * 256;
    return piece;
  }
  int64_t used() const { return used_; }

 private:
  char* base_;
  int64_t used_ = 0;
};

// A contiguous tensor of up to five sizes.
template <class... Sizes>
Tensor contiguous(void* data, DType dtype, Sizes... sizes) {
  Tensor t;
  const int64_t shape[] = {static_cast<int64_t>(sizes)...};
  t.data = data, t.dtype = dtype, t.ndim = sizeof...(sizes);
  int64_t stride = 1;
  for (int d = t.ndim - 1; d >= 0; --d) t.shape[d] = shape[d], t.stride[d] = stride, stride *= shape[d];
  return t;
}

}  // namespace dhsa::cuda
