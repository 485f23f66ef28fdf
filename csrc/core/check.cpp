// Every mistake that a caller of the core can make, said once: "dhsa::<op>: <argument>: expected <...>, got <...>".
#include <algorithm>
#include <cmath>
#include <initializer_list>
#include <limits>
#include <stdexcept>
#include <string>

#include "dhsa.h"

namespace dhsa {
namespace {

constexpr int64_t kMaxHeadDim = 256;
constexpr int64_t kMaxDecodeQueries = 16;
constexpr int64_t kAlignment = 16;  // bytes
constexpr int64_t kAny = -1;        // a dimension of any size
constexpr int64_t kMaxIndex = std::numeric_limits<int32_t>::max();

std::string to_text(int64_t value) { return std::to_string(value); }

std::string to_text(const int64_t* shape, int32_t ndim) {
  std::string text = "[";
  for (int32_t i = 0; i < ndim; ++i) {
    text += (i > 0 ? ", " : "") + (shape[i] == kAny ? std::string("any") : std::to_string(shape[i]));
  }
  return text + "]";
}

const char* to_text(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return "float32";
    case DType::kFloat16:
      return "float16";
    case DType::kBFloat16:
      return "bfloat16";
    case DType::kInt32:
      return "int32";
  }
  return "another type";
}

class Check {
 public:
  explicit Check(const char* op) : op_(op) {}

  [[noreturn]] void fail(const std::string& argument, const std::string& expected, const std::string& got) const {
    throw std::invalid_argument("dhsa::" + std::string(op_) + ": " + argument + ": expected " + expected + ", got " +
                                got);
  }

  void at_least(const char* argument, int64_t low, int64_t value) const {
    if (value < low) fail(argument, "an integer >= " + to_text(low), to_text(value));
  }

  void softmax(const Softmax& s) const {
    if (!(s.softcap >= 0.0f)) fail("softcap", "a number >= 0", std::to_string(s.softcap));
    if (std::isnan(s.scale)) fail("scale", "a number", "nan");
    window(s.window);
  }

  // A contiguous tensor of this shape (kAny fits any size) and type.
  void like(const char* argument, const Tensor& t, std::initializer_list<int64_t> shape, DType dtype) const {
    bool same = t.ndim == static_cast<int32_t>(shape.size());
    for (int32_t i = 0; same && i < t.ndim; ++i) same = shape.begin()[i] == kAny || shape.begin()[i] == t.shape[i];
    if (!same) {
      fail(argument, "shape " + to_text(shape.begin(), static_cast<int32_t>(shape.size())), to_text(t.shape, t.ndim));
    }
    if (t.dtype != dtype) fail(argument, to_text(dtype), to_text(t.dtype));
    if (empty(t)) return;
    int64_t stride = 1;
    for (int32_t i = t.ndim - 1; i >= 0; --i) {
      if (t.shape[i] > 1 && t.stride[i] != stride) {
        fail(argument, "a contiguous tensor", "strides " + to_text(t.stride, t.ndim));
      }
      stride *= t.shape[i];
    }
    aligned(argument, t, element_size(dtype));
  }

  // [batch, heads, length, head_dim] that kernels read in 16-byte pieces.
  void rows(const char* argument, const Tensor& t) const {
    if (t.ndim != 4) {
      fail(argument, "4 dimensions [batch, heads, length, head_dim]",
           to_text(t.ndim) + ": " + to_text(t.shape, t.ndim));
    }
    if (t.dtype == DType::kInt32) fail(argument, "float32, float16 or bfloat16", to_text(t.dtype));
    head_dim(argument, t.shape[3]);
    if (t.shape[2] > kMaxIndex) fail(argument, "a length below 2^31", to_text(t.shape[2]));
    if (empty(t)) return;
    if (t.stride[3] != 1) fail(argument, "a contiguous last dimension", "stride " + to_text(t.stride[3]));
    for (int32_t i = 0; i < 3; ++i) {
      if (t.shape[i] > 1 && t.stride[i] * element_size(t.dtype) % kAlignment != 0) {
        fail(argument, "strides that are multiples of 16 bytes",
             to_text(t.stride[i]) + " elements in dimension " + to_text(i));
      }
    }
    aligned(argument, t, kAlignment);
  }

  void head_dim(const char* argument, int64_t value) const {
    if (value < 8 || value % 8 != 0 || value > kMaxHeadDim) {
      fail(argument, "a head_dim that is a multiple of 8 up to 256", to_text(value));
    }
  }

