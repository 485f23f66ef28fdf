// What the library was built for and what the machine has, for dhsa_ext/backend.py; "error: ..." where asking fails.
#include <cstring>
#include <exception>
#include <string>

#include "dhsa.h"
#ifdef DHSA_WITH_CUDA
#include "cuda/launch.h"

namespace {

// The attention kernels that run on the current device; "" without one that the build supports.
const char* cuda_kernel() {
  int device = 0, major = 0, minor = 0;
  if (cudaGetDevice(&device) != cudaSuccess ||
      cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) != cudaSuccess ||
      cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) != cudaSuccess ||
      !dhsa::cuda::device_supported(major, minor)) {
    return "";
  }
  const char* kernel = dhsa::cuda::attention_kernel(major, minor);
  return kernel != nullptr ? kernel : "error: DHSA_FORCE_CUDA_KERNEL names a kernel that cannot run on this GPU";
}

}  // namespace
#endif

extern "C" __attribute__((visibility("default"))) const char* dhsa_info(const char* what) {
  static thread_local std::string answer;
  try {
    if (std::strcmp(what, "isas_compiled") == 0) return dhsa::cpu::isas_compiled();
    if (std::strcmp(what, "isas_detected") == 0) return dhsa::cpu::isas_detected();
    if (std::strcmp(what, "isa_active") == 0) return dhsa::cpu::isa_active();
    if (std::strcmp(what, "cache_sizes") == 0) return dhsa::cpu::cache_sizes();
#ifdef DHSA_WITH_CUDA
    if (std::strcmp(what, "cuda_archs") == 0) return dhsa::cuda::archs_compiled();
    if (std::strcmp(what, "cuda_kernel") == 0) return cuda_kernel();
#endif
    return "";
  } catch (const std::exception& error) {
    answer = std::string("error: ") + error.what();
    return answer.c_str();
  }
}
