// The ops on NumPy arrays: NumPy's memory, a pool of threads, the core's kernels; no torch. dhsa_ext/numpy.py is the
// face of this module: it names the arguments, gives their defaults and says what each op computes.
//
// Every op takes its schema's arguments by position, then `dtype` (None, or "bfloat16": uint16 arrays hold its bits)
// and the number of threads. A mistake raises ValueError with one sentence; the GIL is released while the op runs.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <limits>
#include <memory>
#include <new>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "dhsa.h"
#include "numpy/thread_pool.h"

namespace dhsa::adapter {
namespace {

namespace py = pybind11;
using Object = py::object;  // a NumPy array, or None where the schema has `Tensor?`
using Shape = std::vector<int64_t>;
using Text = std::optional<std::string>;

constexpr std::align_val_t kWorkspaceAlign{64};

struct FreeWorkspace {
  void operator()(void* p) const { ::operator delete(p, kWorkspaceAlign); }
};

int64_t num_blocks(int64_t n, int64_t block) { return (n + block - 1) / block; }

Shape shape_of(const Tensor& t, int32_t dims, std::initializer_list<int64_t> tail) {
  Shape shape(t.shape, t.shape + dims);
  shape.insert(shape.end(), tail);
  return shape;
}

// One call of an op: turns its arguments into the core's, allocates its outputs, runs it.
class Call {
 public:
  Call(const char* op, const Text& dtype, int threads) : op_(op), threads_(threads) {
    if (dtype && *dtype != "bfloat16") fail("dtype", "None or 'bfloat16'", "'" + *dtype + "'");
    bfloat16_ = dtype.has_value();
    if (threads < 1) fail("threads", "an integer >= 1", std::to_string(threads));
  }

  [[noreturn]] void fail(const std::string& argument, const std::string& expected, const std::string& got) const {
    throw std::invalid_argument("dhsa::" + std::string(op_) + ": " + argument + ": expected " + expected + ", got " +
                                got);
  }

  Tensor operator()(const char* argument, const Object& x) {
    if (!py::isinstance<py::array>(x)) {
      fail(argument, "a NumPy array", py::str(py::type::of(x).attr("__name__")).cast<std::string>());
    }
    const auto array = py::reinterpret_borrow<py::array>(x);
    if (array.ndim() > 5) fail(argument, "at most 5 dimensions", std::to_string(array.ndim()));
    Tensor t;
    t.data = const_cast<void*>(array.data());
    t.dtype = dtype(argument, array.dtype());
    t.ndim = static_cast<int32_t>(array.ndim());
    for (int32_t i = 0; i < t.ndim; ++i) {
      if (array.shape(i) > 1 && array.strides(i) % array.itemsize() != 0) {
        fail(argument, "strides of whole elements", std::to_string(array.strides(i)) + " bytes");
      }
      t.shape[i] = array.shape(i);
      t.stride[i] = array.strides(i) / array.itemsize();
    }
    return t;
  }
  Tensor optional(const char* argument, const Object& x) { return x.is_none() ? Tensor{} : (*this)(argument, x); }

  template <class Enum>
  Enum word(const char* argument, const std::string& value,
            std::initializer_list<std::pair<const char*, Enum>> words) const {
    std::string known;
    for (const auto& [name, meaning] : words) {
      if (value == name) return meaning;
      known += std::string(known.empty() ? "'" : ", '") + name + "'";
    }
    fail(argument, "one of " + known, "'" + value + "'");
  }
  PoolScale pool_scale(const char* argument, const std::string& value) const {
    return word<PoolScale>(argument, value,
                           {{"sqrt", PoolScale::kSqrt}, {"mean", PoolScale::kMean}, {"sum", PoolScale::kSum}});
  }
  ChunkScore chunk_score(const std::string& value) const {
    return word<ChunkScore>("score", value, {{"dot", ChunkScore::kDot}, {"mass", ChunkScore::kMass}});
  }
  QueryRows query_rows(const std::string& value) const {
    return word<QueryRows>("rows", value, {{"sample", QueryRows::kSample}, {"mean", QueryRows::kMean}});
  }
  int64_t window(std::optional<int64_t> window) const {
    if (window && *window < 1) fail("window", "an integer >= 1", std::to_string(*window));
    return window.value_or(0);
  }
  Softmax softmax(const Tensor& q, std::optional<double> scale, double softcap, std::optional<int64_t> window) const {
    const int64_t head_dim = q.ndim == 4 && q.shape[3] > 0 ? q.shape[3] : 1;
    return {static_cast<float>(scale.value_or(1.0 / std::sqrt(static_cast<double>(head_dim)))),
            static_cast<float>(softcap), this->window(window)};
  }

