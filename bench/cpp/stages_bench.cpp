// Each stage of the core by itself, in pipeline order, on one thread and one ISA (DHSA_FORCE_ISA), without torch.
//
// Shape: 1 x 8 heads x 4096 tokens x head_dim 128, 8 or 2 KV heads, chunks of 16 tokens, query blocks of 64, budget
// 1024. Rates count the least work that the answer needs: for a stage that moves data each input read once and each
// output written once, for one that computes two operations per multiply-add. Answers are what tests/cpp tests.
#include <benchmark/benchmark.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <vector>

#include "core/half.h"
#include "dhsa.h"

namespace {

using dhsa::DType;
using dhsa::Tensor;

constexpr int64_t kHeads = 8, kLength = 4096, kHeadDim = 128, kChunk = 16, kQBlock = 64, kBudget = 1024;
constexpr int64_t kChunks = kLength / kChunk, kBlocks = kLength / kQBlock;

// A contiguous tensor with its memory, normal numbers or zeros.
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
    bytes = count * dhsa::element_size(dtype);
    memory = std::make_unique<std::byte[]>(bytes + 64);
    tensor.data = reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(memory.get()) + 63) / 64 * 64);
    std::mt19937 generator(static_cast<uint32_t>(count));
    std::normal_distribution<float> normal;
    for (int64_t i = 0; random && i < count; ++i) {
      const float x = normal(generator);
      if (dtype == DType::kFloat32) tensor.as<float>()[i] = x;
      if (dtype == DType::kFloat16) tensor.as<uint16_t>()[i] = dhsa::half_from_float(x);
      if (dtype == DType::kBFloat16) tensor.as<uint16_t>()[i] = dhsa::bfloat16_from_float(x);
    }
  }
  Tensor tensor;
  int64_t bytes = 0;

 private:
  std::unique_ptr<std::byte[]> memory;
};

struct Chunks {
  Array offsets{DType::kInt32, {1, kChunks + 1}, false}, num_chunks{DType::kInt32, {1}, false};
  Chunks() {
    for (int64_t c = 0; c <= kChunks; ++c) offsets.tensor.as<int32_t>()[c] = static_cast<int32_t>(c * kChunk);
    num_chunks.tensor.as<int32_t>()[0] = kChunks;
  }
};

struct OneThread final : dhsa::cpu::Executor {
  int workers() const override { return 1; }
  void run(int64_t count, const std::function<void(int64_t, int)>& task) const override {
    for (int64_t item = 0; item < count; ++item) task(item, 0);
  }
};

template <class P>
void time_stage(benchmark::State& state, const P& p, double flops, int64_t bytes) {
  dhsa::check(p);
  const Array workspace(DType::kInt32, {dhsa::cpu::workspace_bytes(p, 1) / 4}, false);
  for (auto _ : state) dhsa::cpu::run(p, workspace.tensor.data, OneThread());
  if (flops > 0) {
    state.counters["FLOP/s"] = benchmark::Counter(flops, benchmark::Counter::kIsIterationInvariantRate);
  } else {
    state.counters["B/s"] =
        benchmark::Counter(static_cast<double>(bytes), benchmark::Counter::kIsIterationInvariantRate);
  }
}

dhsa::KeyChoice choice() {
  dhsa::KeyChoice choice;
  choice.budget = kBudget;
  choice.min_chunk = kChunk;
  return choice;
}
const dhsa::Softmax kSoftmax{1.0f / std::sqrt(static_cast<float>(kHeadDim)), 0.0f, 0};

void boundary_scores(benchmark::State& state, DType dtype, int64_t kv_heads) {
  const Array k(dtype, {1, kv_heads, kLength, kHeadDim}), scores(DType::kFloat32, {1, kLength}, false);
  time_stage(state, dhsa::BoundaryScores{k.tensor, 4, scores.tensor}, 0, k.bytes + scores.bytes);
}

