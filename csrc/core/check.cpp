// The arguments of every stage, checked once for all backends and adapters. Each mistake is one sentence,
// "dhsa::<op>: <argument>: expected <...>, got <...>", thrown as std::invalid_argument before anything runs;
// dhsa_ext/checks.py says the same where no native library is loaded.
#include <algorithm>
#include <cmath>
#include <initializer_list>
#include <stdexcept>
#include <string>

#include "dhsa.h"

namespace dhsa {
namespace {

constexpr int64_t kAny = -1;  // a size that may be anything
constexpr int64_t kMaxHeadDim = 256, kMaxDecodeQueries = 16;
constexpr int64_t kAlignBytes = 16;  // of data pointers and of every stride but the last: one vector load

const char* name(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return "float32";
    case DType::kFloat16:
      return "float16";
    case DType::kBFloat16:
      return "bfloat16";
    case DType::kInt32:
      break;
  }
  return "int32";
}

std::string shape(const Tensor& x) {
  std::string text = "[";
  for (int32_t i = 0; i < x.ndim; ++i) text += (i > 0 ? ", " : "") + std::to_string(x.shape[i]);
  return text + "]";
}

class Check {
 public:
  explicit Check(const char* op) : op_(op) {}

  [[noreturn]] void fail(const char* argument, const std::string& expected, const std::string& got) const {
    throw std::invalid_argument(std::string("dhsa::") + op_ + ": " + argument + ": expected " + expected + ", got " +
                                got);
  }

  void at_least(const char* argument, int64_t low, int64_t value) const {
    if (value < low) fail(argument, "an integer >= " + std::to_string(low), std::to_string(value));
  }

  // [batch, heads, length, head_dim] in a floating type, as the kernels load it.
  void rows(const char* argument, const Tensor& x) const {
    if (x.ndim != 4) {
      fail(argument, "4 dimensions [batch, heads, length, head_dim]", std::to_string(x.ndim) + ": " + shape(x));
    }
    if (x.dtype == DType::kInt32) fail(argument, "float32, float16 or bfloat16", name(x.dtype));
    const int64_t head_dim = x.shape[3];
    if (head_dim % 8 != 0 || head_dim < 8 || head_dim > kMaxHeadDim) {
      fail(argument, "a head_dim that is a multiple of 8 up to 256", std::to_string(head_dim));
    }
    if (x.stride[3] != 1) fail(argument, "a contiguous last dimension", "stride " + std::to_string(x.stride[3]));
    if (reinterpret_cast<uintptr_t>(x.data) % kAlignBytes != 0) {
      fail(argument, "a data pointer that is a multiple of 16 bytes", "one that is not");
    }
    for (int32_t i = 0; i < 3; ++i) {
      if (x.shape[i] > 1 && x.stride[i] * element_size(x.dtype) % kAlignBytes != 0) {
        fail(argument, "strides that are multiples of 16 bytes",
             std::to_string(x.stride[i]) + " elements in dimension " + std::to_string(i));
      }
    }
  }

  // A contiguous tensor of this shape (kAny: any size) and type.
  void like(const char* argument, const Tensor& x, std::initializer_list<int64_t> sizes, DType dtype) const {
    bool same = x.ndim == static_cast<int32_t>(sizes.size());
    std::string wanted = "[";
    int32_t i = 0;
    for (const int64_t size : sizes) {
      same = same && (size == kAny || x.shape[i] == size);
      wanted += (i++ > 0 ? ", " : "") + (size == kAny ? std::string("any") : std::to_string(size));
    }
    if (!same) fail(argument, "shape " + wanted + "]", shape(x));
    if (x.dtype != dtype) fail(argument, name(dtype), name(x.dtype));
    int64_t dense = 1;
    for (int32_t d = x.ndim - 1; d >= 0; --d) {
      if (x.shape[d] > 1 && x.stride[d] != dense) {
        fail(argument, "a contiguous tensor", "stride " + std::to_string(x.stride[d]) + " in dimension " +
                                                  std::to_string(d));
      }
      dense *= std::max<int64_t>(1, x.shape[d]);
    }
  }

