// The torch ops over any backend of the core: convert, check, allocate, run. Written once; cpu.cpp and cuda.cpp supply
// `Backend` and register the result. LibTorch stable ABI, so that one binary serves every torch from 2.10 on.
//
// Backend::run(params, like) lends the stage its workspace, on the device of the tensor `like`, and its threads or its
// stream.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "dhsa.h"

namespace dhsa::adapter {

using TorchTensor = torch::stable::Tensor;
using MaybeTensor = std::optional<TorchTensor>;
using torch::headeronly::ScalarType;

[[noreturn]] inline void fail(const std::string& sentence) { throw std::invalid_argument("dhsa::" + sentence); }

inline std::string device_name(const TorchTensor& x) {
  return x.is_cpu() ? "cpu" : x.is_cuda() ? "cuda:" + std::to_string(x.get_device_index()) : "another device";
}

// What torch's C interface returns; the macro for it has another name in torch 2.10.
inline void expect_done(AOTITorchError error, const char* what) {
  if (error != 0) throw std::runtime_error(std::string("dhsa: torch: ") + what + " failed");
}

template <class Result>
Result call_aten(const char* op, const TorchTensor& x) {
  StableIValue stack[] = {torch::stable::detail::from(x)};
  expect_done(torch_call_dispatcher(op, "", stack, TORCH_ABI_VERSION), op);
  return torch::stable::detail::to<Result>(stack[0]);
}

// In grad mode. The stable ABI has no getter, but a view of a tensor is a leaf unless gradients flow through it.
inline bool requires_grad(const TorchTensor& x) {
  return !call_aten<bool>("aten::is_leaf", call_aten<TorchTensor>("aten::alias", x));
}

// One op's view of its arguments: converts tensors, holds them all to the first one's device, and refuses those that
// require grad: the ops have no kernel of autograd's own (dhsa_ext/ops.py).
class Arguments {
 public:
  explicit Arguments(const char* op) : op_(op), grad_mode_(aoti_torch_grad_mode_is_enabled()) {}

  Tensor operator()(const char* argument, const TorchTensor& x) {
    const std::string device = device_name(x);
    if (device_.empty()) device_ = device;
    if (device != device_) fail(where(argument) + "expected a tensor on " + device_ + ", got one on " + device);
    if (grad_mode_ && x.scalar_type() != ScalarType::Int && requires_grad(x)) {
      throw std::runtime_error("dhsa::" + where(argument) +
                               "expected an input that does not require grad (the op is forward only), got one that "
                               "does: call it under torch.no_grad() or detach it");
    }
    if (x.dim() > 5) fail(where(argument) + "expected at most 5 dimensions, got " + std::to_string(x.dim()));
    return view(argument, x);
  }
  Tensor operator()(const char* argument, const MaybeTensor& x) { return x ? (*this)(argument, *x) : Tensor{}; }

  Tensor view(const char* argument, const TorchTensor& x) const {
    Tensor t;
    t.data = x.data_ptr();
    t.dtype = dtype(argument, x.scalar_type());
    t.ndim = static_cast<int32_t>(x.dim());
    for (int32_t i = 0; i < t.ndim; ++i) {
      t.shape[i] = x.size(i);
      t.stride[i] = x.stride(i);
    }
    return t;
  }

  template <class Enum>
  Enum word(const char* argument, const std::string& value, std::initializer_list<std::pair<const char*, Enum>> words) {
    std::string known;
    for (const auto& [name, meaning] : words) {
      if (value == name) return meaning;
      known += std::string(known.empty() ? "'" : ", '") + name + "'";
    }
    fail(where(argument) + "expected one of " + known + ", got '" + value + "'");
  }

  int64_t window(const std::optional<int64_t>& window) const {
    if (window && *window < 1) fail(where("window") + "expected an integer >= 1, got " + std::to_string(*window));
    return window.value_or(0);
  }

 private:
  std::string where(const char* argument) const { return std::string(op_) + ": " + argument + ": "; }

  DType dtype(const char* argument, ScalarType type) const {
    switch (type) {
      case ScalarType::Float:
        return DType::kFloat32;
      case ScalarType::Half:
        return DType::kFloat16;
      case ScalarType::BFloat16:
        return DType::kBFloat16;
      case ScalarType::Int:
        return DType::kInt32;
      default:
        fail(where(argument) + "expected float32, float16, bfloat16 or int32, got " +
             torch::headeronly::toString(type));
    }
  }

