// What the plugins of qemu look at: each stage of the core on fixed inputs, once, in a region of qemu_plugin.h.
//
//   cases [--cache KIB] [PART...]  a line a case, in the order of the regions, separated by tabs: name, unit, number of
//                                  units, and the bytes of each of its inputs as NAME=BYTES; only cases whose names
//                                  have every PART. Blocks are as for a core with KIB of cache, 512 if not said.
//   cases --isas                   the ISAs that this machine runs, one a line
//
// Shape: 8 query heads, 8 or 2 KV heads, head_dim 128, chunks of 16 tokens; query blocks of 64 and 1024 kept keys of
// 4096. Units are the least work that the answer needs. The attention cases read 1024 keys in runs of 16 and more, all
// before the first query: nothing is masked, and 64 queries make 64 x 1024 pairs of 2 x 128 multiply-adds.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "core/half.h"
#include "cpu/caches.h"
#include "dhsa.h"

namespace {

using dhsa::DType;
using dhsa::Tensor;

constexpr int64_t kHeads = 8, kLength = 4096, kHeadDim = 128, kChunk = 16, kQBlock = 64, kBudget = 1024;
constexpr int64_t kChunks = kLength / kChunk;
constexpr int64_t kPeriod = 65560;  // inputs repeat after so many numbers, no whole number of rows
constexpr struct {
  DType dtype;
  const char* name;
} kTypes[] = {{DType::kFloat32, "float32"}, {DType::kFloat16, "float16"}, {DType::kBFloat16, "bfloat16"}};
const dhsa::Softmax kSoftmax{1.0f / std::sqrt(static_cast<float>(kHeadDim)), 0.0f, 0};

// A contiguous tensor with its memory: uniform numbers, the same in every run, or zeros.
struct Array {
  Array(DType dtype, std::initializer_list<int64_t> shape, bool random = true) {
    tensor.dtype = dtype;
    tensor.ndim = static_cast<int32_t>(shape.size());
    std::copy(shape.begin(), shape.end(), tensor.shape);
    int64_t count = 1;
    for (int32_t i = tensor.ndim - 1; i >= 0; --i) {
      tensor.stride[i] = count;
      count *= tensor.shape[i];
    }
    memory.resize(count * dhsa::element_size(dtype) + 64);
    tensor.data = reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(memory.data()) + 63) / 64 * 64);
    std::minstd_rand generator(static_cast<uint32_t>(count));
    for (int64_t i = 0; random && i < std::min(count, kPeriod); ++i) {
      const float x = (static_cast<float>(generator()) * 0x1p-30f - 1.0f) * 1.7320508f;  // variance 1
      if (dtype == DType::kFloat32) tensor.as<float>()[i] = x;
      if (dtype == DType::kFloat16) tensor.as<uint16_t>()[i] = dhsa::half_from_float(x);
      if (dtype == DType::kBFloat16) tensor.as<uint16_t>()[i] = dhsa::bfloat16_from_float(x);
    }
    const int64_t size = dhsa::element_size(dtype);  // a copy takes fewer emulated instructions than a draw
    for (int64_t i = kPeriod; random && i < count; i += kPeriod) {
      std::memcpy(tensor.as<char>() + i * size, tensor.data, std::min(kPeriod, count - i) * size);
    }
  }
  Array(const Array&) = delete;
  Array& operator=(const Array&) = delete;

  const char* begin() const { return static_cast<const char*>(tensor.data); }
  int64_t bytes() const { return static_cast<int64_t>(memory.size()) - 64; }

  Tensor tensor;

 private:
  std::vector<std::byte> memory;
};

struct Chunks {
  Array offsets{DType::kInt32, {1, kChunks + 1}, false}, num_chunks{DType::kInt32, {1}, false};
  Chunks() {
    for (int64_t c = 0; c <= kChunks; ++c) offsets.tensor.as<int32_t>()[c] = static_cast<int32_t>(c * kChunk);
    num_chunks.tensor.as<int32_t>()[0] = kChunks;
  }
};