// A predictor with 8 heads and window 4, weights of a size that keeps its activations near 1.
void boundary_logits(benchmark::State& state, DType dtype, int64_t kv_heads) {
  constexpr int64_t kPredictorHeads = 8, kWindow = 4, kHidden = 256;
  const int64_t width = kv_heads * kHeadDim, features = 4 * width + 1;
  const Array k(dtype, {1, kv_heads, kLength, kHeadDim}), logits(DType::kFloat32, {1, kLength}, false);
  const auto weights = [](std::initializer_list<int64_t> shape) {
    Array array(DType::kFloat32, shape);
    const float size = 1.0f / std::sqrt(static_cast<float>(*(shape.end() - 1)));
    for (int64_t i = 0; i < array.bytes / 4; ++i) array.tensor.as<float>()[i] *= size;
    return array;
  };
  const Array in = weights({3 * width, width}), in_bias = weights({3 * width});
  const Array out = weights({width, width}), out_bias = weights({width});
  const Array norm = weights({width}), norm_bias = weights({width}), gate = weights({1, width}),
              gate_bias = weights({1});
  const Array fc1 = weights({kHidden, features}), fc1_bias = weights({kHidden});
  const Array fc2 = weights({1, kHidden}), fc2_bias = weights({1});
  dhsa::BoundaryLogits p;
  p.k = k.tensor;
  p.in_proj_weight = in.tensor, p.in_proj_bias = in_bias.tensor;
  p.out_proj_weight = out.tensor, p.out_proj_bias = out_bias.tensor;
  p.norm_weight = norm.tensor, p.norm_bias = norm_bias.tensor;
  p.gate_weight = gate.tensor, p.gate_bias = gate_bias.tensor;
  p.fc1_weight = fc1.tensor, p.fc1_bias = fc1_bias.tensor, p.fc2_weight = fc2.tensor, p.fc2_bias = fc2_bias.tensor;
  p.num_heads = kPredictorHeads;
  p.window = kWindow;
  p.logits = logits.tensor;
  const double products = 4.0 * width * width + 4.0 * kWindow * kWindow * kPredictorHeads * width + features * kHidden;
  time_stage(state, p, 2.0 * kLength * products, 0);
}

void select_boundaries(benchmark::State& state) {
  const Array scores(DType::kFloat32, {1, kLength}), offsets(DType::kInt32, {1, kChunks + 1}, false);
  const Array num_chunks(DType::kInt32, {1}, false);
  dhsa::SelectBoundaries p;
  p.scores = scores.tensor;
  p.max_chunks = kChunks;
  p.threshold = -std::numeric_limits<float>::infinity();
  p.offsets = offsets.tensor;
  p.num_chunks = num_chunks.tensor;
  time_stage(state, p, 0, scores.bytes + offsets.bytes);
}

void chunk_pool(benchmark::State& state, DType dtype, int64_t kv_heads) {
  const Array k(dtype, {1, kv_heads, kLength, kHeadDim});
  const Array pooled(DType::kFloat32, {1, kv_heads, kChunks, kHeadDim}, false);
  const Chunks chunks;
  dhsa::ChunkPool p;
  p.x = k.tensor;
  p.offsets = chunks.offsets.tensor;
  p.num_chunks = chunks.num_chunks.tensor;
  p.heads = kv_heads;
  p.pooled = pooled.tensor;
  time_stage(state, p, 0, k.bytes + pooled.bytes);
}

void query_pool(benchmark::State& state, DType dtype, int64_t kv_heads) {
  const Array q(dtype, {1, kHeads, kLength, kHeadDim});
  const Array pooled(DType::kFloat32, {1, kv_heads, kBlocks, kHeadDim}, false);
  dhsa::QueryPool p;
  p.q = q.tensor;
  p.heads = kv_heads;
  p.q_block = kQBlock;
  p.pooled = pooled.tensor;
  time_stage(state, p, 0, q.bytes + pooled.bytes);
}

void chunk_scores(benchmark::State& state, int64_t kv_heads) {
  const Array q(DType::kFloat32, {1, kv_heads, kBlocks, kHeadDim}),
      k(DType::kFloat32, {1, kv_heads, kChunks, kHeadDim});
  const Array scores(DType::kFloat32, {1, kv_heads, kBlocks, kChunks}, false);
  time_stage(state, dhsa::ChunkScores{q.tensor, k.tensor, scores.tensor},
             2.0 * static_cast<double>(kv_heads * kBlocks * kChunks * kHeadDim), 0);
}

void token_scores(benchmark::State& state, int64_t kv_heads) {
  const Array from(DType::kFloat32, {1, kv_heads, kBlocks, kChunks});
  const Array to(DType::kFloat32, {1, kv_heads, kBlocks, kLength}, false);
  const Chunks chunks;
  time_stage(state, dhsa::TokenScores{from.tensor, chunks.offsets.tensor, chunks.num_chunks.tensor, kLength, to.tensor},
             0, from.bytes + to.bytes);
}

