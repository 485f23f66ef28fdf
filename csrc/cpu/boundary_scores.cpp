// boundary_scores on CPU: each worker takes a range of tokens and adds up the heads' window products.
#include <algorithm>
#include <cmath>
#include <limits>

#include "cpu/dispatch.h"
#include "cpu/scratch.h"
#include "cpu/views.h"
#include "dhsa.h"

namespace dhsa::cpu {
namespace {

constexpr int64_t kRange = 512;  // tokens of a work item; each range reads 2 * window - 1 keys beside its own

struct Scratch {
  float *ring, *dots, *norms;
  Scratch(Arena& arena, const BoundaryScores& p) {
    const int64_t window = std::min(p.window, p.k.shape[2]);
    ring = arena.take<float>(window * p.k.shape[3]);
    dots = arena.take<float>(kRange + window);
    norms = arena.take<float>(kRange + window);
  }
};

void score_range(const BoundaryScores& p, int64_t b, int64_t first, int64_t last, const Scratch& scratch) {
  const Kernels& kernels = active_kernels();
  const RowView k(p.k);
  const int64_t seqlen_k = p.k.shape[2], window = p.window;
  float* scores = p.scores.as<float>() + b * seqlen_k;
  std::fill(scores + first, scores + last, -std::numeric_limits<float>::infinity());
  first = std::max(first, window);
  last = std::min(last, seqlen_k - window + 1);
  if (first >= last) return;

  // Entry i stands for the window sum that begins at key first - window + i.
  const int64_t count = last - first + window;
  std::fill_n(scratch.dots, count, 0.0f);
  std::fill_n(scratch.norms, count, 0.0f);
  for (int64_t head = 0; head < p.k.shape[1]; ++head) {
    kernels.window_products[k.dtype](k.at(b, head, first - window), k.row, p.k.shape[3], window, count, scratch.ring,
                                     scratch.dots, scratch.norms);
  }
  const float unit = 1.0f / (static_cast<float>(window) * static_cast<float>(window));  // sums to products of means
  for (int64_t t = first; t < last; ++t) {
    const int64_t right = t - first + window, left = right - window;
    const float norm = std::sqrt(scratch.norms[left]) * std::sqrt(scratch.norms[right]) * unit;
    scores[t] = 1.0f - scratch.dots[right] * unit / (norm < 1e-6f ? 1e-6f : norm);
  }
}

}  // namespace

int64_t workspace_bytes(const BoundaryScores& p, int workers) { return workers * scratch_bytes<Scratch>(p); }

void run(const BoundaryScores& p, void* workspace, const Executor& executor) {
  const int64_t seqlen_k = p.k.shape[2], ranges = ceil_div(seqlen_k, kRange);
  executor.run(p.k.shape[0] * ranges, [&](int64_t item, int worker) {
    const int64_t first = item % ranges * kRange;
    score_range(p, item / ranges, first, std::min(first + kRange, seqlen_k),
                worker_scratch<Scratch>(workspace, worker, p));
  });
}

}  // namespace dhsa::cpu