// For each list of one query block kBudget / kChunk of the first kChunks - 4 chunks, none of them a query's own.
struct Lists {
  Array runs, num_runs;

  explicit Lists(int64_t lists)
      : runs(DType::kInt32, {1, lists, 1, kBudget / kChunk, 2}, false), num_runs(DType::kInt32, {1, lists, 1}, false) {
    std::mt19937 generator(1);
    for (int64_t s = 0; s < lists; ++s) {
      int64_t left = kBudget / kChunk, count = 0;
      int32_t* list = runs.tensor.as<int32_t>() + s * runs.tensor.stride[1];
      const int64_t among = kChunks - kQBlock / kChunk;
      for (int64_t c = 0; c < among; ++c) {
        if (static_cast<int64_t>(generator() % static_cast<uint32_t>(among - c)) >= left) continue;
        --left;
        if (count > 0 && list[2 * count - 1] == c * kChunk) {
          list[2 * count - 1] += kChunk;
          continue;
        }
        list[2 * count] = static_cast<int32_t>(c * kChunk);
        list[2 * count++ + 1] = static_cast<int32_t>((c + 1) * kChunk);
      }
      num_runs.tensor.as<int32_t>()[s] = static_cast<int32_t>(count);
    }
  }
};

struct OneThread final : dhsa::cpu::Executor {
  int workers() const override { return 1; }
  void run(int64_t count, const std::function<void(int64_t, int)>& task) const override {
    for (int64_t item = 0; item < count; ++item) task(item, 0);
  }
};

#if defined(__aarch64__)
void begin_region() { asm volatile("hint #112" ::: "memory"); }
void end_region() { asm volatile("hint #113" ::: "memory"); }
void name_input(const char* first, const char* last) {
  asm volatile("hint #114\n\tldrb wzr, [%0]\n\tldrb wzr, [%1]" ::"r"(first), "r"(last) : "memory");
}
#else
#error "these are cases for ARM64: compile them with aarch64-linux-gnu-g++"
#endif

std::vector<std::string> parts;

struct Input {
  const char* name;
  const Array& array;
};

template <class P>
void count(const std::string& name, const char* unit, int64_t units, const P& p, std::initializer_list<Input> inputs) {
  for (const std::string& part : parts) {
    if (name.find(part) == std::string::npos) return;
  }
  dhsa::check(p);
  const Array workspace(DType::kInt32, {dhsa::cpu::workspace_bytes(p, 1) / 4}, false);
  for (const Input& input : inputs) name_input(input.array.begin(), input.array.begin() + input.array.bytes() - 1);
  begin_region();
  dhsa::cpu::run(p, workspace.tensor.data, OneThread());
  end_region();
  std::printf("%s\t%s\t%lld", name.c_str(), unit, static_cast<long long>(units));
  for (const Input& input : inputs) {
    std::printf("\t%s=%lld", input.name, static_cast<long long>(input.array.bytes()));
  }
  std::puts("");
}

constexpr const char* kMultiplyAdd = "multiply-add";

dhsa::KeyChoice choice(int64_t budget) {
  dhsa::KeyChoice choice;
  choice.budget = budget;
  choice.min_chunk = kChunk;
  return choice;
}

void attention(const std::string& suffix, DType dtype, int64_t kv_heads, int64_t queries) {
  const Array q(dtype, {1, kHeads, queries, kHeadDim}), k(dtype, {1, kv_heads, kLength, kHeadDim});
  const Array v(dtype, {1, kv_heads, kLength, kHeadDim}), out(dtype, {1, kHeads, queries, kHeadDim}, false);
  const Array lse(DType::kFloat32, {1, kHeads, queries}, false);
  const Lists lists(kv_heads);
  dhsa::SparseAttention p;
  p.q = q.tensor;
  p.k = k.tensor;
  p.v = v.tensor;
  p.runs = lists.runs.tensor;
  p.num_runs = lists.num_runs.tensor;
  p.q_block = queries;
  p.softmax = kSoftmax;
  p.out = out.tensor;
  p.lse = lse.tensor;
  count(std::string("sparse_attention/") + (queries == 1 ? "one_query" : "64_queries") + suffix, kMultiplyAdd,
        2 * kHeads * queries * kBudget * kHeadDim, p, {{"q", q}, {"k", k}, {"v", v}});
}

