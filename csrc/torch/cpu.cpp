// The ops on CPU tensors: torch's threads, torch's memory, the core's kernels. The schemas are dhsa_ext/ops.py's.
#include <algorithm>

#include "core/deal_items.h"
#include "torch/ops.h"

namespace dhsa::adapter {
namespace {

class TorchExecutor final : public cpu::Executor {
 public:
  int workers() const override { return std::max(1, static_cast<int>(torch::stable::get_num_threads())); }

  void run(int64_t count, const std::function<void(int64_t, int)>& task) const override {
    deal_items(count, workers(), task, [](int64_t parts, const auto& work) {
      torch::stable::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
        for (int64_t part = begin; part < end; ++part) work(static_cast<int>(part));
      });
    });
  }
};

struct Cpu {
  template <class Params>
  static void run(const Params& p, const TorchTensor& like) {
    const TorchExecutor executor;
    const int64_t bytes = cpu::workspace_bytes(p, executor.workers());
    const TorchTensor workspace = empty(like, {bytes}, ScalarType::Byte);
    cpu::run(p, bytes > 0 ? workspace.data_ptr() : nullptr, executor);
  }
};

using CpuOps = Ops<Cpu>;

STABLE_TORCH_LIBRARY_IMPL(dhsa, CPU, m) {
  m.impl("boundary_scores", TORCH_BOX(&CpuOps::boundary_scores));
  m.impl("boundary_logits", TORCH_BOX(&CpuOps::boundary_logits));
  m.impl("select_boundaries", TORCH_BOX(&CpuOps::select_boundaries));
  m.impl("chunk_pool", TORCH_BOX(&CpuOps::chunk_pool));
  m.impl("query_pool", TORCH_BOX(&CpuOps::query_pool));
  m.impl("chunk_scores", TORCH_BOX(&CpuOps::chunk_scores));
  m.impl("token_scores", TORCH_BOX(&CpuOps::token_scores));
  m.impl("select_keys", TORCH_BOX(&CpuOps::select_keys));
  m.impl("chunk_mass", TORCH_BOX(&CpuOps::chunk_mass));
  m.impl("refine_keys", TORCH_BOX(&CpuOps::refine_keys));
  m.impl("sparse_attention", TORCH_BOX(&CpuOps::sparse_attention));
  m.impl("sparse_prefill", TORCH_BOX(&CpuOps::sparse_prefill));
  m.impl("sparse_decode", TORCH_BOX(&CpuOps::sparse_decode));
}

}  // namespace
}  // namespace dhsa::adapter