  void chunks(int64_t batch, const Tensor& offsets, const Tensor& num_chunks, int64_t columns = kAny) const {
    like("offsets", offsets, {batch, columns == kAny ? kAny : columns + 1}, DType::kInt32);
    if (offsets.shape[1] < 1) fail("offsets", "at least 1 column", std::to_string(offsets.shape[1]));
    like("num_chunks", num_chunks, {batch}, DType::kInt32);
  }

  void qkv(const Tensor& q, const Tensor& k, const Tensor* v) const {
    rows("q", q);
    rows("k", k);
    if (k.shape[0] != q.shape[0] || k.shape[3] != q.shape[3]) {
      fail("k", "batch " + std::to_string(q.shape[0]) + " and head_dim " + std::to_string(q.shape[3]) + " as q",
           shape(k));
    }
    if (k.dtype != q.dtype) fail("k", std::string(name(q.dtype)) + " as q", name(k.dtype));
    if (k.shape[1] < 1 || q.shape[1] % k.shape[1] != 0) {
      fail("k", "a number of heads that divides q's",
           std::to_string(k.shape[1]) + " for " + std::to_string(q.shape[1]) + " query heads");
    }
    if (v == nullptr) return;
    rows("v", *v);
    if (!std::equal(v->shape, v->shape + 4, k.shape)) fail("v", "shape " + shape(k) + " as k", shape(*v));
    if (v->dtype != k.dtype) fail("v", std::string(name(k.dtype)) + " as k", name(v->dtype));
  }

  void lists(const char* argument, int64_t count, const Tensor& q, const Tensor& k) const {
    const int64_t heads = q.shape[1], heads_kv = k.shape[1];
    if (count == 1 || count == heads_kv || count == heads) return;
    fail(argument,
         "1, " + std::to_string(heads_kv) + " (KV heads) or " + std::to_string(heads) +
             " (query heads) selection heads",
         std::to_string(count));
  }

  void pool_heads(int64_t heads, int64_t have) const {
    at_least("heads", 1, heads);
    if (have % heads != 0 && (have == 0 || heads % have != 0)) {
      fail("heads", "a divisor or a multiple of the " + std::to_string(have) + " heads given", std::to_string(heads));
    }
  }

  void blocks(const char* argument, int64_t count, int64_t seqlen_q, int64_t q_block) const {
    const int64_t wanted = (seqlen_q + q_block - 1) / q_block;
    if (count != wanted) {
      fail(argument, "ceil(Lq / q_block) = " + std::to_string(wanted) + " query blocks", std::to_string(count));
    }
  }

  void choice(const KeyChoice& c, int64_t seqlen_q, int64_t q_block) const {
    at_least("q_block", 1, q_block);
    at_least("sink", 0, c.sink);
    at_least("local", 0, c.local);
    at_least("dense_tail", 0, c.dense_tail);
    at_least("min_chunk", 1, c.min_chunk);
    const int64_t forced = seqlen_q > 0 ? c.sink + c.local + std::min(q_block, seqlen_q) - 1 : 0;
    if (c.budget < std::max<int64_t>(0, forced)) {
      fail("budget",
           "at least sink + local + min(q_block, Lq) - 1 = " + std::to_string(std::max<int64_t>(0, forced)),
           std::to_string(c.budget));
    }
  }

  // sparse_prefill and sparse_decode: sink and local count no more keys than there are.
  void clamped_choice(KeyChoice c, int64_t seqlen_q, int64_t seqlen_k, int64_t q_block) const {
    c.sink = std::min(c.sink, seqlen_k);
    c.local = std::min(c.local, seqlen_k);
    choice(c, seqlen_q, q_block);
  }

  void softmax(const Softmax& s) const {
    if (!(s.softcap >= 0.0f)) fail("softcap", "a number >= 0", std::to_string(s.softcap));
    if (std::isnan(s.scale)) fail("scale", "a number", "nan");
    at_least("window", 0, s.window);
  }

 private:
  const char* op_;
};

}  // namespace

void check(const BoundaryScores& p) {
  const Check c("boundary_scores");
  c.rows("k", p.k);
  c.at_least("window", 1, p.window);
}