  void qkv(const Tensor& q, const Tensor& k, const Tensor* v) const {
    rows("q", q);
    rows("k", k);
    if (k.shape[0] != q.shape[0] || k.shape[3] != q.shape[3]) {
      fail("k", "batch " + to_text(q.shape[0]) + " and head_dim " + to_text(q.shape[3]) + " as q",
           to_text(k.shape, k.ndim));
    }
    if (k.dtype != q.dtype) fail("k", std::string(to_text(q.dtype)) + " as q", to_text(k.dtype));
    if (k.shape[1] < 1 || q.shape[1] % k.shape[1] != 0) {
      fail("k", "a number of heads that divides q's",
           to_text(k.shape[1]) + " for " + to_text(q.shape[1]) + " query heads");
    }
    if (v == nullptr) return;
    rows("v", *v);
    if (!std::equal(k.shape, k.shape + 4, v->shape)) fail("v", "shape " + to_text(k.shape, 4), to_text(v->shape, 4));
    if (v->dtype != k.dtype) fail("v", to_text(k.dtype), to_text(v->dtype));
  }

  void chunks(int64_t batch, const Tensor& offsets, const Tensor& num_chunks, int64_t columns) const {
    like("offsets", offsets, {batch, columns == kAny ? kAny : columns + 1}, DType::kInt32);
    if (offsets.shape[1] < 1) fail("offsets", "at least 1 column", to_text(offsets.shape[1]));
    like("num_chunks", num_chunks, {batch}, DType::kInt32);
  }

  void pool_heads(int64_t heads, int64_t have) const {
    at_least("heads", 1, heads);
    if (have % heads != 0 && (have == 0 || heads % have != 0)) {
      fail("heads", "a divisor or a multiple of the " + to_text(have) + " heads given", to_text(heads));
    }
  }

  void lists(const char* argument, int64_t lists, int64_t q_heads, int64_t kv_heads) const {
    if (lists != 1 && lists != kv_heads && lists != q_heads) {
      fail(argument,
           "1, " + to_text(kv_heads) + " (KV heads) or " + to_text(q_heads) + " (query heads) selection heads",
           to_text(lists));
    }
  }

  void blocks(const char* argument, int64_t blocks, int64_t seqlen_q, int64_t q_block) const {
    const int64_t wanted = (seqlen_q + q_block - 1) / q_block;
    if (blocks != wanted) {
      fail(argument, "ceil(Lq / q_block) = " + to_text(wanted) + " query blocks", to_text(blocks));
    }
  }

  void window(int64_t value) const {  // the schemas' None is 0 here
    if (value < 0) fail("window", "an integer >= 1", to_text(value));
  }

  void choice(const KeyChoice& c, int64_t seqlen_q, int64_t q_block) const {
    at_least("q_block", 1, q_block);
    window(c.window);
    at_least("sink", 0, c.sink);
    at_least("local", 0, c.local);
    at_least("dense_tail", 0, c.dense_tail);
    const int64_t forced = seqlen_q > 0 ? std::max<int64_t>(0, c.sink + c.local + std::min(q_block, seqlen_q) - 1) : 0;
    if (c.budget < forced) {
      fail("budget", "at least sink + local + min(q_block, Lq) - 1 = " + to_text(forced), to_text(c.budget));
    }
  }

 private:
  static bool empty(const Tensor& t) { return std::find(t.shape, t.shape + t.ndim, 0) != t.shape + t.ndim; }

  void aligned(const char* argument, const Tensor& t, int64_t bytes) const {
    const int64_t rest = static_cast<int64_t>(reinterpret_cast<uintptr_t>(t.data) % static_cast<uintptr_t>(bytes));
    if (t.data == nullptr) fail(argument, "data", "none");
    if (rest != 0) {
      fail(argument, "a data pointer that is a multiple of " + to_text(bytes) + " bytes",
           to_text(rest) + " bytes past");
    }
  }

  const char* op_;
};

KeyChoice clamped(KeyChoice choice, int64_t seqlen_k) {
  choice.sink = std::min(choice.sink, seqlen_k);
  choice.local = std::min(choice.local, seqlen_k);
  return choice;
}

}  // namespace

void check(const BoundaryScores& p) {
  const Check check("boundary_scores");
  check.rows("k", p.k);
  check.at_least("window", 1, p.window);
}

