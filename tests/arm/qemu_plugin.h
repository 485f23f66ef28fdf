// The part of qemu's plugin interface 1 (qemu 6 to 8) that the plugins here use; the emulator defines the functions.
// Distributions ship no header of it.
//
// Both plugins look at regions of a program that begin with hint #112 and end with hint #113, which a machine of its
// own executes as nop. A region is one thread's.
#pragma once

#include <inttypes.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define EXPORT __attribute__((visibility("default")))

typedef uint64_t qemu_plugin_id_t;
typedef uint32_t qemu_plugin_meminfo_t;
struct qemu_plugin_tb;
struct qemu_plugin_insn;
enum qemu_plugin_cb_flags { kNoRegisters };
enum qemu_plugin_op { kInlineAdd };
enum qemu_plugin_mem_rw { kReadsAndWrites = 3 };
typedef void (*qemu_plugin_tb_callback)(qemu_plugin_id_t, struct qemu_plugin_tb*);
typedef void (*qemu_plugin_insn_callback)(unsigned vcpu, void* data);
typedef void (*qemu_plugin_mem_callback)(unsigned vcpu, qemu_plugin_meminfo_t, uint64_t address, void* data);
typedef void (*qemu_plugin_exit_callback)(qemu_plugin_id_t, void* data);
struct qemu_info_t;
void qemu_plugin_register_vcpu_tb_trans_cb(qemu_plugin_id_t, qemu_plugin_tb_callback);
void qemu_plugin_register_vcpu_insn_exec_cb(struct qemu_plugin_insn*, qemu_plugin_insn_callback,
                                            enum qemu_plugin_cb_flags, void* data);
void qemu_plugin_register_vcpu_insn_exec_inline(struct qemu_plugin_insn*, enum qemu_plugin_op, void* counter,
                                                uint64_t addend);
void qemu_plugin_register_vcpu_mem_cb(struct qemu_plugin_insn*, qemu_plugin_mem_callback, enum qemu_plugin_cb_flags,
                                      enum qemu_plugin_mem_rw, void* data);
void qemu_plugin_register_atexit_cb(qemu_plugin_id_t, qemu_plugin_exit_callback, void* data);
size_t qemu_plugin_tb_n_insns(const struct qemu_plugin_tb*);
struct qemu_plugin_insn* qemu_plugin_tb_get_insn(const struct qemu_plugin_tb*, size_t index);
const void* qemu_plugin_insn_data(const struct qemu_plugin_insn*);
const char* qemu_plugin_insn_symbol(const struct qemu_plugin_insn*);
unsigned qemu_plugin_mem_size_shift(qemu_plugin_meminfo_t);

EXPORT int qemu_plugin_version = 1;
EXPORT int qemu_plugin_install(qemu_plugin_id_t, const struct qemu_info_t*, int argc, char** argv);

static const uint32_t kBegin = 0xd503201fu | 112u << 5, kEnd = 0xd503201fu | 113u << 5;

static inline uint32_t opcode(const struct qemu_plugin_insn* insn) {
  uint32_t bits;
  memcpy(&bits, qemu_plugin_insn_data(insn), sizeof bits);
  return bits;
}