  const char* op_;
  bool grad_mode_;
  std::string device_;
};

inline PoolScale pool_scale(Arguments& args, const char* argument, const std::string& value) {
  return args.word<PoolScale>(argument, value,
                              {{"sqrt", PoolScale::kSqrt}, {"mean", PoolScale::kMean}, {"sum", PoolScale::kSum}});
}

inline ChunkScore chunk_score(Arguments& args, const std::string& value) {
  return args.word<ChunkScore>("score", value, {{"dot", ChunkScore::kDot}, {"mass", ChunkScore::kMass}});
}

inline QueryRows query_rows(Arguments& args, const std::string& value) {
  return args.word<QueryRows>("rows", value, {{"sample", QueryRows::kSample}, {"mean", QueryRows::kMean}});
}

inline Softmax softmax(const Tensor& q, std::optional<double> scale, double softcap, int64_t window) {
  const int64_t head_dim = q.ndim == 4 && q.shape[3] > 0 ? q.shape[3] : 1;
  return {static_cast<float>(scale.value_or(1.0 / std::sqrt(static_cast<double>(head_dim)))),
          static_cast<float>(softcap), window};
}

inline float threshold_or_none(std::optional<double> threshold) {
  return static_cast<float>(threshold.value_or(-std::numeric_limits<double>::infinity()));
}

inline int64_t num_blocks(int64_t n, int64_t block) { return (n + block - 1) / block; }

// Contiguous, on the device of `like`; past torch's dispatcher, which would take 1 µs.
inline TorchTensor empty(const TorchTensor& like, const std::vector<int64_t>& shape, ScalarType type) {
  std::vector<int64_t> stride(shape.size(), 1);
  for (size_t i = shape.size(); i-- > 1;) stride[i - 1] = stride[i] * std::max<int64_t>(1, shape[i]);
  int32_t device_type = 0, device_index = 0;
  expect_done(aoti_torch_get_device_type(like.get(), &device_type), "device type");
  expect_done(aoti_torch_get_device_index(like.get(), &device_index), "device index");
  const auto dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
  AtenTensorHandle result = nullptr;
  expect_done(aoti_torch_empty_strided(static_cast<int64_t>(shape.size()), shape.data(), stride.data(), dtype,
                                       device_type, device_index, &result),
              "allocation");
  return TorchTensor(result);
}

using Pair = std::tuple<TorchTensor, TorchTensor>;

template <class Backend>
struct Ops {
  static TorchTensor boundary_scores(const TorchTensor& k, int64_t window) {
    Arguments args("boundary_scores");
    BoundaryScores p;
    p.k = args("k", k);
    p.window = window;
    check(p);
    return finish(p, p.scores, k, {k.size(0), k.size(2)}, ScalarType::Float);
  }

  static TorchTensor boundary_logits(const TorchTensor& k, const TorchTensor& in_proj_weight,
                                     const TorchTensor& in_proj_bias, const TorchTensor& out_proj_weight,
                                     const TorchTensor& out_proj_bias, const TorchTensor& norm_weight,
                                     const TorchTensor& norm_bias, MaybeTensor gate_weight, MaybeTensor gate_bias,
                                     const TorchTensor& fc1_weight, const TorchTensor& fc1_bias,
                                     const TorchTensor& fc2_weight, const TorchTensor& fc2_bias, int64_t num_heads,
                                     int64_t window) {
    Arguments args("boundary_logits");
    BoundaryLogits p;
    p.k = args("k", k);
    p.in_proj_weight = args("in_proj_weight", in_proj_weight);
    p.in_proj_bias = args("in_proj_bias", in_proj_bias);
    p.out_proj_weight = args("out_proj_weight", out_proj_weight);
    p.out_proj_bias = args("out_proj_bias", out_proj_bias);
    p.norm_weight = args("norm_weight", norm_weight);
    p.norm_bias = args("norm_bias", norm_bias);
    p.gate_weight = args("gate_weight", gate_weight);
    p.gate_bias = args("gate_bias", gate_bias);
    p.fc1_weight = args("fc1_weight", fc1_weight);
    p.fc1_bias = args("fc1_bias", fc1_bias);
    p.fc2_weight = args("fc2_weight", fc2_weight);
    p.fc2_bias = args("fc2_bias", fc2_bias);
    p.num_heads = num_heads;
    p.window = window;
    check(p);
    return finish(p, p.logits, k, {k.size(0), k.size(2)}, ScalarType::Float);
  }