void check(const BoundaryLogits& p) {
  const Check check("boundary_logits");
  check.rows("k", p.k);
  check.at_least("window", 1, p.window);
  check.at_least("num_heads", 1, p.num_heads);
  const int64_t width = p.k.shape[1] * p.k.shape[3], hidden = p.fc1_weight.shape[0];
  if (width % p.num_heads != 0) {
    check.fail("num_heads", "a divisor of the keys' width " + to_text(width), to_text(p.num_heads));
  }
  const DType dtype = p.in_proj_weight.dtype;
  if (dtype == DType::kInt32) check.fail("in_proj_weight", "float32, float16 or bfloat16", to_text(dtype));
  check.like("in_proj_weight", p.in_proj_weight, {3 * width, width}, dtype);
  check.like("in_proj_bias", p.in_proj_bias, {3 * width}, dtype);
  check.like("out_proj_weight", p.out_proj_weight, {width, width}, dtype);
  check.like("out_proj_bias", p.out_proj_bias, {width}, dtype);
  check.like("norm_weight", p.norm_weight, {width}, dtype);
  check.like("norm_bias", p.norm_bias, {width}, dtype);
  check.like("fc1_weight", p.fc1_weight, {hidden, 4 * width + 1}, dtype);
  check.like("fc1_bias", p.fc1_bias, {hidden}, dtype);
  check.like("fc2_weight", p.fc2_weight, {1, hidden}, dtype);
  check.like("fc2_bias", p.fc2_bias, {1}, dtype);
  if (p.gate_weight.given() != p.gate_bias.given()) {
    check.fail("gate_bias", "gate_weight and gate_bias, both or neither", "one of them");
  }
  if (p.gate_weight.given()) {
    check.like("gate_weight", p.gate_weight, {1, width}, dtype);
    check.like("gate_bias", p.gate_bias, {1}, dtype);
  }
}

void check(const SelectBoundaries& p) {
  const Check check("select_boundaries");
  check.like("scores", p.scores, {kAny, kAny}, DType::kFloat32);
  if (p.scores.shape[1] > kMaxIndex) check.fail("scores", "a length below 2^31", to_text(p.scores.shape[1]));
  check.at_least("max_chunks", 1, p.max_chunks);
  check.at_least("nms_radius", 0, p.nms_radius);
  check.at_least("segment", 0, p.segment);
  if (std::isnan(p.threshold)) check.fail("threshold", "a number", "nan");
}

void check(const ChunkPool& p) {
  const Check check("chunk_pool");
  check.rows("x", p.x);
  check.chunks(p.x.shape[0], p.offsets, p.num_chunks, kAny);
  check.pool_heads(p.heads, p.x.shape[1]);
}

void check(const QueryPool& p) {
  const Check check("query_pool");
  check.rows("q", p.q);
  check.at_least("q_block", 1, p.q_block);
  check.pool_heads(p.heads, p.q.shape[1]);
}

void check(const ChunkScores& p) {
  const Check check("chunk_scores");
  check.like("q_pooled", p.q_pooled, {kAny, kAny, kAny, kAny}, DType::kFloat32);
  check.head_dim("q_pooled", p.q_pooled.shape[3]);
  check.like("k_pooled", p.k_pooled, {p.q_pooled.shape[0], p.q_pooled.shape[1], kAny, p.q_pooled.shape[3]},
             DType::kFloat32);
}

void check(const TokenScores& p) {
  const Check check("token_scores");
  check.like("chunk_scores", p.chunk_scores, {kAny, kAny, kAny, kAny}, DType::kFloat32);
  check.chunks(p.chunk_scores.shape[0], p.offsets, p.num_chunks, p.chunk_scores.shape[3]);
  check.at_least("k_len", 0, p.seqlen_k);
}

void check(const SelectKeys& p) {
  const Check check("select_keys");
  check.like("chunk_scores", p.chunk_scores, {kAny, kAny, kAny, kAny}, DType::kFloat32);
  check.chunks(p.chunk_scores.shape[0], p.offsets, p.num_chunks, p.chunk_scores.shape[3]);
  check.at_least("q_len", 0, p.seqlen_q);
  check.at_least("k_len", 0, p.seqlen_k);
  check.at_least("min_chunk", 1, p.choice.min_chunk);
  check.choice(p.choice, p.seqlen_q, p.q_block);
  check.blocks("chunk_scores", p.chunk_scores.shape[2], p.seqlen_q, p.q_block);
}

