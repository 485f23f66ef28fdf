// Capacities that follow from arguments alone, so that outputs are allocated before any kernel has run.
#include <algorithm>

#include "dhsa.h"

namespace dhsa {

int64_t chunk_capacity(int64_t seqlen_k, int64_t max_chunks, int64_t segment) {
  if (segment == 0) return max_chunks;
  const int64_t rest = seqlen_k % segment;
  const int64_t rest_quota = rest > 0 ? std::max<int64_t>(1, max_chunks * rest / segment) : 0;
  return seqlen_k / segment * max_chunks + rest_quota;
}

int64_t run_capacity(int64_t chunk_capacity, int64_t budget, int64_t min_chunk) {
  return std::min(chunk_capacity, budget / min_chunk + 1) + 3;
}

int64_t refined_run_capacity(int64_t seqlen_k, int64_t budget) {
  return std::max<int64_t>(1, std::min(budget, (seqlen_k + 1) / 2));
}

}  // namespace dhsa
