// The ops on CUDA tensors: torch's current stream and device, torch's memory, the core's kernels. The schemas are
// dhsa_ext/ops.py's.
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <cstdlib>

#include "cuda/attention_loader.h"
#include "cuda/launch.h"
#include "torch/ops.h"

namespace dhsa::adapter {
namespace {

void check_cuda(cudaError_t error, const char* what) {
  if (error != cudaSuccess) throw std::runtime_error(std::string("dhsa: ") + what + ": " + cudaGetErrorString(error));
}

// Looked up at run time in the CUDA torch already loaded: the library then also loads beside a CPU-only torch. By the
// name of torch's library, because Python loads it with local scope, where RTLD_DEFAULT does not look.
cudaStream_t current_stream(int32_t device) {
  using Getter = AOTITorchError (*)(int32_t, void**);
  static const Getter getter = [] {
    void* torch_cuda = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return torch_cuda == nullptr ? nullptr
                                 : reinterpret_cast<Getter>(dlsym(torch_cuda, "aoti_torch_get_current_cuda_stream"));
  }();
  void* stream = nullptr;
  if (getter == nullptr || getter(device, &stream) != 0) {
    throw std::runtime_error("dhsa: expected a torch with CUDA that gives its current stream, got none");
  }
  return static_cast<cudaStream_t>(stream);
}

// One sentence before the first launch where no compiled arch runs on the GPU that is there, or not the forced kernel.
void check_device(int32_t device) {
  static thread_local int32_t checked = -1, major = 0, minor = 0;
  if (checked != device) {
    check_cuda(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "compute capability");
    check_cuda(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device), "compute capability");
    checked = device;
  }
  const std::string gpu = std::to_string(major) + std::to_string(minor);
  const std::string archs = cuda::archs_compiled();
  if (!cuda::device_supported(major, minor)) {
    throw std::runtime_error("dhsa: expected a GPU of the compiled architectures " + archs + ", got sm_" + gpu +
                             ": rebuild with DHSA_CUDA_ARCHS=" + gpu + (gpu == "90" ? "a" : ""));
  }
  if (cuda::attention_kernel(major, minor) == nullptr) {
    throw std::runtime_error(
        "dhsa: DHSA_FORCE_CUDA_KERNEL: expected sm80, or sm90 on an sm_90 GPU with 90a compiled, got '" +
        std::string(std::getenv("DHSA_FORCE_CUDA_KERNEL")) + "' on sm_" + gpu + " with " + archs);
  }
}

void check_head_dim(const char* op, const Tensor& x) {
  const int64_t head_dim = x.shape[3];
  if (head_dim != 64 && head_dim != 96 && head_dim != 128 && head_dim != 256) {
    fail(std::string(op) + ": q: expected a head_dim of 64, 96, 128 or 256 on CUDA, got " + std::to_string(head_dim));
  }
}

void check_q_block(const char* op, int64_t q_block) {
  if (q_block != 1 && q_block != 16 && q_block != 32 && q_block != 64 && q_block != 128) {
    fail(std::string(op) + ": q_block: expected 16, 32, 64, 128, or 1 in decode, on CUDA, got " +
         std::to_string(q_block));
  }
}

// What CUDA asks beyond the core's check().
template <class Params>
void check_on_cuda(const Params&) {}
void check_on_cuda(const ChunkMass& p) { check_head_dim("chunk_mass", p.q); }
void check_on_cuda(const RefineKeys& p) { check_head_dim("refine_keys", p.q); }
void check_on_cuda(const SparseAttention& p) {
  check_head_dim("sparse_attention", p.q);
  check_q_block("sparse_attention", p.q_block);
}
void check_on_cuda(const SparsePrefill& p) {
  check_head_dim("sparse_prefill", p.q);
  check_q_block("sparse_prefill", p.q_block);
}
void check_on_cuda(const SparseDecode& p) { check_head_dim("sparse_decode", p.q); }

// Refuses a forced loader that these keys and values cannot have; a call without queries launches nothing.
template <class Params>
void check_loader(const Params&) {}
void check_loader(const Tensor& q, const Tensor& k, const Tensor& v) {
  if (q.shape[0] * q.shape[1] * q.shape[2] == 0) return;
  const std::string refusal = cuda::loader_refusal(k, v);
  if (!refusal.empty()) throw std::runtime_error("dhsa: " + refusal);
}
void check_loader(const SparseAttention& p) { check_loader(p.q, p.k, p.v); }
void check_loader(const SparsePrefill& p) { check_loader(p.q, p.k, p.v); }

struct Cuda {
  template <class Params>
  static void run(const Params& p, const TorchTensor& like) {
    check_on_cuda(p);
    const int32_t device = like.get_device_index();
    const torch::stable::accelerator::DeviceGuard guard(device);
    check_device(device);
    check_loader(p);
    const int64_t bytes = cuda::workspace_bytes(p);
    const TorchTensor workspace = empty(like, {bytes}, ScalarType::Byte);
    check_cuda(cuda::run(p, bytes > 0 ? workspace.data_ptr() : nullptr, current_stream(device)), "launch");
  }
};

using CudaOps = Ops<Cuda>;

STABLE_TORCH_LIBRARY_IMPL(dhsa, CUDA, m) {
  m.impl("boundary_scores", TORCH_BOX(&CudaOps::boundary_scores));
  m.impl("boundary_logits", TORCH_BOX(&CudaOps::boundary_logits));
  m.impl("select_boundaries", TORCH_BOX(&CudaOps::select_boundaries));
  m.impl("chunk_pool", TORCH_BOX(&CudaOps::chunk_pool));
  m.impl("query_pool", TORCH_BOX(&CudaOps::query_pool));
  m.impl("chunk_scores", TORCH_BOX(&CudaOps::chunk_scores));
  m.impl("token_scores", TORCH_BOX(&CudaOps::token_scores));
  m.impl("select_keys", TORCH_BOX(&CudaOps::select_keys));
  m.impl("chunk_mass", TORCH_BOX(&CudaOps::chunk_mass));
  m.impl("refine_keys", TORCH_BOX(&CudaOps::refine_keys));
  m.impl("sparse_attention", TORCH_BOX(&CudaOps::sparse_attention));
  m.impl("sparse_prefill", TORCH_BOX(&CudaOps::sparse_prefill));
  m.impl("sparse_decode", TORCH_BOX(&CudaOps::sparse_decode));
}

}  // namespace
}  // namespace dhsa::adapter