void boundary_scores(const std::string& suffix, DType dtype, int64_t kv_heads) {
  const Array k(dtype, {1, kv_heads, kLength, kHeadDim}), scores(DType::kFloat32, {1, kLength}, false);
  count("boundary_scores" + suffix, "element of k", kv_heads * kLength * kHeadDim,
        dhsa::BoundaryScores{k.tensor, 4, scores.tensor}, {{"k", k}});
}

void select_boundaries() {
  const Array scores(DType::kFloat32, {1, kLength}), offsets(DType::kInt32, {1, kChunks + 1}, false);
  const Array num_chunks(DType::kInt32, {1}, false);
  dhsa::SelectBoundaries p;
  p.scores = scores.tensor;
  p.max_chunks = kChunks;
  p.threshold = -std::numeric_limits<float>::infinity();
  p.offsets = offsets.tensor;
  p.num_chunks = num_chunks.tensor;
  count("select_boundaries", "token", kLength, p, {{"scores", scores}});
}

void chunk_pool(const std::string& suffix, DType dtype, int64_t kv_heads) {
  const Array k(dtype, {1, kv_heads, kLength, kHeadDim});
  const Array pooled(DType::kFloat32, {1, kv_heads, kChunks, kHeadDim}, false);
  const Chunks chunks;
  dhsa::ChunkPool p;
  p.x = k.tensor;
  p.offsets = chunks.offsets.tensor;
  p.num_chunks = chunks.num_chunks.tensor;
  p.heads = kv_heads;
  p.pooled = pooled.tensor;
  count("chunk_pool" + suffix, "element of k", kv_heads * kLength * kHeadDim, p, {{"k", k}});
}

void query_pool(const std::string& suffix, DType dtype, int64_t kv_heads) {
  const Array q(dtype, {1, kHeads, kLength / 4, kHeadDim});
  const Array pooled(DType::kFloat32, {1, kv_heads, kLength / 4 / kQBlock, kHeadDim}, false);
  dhsa::QueryPool p;
  p.q = q.tensor;
  p.heads = kv_heads;
  p.q_block = kQBlock;
  p.pooled = pooled.tensor;
  count("query_pool" + suffix, "element of q", kHeads * kLength / 4 * kHeadDim, p, {{"q", q}});
}

void chunk_scores() {
  const int64_t blocks = kLength / kQBlock;
  const Array q(DType::kFloat32, {1, kHeads, blocks, kHeadDim}), k(DType::kFloat32, {1, kHeads, kChunks, kHeadDim});
  const Array scores(DType::kFloat32, {1, kHeads, blocks, kChunks}, false);
  count("chunk_scores", kMultiplyAdd, kHeads * blocks * kChunks * kHeadDim,
        dhsa::ChunkScores{q.tensor, k.tensor, scores.tensor}, {{"q_pooled", q}, {"k_pooled", k}});
}

void token_scores() {
  const int64_t blocks = 8;
  const Array from(DType::kFloat32, {1, kHeads, blocks, kChunks});
  const Array to(DType::kFloat32, {1, kHeads, blocks, kLength}, false);
  const Chunks chunks;
  count("token_scores", "score", kHeads * blocks * kLength,
        dhsa::TokenScores{from.tensor, chunks.offsets.tensor, chunks.num_chunks.tensor, kLength, to.tensor},
        {{"chunk_scores", from}});
}

