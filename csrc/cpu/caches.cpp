#include "cpu/caches.h"

#if defined(__unix__)
#include <unistd.h>
#endif

#include <algorithm>
#include <fstream>
#include <sstream>
#include <string>

#include "dhsa.h"

namespace dhsa::cpu {
namespace {

// Kernels of ARM boards list caches where the device tree or the firmware names them.
const std::string kListed = "/sys/devices/system/cpu/cpu0/cache/index";

std::string word_of(const std::string& path) {
  std::ifstream file(path);
  std::string word;
  file >> word;
  return word;
}

// Of a list such as 0-3,8-11.
int64_t count_listed(const std::string& list) {
  std::istringstream ranges(list);
  int64_t count = 0;
  for (std::string range; std::getline(ranges, range, ',');) {
    int64_t first = 0, last = 0;
    char dash = 0;
    std::istringstream numbers(range);
    numbers >> first;
    if (!(numbers >> dash >> last)) last = first;
    count += last - first + 1;
  }
  return std::max<int64_t>(1, count);
}

struct Cache {
  int64_t bytes = 0, cpus = 1;  // that share it
};

// 0 bytes of a level that is not listed.
Cache listed_cache(int level) {
  for (int i = 0; i < 8; ++i) {
    const std::string at = kListed + std::to_string(i) + '/', type = word_of(at + "type");
    if (word_of(at + "level") != std::to_string(level) || (type != "Data" && type != "Unified")) continue;
    int64_t size = 0;
    char unit = ' ';
    std::istringstream(word_of(at + "size")) >> size >> unit;
    return {size << (unit == 'K' ? 10 : unit == 'M' ? 20 : 0), count_listed(word_of(at + "shared_cpu_list"))};
  }
  return {};
}

// What the C library knows: on x86 the processor's own answer, elsewhere mostly nothing.
int64_t known_bytes(int level) {
#if defined(_SC_LEVEL1_DCACHE_SIZE) && defined(_SC_LEVEL2_CACHE_SIZE)
  return std::max<int64_t>(0, sysconf(level == 1 ? _SC_LEVEL1_DCACHE_SIZE : _SC_LEVEL2_CACHE_SIZE));
#else
  return 0;
#endif
}

// Hardware threads that share a first-level cache are one core.
Caches detect() {
  const Cache first = listed_cache(1);
  Caches found{first.bytes, 0};
  for (const int level : {2, 3}) {
    const Cache cache = listed_cache(level);
    found.share = std::max(found.share, cache.bytes / std::max<int64_t>(1, cache.cpus / first.cpus));
  }
  if (found.first <= 0) found.first = known_bytes(1);
  if (found.share <= 0) found.share = known_bytes(2);
  return {found.first > 0 ? found.first : 32 << 10, found.share > 0 ? found.share : 512 << 10};
}

Caches& in_use() {
  static Caches sizes = detect();
  return sizes;
}

}  // namespace

const Caches& caches() { return in_use(); }

void force_caches(const Caches& sizes) { in_use() = sizes; }

const char* cache_sizes() {
  static const std::string text =
      std::to_string(caches().first >> 10) + " KiB, " + std::to_string(caches().share >> 10) + " KiB";
  return text.c_str();
}

}  // namespace dhsa::cpu
