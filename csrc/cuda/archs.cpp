// Which GPUs this build runs on. DHSA_CUDA_ARCHS is the list given to CMake, as "80,90a".
#include <cstdlib>
#include <cstring>

#include "cuda/launch.h"

namespace dhsa::cuda {

const char* archs_compiled() { return DHSA_CUDA_ARCHS; }

// Machine code for X.Y runs on X.Z with Z >= Y; with the suffix "a" on X.Y alone.
bool device_supported(int compute_major, int compute_minor) {
  for (const char* arch = DHSA_CUDA_ARCHS; *arch != '\0';) {
    char* end = nullptr;
    const long number = std::strtol(arch, &end, 10);
    const bool exact = *end == 'a';
    if (number / 10 == compute_major && (exact ? number % 10 == compute_minor : number % 10 <= compute_minor)) {
      return true;
    }
    const char* comma = std::strchr(arch, ',');
    if (comma == nullptr) break;
    arch = comma + 1;
  }
  return false;
}

}  // namespace dhsa::cuda