  static Pair select_boundaries(const TorchTensor& scores, int64_t max_chunks, int64_t nms_radius,
                                std::optional<double> threshold, int64_t segment) {
    Arguments args("select_boundaries");
    SelectBoundaries p;
    p.scores = args("scores", scores);
    p.max_chunks = max_chunks;
    p.nms_radius = nms_radius;
    p.threshold = threshold_or_none(threshold);
    p.segment = segment;
    check(p);
    const int64_t capacity = chunk_capacity(scores.size(1), max_chunks, segment);
    return finish(p, p.offsets, p.num_chunks, scores, {scores.size(0), capacity + 1}, {scores.size(0)}, ScalarType::Int,
                  ScalarType::Int);
  }

  static TorchTensor chunk_pool(const TorchTensor& x, const TorchTensor& offsets, const TorchTensor& num_chunks,
                                int64_t heads, const std::string& scale) {
    Arguments args("chunk_pool");
    ChunkPool p;
    p.x = args("x", x);
    p.offsets = args("offsets", offsets);
    p.num_chunks = args("num_chunks", num_chunks);
    p.heads = heads;
    p.scale = pool_scale(args, "scale", scale);
    check(p);
    return finish(p, p.pooled, x, {x.size(0), heads, offsets.size(1) - 1, x.size(3)}, ScalarType::Float);
  }

  static TorchTensor query_pool(const TorchTensor& q, int64_t heads, int64_t q_block, const std::string& scale) {
    Arguments args("query_pool");
    QueryPool p;
    p.q = args("q", q);
    p.heads = heads;
    p.q_block = q_block;
    p.scale = pool_scale(args, "scale", scale);
    check(p);
    return finish(p, p.pooled, q, {q.size(0), heads, num_blocks(q.size(2), q_block), q.size(3)}, ScalarType::Float);
  }

  static TorchTensor chunk_scores(const TorchTensor& q_pooled, const TorchTensor& k_pooled) {
    Arguments args("chunk_scores");
    ChunkScores p;
    p.q_pooled = args("q_pooled", q_pooled);
    p.k_pooled = args("k_pooled", k_pooled);
    check(p);
    return finish(p, p.scores, q_pooled, {q_pooled.size(0), q_pooled.size(1), q_pooled.size(2), k_pooled.size(2)},
                  ScalarType::Float);
  }

  static TorchTensor token_scores(const TorchTensor& chunk_scores, const TorchTensor& offsets,
                                  const TorchTensor& num_chunks, int64_t k_len) {
    Arguments args("token_scores");
    TokenScores p;
    p.chunk_scores = args("chunk_scores", chunk_scores);
    p.offsets = args("offsets", offsets);
    p.num_chunks = args("num_chunks", num_chunks);
    p.seqlen_k = k_len;
    check(p);
    return finish(p, p.scores, chunk_scores, {chunk_scores.size(0), chunk_scores.size(1), chunk_scores.size(2), k_len},
                  ScalarType::Float);
  }

  static Pair select_keys(const TorchTensor& chunk_scores, const TorchTensor& offsets, const TorchTensor& num_chunks,
                          int64_t q_len, int64_t k_len, int64_t q_block, int64_t budget, int64_t sink, int64_t local,
                          std::optional<int64_t> window, int64_t dense_tail, int64_t min_chunk) {
    Arguments args("select_keys");
    SelectKeys p;
    p.chunk_scores = args("chunk_scores", chunk_scores);
    p.offsets = args("offsets", offsets);
    p.num_chunks = args("num_chunks", num_chunks);
    p.seqlen_q = q_len;
    p.seqlen_k = k_len;
    p.q_block = q_block;
    p.choice = {budget, sink, local, args.window(window), dense_tail, min_chunk};
    check(p);
    const int64_t capacity = run_capacity(chunk_scores.size(3), budget, min_chunk);
    return finish(p, p.runs, p.num_runs, chunk_scores, list_shape(chunk_scores, {capacity, 2}),
                  list_shape(chunk_scores, {}), ScalarType::Int, ScalarType::Int);
  }