  template <class Params>
  void check(const Params& p) const {
    if (bfloat16_ && !holds_bits_) fail("dtype", "uint16 arrays with dtype='bfloat16'", "none");
    dhsa::check(p);
  }

  template <class Params>
  py::array one(Params& p, Tensor& out, const Shape& shape, DType type = DType::kFloat32) const {
    py::array result = empty(out, shape, type);
    run(p);
    return result;
  }

  template <class Params>
  py::tuple two(Params& p, Tensor& out0, const Shape& shape0, DType type0, Tensor& out1, const Shape& shape1,
                DType type1) const {
    py::array result0 = empty(out0, shape0, type0), result1 = empty(out1, shape1, type1);
    run(p);
    return py::make_tuple(std::move(result0), std::move(result1));
  }

  template <class Params>
  py::tuple attend(Params& p) const {
    return two(p, p.out, shape_of(p.q, 4, {}), p.q.dtype, p.lse, shape_of(p.q, 3, {}), DType::kFloat32);
  }

 private:
  DType dtype(const char* argument, const py::dtype& type) {
    if (type.byteorder() == '=') {
      if (type.kind() == 'f' && type.itemsize() == 4) return DType::kFloat32;
      if (type.kind() == 'f' && type.itemsize() == 2) return DType::kFloat16;
      if (type.kind() == 'i' && type.itemsize() == 4) return DType::kInt32;
      if (type.kind() == 'u' && type.itemsize() == 2 && bfloat16_) {
        holds_bits_ = true;
        return DType::kBFloat16;
      }
    }
    fail(argument, "float32, float16, int32, or uint16 with dtype='bfloat16'", py::str(type).cast<std::string>());
  }

  static py::array empty(Tensor& t, const Shape& shape, DType type) {
    const char* name = type == DType::kFloat32   ? "float32"
                       : type == DType::kFloat16 ? "float16"
                       : type == DType::kInt32   ? "int32"
                                                 : "uint16";
    py::array array(py::dtype(std::string(name)), shape);
    t.data = array.mutable_data();
    t.dtype = type;
    t.ndim = static_cast<int32_t>(shape.size());
    for (int32_t i = 0; i < t.ndim; ++i) {
      t.shape[i] = array.shape(i);
      t.stride[i] = array.strides(i) / array.itemsize();
    }
    return array;
  }

  template <class Params>
  void run(const Params& p) const {
    const py::gil_scoped_release no_gil;
    const PoolExecutor executor(threads_);
    const int64_t bytes = cpu::workspace_bytes(p, executor.workers());
    const std::unique_ptr<void, FreeWorkspace> workspace(
        bytes > 0 ? ::operator new(static_cast<size_t>(bytes), kWorkspaceAlign) : nullptr);
    cpu::run(p, workspace.get(), executor);
  }

