// Shared by the CUDA test programs: device buffers with guard zones, random tensors in both layouts, comparison, and
// graph timing. No torch: a program is nvcc's output and runs where a GPU is.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "cuda/dispatch.h"
#include "cuda/launch.h"

#define CUDA_CHECK(call)                                                                              \
  do {                                                                                                \
    const cudaError_t error_ = (call);                                                                \
    if (error_ != cudaSuccess) {                                                                      \
      std::fprintf(stderr, "%s:%d: %s: %s\n", __FILE__, __LINE__, #call, cudaGetErrorString(error_)); \
      std::exit(2);                                                                                   \
    }                                                                                                 \
  } while (0)

namespace dhsa::test {

inline std::mt19937& rng() {
  static std::mt19937 engine(20241123);
  return engine;
}
inline int64_t random_int(int64_t low, int64_t high) {  // inclusive
  return std::uniform_int_distribution<int64_t>(low, high)(rng());
}
inline float random_normal() { return std::normal_distribution<float>()(rng()); }

// Device memory that starts poisoned (0xff: NaN, -1) and ends in a guard zone that nobody may touch.
class Buffer {
 public:
  explicit Buffer(size_t bytes) : bytes_(bytes) {
    CUDA_CHECK(cudaMalloc(&data_, bytes_ + kGuard));
    poison();
  }
  Buffer(Buffer&& other) noexcept : data_(other.data_), bytes_(other.bytes_) { other.data_ = nullptr; }
  Buffer(const Buffer&) = delete;
  ~Buffer() {
    if (data_ != nullptr) cudaFree(data_);
  }
  void poison() { CUDA_CHECK(cudaMemset(data_, 0xff, bytes_ + kGuard)); }
  bool guard_intact() const {
    unsigned char guard[kGuard];
    CUDA_CHECK(cudaMemcpy(guard, static_cast<char*>(data_) + bytes_, kGuard, cudaMemcpyDeviceToHost));
    return std::all_of(guard, guard + kGuard, [](unsigned char byte) { return byte == 0xff; });
  }
  void* data() const { return data_; }
  template <class T>
  void upload(const std::vector<T>& host) {
    CUDA_CHECK(cudaMemcpy(data_, host.data(), std::min(bytes_, host.size() * sizeof(T)), cudaMemcpyHostToDevice));
  }
  template <class T>
  std::vector<T> download() const {
    std::vector<T> host(bytes_ / sizeof(T));
    CUDA_CHECK(cudaMemcpy(host.data(), data_, host.size() * sizeof(T), cudaMemcpyDeviceToHost));
    return host;
  }

 private:
  static constexpr size_t kGuard = 256;
  void* data_ = nullptr;
  size_t bytes_;
};

inline Buffer workspace(int64_t bytes) { return Buffer(static_cast<size_t>(std::max<int64_t>(bytes, 1))); }

enum class Layout { kHeadsFirst, kTokensFirst };  // [B, H, L, D] or [B, L, H, D] in memory

// A tensor [B, H, L, D] with its rounded values on the host, in the order of the shape whatever the layout.
struct Input {
  int64_t batch, heads, length, dim;
  Tensor view;
  Buffer buffer;
  std::vector<float> host;

  Input(int64_t b, int64_t h, int64_t l, int64_t d, DType dtype, Layout layout, bool keep_host = true)
      : batch(b), heads(h), length(l), dim(d), buffer(b * h * l * d * element_size(dtype)) {
    view = cuda::contiguous(buffer.data(), dtype, b, h, l, d);
    if (layout == Layout::kTokensFirst) view.stride[1] = d, view.stride[2] = h * d, view.stride[0] = l * h * d;
    fill(keep_host);
  }
  double at(int64_t b, int64_t h, int64_t l, int64_t d) const { return host[((b * heads + h) * length + l) * dim + d]; }

  // Fresh normal values; without a host copy, a repeated block of them (large timing inputs).
  void fill(bool keep_host = true) {
    const int64_t n = batch * heads * length * dim, period = keep_host ? n : std::min<int64_t>(n, 1000003);
    std::vector<float> values(period);
    for (float& x : values) x = random_normal();
    if (view.dtype == DType::kFloat32) {
      upload<float>(values, n, keep_host, [](float x) { return x; });
    } else if (view.dtype == DType::kFloat16) {
      upload<__half>(values, n, keep_host, [](float x) { return __float2half(x); });
    } else {
      upload<__nv_bfloat16>(values, n, keep_host, [](float x) { return __float2bfloat16(x); });
    }
  }

 private:
  template <class T, class Convert>
  void upload(const std::vector<float>& values, int64_t n, bool keep_host, Convert convert) {
    std::vector<T> memory(n), rounded(values.size());
    for (size_t i = 0; i < values.size(); ++i) rounded[i] = convert(values[i]);
    if (!keep_host) {
      for (int64_t i = 0; i < n; i += static_cast<int64_t>(rounded.size())) {
        std::copy_n(rounded.begin(), std::min<int64_t>(rounded.size(), n - i), memory.begin() + i);
      }
    } else {
      host.resize(n);
      int64_t i = 0;
      for (int64_t b = 0; b < batch; ++b)
        for (int64_t h = 0; h < heads; ++h)
          for (int64_t l = 0; l < length; ++l)
            for (int64_t d = 0; d < dim; ++d, ++i) {
              memory[b * view.stride[0] + h * view.stride[1] + l * view.stride[2] + d] = rounded[i];
              host[i] = static_cast<float>(rounded[i]);
            }
    }
    buffer.upload(memory);
  }
};

// A contiguous float or int tensor.
template <class T>
struct Array {
  Tensor view;
  Buffer buffer;

  template <class... Sizes>
  explicit Array(Sizes... sizes) : buffer((static_cast<int64_t>(sizes) * ... * 1) * sizeof(T)) {
    view = cuda::contiguous(buffer.data(), std::is_same_v<T, int> ? DType::kInt32 : DType::kFloat32, sizes...);
  }
  void set(const std::vector<T>& host) { buffer.upload(host); }
  std::vector<T> get() const { return buffer.template download<T>(); }
};

inline int& failures() {
  static int count = 0;
  return count;
}
inline int& checks() {
  static int count = 0;
  return count;
}

inline void expect(bool ok, const std::string& what) {
  ++checks();
  if (ok) return;
  ++failures();
  if (failures() <= 40) std::printf("FAIL %s\n", what.c_str());
}

// Scores and pooled vectors: |x - ref| <= 1e-4 + 1e-4 |ref|; -inf must meet -inf.
inline void expect_scores(const std::vector<float>& x, const std::vector<double>& ref, const std::string& what) {
  double worst = 0;
  for (size_t i = 0; i < ref.size(); ++i) {
    if (std::isinf(ref[i]) || std::isinf(x[i])) {
      if (x[i] != ref[i]) worst = INFINITY;
    } else {
      const double error = std::fabs(x[i] - ref[i]) / (1e-4 + 1e-4 * std::fabs(ref[i]));
      if (!(error <= worst)) worst = std::isnan(error) ? INFINITY : error;
    }
  }
  expect(worst <= 1, what + ": " + std::to_string(worst) + " of the tolerance");
}

template <class T>
void expect_equal(const std::vector<T>& x, const std::vector<T>& ref, const std::string& what) {
  for (size_t i = 0; i < ref.size(); ++i) {
    if (x[i] == ref[i]) continue;
    return expect(false, what + ": entry " + std::to_string(i) + " is " + std::to_string(x[i]) + ", not " +
                             std::to_string(ref[i]));
  }
  expect(x.size() >= ref.size(), what);
}

// The result of f's launches, run directly.
template <class Stage>
void run_stage(const Stage& stage, const std::string& what) {
  Buffer scratch = workspace(cuda::workspace_bytes(stage));
  CUDA_CHECK(cuda::run(stage, scratch.data(), nullptr));
  CUDA_CHECK(cudaDeviceSynchronize());
  expect(scratch.guard_intact(), what + ": wrote past its workspace");
}

// A captured graph of `repeats` calls of f(stream).
class Graph {
 public:
  Graph(int repeats, const std::function<void(cudaStream_t)>& f) : repeats_(repeats) {
    CUDA_CHECK(cudaStreamCreate(&stream_));
    cudaGraph_t graph;
    CUDA_CHECK(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeGlobal));
    for (int i = 0; i < repeats; ++i) f(stream_);
    CUDA_CHECK(cudaStreamEndCapture(stream_, &graph));
    CUDA_CHECK(cudaGraphInstantiate(&exec_, graph, 0));
    CUDA_CHECK(cudaGraphDestroy(graph));
  }
  ~Graph() {
    cudaGraphExecDestroy(exec_);
    cudaStreamDestroy(stream_);
  }
  void replay() {
    CUDA_CHECK(cudaGraphLaunch(exec_, stream_));
    CUDA_CHECK(cudaStreamSynchronize(stream_));
  }
  // Median microseconds of one call.
  double microseconds(int replays = 7) {
    cudaEvent_t start, stop;
    CUDA_CHECK(cudaEventCreate(&start));
    CUDA_CHECK(cudaEventCreate(&stop));
    replay();
    std::vector<float> times;
    for (int i = 0; i < replays; ++i) {
      CUDA_CHECK(cudaEventRecord(start, stream_));
      CUDA_CHECK(cudaGraphLaunch(exec_, stream_));
      CUDA_CHECK(cudaEventRecord(stop, stream_));
      CUDA_CHECK(cudaEventSynchronize(stop));
      float ms;
      CUDA_CHECK(cudaEventElapsedTime(&ms, start, stop));
      times.push_back(ms);
    }
    CUDA_CHECK(cudaEventDestroy(start));
    CUDA_CHECK(cudaEventDestroy(stop));
    std::sort(times.begin(), times.end());
    return times[times.size() / 2] * 1e3 / repeats_;
  }

 private:
  int repeats_;
  cudaStream_t stream_;
  cudaGraphExec_t exec_;
};

}  // namespace dhsa::test
