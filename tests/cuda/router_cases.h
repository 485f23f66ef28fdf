// Shared by router_test and pipeline_test: patterns of scores, select_keys on the device, and the frame of a test
// program.
#pragma once

#include <utility>

#include "router_reference.h"

namespace dhsa::test {

inline bool small_run = false;  // few and small cases, for compute-sanitizer

inline const char* name(DType dtype) {
  return dtype == DType::kFloat32 ? "float32" : dtype == DType::kFloat16 ? "float16" : "bfloat16";
}
constexpr DType kTypes[] = {DType::kFloat32, DType::kFloat16, DType::kBFloat16};
constexpr Layout kLayouts[] = {Layout::kHeadsFirst, Layout::kTokensFirst};

enum class Pattern { kRandom, kTies, kConstant, kRising, kFalling, kZigzag, kSpecial };
constexpr const char* kPatternNames[] = {"random", "ties", "constant", "rising", "falling", "zigzag", "special"};

inline std::vector<float> make_scores(int64_t n, Pattern pattern) {
  std::vector<float> scores(n);
  const float specials[] = {INFINITY, -INFINITY, NAN, 0.0f, -0.0f, 1.0f, -1.0f, 3e38f, 1e-40f};
  for (int64_t i = 0; i < n; ++i) {
    switch (pattern) {
      case Pattern::kRandom:
        scores[i] = random_normal();
        break;
      case Pattern::kTies:
        scores[i] = static_cast<float>(random_int(0, 3));
        break;
      case Pattern::kConstant:
        scores[i] = 0.25f;
        break;
      case Pattern::kRising:
        scores[i] = static_cast<float>(i);
        break;
      case Pattern::kFalling:
        scores[i] = static_cast<float>(n - i);
        break;
      case Pattern::kZigzag:
        scores[i] = static_cast<float>(std::abs(i % 4001 - 2000)) + (i % 2) * 0.5f;
        break;
      case Pattern::kSpecial:
        scores[i] = specials[random_int(0, 8)];
        break;
    }
  }
  return scores;
}
struct Lists {
  std::vector<int> runs, num_runs;
};

inline Lists select_keys_on_device(const std::vector<float>& scores, const std::vector<int>& offsets,
                                   const std::vector<int>& counts, int64_t batch, int64_t heads, int64_t blocks,
                                   int64_t seqlen_q, int64_t seqlen_k, int64_t q_block, const KeyChoice& choice,
                                   int64_t runs, const std::string& what) {
  const int64_t capacity = static_cast<int64_t>(offsets.size()) / batch - 1;
  Array<float> d_scores(batch, heads, blocks, capacity);
  Array<int> d_offsets(batch, capacity + 1), d_counts(batch), d_runs(batch, heads, blocks, runs, 2),
      d_num(batch, heads, blocks);
  d_scores.set(scores), d_offsets.set(offsets), d_counts.set(counts);
  SelectKeys stage;
  stage.chunk_scores = d_scores.view, stage.offsets = d_offsets.view, stage.num_chunks = d_counts.view;
  stage.seqlen_q = seqlen_q, stage.seqlen_k = seqlen_k, stage.q_block = q_block, stage.choice = choice;
  stage.runs = d_runs.view, stage.num_runs = d_num.view;
  run_stage(stage, what);
  expect(d_runs.buffer.guard_intact() && d_num.buffer.guard_intact(), what + ": guard");
  return {d_runs.get(), d_num.get()};
}
// Median microseconds of a call in a graph.
template <class Stage>
inline double time_stage(const Stage& stage, int repeats) {
  Buffer scratch = workspace(cuda::workspace_bytes(stage));
  Graph graph(repeats, [&](cudaStream_t stream) { CUDA_CHECK(cuda::run(stage, scratch.data(), stream)); });
  return graph.microseconds();
}

// The program's device, and whether the build runs on it.
inline bool device_ready() {
  cudaDeviceProp device;
  CUDA_CHECK(cudaGetDeviceProperties(&device, 0));
  std::printf("%s, compiled for %s\n", device.name, cuda::archs_compiled());
  if (cuda::device_supported(device.major, device.minor)) return true;
  std::printf("not built for this GPU\n");
  return false;
}

// Runs the named tests; the exit status.
inline int run_tests(std::initializer_list<std::pair<const char*, void (*)()>> tests) {
  for (const auto& [label, test] : tests) {
    const int before = failures(), checked = checks();
    test();
    std::printf("%-28s %6d checks, %d failed\n", label, checks() - checked, failures() - before);
    std::fflush(stdout);
  }
  return failures() == 0 ? 0 : 1;
}

}  // namespace dhsa::test