void check(const BoundaryLogits& p) {
  const Check c("boundary_logits");
  c.rows("k", p.k);
  c.at_least("window", 1, p.window);
  c.at_least("num_heads", 1, p.num_heads);
  const int64_t width = p.k.shape[1] * p.k.shape[3];
  if (width % p.num_heads != 0) {
    c.fail("num_heads", "a divisor of the keys' width " + std::to_string(width), std::to_string(p.num_heads));
  }
  const DType dtype = p.in_proj_weight.dtype;
  const int64_t hidden = p.fc1_weight.shape[0];
  c.like("in_proj_weight", p.in_proj_weight, {3 * width, width}, dtype);
  c.like("in_proj_bias", p.in_proj_bias, {3 * width}, dtype);
  c.like("out_proj_weight", p.out_proj_weight, {width, width}, dtype);
  c.like("out_proj_bias", p.out_proj_bias, {width}, dtype);
  c.like("norm_weight", p.norm_weight, {width}, dtype);
  c.like("norm_bias", p.norm_bias, {width}, dtype);
  if (p.gate_weight.given() != p.gate_bias.given()) {
    c.fail("gate_bias", "gate_weight and gate_bias, both or neither", "one of them");
  }
  if (p.gate_weight.given()) {
    c.like("gate_weight", p.gate_weight, {1, width}, dtype);
    c.like("gate_bias", p.gate_bias, {1}, dtype);
  }
  c.like("fc1_weight", p.fc1_weight, {hidden, 4 * width + 1}, dtype);
  c.like("fc1_bias", p.fc1_bias, {hidden}, dtype);
  c.like("fc2_weight", p.fc2_weight, {1, hidden}, dtype);
  c.like("fc2_bias", p.fc2_bias, {1}, dtype);
}

void check(const SelectBoundaries& p) {
  const Check c("select_boundaries");
  c.like("scores", p.scores, {kAny, kAny}, DType::kFloat32);
  c.at_least("max_chunks", 1, p.max_chunks);
  c.at_least("nms_radius", 0, p.nms_radius);
  c.at_least("segment", 0, p.segment);
  if (std::isnan(p.threshold)) c.fail("threshold", "a number", "nan");
}

void check(const ChunkPool& p) {
  const Check c("chunk_pool");
  c.rows("x", p.x);
  c.chunks(p.x.shape[0], p.offsets, p.num_chunks);
  c.pool_heads(p.heads, p.x.shape[1]);
}

void check(const QueryPool& p) {
  const Check c("query_pool");
  c.rows("q", p.q);
  c.at_least("q_block", 1, p.q_block);
  c.pool_heads(p.heads, p.q.shape[1]);
}

void check(const ChunkScores& p) {
  const Check c("chunk_scores");
  c.like("q_pooled", p.q_pooled, {kAny, kAny, kAny, kAny}, DType::kFloat32);
  c.like("k_pooled", p.k_pooled, {p.q_pooled.shape[0], p.q_pooled.shape[1], kAny, p.q_pooled.shape[3]},
         DType::kFloat32);
}

void check(const TokenScores& p) {
  const Check c("token_scores");
  c.like("chunk_scores", p.chunk_scores, {kAny, kAny, kAny, kAny}, DType::kFloat32);
  c.chunks(p.chunk_scores.shape[0], p.offsets, p.num_chunks, p.chunk_scores.shape[3]);
  c.at_least("k_len", 0, p.seqlen_k);
}

void check(const SelectKeys& p) {
  const Check c("select_keys");
  c.like("chunk_scores", p.chunk_scores, {kAny, kAny, kAny, kAny}, DType::kFloat32);
  c.chunks(p.chunk_scores.shape[0], p.offsets, p.num_chunks, p.chunk_scores.shape[3]);
  c.at_least("q_len", 0, p.seqlen_q);
  c.at_least("k_len", 0, p.seqlen_k);
  c.choice(p.choice, p.seqlen_q, p.q_block);
  c.blocks("chunk_scores", p.chunk_scores.shape[2], p.seqlen_q, p.q_block);
}

