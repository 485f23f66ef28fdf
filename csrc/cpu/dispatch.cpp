#include "cpu/dispatch.h"

#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

#if defined(DHSA_HAVE_AMX)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <cstdlib>
#include <stdexcept>
#include <string>

#include "dhsa.h"

namespace dhsa::cpu {
namespace {

bool always() { return true; }

#if defined(DHSA_HAVE_AVX2)
bool machine_has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
#endif

#if defined(DHSA_HAVE_AVX512)
bool machine_has_avx512() {  // the machine and its system: the compiler's runtime reads XCR0 too
  return machine_has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
#endif

#if defined(DHSA_HAVE_AVX512BF16)
bool machine_has_avx512bf16() { return machine_has_avx512() && __builtin_cpu_supports("avx512bf16"); }

// Zen 4 multiplies pairs at twice the rate of float32, a Xeon with AMX at half of it (docs/attention_cpu.md).
bool pairs_are_fast() { return __builtin_cpu_is("amd"); }
#endif

#if defined(DHSA_HAVE_AMX)
// Linux has a process ask, once, for the 8 KiB of state that tiles add to a thread.
bool machine_has_amx() {
  constexpr unsigned kBf16 = 1u << 22, kTiles = 1u << 24;
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  if (!machine_has_avx512bf16() || !__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return false;
  if ((edx & kBf16) == 0 || (edx & kTiles) == 0) return false;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  static const bool granted = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return granted;
}
#endif

#if defined(DHSA_HAVE_NEONFHM)
constexpr unsigned long kHwcapFhm = 1ul << 23;  // HWCAP_ASIMDFHM, which older C libraries do not name

bool machine_has_neonfhm() { return (getauxval(AT_HWCAP) & kHwcapFhm) != 0; }
#endif

#if defined(DHSA_HAVE_NEONBF16)
constexpr unsigned long kHwcap2Bf16 = 1ul << 14;  // HWCAP2_BF16

bool machine_has_neonbf16() { return machine_has_neonfhm() && (getauxval(AT_HWCAP2) & kHwcap2Bf16) != 0; }
#endif

struct Isa {
  const Kernels* kernels;
  bool (*machine_has)();
  bool (*preferred)() = always;  // chosen without being asked for by name
};

// In rising order of preference; a new ISA is one row here and one folder.
const Isa kIsas[] = {
    {&kScalarKernels, always},
#if defined(DHSA_HAVE_AVX2)
    {&kAvx2Kernels, machine_has_avx2},
#endif
#if defined(DHSA_HAVE_AVX512)
    {&kAvx512Kernels, machine_has_avx512},
#endif
#if defined(DHSA_HAVE_AVX512BF16)
    {&kAvx512bf16Kernels, machine_has_avx512bf16, pairs_are_fast},
#endif
#if defined(DHSA_HAVE_AMX)
    {&kAmxKernels, machine_has_amx},
#endif
#if defined(DHSA_HAVE_NEON)
    {&kNeonKernels, always},  // part of the armv8-a baseline
#endif
#if defined(DHSA_HAVE_NEONFHM)
    {&kNeonfhmKernels, machine_has_neonfhm},
#endif
#if defined(DHSA_HAVE_NEONBF16)
    {&kNeonbf16Kernels, machine_has_neonbf16},
#endif
};

std::string names(bool detected_only) {
  std::string list;
  for (const Isa& isa : kIsas) {
    if (detected_only && !isa.machine_has()) continue;
    if (!list.empty()) list += ",";
    list += isa.kernels->name;
  }
  return list;
}

const Kernels& choose(const char* forced) {
  const bool any = forced == nullptr || *forced == '\0';
  const Kernels* best = nullptr;
  for (const Isa& isa : kIsas) {
    const bool named = any ? isa.preferred() : std::string(forced) == isa.kernels->name;
    if (named && isa.machine_has()) best = isa.kernels;
  }
  if (best == nullptr) {
    throw std::runtime_error(std::string("DHSA_FORCE_ISA: expected one of ") + isas_detected() +
                             " (compiled: " + isas_compiled() + "), got " + forced);
  }
  return *best;
}

const Kernels*& active() {
  static const Kernels* kernels = &choose(std::getenv("DHSA_FORCE_ISA"));
  return kernels;
}

}  // namespace

const Kernels& active_kernels() { return *active(); }

void force_isa(const char* name) { active() = &choose(name); }

const char* isas_compiled() {
  static const std::string list = names(false);
  return list.c_str();
}

const char* isas_detected() {
  static const std::string list = names(true);
  return list.c_str();
}

const char* isa_active() { return active_kernels().name; }

}  // namespace dhsa::cpu