  static Pair chunk_mass(const TorchTensor& q, const TorchTensor& k_mean, const TorchTensor& offsets,
                         const TorchTensor& num_chunks, int64_t k_len, int64_t q_block, int64_t q_stride,
                         const std::string& rows, std::optional<double> scale, double softcap,
                         std::optional<int64_t> window) {
    Arguments args("chunk_mass");
    ChunkMass p;
    p.q = args("q", q);
    p.k_mean = args("k_mean", k_mean);
    p.offsets = args("offsets", offsets);
    p.num_chunks = args("num_chunks", num_chunks);
    p.seqlen_k = k_len;
    p.q_block = q_block;
    p.q_stride = q_stride;
    p.rows = query_rows(args, rows);
    p.softmax = softmax(p.q, scale, softcap, args.window(window));
    check(p);
    const int64_t blocks = num_blocks(q.size(2), q_block);
    return finish(p, p.scores, p.row_lse, q, {q.size(0), k_mean.size(1), blocks, k_mean.size(2)},
                  {q.size(0), q.size(1), blocks, num_blocks(q_block, q_stride)}, ScalarType::Float, ScalarType::Float);
  }

  static Pair refine_keys(const TorchTensor& q, const TorchTensor& k, const TorchTensor& chunk_scores,
                          MaybeTensor row_lse, const TorchTensor& offsets, const TorchTensor& num_chunks,
                          int64_t q_block, int64_t budget, int64_t refine, int64_t sink, int64_t local,
                          std::optional<int64_t> window, int64_t dense_tail, int64_t q_stride, const std::string& rows,
                          std::optional<double> scale, double softcap) {
    Arguments args("refine_keys");
    RefineKeys p;
    p.q = args("q", q);
    p.k = args("k", k);
    p.chunk_scores = args("chunk_scores", chunk_scores);
    p.row_lse = args("row_lse", row_lse);
    p.offsets = args("offsets", offsets);
    p.num_chunks = args("num_chunks", num_chunks);
    p.q_block = q_block;
    p.refine = refine;
    p.q_stride = q_stride;
    p.rows = query_rows(args, rows);
    p.choice = {budget, sink, local, args.window(window), dense_tail, 1};
    p.softmax = softmax(p.q, scale, softcap, args.window(window));
    check(p);
    const int64_t capacity = refined_run_capacity(k.size(2), budget);
    return finish(p, p.runs, p.num_runs, q, list_shape(chunk_scores, {capacity, 2}), list_shape(chunk_scores, {}),
                  ScalarType::Int, ScalarType::Int);
  }

  static Pair sparse_attention(const TorchTensor& q, const TorchTensor& k, const TorchTensor& v,
                               const TorchTensor& runs, const TorchTensor& num_runs, int64_t q_block,
                               std::optional<double> scale, double softcap, std::optional<int64_t> window) {
    Arguments args("sparse_attention");
    SparseAttention p;
    p.q = args("q", q);
    p.k = args("k", k);
    p.v = args("v", v);
    p.runs = args("runs", runs);
    p.num_runs = args("num_runs", num_runs);
    p.q_block = q_block;
    p.softmax = softmax(p.q, scale, softcap, args.window(window));
    check(p);
    return attend(p, q);
  }