void check(const ChunkMass& p) {
  const Check c("chunk_mass");
  c.rows("q", p.q);
  c.like("k_mean", p.k_mean, {p.q.shape[0], kAny, kAny, p.q.shape[3]}, DType::kFloat32);
  if (p.k_mean.shape[1] < 1 || p.q.shape[1] % p.k_mean.shape[1] != 0) {
    c.fail("k_mean", "a number of heads that divides q's",
           std::to_string(p.k_mean.shape[1]) + " for " + std::to_string(p.q.shape[1]) + " query heads");
  }
  c.chunks(p.q.shape[0], p.offsets, p.num_chunks, p.k_mean.shape[2]);
  c.at_least("k_len", 0, p.seqlen_k);
  c.at_least("q_block", 1, p.q_block);
  c.at_least("q_stride", 1, p.q_stride);
  c.softmax(p.softmax);
}

void check(const RefineKeys& p) {
  const Check c("refine_keys");
  c.qkv(p.q, p.k, nullptr);
  c.at_least("q_block", 1, p.q_block);
  c.at_least("refine", 1, p.refine);
  c.at_least("q_stride", 1, p.q_stride);
  c.like("chunk_scores", p.chunk_scores, {p.q.shape[0], kAny, kAny, kAny}, DType::kFloat32);
  c.lists("chunk_scores", p.chunk_scores.shape[1], p.q, p.k);
  c.blocks("chunk_scores", p.chunk_scores.shape[2], p.q.shape[2], p.q_block);
  if (p.row_lse.given()) {
    const int64_t samples = (p.q_block + p.q_stride - 1) / p.q_stride;
    c.like("row_lse", p.row_lse, {p.q.shape[0], p.q.shape[1], p.chunk_scores.shape[2], samples}, DType::kFloat32);
  }
  c.chunks(p.q.shape[0], p.offsets, p.num_chunks, p.chunk_scores.shape[3]);
  c.choice(p.choice, p.q.shape[2], p.q_block);
  c.softmax(p.softmax);
}

void check(const SparseAttention& p) {
  const Check c("sparse_attention");
  c.qkv(p.q, p.k, &p.v);
  c.at_least("q_block", 1, p.q_block);
  c.like("runs", p.runs, {p.q.shape[0], kAny, kAny, kAny, 2}, DType::kInt32);
  c.lists("runs", p.runs.shape[1], p.q, p.k);
  c.blocks("runs", p.runs.shape[2], p.q.shape[2], p.q_block);
  c.like("num_runs", p.num_runs, {p.runs.shape[0], p.runs.shape[1], p.runs.shape[2]}, DType::kInt32);
  c.softmax(p.softmax);
}

void check(const SparsePrefill& p) {
  const Check c("sparse_prefill");
  c.qkv(p.q, p.k, &p.v);
  c.at_least("max_chunks", 1, p.max_chunks);
  c.at_least("q_stride", 1, p.q_stride);
  c.at_least("boundary_window", 1, p.boundary_window);
  c.at_least("refine", 0, p.refine);
  c.at_least("nms_radius", 0, p.nms_radius);
  c.at_least("segment", 0, p.segment);
  if (std::isnan(p.threshold)) c.fail("threshold", "a number", "nan");
  c.lists("select_heads", p.select_heads, p.q, p.k);
  if (p.offsets.given() != p.num_chunks.given()) {
    c.fail(p.offsets.given() ? "num_chunks" : "offsets", "offsets and num_chunks, both or neither", "one");
  }
  if (p.offsets.given()) c.chunks(p.q.shape[0], p.offsets, p.num_chunks);
  c.clamped_choice(p.choice, p.q.shape[2], p.k.shape[2], p.q_block);
  c.softmax(p.softmax);
}

void check(const SparseDecode& p) {
  const Check c("sparse_decode");
  c.qkv(p.q, p.k, &p.v);
  if (p.q.shape[2] > kMaxDecodeQueries) c.fail("q", "at most 16 queries", std::to_string(p.q.shape[2]));
  c.like("k_pooled", p.k_pooled, {p.q.shape[0], kAny, kAny, p.q.shape[3]}, DType::kFloat32);
  c.lists("k_pooled", p.k_pooled.shape[1], p.q, p.k);
  c.chunks(p.q.shape[0], p.offsets, p.num_chunks, p.k_pooled.shape[2]);
  c.at_least("refine", 0, p.refine);
  c.clamped_choice(p.choice, p.q.shape[2], p.k.shape[2], 1);
  c.softmax(p.softmax);
}

}  // namespace dhsa
