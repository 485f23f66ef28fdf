// 7. sparse_attention: only the switch, architecture x dtype x head_dim, and the plan for splitting long lists.
//
// An sm_90 GPU runs sm90/ (wgmma) if the build holds sm_90a code, every other GPU sm80/ (mma.sync); float32 runs a
// plain kernel. attention_kernel() (archs.cpp) chooses.
#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "cuda/attention_loader.h"
#include "cuda/device/run_walker.h"
#include "cuda/dispatch.h"
#include "cuda/launch.h"
#include "cuda/sm80/attention.h"
#include "cuda/sm90/attention.h"
#include "cuda/sm90/key_boxes.h"

namespace dhsa::cuda {

cudaError_t choose_kernels(bool* sm90) {
  int device = 0, major = 0, minor = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  if (error != cudaSuccess) return error;
  const char* kernel = attention_kernel(major, minor);
  if (kernel == nullptr) return cudaErrorNoKernelImageForDevice;
  *sm90 = std::strcmp(kernel, "sm90") == 0;
  return cudaSuccess;
}

namespace {

// dense_tail keeps every candidate of the blocks that hold the call's last queries, the paper preset those of the last
// 64: blocks from there on may be split. Partial answers get at most 16 MiB, which at 32 heads, head_dim 128 and
// q_block 128 is 8 items a list: at 128K keys each is as long as 8 ordinary items, started first.
constexpr int64_t kTailQueries = 64;
constexpr int64_t kPartialBytes = int64_t(16) << 20;
constexpr int64_t kMaxSplits = 32;
// A list is cut into shares no shorter than this: 4096 keys leave lists of an ordinary budget whole, and when the call
// has too few tiles to fill a GPU (decode, short pieces of a chunked prefill) every list may be cut, down to 128 keys.
constexpr int64_t kTailSplitKeys = 4096, kFewSplitKeys = 128, kFewTiles = 160;

struct SplitPlan {
  int64_t tail_blocks = 0, max_splits = 1, min_split_keys = kTailSplitKeys;
};

SplitPlan split_plan(const SparseAttention& x) {
  const int64_t batch = x.q.shape[0], heads = x.q.shape[1], seqlen_q = x.q.shape[2], head_dim = x.q.shape[3];
  const int64_t heads_kv = x.k.shape[1], seqlen_k = x.k.shape[2], select_heads = x.runs.shape[1];
  SplitPlan plan;
  if (batch * heads * seqlen_q == 0 || x.q.dtype == DType::kFloat32) return plan;
  const int64_t num_blocks = ceil_div(seqlen_q, x.q_block), lists = std::max(heads_kv, select_heads);
  const bool few = batch * lists * num_blocks * ceil_div(x.q_block * (heads / lists), 128) <= kFewTiles;
  if (few) plan.min_split_keys = kFewSplitKeys;
  plan.tail_blocks = few ? num_blocks : num_blocks - std::max<int64_t>(0, seqlen_q - kTailQueries) / x.q_block;
  const int64_t bytes = batch * heads * plan.tail_blocks * x.q_block * (head_dim + 1) * 4;
  plan.max_splits = std::min({kMaxSplits, kPartialBytes / bytes, ceil_div(seqlen_k, plan.min_split_keys)});
  if (plan.max_splits <= 1) plan = SplitPlan();
  return plan;
}

struct Partials {
  float *out, *lse;
  int32_t* split_count;
};

Partials partials(const SparseAttention& x, const SplitPlan& plan, Arena& arena) {
  const int64_t lists = x.q.shape[0] * std::max(x.k.shape[1], x.runs.shape[1]) * plan.tail_blocks;
  const int64_t group = x.q.shape[1] / std::max<int64_t>(1, std::max(x.k.shape[1], x.runs.shape[1]));
  const int64_t rows = lists * plan.max_splits * x.q_block * group;
  if (plan.tail_blocks == 0) return {};
  Partials p;
  p.out = arena.take<float>(rows * x.q.shape[3]);
  p.lse = arena.take<float>(rows);
  p.split_count = arena.take<int32_t>(lists * ceil_div(x.q_block * group, 64));  // a tile has 64 rows or more
  return p;
}

Strides strides(const Tensor& t) { return {t.stride[0], t.stride[1], t.stride[2]}; }

AttentionParams params(const SparseAttention& x, const SplitPlan& plan, const Partials& partial) {
  const int64_t heads = x.q.shape[1], heads_kv = x.k.shape[1], select_heads = x.runs.shape[1];
  const int64_t groups = std::max(heads_kv, select_heads), seqlen_k = x.k.shape[2];
  AttentionParams p = {};
  p.q = x.q.data, p.k = x.k.data, p.v = x.v.data, p.out = x.out.data, p.lse = x.lse.as<float>();
  p.runs = x.runs.as<int2>(), p.num_runs = x.num_runs.as<int32_t>();
  p.q_stride = strides(x.q), p.k_stride = strides(x.k), p.v_stride = strides(x.v), p.out_stride = strides(x.out);
  p.batch = int32_t(x.q.shape[0]), p.heads = int32_t(heads);
  p.seqlen_q = int32_t(x.q.shape[2]), p.seqlen_k = int32_t(seqlen_k);
  p.q_block = int32_t(x.q_block), p.num_blocks = int32_t(x.runs.shape[2]), p.run_capacity = int32_t(x.runs.shape[3]);
  p.group = int32_t(heads / groups), p.num_groups = int32_t(groups);
  p.groups_per_kv = int32_t(groups / heads_kv);
  p.select_heads = int32_t(select_heads), p.groups_per_list = int32_t(groups / select_heads);
  p.window = x.softmax.window < seqlen_k ? int32_t(x.softmax.window) : 0;  // a window as long as the keys hides none
  p.scale = x.softmax.scale, p.softcap = x.softmax.softcap;
  p.tail_blocks = int32_t(plan.tail_blocks), p.max_splits = int32_t(plan.max_splits);
  p.min_split_keys = int32_t(plan.min_split_keys);
  p.partial_out = partial.out, p.partial_lse = partial.lse, p.split_count = partial.split_count;
  return p;
}

// DHSA_FORCE_CUDA_LOADER, "auto" where it is not set.
const char* forced_loader() {
  const char* loader = std::getenv("DHSA_FORCE_CUDA_LOADER");
  return loader == nullptr || *loader == '\0' ? "auto" : loader;
}

// DHSA_CUDA_SM90: the build holds sm_90a code. Without it choose_kernels() never asks for these.
template <class T, int kHeadDim>
cudaError_t run_sm90([[maybe_unused]] AttentionParams& p, [[maybe_unused]] cudaStream_t stream) {
#ifdef DHSA_CUDA_SM90
  return sm90::attention<T, kHeadDim>(p, std::strcmp(forced_loader(), "gather") != 0, stream);
#else
  return cudaErrorNoKernelImageForDevice;
#endif
}

bool has_tensor_maps([[maybe_unused]] const Tensor& k, [[maybe_unused]] const Tensor& v) {
#ifdef DHSA_CUDA_SM90
  AttentionParams p = {};
  p.k = k.data, p.v = v.data, p.k_stride = strides(k), p.v_stride = strides(v);
  p.batch = int32_t(k.shape[0]), p.num_groups = int32_t(k.shape[1]), p.seqlen_k = int32_t(k.shape[2]);
  p.groups_per_kv = 1;
  return sm90::make_key_boxes(p, int(k.shape[3]), 32).usable != 0;
#else
  return false;
#endif
}

template <class T, int kHeadDim>
cudaError_t run_half(const AttentionParams& p, cudaStream_t stream) {
  bool sm90 = false;
  cudaError_t error = choose_kernels(&sm90);
  if (error != cudaSuccess) return error;
  const int rows = p.q_block * p.group;
  AttentionParams launched = p;
  if (sm90) {
    error = run_sm90<T, kHeadDim>(launched, stream);
  } else {
    error = sm80::attention<T, kHeadDim>(launched, kHeadDim == 256 || rows <= 64 ? 1 : 2, stream);
  }
  if (error != cudaSuccess || p.tail_blocks == 0) return error;
  return sm80::attention_combine<T, kHeadDim>(launched, stream);
}

template <class T>
cudaError_t run_half(const AttentionParams& p, int64_t head_dim, cudaStream_t stream) {
  return with_head_dim(head_dim, [&](auto dim) { return run_half<T, dim.value>(p, stream); });
}

cudaError_t run_float32(const AttentionParams& p, int64_t head_dim, cudaStream_t stream) {
  return with_head_dim(head_dim, [&](auto dim) { return sm80::attention_float32<dim.value>(p, stream); });
}

}  // namespace

std::string loader_refusal(const Tensor& k, const Tensor& v) {
  const std::string loader = forced_loader();
  if (loader == "auto" || loader == "gather") return "";
  const std::string variable = "DHSA_FORCE_CUDA_LOADER: expected ";
  if (loader != "tma") return variable + "auto, gather or tma, got '" + loader + "'";
  bool sm90 = false;
  const cudaError_t error = choose_kernels(&sm90);
  if (error != cudaSuccess || !sm90 || k.dtype == DType::kFloat32) {
    return variable + "auto or gather where the sm_90a kernel does not run, got 'tma'";
  }
  if (!has_tensor_maps(k, v)) {
    return variable + "auto or gather for k and v that no tensor map can describe, got 'tma'";
  }
  return "";
}

int64_t workspace_bytes(const SparseAttention& x) {
  Arena arena(nullptr);
  partials(x, split_plan(x), arena);
  return arena.used();
}

cudaError_t run(const SparseAttention& x, void* workspace, cudaStream_t stream) {
  const int64_t head_dim = x.q.shape[3];
  if (x.q.shape[0] * x.q.shape[1] * x.q.shape[2] == 0) return cudaSuccess;
  if (x.k.shape[2] > kMaxSeqlenK) return cudaErrorInvalidValue;
  if (!loader_refusal(x.k, x.v).empty()) return cudaErrorNotSupported;
  const SplitPlan plan = split_plan(x);
  Arena arena(workspace);
  const AttentionParams p = params(x, plan, partials(x, plan, arena));
  switch (x.q.dtype) {
    case DType::kFloat32:
      return run_float32(p, head_dim, stream);
    case DType::kFloat16:
      return run_half<__half>(p, head_dim, stream);
    case DType::kBFloat16:
      return run_half<__nv_bfloat16>(p, head_dim, stream);
    case DType::kInt32:
      break;
  }
  return cudaErrorInvalidValue;
}

}  // namespace dhsa::cuda
