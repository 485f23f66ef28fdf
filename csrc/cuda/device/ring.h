// A walk along a ring of stages in shared memory: the position, and the parity of its barriers' current phase.
#pragma once

#include <cstdint>

namespace dhsa::cuda {

template <int kStages>
struct Ring {
  int32_t stage = 0;
  uint32_t parity = 0;
  __device__ void advance() {
    if (++stage == kStages) stage = 0, parity ^= 1;
  }
};

}  // namespace dhsa::cuda