  const char* op_;
  int threads_;
  bool bfloat16_ = false, holds_bits_ = false;
};

float threshold_or_none(std::optional<double> threshold) {
  return static_cast<float>(threshold.value_or(-std::numeric_limits<double>::infinity()));
}

void clamp_forced(KeyChoice& choice, int64_t seqlen_k) {
  choice.sink = std::min(choice.sink, seqlen_k);
  choice.local = std::min(choice.local, seqlen_k);
}

py::array boundary_scores(const Object& k, int64_t window, const Text& dtype, int threads) {
  Call call("boundary_scores", dtype, threads);
  BoundaryScores p;
  p.k = call("k", k);
  p.window = window;
  call.check(p);
  return call.one(p, p.scores, {p.k.shape[0], p.k.shape[2]});
}

py::array boundary_logits(const Object& k, const Object& in_proj_weight, const Object& in_proj_bias,
                          const Object& out_proj_weight, const Object& out_proj_bias, const Object& norm_weight,
                          const Object& norm_bias, const Object& gate_weight, const Object& gate_bias,
                          const Object& fc1_weight, const Object& fc1_bias, const Object& fc2_weight,
                          const Object& fc2_bias, int64_t num_heads, int64_t window, const Text& dtype, int threads) {
  Call call("boundary_logits", dtype, threads);
  BoundaryLogits p;
  p.k = call("k", k);
  p.in_proj_weight = call("in_proj_weight", in_proj_weight);
  p.in_proj_bias = call("in_proj_bias", in_proj_bias);
  p.out_proj_weight = call("out_proj_weight", out_proj_weight);
  p.out_proj_bias = call("out_proj_bias", out_proj_bias);
  p.norm_weight = call("norm_weight", norm_weight);
  p.norm_bias = call("norm_bias", norm_bias);
  p.gate_weight = call.optional("gate_weight", gate_weight);
  p.gate_bias = call.optional("gate_bias", gate_bias);
  p.fc1_weight = call("fc1_weight", fc1_weight);
  p.fc1_bias = call("fc1_bias", fc1_bias);
  p.fc2_weight = call("fc2_weight", fc2_weight);
  p.fc2_bias = call("fc2_bias", fc2_bias);
  p.num_heads = num_heads;
  p.window = window;
  call.check(p);
  return call.one(p, p.logits, {p.k.shape[0], p.k.shape[2]});
}

py::tuple select_boundaries(const Object& scores, int64_t max_chunks, int64_t nms_radius,
                            std::optional<double> threshold, int64_t segment, int threads) {
  Call call("select_boundaries", std::nullopt, threads);
  SelectBoundaries p;
  p.scores = call("scores", scores);
  p.max_chunks = max_chunks;
  p.nms_radius = nms_radius;
  p.threshold = threshold_or_none(threshold);
  p.segment = segment;
  call.check(p);
  const int64_t batch = p.scores.shape[0], capacity = chunk_capacity(p.scores.shape[1], max_chunks, segment);
  return call.two(p, p.offsets, {batch, capacity + 1}, DType::kInt32, p.num_chunks, {batch}, DType::kInt32);
}

py::array chunk_pool(const Object& x, const Object& offsets, const Object& num_chunks, int64_t heads,
                     const std::string& scale, const Text& dtype, int threads) {
  Call call("chunk_pool", dtype, threads);
  ChunkPool p;
  p.x = call("x", x);
  p.offsets = call("offsets", offsets);
  p.num_chunks = call("num_chunks", num_chunks);
  p.heads = heads;
  p.scale = call.pool_scale("scale", scale);
  call.check(p);
  return call.one(p, p.pooled, {p.x.shape[0], heads, p.offsets.shape[1] - 1, p.x.shape[3]});
}

py::array query_pool(const Object& q, int64_t heads, int64_t q_block, const std::string& scale, const Text& dtype,
                     int threads) {
  Call call("query_pool", dtype, threads);
  QueryPool p;
  p.q = call("q", q);
  p.heads = heads;
  p.q_block = q_block;
  p.scale = call.pool_scale("scale", scale);
  call.check(p);
  return call.one(p, p.pooled, {p.q.shape[0], heads, num_blocks(p.q.shape[2], q_block), p.q.shape[3]});
}

py::array chunk_scores(const Object& q_pooled, const Object& k_pooled, int threads) {
  Call call("chunk_scores", std::nullopt, threads);
  ChunkScores p;
  p.q_pooled = call("q_pooled", q_pooled);
  p.k_pooled = call("k_pooled", k_pooled);
  call.check(p);
  return call.one(p, p.scores, shape_of(p.q_pooled, 3, {p.k_pooled.shape[2]}));
}

py::array token_scores(const Object& chunk_scores, const Object& offsets, const Object& num_chunks, int64_t k_len,
                       int threads) {
  Call call("token_scores", std::nullopt, threads);
  TokenScores p;
  p.chunk_scores = call("chunk_scores", chunk_scores);
  p.offsets = call("offsets", offsets);
  p.num_chunks = call("num_chunks", num_chunks);
  p.seqlen_k = k_len;
  call.check(p);
  return call.one(p, p.scores, shape_of(p.chunk_scores, 3, {k_len}));
}

py::tuple select_keys(const Object& chunk_scores, const Object& offsets, const Object& num_chunks, int64_t q_len,
                      int64_t k_len, int64_t q_block, int64_t budget, int64_t sink, int64_t local,
                      std::optional<int64_t> window, int64_t dense_tail, int64_t min_chunk, int threads) {
  Call call("select_keys", std::nullopt, threads);
  SelectKeys p;
  p.chunk_scores = call("chunk_scores", chunk_scores);
  p.offsets = call("offsets", offsets);
  p.num_chunks = call("num_chunks", num_chunks);
  p.seqlen_q = q_len;
  p.seqlen_k = k_len;
  p.q_block = q_block;
  p.choice = {budget, sink, local, call.window(window), dense_tail, min_chunk};
  call.check(p);
  const int64_t capacity = run_capacity(p.chunk_scores.shape[3], budget, min_chunk);
  return call.two(p, p.runs, shape_of(p.chunk_scores, 3, {capacity, 2}), DType::kInt32, p.num_runs,
                  shape_of(p.chunk_scores, 3, {}), DType::kInt32);
}

py::tuple chunk_mass(const Object& q, const Object& k_mean, const Object& offsets, const Object& num_chunks,
                     int64_t k_len, int64_t q_block, int64_t q_stride, const std::string& rows,
                     std::optional<double> scale, double softcap, std::optional<int64_t> window, const Text& dtype,
                     int threads) {
  Call call("chunk_mass", dtype, threads);
  ChunkMass p;
  p.q = call("q", q);
  p.k_mean = call("k_mean", k_mean);
  p.offsets = call("offsets", offsets);
  p.num_chunks = call("num_chunks", num_chunks);
  p.seqlen_k = k_len;
  p.q_block = q_block;
  p.q_stride = q_stride;
  p.rows = call.query_rows(rows);
  p.softmax = call.softmax(p.q, scale, softcap, window);
  call.check(p);
  const int64_t batch = p.q.shape[0], blocks = num_blocks(p.q.shape[2], q_block);
  return call.two(p, p.scores, {batch, p.k_mean.shape[1], blocks, p.k_mean.shape[2]}, DType::kFloat32, p.row_lse,
                  {batch, p.q.shape[1], blocks, num_blocks(q_block, q_stride)}, DType::kFloat32);
}

py::tuple refine_keys(const Object& q, const Object& k, const Object& chunk_scores, const Object& row_lse,
                      const Object& offsets, const Object& num_chunks, int64_t q_block, int64_t budget, int64_t refine,
                      int64_t sink, int64_t local, std::optional<int64_t> window, int64_t dense_tail, int64_t q_stride,
                      const std::string& rows, std::optional<double> scale, double softcap, const Text& dtype,
                      int threads) {
  Call call("refine_keys", dtype, threads);
  RefineKeys p;
  p.q = call("q", q);
  p.k = call("k", k);
  p.chunk_scores = call("chunk_scores", chunk_scores);
  p.row_lse = call.optional("row_lse", row_lse);
  p.offsets = call("offsets", offsets);
  p.num_chunks = call("num_chunks", num_chunks);
  p.q_block = q_block;
  p.refine = refine;
  p.q_stride = q_stride;
  p.rows = call.query_rows(rows);
  p.choice = {budget, sink, local, call.window(window), dense_tail, 1};
  p.softmax = call.softmax(p.q, scale, softcap, window);
  call.check(p);
  const int64_t capacity = refined_run_capacity(p.k.shape[2], budget);
  return call.two(p, p.runs, shape_of(p.chunk_scores, 3, {capacity, 2}), DType::kInt32, p.num_runs,
                  shape_of(p.chunk_scores, 3, {}), DType::kInt32);
}

py::tuple sparse_attention(const Object& q, const Object& k, const Object& v, const Object& runs,
                           const Object& num_runs, int64_t q_block, std::optional<double> scale, double softcap,
                           std::optional<int64_t> window, const Text& dtype, int threads) {
  Call call("sparse_attention", dtype, threads);
  SparseAttention p;
  p.q = call("q", q);
  p.k = call("k", k);
  p.v = call("v", v);
  p.runs = call("runs", runs);
  p.num_runs = call("num_runs", num_runs);
  p.q_block = q_block;
  p.softmax = call.softmax(p.q, scale, softcap, window);
  call.check(p);
  return call.attend(p);
}

py::tuple sparse_prefill(const Object& q, const Object& k, const Object& v, int64_t budget,
                         std::optional<int64_t> max_chunks, int64_t q_block, std::optional<int64_t> select_heads,
                         const std::string& score, const std::string& pool, int64_t refine, int64_t q_stride,
                         const std::string& rows, int64_t sink, int64_t local, int64_t dense_tail,
                         int64_t boundary_window, int64_t nms_radius, std::optional<double> threshold, int64_t segment,
                         bool strict, const Object& offsets, const Object& num_chunks, std::optional<double> scale,
                         double softcap, std::optional<int64_t> window, const Text& dtype, int threads) {
  Call call("sparse_prefill", dtype, threads);
  SparsePrefill p;
  p.q = call("q", q);
  p.k = call("k", k);
  p.v = call("v", v);
  const int64_t seqlen_k = p.k.ndim == 4 ? p.k.shape[2] : 0;
  p.max_chunks = max_chunks.value_or(std::max<int64_t>(1, (segment > 0 ? segment : seqlen_k) / 16));
  p.q_block = q_block;
  p.select_heads = select_heads.value_or(p.k.ndim == 4 ? p.k.shape[1] : 1);
  p.score = call.chunk_score(score);
  p.pool = call.pool_scale("pool", pool);
  p.refine = refine;
  p.q_stride = q_stride;
  p.rows = call.query_rows(rows);
  // Boundaries of the call's own making lie more than nms_radius apart; a short last segment breaks that.
  const int64_t min_chunk = !offsets.is_none() || segment > 0 || nms_radius < 0 ? 1 : nms_radius + 1;
  p.choice = {budget, sink, local, call.window(window), dense_tail, min_chunk};
  p.boundary_window = boundary_window;
  p.nms_radius = nms_radius;
  p.threshold = threshold_or_none(threshold);
  p.segment = segment;
  p.strict = strict;
  p.offsets = call.optional("offsets", offsets);
  p.num_chunks = call.optional("num_chunks", num_chunks);
  p.softmax = call.softmax(p.q, scale, softcap, window);
  call.check(p);
  clamp_forced(p.choice, seqlen_k);
  return call.attend(p);
}

py::tuple sparse_decode(const Object& q, const Object& k, const Object& v, const Object& k_pooled,
                        const Object& offsets, const Object& num_chunks, int64_t budget, const std::string& score,
                        int64_t refine, int64_t sink, int64_t local, int64_t min_chunk, std::optional<double> scale,
                        double softcap, std::optional<int64_t> window, const Object& cache_seqlens, const Text& dtype,
                        int threads) {
  Call call("sparse_decode", dtype, threads);
  SparseDecode p;
  p.q = call("q", q);
  p.k = call("k", k);
  p.v = call("v", v);
  p.k_pooled = call("k_pooled", k_pooled);
  p.offsets = call("offsets", offsets);
  p.num_chunks = call("num_chunks", num_chunks);
  p.cache_seqlens = call.optional("cache_seqlens", cache_seqlens);
  p.score = call.chunk_score(score);
  p.refine = refine;
  p.choice = {budget, sink, local, call.window(window), 0, min_chunk};
  p.softmax = call.softmax(p.q, scale, softcap, window);
  call.check(p);
  clamp_forced(p.choice, p.k.shape[2]);
  return call.attend(p);
}

PYBIND11_MODULE(_numpy, m) {
  m.doc() = "The ops of dhsa_ext on NumPy arrays; dhsa_ext.numpy is how to call them.";
  m.def("boundary_scores", &boundary_scores);
  m.def("boundary_logits", &boundary_logits);
  m.def("select_boundaries", &select_boundaries);
  m.def("chunk_pool", &chunk_pool);
  m.def("query_pool", &query_pool);
  m.def("chunk_scores", &chunk_scores);
  m.def("token_scores", &token_scores);
  m.def("select_keys", &select_keys);
  m.def("chunk_mass", &chunk_mass);
  m.def("refine_keys", &refine_keys);
  m.def("sparse_attention", &sparse_attention);
  m.def("sparse_prefill", &sparse_prefill);
  m.def("sparse_decode", &sparse_decode);
  m.def("isas_compiled", &cpu::isas_compiled);
  m.def("isas_detected", &cpu::isas_detected);
  m.def("isa_active", &cpu::isa_active);
  m.def("cache_sizes", &cpu::cache_sizes);
}

}  // namespace
}  // namespace dhsa::adapter