// Chosen keys: the stage's outputs, and what sparse_attention reads.
struct Lists {
  Array scores, runs, num_runs;
  Chunks chunks;
  dhsa::SelectKeys select;

  explicit Lists(int64_t lists)
      : scores(DType::kFloat32, {1, lists, kBlocks, kChunks}),
        runs(DType::kInt32, {1, lists, kBlocks, dhsa::run_capacity(kChunks, kBudget, kChunk), 2}, false),
        num_runs(DType::kInt32, {1, lists, kBlocks}, false) {
    select.chunk_scores = scores.tensor;
    select.offsets = chunks.offsets.tensor;
    select.num_chunks = chunks.num_chunks.tensor;
    select.seqlen_q = select.seqlen_k = kLength;
    select.q_block = kQBlock;
    select.choice = choice();
    select.runs = runs.tensor;
    select.num_runs = num_runs.tensor;
  }
};

void select_keys(benchmark::State& state, int64_t kv_heads) {
  const Lists lists(kv_heads);
  time_stage(state, lists.select, 0, lists.scores.bytes + lists.runs.bytes);
}

void chunk_mass(benchmark::State& state, DType dtype, int64_t kv_heads) {
  const Array q(dtype, {1, kHeads, kLength, kHeadDim}), k(DType::kFloat32, {1, kv_heads, kChunks, kHeadDim});
  const Array scores(DType::kFloat32, {1, kv_heads, kBlocks, kChunks}, false);
  const Array row_lse(DType::kFloat32, {1, kHeads, kBlocks, kQBlock / 8}, false);
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
  // Chunks that begin at or before a block's end: half of the square.
  time_stage(state, p, static_cast<double>(kHeads * (kLength / 8) * kChunks * kHeadDim), 0);
}

void refine_keys(benchmark::State& state, DType dtype, int64_t kv_heads) {
  const int64_t capacity = dhsa::refined_run_capacity(kLength, kBudget), refine = 4;
  const Array q(dtype, {1, kHeads, kLength, kHeadDim}), k(dtype, {1, kv_heads, kLength, kHeadDim});
  const Array scores(DType::kFloat32, {1, kv_heads, kBlocks, kChunks});
  const Array row_lse(DType::kFloat32, {1, kHeads, kBlocks, kQBlock / 8});
  const Array runs(DType::kInt32, {1, kv_heads, kBlocks, capacity, 2}, false);
  const Array num_runs(DType::kInt32, {1, kv_heads, kBlocks}, false);
  const Chunks chunks;
  dhsa::RefineKeys p;
  p.q = q.tensor;
  p.k = k.tensor;
  p.chunk_scores = scores.tensor;
  p.row_lse = row_lse.tensor;
  p.offsets = chunks.offsets.tensor;
  p.num_chunks = chunks.num_chunks.tensor;
  p.refine = refine;
  p.choice = choice();
  p.softmax = kSoftmax;
  p.runs = runs.tensor;
  p.num_runs = num_runs.tensor;
  const int64_t room = kBudget - p.choice.sink - p.choice.local - kQBlock + 1;
  double looked_at = 0;  // blocks whose candidates fit the budget score none
  for (int64_t end = kQBlock; end <= kLength; end += kQBlock) {
    if (end > kBudget) looked_at += static_cast<double>(std::min(refine * room, end - (kBudget - room)));
  }
  time_stage(state, p, 2.0 * looked_at * static_cast<double>(kHeads * (kQBlock / 8) * kHeadDim), 0);
}

double attention_flops(double pairs) { return 4.0 * pairs * static_cast<double>(kHeads * kHeadDim); }
double causal_pairs(int64_t budget) {  // of one head
  double pairs = 0;
  for (int64_t i = 0; i < kLength; ++i) pairs += static_cast<double>(std::min(i + 1, budget));
  return pairs;
}

void sparse_attention(benchmark::State& state, DType dtype, int64_t kv_heads) {
  const Array q(dtype, {1, kHeads, kLength, kHeadDim}), k(dtype, {1, kv_heads, kLength, kHeadDim});
  const Array v(dtype, {1, kv_heads, kLength, kHeadDim}), out(dtype, {1, kHeads, kLength, kHeadDim}, false);
  const Array lse(DType::kFloat32, {1, kHeads, kLength}, false);
  const Lists lists(kv_heads);
  const Array workspace(DType::kInt32, {dhsa::cpu::workspace_bytes(lists.select, 1) / 4}, false);
  dhsa::cpu::run(lists.select, workspace.tensor.data, OneThread());
  dhsa::SparseAttention p;
  p.q = q.tensor;
  p.k = k.tensor;
  p.v = v.tensor;
  p.runs = lists.runs.tensor;
  p.num_runs = lists.num_runs.tensor;
  p.q_block = kQBlock;
  p.softmax = kSoftmax;
  p.out = out.tensor;
  p.lse = lse.tensor;
  time_stage(state, p, attention_flops(causal_pairs(kBudget)), 0);
}

