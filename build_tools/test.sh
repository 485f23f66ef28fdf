#!/usr/bin/env bash
# Runs every test that this machine can, then says in a table what ran and what did not, and for each suite left out
# the command that enables it. DHSA_TEST_REQUIRE=cpp,asan,arm turns the skip of a named suite into a failure.
# Suites of ARM64 code, none of which needs an ARM machine: arm, the C++ tests under emulation; arm-insns, arm-reads
# and arm-tiles, counts of instructions and models of a cache and of a schedule held to budgets (no times); arm-python,
# the package under emulation.
# Logs: build/test-logs/<suite>.log. Called by `make test`, which prepares $VENV.
set -uo pipefail
cd "$(dirname "$0")/.."

venv=$(cd "${VENV:-.venv}" && pwd)
export PATH="$venv/bin:$PATH"  # cmake and ninja of the `test` extra, where the machine has none
logs=build/test-logs
mkdir -p "$logs"

suites=(python cpp asan arm arm-insns arm-reads arm-tiles arm-python gpu)
require=${DHSA_TEST_REQUIRE:-}
for name in ${require//,/ }; do
  [[ " ${suites[*]} " == *" $name "* ]] ||
    { echo "DHSA_TEST_REQUIRE: expected names among ${suites[*]}, got $name" >&2; exit 2; }
done

declare -A result detail seconds job

# note NAME STATUS SECONDS: how a suite went, from its log.
note() {
  seconds[$1]=$3
  if (($2 == 0)); then result[$1]=passed; else result[$1]=FAILED; fi
  detail[$1]=$(summary "$logs/$1.log")
  (($2 == 0)) || detail[$1]+=" (exit $2, see $logs/$1.log)"
}

# suite NAME COMMAND...: run it, show and keep what it prints, note how it went.
suite() {
  local name=$1 begin=$SECONDS
  shift
  printf '\n==== %s: %s\n' "$name" "$*"
  "$@" 2>&1 | tee "$logs/$name.log"
  note "$name" "${PIPESTATUS[0]}" $((SECONDS - begin))
}

# begin NAME COMMAND...: the same beside the suites that follow, for one that keeps a single core busy; `finish NAME`
# waits for it and shows what it printed.
begin() {
  local name=$1 begin=$SECONDS
  shift
  (
    "$@" >"$logs/$name.log" 2>&1
    echo $? $((SECONDS - begin)) >"$logs/$name.status"
  ) &
  job[$name]=$!
}
finish() {
  local status took
  printf '\n==== %s\n' "$1"
  wait "${job[$1]}"
  cat "$logs/$1.log"
  read -r status took <"$logs/$1.status"
  note "$1" "$status" "$took"
}

# skip NAME REASON COMMAND: the machine lacks something; COMMAND brings it.
skip() {
  result[$1]=skipped
  [[ ",$require," == *",$1,"* ]] && result[$1]=FAILED
  seconds[$1]=-
  detail[$1]="$2; to enable: $3"
}

# What a runner counted: pytest's closing line, a budget's, or GoogleTest's, added up over its binaries and runs.
summary() {
  local pytest budget
  budget=$(grep -E '^[a-z]+ budget: ' "$1" | tail -n 1)
  pytest=$(grep -E '^(=+ )?[0-9]+ (passed|failed|skipped|error).* in [0-9.]+s' "$1" | tail -n 1)
  if [[ -n $pytest ]]; then
    sed -E 's/^=+ //; s/ in [0-9.]+s.*//' <<<"$pytest"
  elif [[ -n $budget ]]; then
    echo "$budget"
  else
    awk '/^\[  PASSED  \] [0-9]+ test/ {passed += $4; runs++} /^\[  FAILED  \] [0-9]+ test/ {failed += $4}
         END {printf "%d C++ tests passed, %d failed, in %d runs", passed, failed, runs}' "$1"
  fi
}

have() { command -v "$1" >/dev/null; }
have_googletest() { echo '#include <gtest/gtest.h>' | "${CXX:-g++}" -E -x c++ - >/dev/null 2>&1; }
have_sanitizers() {
  local probe=$logs/sanitizer-probe
  echo 'int main() {}' | "${CXX:-g++}" -fsanitize=address,undefined -x c++ - -o "$probe" 2>/dev/null && "$probe"
}

if have aarch64-linux-gnu-g++ && have qemu-aarch64-static && have mmdebstrap; then
  begin arm-python env PIP="$venv/bin/python -m pip" tests/run_arm_python.sh
else
  skip arm-python "no ARM64 cross-compiler, emulator or mmdebstrap" \
    "apt-get install g++-aarch64-linux-gnu qemu-user-static mmdebstrap"
fi

# Threads that spin while they wait for one another take ten times as long where the workers share the cores.
export OMP_WAIT_POLICY=passive
workers=$(($(nproc) < 8 ? $(nproc) : 8))
suite python "$venv/bin/python" -m pytest -n "$workers" tests

if ! have_googletest; then
  skip cpp "no GoogleTest" "apt-get install libgtest-dev"
  skip asan "no GoogleTest" "apt-get install libgtest-dev"
else
  suite cpp tests/run_cpp.sh
  if have_sanitizers; then
    suite asan tests/run_asan.sh
  else
    skip asan "no address or undefined-behaviour sanitizer" "apt-get install libasan8 libubsan1"
  fi
fi

if have aarch64-linux-gnu-g++ && have qemu-aarch64-static && [[ -d /usr/src/googletest ]]; then
  suite arm tests/run_arm.sh
else
  skip arm "no ARM64 cross-compiler, emulator or GoogleTest sources" \
    "apt-get install g++-aarch64-linux-gnu qemu-user-static googletest"
fi

if have aarch64-linux-gnu-g++ && have qemu-aarch64; then
  suite arm-insns "$venv/bin/python" tests/arm/insn_budget.py
  suite arm-reads "$venv/bin/python" tests/arm/input_reads.py
else
  for name in arm-insns arm-reads; do
    skip "$name" "no ARM64 cross-compiler, or no emulator that loads plugins" \
      "apt-get install g++-aarch64-linux-gnu qemu-user"
  done
fi

if have aarch64-linux-gnu-g++-11 && have aarch64-linux-gnu-g++-12 && have llvm-mca-19; then
  suite arm-tiles "$venv/bin/python" tests/arm/tile_budget.py
else
  skip arm-tiles "no llvm-mca-19, or not both ARM64 cross-compilers" \
    "apt-get install llvm-19 g++-11-aarch64-linux-gnu g++-12-aarch64-linux-gnu"
fi

[[ -v job[arm-python] ]] && finish arm-python

if have nvidia-smi && nvidia-smi -L >/dev/null 2>&1; then
  suite gpu env PYTHON="$venv/bin/python" STEPS="build kernels sanitizer" tests/gpu_check.sh
else
  skip gpu "no NVIDIA GPU" "make gpu-check, on a machine with one"
fi

printf '\n%-10s %-8s %8s  %s\n' suite result seconds what
passed=0 failed=0 skipped=0
for name in "${suites[@]}"; do
  printf '%-10s %-8s %8s  %s\n' "$name" "${result[$name]}" "${seconds[$name]}" "${detail[$name]}"
  case ${result[$name]} in passed) ((++passed)) ;; FAILED) ((++failed)) ;; skipped) ((++skipped)) ;; esac
done
# Single Python tests that were skipped, with the reason that each gives.
grep -hE '^SKIPPED ' "$logs/python.log" | sed 's/^/python   /'
printf 'suites: %d passed, %d failed, %d skipped\n' "$passed" "$failed" "$skipped"
((failed == 0))