void select_keys() {
  const int64_t blocks = 8;  // the last ones: every one has more candidates than budget
  const Array scores(DType::kFloat32, {1, kHeads, blocks, kChunks});
  const Array runs(DType::kInt32, {1, kHeads, blocks, dhsa::run_capacity(kChunks, kBudget, kChunk), 2}, false);
  const Array num_runs(DType::kInt32, {1, kHeads, blocks}, false);
  const Chunks chunks;
  dhsa::SelectKeys p;
  p.chunk_scores = scores.tensor;
  p.offsets = chunks.offsets.tensor;
  p.num_chunks = chunks.num_chunks.tensor;
  p.seqlen_q = blocks * kQBlock;
  p.seqlen_k = kLength;
  p.q_block = kQBlock;
  p.choice = choice(kBudget);
  p.runs = runs.tensor;
  p.num_runs = num_runs.tensor;
  count("select_keys", "chunk", kHeads * blocks * kChunks, p, {{"chunk_scores", scores}});
}

constexpr int64_t kLastBlocks = 4, kRowsOfBlock = kQBlock / 8;

void chunk_mass(const std::string& suffix, DType dtype, int64_t kv_heads) {
  const Array q(dtype, {1, kHeads, kLastBlocks * kQBlock, kHeadDim});
  const Array k(DType::kFloat32, {1, kv_heads, kChunks, kHeadDim});
  const Array scores(DType::kFloat32, {1, kv_heads, kLastBlocks, kChunks}, false);
  const Array row_lse(DType::kFloat32, {1, kHeads, kLastBlocks, kRowsOfBlock}, false);
  const Chunks chunks;
  dhsa::ChunkMass p;
  p.q = q.tensor;
  p.k_mean = k.tensor;
  p.offsets = chunks.offsets.tensor;
  p.num_chunks = chunks.num_chunks.tensor;
  p.seqlen_k = kLength;
  p.softmax = kSoftmax;
  p.scores = scores.tensor;
  p.row_lse = row_lse.tensor;
  int64_t seen = 0;  // chunks that begin at or before a block's end
  for (int64_t j = 0; j < kLastBlocks; ++j) seen += kChunks - j * kQBlock / kChunk;
  count("chunk_mass" + suffix, kMultiplyAdd, kHeads * kRowsOfBlock * seen * kHeadDim, p, {{"q", q}, {"k_mean", k}});
}

void refine_keys(const std::string& suffix, DType dtype, int64_t kv_heads) {
  const int64_t budget = 512, refine = 4, capacity = dhsa::refined_run_capacity(kLength, budget);
  const Array q(dtype, {1, kHeads, kLastBlocks * kQBlock, kHeadDim}), k(dtype, {1, kv_heads, kLength, kHeadDim});
  const Array scores(DType::kFloat32, {1, kv_heads, kLastBlocks, kChunks});
  const Array row_lse(DType::kFloat32, {1, kHeads, kLastBlocks, kRowsOfBlock});
  const Array runs(DType::kInt32, {1, kv_heads, kLastBlocks, capacity, 2}, false);
  const Array num_runs(DType::kInt32, {1, kv_heads, kLastBlocks}, false);
  const Chunks chunks;
  dhsa::RefineKeys p;
  p.q = q.tensor;
  p.k = k.tensor;
  p.chunk_scores = scores.tensor;
  p.row_lse = row_lse.tensor;
  p.offsets = chunks.offsets.tensor;
  p.num_chunks = chunks.num_chunks.tensor;
  p.refine = refine;
  p.choice = choice(budget);
  p.softmax = kSoftmax;
  p.runs = runs.tensor;
  p.num_runs = num_runs.tensor;
  const int64_t forced = p.choice.sink + p.choice.local + kQBlock - 1;
  count("refine_keys" + suffix, kMultiplyAdd,
        refine * (budget - forced) * kLastBlocks * kHeads * kRowsOfBlock * kHeadDim, p, {{"q", q}, {"k", k}});
}

