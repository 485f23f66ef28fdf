#!/usr/bin/env bash
# The C++ tests for ARM64, without one: cross-compiled into a static binary and run under qemu as each CPU model, on
# every ISA that the model has. run_arm.sh [GOOGLETEST ARGUMENTS]; CPUS, JOBS and DHSA_TEST_SEED as they say. Under a
# model that lacks an ISA, running past DHSA_FORCE_ISA's refusal must end in an illegal instruction (IsaDeathTest).
#
# Beside it: arm/insn_budget.py, arm/input_reads.py and arm/tile_budget.py hold counts of instructions, bytes fetched by
# a model of a cache and a model's throughput to budgets (no times), run_arm_python.sh has the Python package.
# build_tools/test.sh runs them all.
set -euo pipefail
cd "$(dirname "$0")/.."
cmake --preset aarch64 >/dev/null
cmake --build build/aarch64 --target dhsa_test -j "${JOBS:-2}"
binary=build/aarch64/tests/cpp/dhsa_test

# Cortex-A72: Raspberry Pi 4, plain armv8-a. Cortex-A76: Raspberry Pi 5, float16 and dot products. max: all there is.
# Emulation takes 15 times as long: a quarter of the random rounds, and every test of an ISA on the first model that has
# it. The next ones run the same instructions: the tests that see the machine or the kernels themselves, not in scalar.
export DHSA_TEST_ROUNDS=${DHSA_TEST_ROUNDS:-25}
again=--gtest_filter=Isa*:HalfTypes*:Kernels*
jobs=() seen=' '
for cpu in ${CPUS:-cortex-a72 cortex-a76 max}; do
  for isa in $(qemu-aarch64-static -cpu "$cpu" "$binary" --isas); do
    if [[ $seen != *" $isa "* ]]; then
      jobs+=("$cpu $isa")
      seen+="$isa "
    elif [[ $isa != scalar ]]; then
      jobs+=("$cpu $isa $again")
    fi
  done
done

# run CPU ISA [GOOGLETEST ARGUMENTS]: what it prints comes out in one piece, since several run at once.
run() {
  local cpu=$1 isa=$2 status=0 printed
  shift 2
  printed=$(DHSA_FORCE_ISA=$isa qemu-aarch64-static -cpu "$cpu" "$binary" --gtest_brief=1 "$@" 2>&1) || status=$?
  printf 'qemu -cpu %s\n%s\n' "$cpu" "$printed"
  return "$status"
}
limit=${JOBS:-2} pids=() status=0
for i in "${!jobs[@]}"; do
  if ((i >= limit)); then
    wait "${pids[i - limit]}" || status=1
    unset "pids[i - limit]"
  fi
  # shellcheck disable=SC2086
  run ${jobs[i]} "$@" &
  pids[i]=$!
done
for pid in "${pids[@]}"; do wait "$pid" || status=1; done
exit "$status"