void sparse_prefill(benchmark::State& state, DType dtype, int64_t kv_heads, bool accurate) {
  const Array q(dtype, {1, kHeads, kLength, kHeadDim}), k(dtype, {1, kv_heads, kLength, kHeadDim});
  const Array v(dtype, {1, kv_heads, kLength, kHeadDim}), out(dtype, {1, kHeads, kLength, kHeadDim}, false);
  const Array lse(DType::kFloat32, {1, kHeads, kLength}, false);
  dhsa::SparsePrefill p;
  p.q = q.tensor;
  p.k = k.tensor;
  p.v = v.tensor;
  p.max_chunks = kChunks;
  p.q_block = kQBlock;
  p.select_heads = kv_heads;
  p.score = accurate ? dhsa::ChunkScore::kMass : dhsa::ChunkScore::kDot;
  p.refine = accurate ? 4 : 0;
  p.threshold = -std::numeric_limits<float>::infinity();
  p.choice = choice();
  p.choice.min_chunk = p.nms_radius + 1;
  p.softmax = kSoftmax;
  p.out = out.tensor;
  p.lse = lse.tensor;
  time_stage(state, p, attention_flops(causal_pairs(kBudget)), 0);
}

void sparse_decode(benchmark::State& state, DType dtype, int64_t kv_heads) {
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
  p.choice = choice();
  p.softmax = kSoftmax;
  p.out = out.tensor;
  p.lse = lse.tensor;
  time_stage(state, p, 0, (k.bytes + v.bytes) * kBudget / kLength + pooled.bytes);
}

void register_all() {
  constexpr struct {
    DType dtype;
    const char* name;
  } kTypes[] = {{DType::kFloat32, "float32"}, {DType::kFloat16, "float16"}, {DType::kBFloat16, "bfloat16"}};
  const auto add = [](const std::string& name, auto function) {
    benchmark::RegisterBenchmark(name.c_str(), function)->Unit(benchmark::kMillisecond);
  };
  const auto each = [&](const char* stage, auto function) {  // type and number of KV heads
    for (const auto& type : kTypes) {
      for (const int64_t kv_heads : {kHeads, int64_t{2}}) {
        add(std::string(stage) + "/" + type.name + "/kv_heads:" + std::to_string(kv_heads),
            [=](benchmark::State& state) { function(state, type.dtype, kv_heads); });
      }
    }
  };
  each("boundary_scores", boundary_scores);
  for (const int64_t kv_heads : {kHeads, int64_t{2}}) {  // nearly all of the work is past the keys' conversion
    add("boundary_logits/float32/kv_heads:" + std::to_string(kv_heads),
        [=](benchmark::State& state) { boundary_logits(state, DType::kFloat32, kv_heads); });
  }
  add("select_boundaries", select_boundaries);
  each("chunk_pool", chunk_pool);
  each("query_pool", query_pool);
  add("chunk_scores/kv_heads:8", [](benchmark::State& state) { chunk_scores(state, 8); });
  add("token_scores/kv_heads:8", [](benchmark::State& state) { token_scores(state, 8); });
  add("select_keys/kv_heads:8", [](benchmark::State& state) { select_keys(state, 8); });
  each("chunk_mass", chunk_mass);
  each("refine_keys", refine_keys);
  each("sparse_attention", sparse_attention);
  each("sparse_prefill/dot", [](auto& state, DType dtype, int64_t n) { sparse_prefill(state, dtype, n, false); });
  each("sparse_prefill/mass_refine",
       [](auto& state, DType dtype, int64_t n) { sparse_prefill(state, dtype, n, true); });
  each("sparse_decode", sparse_decode);
}

}  // namespace

int main(int argc, char** argv) {
  benchmark::AddCustomContext("isas_detected", dhsa::cpu::isas_detected());
  benchmark::AddCustomContext("isa", dhsa::cpu::isa_active());
  register_all();
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 1;
  benchmark::RunSpecifiedBenchmarks();
  return 0;
}