void check(const ChunkMass& p) {
  const Check check("chunk_mass");
  check.rows("q", p.q);
  check.like("k_mean", p.k_mean, {p.q.shape[0], kAny, kAny, p.q.shape[3]}, DType::kFloat32);
  if (p.k_mean.shape[1] < 1 || p.q.shape[1] % p.k_mean.shape[1] != 0) {
    check.fail("k_mean", "a number of heads that divides q's",
               to_text(p.k_mean.shape[1]) + " for " + to_text(p.q.shape[1]) + " query heads");
  }
  check.chunks(p.q.shape[0], p.offsets, p.num_chunks, p.k_mean.shape[2]);
  check.at_least("k_len", 0, p.seqlen_k);
  check.at_least("q_block", 1, p.q_block);
  check.at_least("q_stride", 1, p.q_stride);
  check.softmax(p.softmax);
}

void check(const RefineKeys& p) {
  const Check check("refine_keys");
  check.qkv(p.q, p.k, nullptr);
  check.at_least("q_block", 1, p.q_block);
  check.at_least("refine", 1, p.refine);
  check.at_least("q_stride", 1, p.q_stride);
  check.like("chunk_scores", p.chunk_scores, {p.q.shape[0], kAny, kAny, kAny}, DType::kFloat32);
  check.lists("chunk_scores", p.chunk_scores.shape[1], p.q.shape[1], p.k.shape[1]);
  check.blocks("chunk_scores", p.chunk_scores.shape[2], p.q.shape[2], p.q_block);
  if (p.row_lse.given()) {
    const int64_t samples = (p.q_block + p.q_stride - 1) / p.q_stride;
    check.like("row_lse", p.row_lse, {p.q.shape[0], p.q.shape[1], p.chunk_scores.shape[2], samples}, DType::kFloat32);
  }
  check.chunks(p.q.shape[0], p.offsets, p.num_chunks, p.chunk_scores.shape[3]);
  check.choice(p.choice, p.q.shape[2], p.q_block);
  check.softmax(p.softmax);
}

void check(const SparseAttention& p) {
  const Check check("sparse_attention");
  check.qkv(p.q, p.k, &p.v);
  check.at_least("q_block", 1, p.q_block);
  check.like("runs", p.runs, {p.q.shape[0], kAny, kAny, kAny, 2}, DType::kInt32);
  check.lists("runs", p.runs.shape[1], p.q.shape[1], p.k.shape[1]);
  check.blocks("runs", p.runs.shape[2], p.q.shape[2], p.q_block);
  check.like("num_runs", p.num_runs, {p.runs.shape[0], p.runs.shape[1], p.runs.shape[2]}, DType::kInt32);
  check.softmax(p.softmax);
}

void check(const SparsePrefill& p) {
  const Check check("sparse_prefill");
  check.qkv(p.q, p.k, &p.v);
  if (!p.offsets.given()) check.at_least("max_chunks", 1, p.max_chunks);
  check.at_least("q_stride", 1, p.q_stride);
  check.at_least("boundary_window", 1, p.boundary_window);
  check.at_least("refine", 0, p.refine);
  check.at_least("nms_radius", 0, p.nms_radius);
  check.at_least("segment", 0, p.segment);
  if (std::isnan(p.threshold)) check.fail("threshold", "a number", "nan");
  check.at_least("min_chunk", 1, p.choice.min_chunk);
  check.lists("select_heads", p.select_heads, p.q.shape[1], p.k.shape[1]);
  if (p.offsets.given() != p.num_chunks.given()) {
    check.fail(p.offsets.given() ? "num_chunks" : "offsets", "offsets and num_chunks, both or neither", "one");
  }
  if (p.offsets.given()) check.chunks(p.q.shape[0], p.offsets, p.num_chunks, kAny);
  check.choice(clamped(p.choice, p.k.shape[2]), p.q.shape[2], p.q_block);
  check.softmax(p.softmax);
}

void check(const SparseDecode& p) {
  const Check check("sparse_decode");
  check.qkv(p.q, p.k, &p.v);
  if (p.q.shape[2] > kMaxDecodeQueries) check.fail("q", "at most 16 queries", to_text(p.q.shape[2]));
  check.like("k_pooled", p.k_pooled, {p.q.shape[0], kAny, kAny, p.q.shape[3]}, DType::kFloat32);
  check.lists("k_pooled", p.k_pooled.shape[1], p.q.shape[1], p.k.shape[1]);
  check.chunks(p.q.shape[0], p.offsets, p.num_chunks, p.k_pooled.shape[2]);
  if (p.cache_seqlens.given()) check.like("cache_seqlens", p.cache_seqlens, {p.q.shape[0]}, DType::kInt32);
  check.at_least("min_chunk", 1, p.choice.min_chunk);
  check.at_least("refine", 0, p.refine);
  check.choice(clamped(p.choice, p.k.shape[2]), p.q.shape[2], 1);
  check.softmax(p.softmax);
}

}  // namespace dhsa
