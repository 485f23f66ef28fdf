// Which GPUs this build runs on, and with which attention kernels. DHSA_CUDA_ARCHS is the list given to CMake, as
// "80,90a".
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

const char* attention_kernel(int compute_major, int compute_minor) {
  const bool sm90 = compute_major == 9 && compute_minor == 0 && std::strstr(DHSA_CUDA_ARCHS, "90a") != nullptr;
  const char* forced = std::getenv("DHSA_FORCE_CUDA_KERNEL");
  if (forced == nullptr || *forced == '\0') return sm90 ? "sm90" : "sm80";
  if (std::strcmp(forced, "sm80") == 0) return "sm80";
  return std::strcmp(forced, "sm90") == 0 && sm90 ? "sm90" : nullptr;
}

}  // namespace dhsa::cuda
