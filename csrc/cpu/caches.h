// The data caches of a core, which sizes of blocks follow.
#pragma once

#include <cstdint>

namespace dhsa::cpu {

// Bytes of the first-level cache, and of a core's share of those behind it: of the level whose share is the largest.
struct Caches {
  int64_t first, share;
};

// Of the system's first core: what Linux lists of it, or what the C library knows; 32 and 512 KiB where neither does.
const Caches& caches();

// Other sizes from now on, while no stage runs: for tests. Workspaces are sized by them.
void force_caches(const Caches& sizes);

}  // namespace dhsa::cpu
