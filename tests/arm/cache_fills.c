// A TCG plugin for qemu-user: bytes that a cache of a given size fetches while the emulated program is in a region
// (qemu_plugin.h). The cache is a model: lines of 64 bytes, 16 ways, the least recently used one goes; every load and
// store passes through it, prefetches do not, and it is empty when a region begins. Bytes are no time.
//
//   program:  hint #114 and then two loads, of an input's first and last byte, name an input of the next region
//   run:      qemu-aarch64 -plugin libcache_fills.so,out=FILE,kib=512 PROGRAM
//   FILE:     one line a region, in order: bytes fetched in all, and those of each of its inputs
#include "qemu_plugin.h"

enum { kLine = 64, kWays = 16, kMaxInputs = 8 };
static const uint32_t kInput = 0xd503201fu | 114u << 5;

struct Line {
  uint64_t number, used;  // address / kLine, and the clock when it was last touched; 0 never
};
struct Input {
  uint64_t first, last;  // addresses
  uint64_t fetched;      // lines
};

static FILE* out;
static struct Line* lines;
static uint64_t sets, now, fetched, last_touched;
static struct Input inputs[kMaxInputs];
static int num_inputs, bounds_to_come;
static bool inside;

static void fetch(uint64_t number) {
  ++fetched;
  for (int i = 0; i < num_inputs; ++i) {
    if (number >= inputs[i].first / kLine && number <= inputs[i].last / kLine) ++inputs[i].fetched;
  }
}

static void touch(uint64_t number) {
  if (number == last_touched) return;
  last_touched = number;
  struct Line *set = lines + number % sets * kWays, *oldest = set;
  ++now;
  for (struct Line* line = set; line < set + kWays; ++line) {
    if (line->used != 0 && line->number == number) {
      line->used = now;
      return;
    }
    if (line->used < oldest->used) oldest = line;
  }
  fetch(number);
  oldest->number = number;
  oldest->used = now;
}

static void accessed(unsigned vcpu, qemu_plugin_meminfo_t info, uint64_t address, void* data) {
  (void)vcpu, (void)data;
  if (bounds_to_come > 0) {
    *(bounds_to_come == 2 ? &inputs[num_inputs].first : &inputs[num_inputs].last) = address;
    if (--bounds_to_come == 0) ++num_inputs;
    return;
  }
  if (!inside) return;
  const uint64_t last = address + (UINT64_C(1) << qemu_plugin_mem_size_shift(info)) - 1;
  touch(address / kLine);
  touch(last / kLine);
}

static void input_named(unsigned vcpu, void* data) {
  (void)vcpu, (void)data;
  if (num_inputs == kMaxInputs) abort();
  inputs[num_inputs].fetched = 0;
  bounds_to_come = 2;
}

static void region_begins(unsigned vcpu, void* data) {
  (void)vcpu, (void)data;
  memset(lines, 0, sets * kWays * sizeof *lines);
  now = fetched = 0;
  last_touched = UINT64_MAX;
  inside = true;
}

static void region_ends(unsigned vcpu, void* data) {
  (void)vcpu, (void)data;
  if (!inside) return;
  inside = false;
  fprintf(out, "%" PRIu64, fetched * kLine);
  for (int i = 0; i < num_inputs; ++i) fprintf(out, " %" PRIu64, inputs[i].fetched * kLine);
  fprintf(out, "\n");
  num_inputs = 0;
}

static void translated(qemu_plugin_id_t id, struct qemu_plugin_tb* block) {
  (void)id;
  for (size_t i = 0, n = qemu_plugin_tb_n_insns(block); i < n; ++i) {
    struct qemu_plugin_insn* insn = qemu_plugin_tb_get_insn(block, i);
    const uint32_t bits = opcode(insn);
    if (bits == kBegin || bits == kEnd || bits == kInput) {
      qemu_plugin_register_vcpu_insn_exec_cb(insn,
                                             bits == kBegin ? region_begins
                                             : bits == kEnd ? region_ends
                                                            : input_named,
                                             kNoRegisters, NULL);
    } else {
      qemu_plugin_register_vcpu_mem_cb(insn, accessed, kNoRegisters, kReadsAndWrites, NULL);
    }
  }
}

static void program_ends(qemu_plugin_id_t id, void* data) {
  (void)id, (void)data;
  if (inside) fprintf(stderr, "cache_fills: a region has no end\n");
  fclose(out);
}

int qemu_plugin_install(qemu_plugin_id_t id, const struct qemu_info_t* info, int argc, char** argv) {
  (void)info;
  uint64_t kib = 0;
  for (int i = 0; i < argc; ++i) {
    if (strncmp(argv[i], "out=", 4) == 0) out = fopen(argv[i] + 4, "w");
    if (strncmp(argv[i], "kib=", 4) == 0) kib = strtoull(argv[i] + 4, NULL, 10);
  }
  sets = kib * 1024 / kLine / kWays;
  lines = sets > 0 ? calloc(sets * kWays, sizeof *lines) : NULL;
  if (argc != 2 || out == NULL || lines == NULL) {
    fprintf(stderr, "cache_fills: expected out=FILE that can be written, and kib=SIZE of the cache\n");
    return 1;
  }
  qemu_plugin_register_vcpu_tb_trans_cb(id, translated);
  qemu_plugin_register_atexit_cb(id, program_ends, NULL);
  return 0;
}