  static Pair sparse_prefill(const TorchTensor& q, const TorchTensor& k, const TorchTensor& v, int64_t budget,
                             std::optional<int64_t> max_chunks, int64_t q_block, std::optional<int64_t> select_heads,
                             const std::string& score, const std::string& pool, int64_t refine, int64_t q_stride,
                             const std::string& rows, int64_t sink, int64_t local, int64_t dense_tail,
                             int64_t boundary_window, int64_t nms_radius, std::optional<double> threshold,
                             int64_t segment, bool strict, MaybeTensor offsets, MaybeTensor num_chunks,
                             std::optional<double> scale, double softcap, std::optional<int64_t> window) {
    Arguments args("sparse_prefill");
    SparsePrefill p;
    p.q = args("q", q);
    p.k = args("k", k);
    p.v = args("v", v);
    const int64_t seqlen_k = p.k.ndim == 4 ? p.k.shape[2] : 0;
    p.max_chunks = max_chunks.value_or(std::max<int64_t>(1, (segment > 0 ? segment : seqlen_k) / 16));
    p.q_block = q_block;
    p.select_heads = select_heads.value_or(p.k.ndim == 4 ? p.k.shape[1] : 1);
    p.score = chunk_score(args, score);
    p.pool = pool_scale(args, "pool", pool);
    p.refine = refine;
    p.q_stride = q_stride;
    p.rows = query_rows(args, rows);
    // Boundaries of the call's own making lie more than nms_radius apart; a short last segment breaks that.
    const int64_t min_chunk = offsets || segment > 0 || nms_radius < 0 ? 1 : nms_radius + 1;
    p.choice = {budget, sink, local, args.window(window), dense_tail, min_chunk};
    p.boundary_window = boundary_window;
    p.nms_radius = nms_radius;
    p.threshold = threshold_or_none(threshold);
    p.segment = segment;
    p.strict = strict;
    p.offsets = args("offsets", offsets);
    p.num_chunks = args("num_chunks", num_chunks);
    p.softmax = softmax(p.q, scale, softcap, args.window(window));
    check(p);
    clamp_forced(p.choice, seqlen_k);
    return attend(p, q);
  }

  static Pair sparse_decode(const TorchTensor& q, const TorchTensor& k, const TorchTensor& v,
                            const TorchTensor& k_pooled, const TorchTensor& offsets, const TorchTensor& num_chunks,
                            int64_t budget, const std::string& score, int64_t refine, int64_t sink, int64_t local,
                            int64_t min_chunk, std::optional<double> scale, double softcap,
                            std::optional<int64_t> window, MaybeTensor cache_seqlens) {
    Arguments args("sparse_decode");
    SparseDecode p;
    p.q = args("q", q);
    p.k = args("k", k);
    p.v = args("v", v);
    p.k_pooled = args("k_pooled", k_pooled);
    p.offsets = args("offsets", offsets);
    p.num_chunks = args("num_chunks", num_chunks);
    p.cache_seqlens = args("cache_seqlens", cache_seqlens);
    p.score = chunk_score(args, score);
    p.refine = refine;
    p.choice = {budget, sink, local, args.window(window), 0, min_chunk};
    p.softmax = softmax(p.q, scale, softcap, args.window(window));
    check(p);
    clamp_forced(p.choice, k.size(2));
    return attend(p, q);
  }

 private:
  static void clamp_forced(KeyChoice& choice, int64_t seqlen_k) {
    choice.sink = std::min(choice.sink, seqlen_k);
    choice.local = std::min(choice.local, seqlen_k);
  }

  static std::vector<int64_t> list_shape(const TorchTensor& chunk_scores, std::vector<int64_t> tail) {
    std::vector<int64_t> shape = {chunk_scores.size(0), chunk_scores.size(1), chunk_scores.size(2)};
    shape.insert(shape.end(), tail.begin(), tail.end());
    return shape;
  }

  template <class Params>
  static TorchTensor finish(Params& p, Tensor& out, const TorchTensor& like, const std::vector<int64_t>& shape,
                            ScalarType type) {
    TorchTensor result = empty(like, shape, type);
    out = Arguments("").view("", result);
    Backend::run(p, like);
    return result;
  }

  template <class Params>
  static Pair finish(Params& p, Tensor& out0, Tensor& out1, const TorchTensor& like, const std::vector<int64_t>& shape0,
                     const std::vector<int64_t>& shape1, ScalarType type0, ScalarType type1) {
    TorchTensor result0 = empty(like, shape0, type0), result1 = empty(like, shape1, type1);
    out0 = Arguments("").view("", result0);
    out1 = Arguments("").view("", result1);
    Backend::run(p, like);
    return {result0, result1};
  }

  template <class Params>
  static Pair attend(Params& p, const TorchTensor& q) {
    return finish(p, p.out, p.lse, q, {q.size(0), q.size(1), q.size(2), q.size(3)}, {q.size(0), q.size(1), q.size(2)},
                  q.scalar_type(), ScalarType::Float);
  }
};

}  // namespace dhsa::adapter