void sparse_prefill(const std::string& suffix, DType dtype, int64_t kv_heads, bool accurate) {
  const int64_t length = 512, budget = 256;  // at 1024 tokens these cases took 177 s of the count's 200
  const Array q(dtype, {1, kHeads, length, kHeadDim}), k(dtype, {1, kv_heads, length, kHeadDim});
  const Array v(dtype, {1, kv_heads, length, kHeadDim}), out(dtype, {1, kHeads, length, kHeadDim}, false);
  const Array lse(DType::kFloat32, {1, kHeads, length}, false);
  dhsa::SparsePrefill p;
  p.q = q.tensor;
  p.k = k.tensor;
  p.v = v.tensor;
  p.max_chunks = length / kChunk;
  p.q_block = kQBlock;
  p.select_heads = kv_heads;
  p.score = accurate ? dhsa::ChunkScore::kMass : dhsa::ChunkScore::kDot;
  p.refine = accurate ? 4 : 0;
  p.threshold = -std::numeric_limits<float>::infinity();
  p.choice = choice(budget);
  p.choice.min_chunk = p.nms_radius + 1;
  p.softmax = kSoftmax;
  p.out = out.tensor;
  p.lse = lse.tensor;
  int64_t pairs = 0;  // of one head
  for (int64_t i = 0; i < length; ++i) pairs += std::min(i + 1, budget);
  count(std::string("sparse_prefill/") + (accurate ? "mass_refine" : "dot") + suffix, kMultiplyAdd,
        2 * kHeads * pairs * kHeadDim, p, {{"q", q}, {"k", k}, {"v", v}});
}

void sparse_decode(const std::string& suffix, DType dtype, int64_t kv_heads) {
  const Array q(dtype, {1, kHeads, 1, kHeadDim}), k(dtype, {1, kv_heads, kLength, kHeadDim});
  const Array v(dtype, {1, kv_heads, kLength, kHeadDim}), out(dtype, {1, kHeads, 1, kHeadDim}, false);
  const Array pooled(DType::kFloat32, {1, kv_heads, kChunks, kHeadDim}), lse(DType::kFloat32, {1, kHeads, 1}, false);
  const Chunks chunks;
  dhsa::SparseDecode p;
  p.q = q.tensor;
  p.k = k.tensor;
  p.v = v.tensor;
  p.k_pooled = pooled.tensor;
  p.offsets = chunks.offsets.tensor;
  p.num_chunks = chunks.num_chunks.tensor;
  p.choice = choice(kBudget);
  p.softmax = kSoftmax;
  p.out = out.tensor;
  p.lse = lse.tensor;
  count("sparse_decode" + suffix, kMultiplyAdd, 2 * kHeads * kBudget * kHeadDim, p,
        {{"q", q}, {"k_pooled", pooled}, {"k", k}, {"v", v}});
}

void count_all() {
  const auto each = [](auto function) {  // type and number of KV heads
    for (const auto& type : kTypes) {
      for (const int64_t kv_heads : {kHeads, int64_t{2}}) {
        function("/" + std::string(type.name) + "/kv_heads:" + std::to_string(kv_heads), type.dtype, kv_heads);
      }
    }
  };
  each(boundary_scores);
  select_boundaries();
  each(chunk_pool);
  each(query_pool);
  chunk_scores();
  token_scores();
  select_keys();
  each(chunk_mass);
  each(refine_keys);
  each([](const std::string& suffix, DType dtype, int64_t n) { attention(suffix, dtype, n, kQBlock); });
  each([](const std::string& suffix, DType dtype, int64_t n) { attention(suffix, dtype, n, 1); });
  each([](const std::string& suffix, DType dtype, int64_t n) { sparse_prefill(suffix, dtype, n, false); });
  each([](const std::string& suffix, DType dtype, int64_t n) { sparse_prefill(suffix, dtype, n, true); });
  each(sparse_decode);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc > 1 && std::string(argv[1]) == "--isas") {
    std::string isas = dhsa::cpu::isas_detected();
    std::replace(isas.begin(), isas.end(), ',', '\n');
    std::puts(isas.c_str());
    return 0;
  }
  const bool sized = argc > 2 && std::string(argv[1]) == "--cache";
  parts.assign(argv + (sized ? 3 : 1), argv + argc);
  // Outside of every region, and not those of the machine that emulates: a Cortex-A76's.
  dhsa::cpu::force_caches({64 << 10, (sized ? std::atoll(argv[2]) : 512) << 10});
  dhsa::cpu::isa_active();
  count_all();
  return 0;
}
