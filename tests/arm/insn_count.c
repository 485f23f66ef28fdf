// A TCG plugin for qemu-user: how many instructions the emulated program executes in a region (qemu_plugin.h), without
// its markers. A count of instructions is no time: it knows no latency, no cache and no second issue port.
//
//   run:      qemu-aarch64 -plugin libinsn_count.so,out=FILE[,profile=on] PROGRAM
//   FILE:     one line a region, in order: its number of instructions; with a profile, below it a line for each symbol:
//             two spaces, instructions, name
//
// Blocks of code are cut at markers and symbols as they are translated, and each piece adds its length to its symbol's
// counter when its first instruction runs, in generated code. A region is the difference of two readings, the same on
// every run. Later interfaces than 1 count another way.
#include "qemu_plugin.h"

struct Counter {
  const char* symbol;
  uint64_t executed;   // since the program began
  uint64_t at_begin;   // the same when the region began
  uint64_t in_region;  // set when it ends
  struct Counter* next;
};

static struct Counter* counters;
static FILE* out;
static bool profile, inside;

static struct Counter* counter_of(const char* symbol) {
  if (symbol == NULL) symbol = "(no symbol)";
  for (struct Counter* c = counters; c != NULL; c = c->next) {
    if (strcmp(c->symbol, symbol) == 0) return c;
  }
  struct Counter* c = calloc(1, sizeof *c);
  if (c == NULL || (c->symbol = strdup(symbol)) == NULL) abort();
  c->next = counters;
  return counters = c;
}

static void region_begins(unsigned vcpu, void* data) {
  (void)vcpu, (void)data;
  inside = true;
  for (struct Counter* c = counters; c != NULL; c = c->next) c->at_begin = c->executed;
}

static int by_count(const void* a, const void* b) {
  const uint64_t x = (*(struct Counter* const*)a)->in_region, y = (*(struct Counter* const*)b)->in_region;
  return x < y ? 1 : x > y ? -1 : 0;
}

static void print_profile(size_t count) {
  struct Counter** sorted = calloc(count, sizeof *sorted);
  if (sorted == NULL) abort();
  size_t n = 0;
  for (struct Counter* c = counters; c != NULL; c = c->next) sorted[n++] = c;
  qsort(sorted, n, sizeof *sorted, by_count);
  for (size_t i = 0; i < n && sorted[i]->in_region > 0; ++i) {
    fprintf(out, "  %" PRIu64 " %s\n", sorted[i]->in_region, sorted[i]->symbol);
  }
  free(sorted);
}

// Symbols that were first translated inside the region began at 0, as calloc left them.
static void region_ends(unsigned vcpu, void* data) {
  (void)vcpu, (void)data;
  if (!inside) return;
  inside = false;
  uint64_t instructions = 0;
  size_t count = 0;
  for (struct Counter* c = counters; c != NULL; c = c->next, ++count) {
    c->in_region = c->executed - c->at_begin;
    instructions += c->in_region;
  }
  fprintf(out, "%" PRIu64 "\n", instructions);
  if (profile) print_profile(count);
}

static void translated(qemu_plugin_id_t id, struct qemu_plugin_tb* block) {
  (void)id;
  const size_t n = qemu_plugin_tb_n_insns(block);
  for (size_t first = 0; first < n;) {
    struct qemu_plugin_insn* insn = qemu_plugin_tb_get_insn(block, first);
    const uint32_t bits = opcode(insn);
    if (bits == kBegin || bits == kEnd) {
      qemu_plugin_register_vcpu_insn_exec_cb(insn, bits == kBegin ? region_begins : region_ends, kNoRegisters, NULL);
      ++first;
      continue;
    }
    struct Counter* counter = counter_of(qemu_plugin_insn_symbol(insn));
    size_t end = first + 1;
    for (; end < n; ++end) {
      struct qemu_plugin_insn* next = qemu_plugin_tb_get_insn(block, end);
      const uint32_t next_bits = opcode(next);
      if (next_bits == kBegin || next_bits == kEnd || counter_of(qemu_plugin_insn_symbol(next)) != counter) break;
    }
    qemu_plugin_register_vcpu_insn_exec_inline(insn, kInlineAdd, &counter->executed, end - first);
    first = end;
  }
}

static void program_ends(qemu_plugin_id_t id, void* data) {
  (void)id, (void)data;
  if (inside) fprintf(stderr, "insn_count: a region has no end\n");
  fclose(out);
}

int qemu_plugin_install(qemu_plugin_id_t id, const struct qemu_info_t* info, int argc, char** argv) {
  (void)info;
  for (int i = 0; i < argc; ++i) {
    if (strncmp(argv[i], "out=", 4) == 0) {
      out = fopen(argv[i] + 4, "w");
    } else if (strcmp(argv[i], "profile=on") == 0) {
      profile = true;
    } else {
      fprintf(stderr, "insn_count: expected out=FILE or profile=on, got %s\n", argv[i]);
      return 1;
    }
  }
  if (out == NULL) {
    fprintf(stderr, "insn_count: expected out=FILE that can be written\n");
    return 1;
  }
  qemu_plugin_register_vcpu_tb_trans_cb(id, translated);
  qemu_plugin_register_atexit_cb(id, program_ends, NULL);
  return 0;
}
