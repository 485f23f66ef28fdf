#!/usr/bin/env bash
# Builds the C++ tests and runs them on every ISA that the machine has: run_cpp.sh [GOOGLETEST ARGUMENTS]
# DHSA_TEST_SEED repeats a run; JOBS is the number of compilers at once.
set -euo pipefail
cd "$(dirname "$0")/.."
preset=${PRESET:-tests}
binary=build/$preset/tests/cpp/dhsa_test
targets=(dhsa_test)
bench=OFF
if [[ $preset == tests ]] && echo '#include <benchmark/benchmark.h>' | "${CXX:-g++}" -E -x c++ - >/dev/null 2>&1; then
  bench=ON
  targets+=(dhsa_bench)
fi
cmake --preset "$preset" -DDHSA_BUILD_BENCH=$bench >/dev/null
cmake --build "build/$preset" --target "${targets[@]}" -j "${JOBS:-2}"

# A sanitizer's own calls are baseline code, but its weak symbols are everywhere: only the plain build tells of leaks.
[[ $preset == tests ]] && tests/cpp/isa_leak.sh "build/$preset/libdhsa_core.a"
if DHSA_FORCE_ISA=none "$binary" --gtest_filter=None >/dev/null 2>&1; then
  echo "DHSA_FORCE_ISA=none: expected a failure, got success" >&2
  exit 1
fi
for isa in $("$binary" --isas); do
  DHSA_FORCE_ISA=$isa "$binary" --gtest_brief=1 "$@"
done
# The microbenchmarks still run; their times are bench/cpp's.
[[ $bench == OFF ]] || "build/$preset/bench/cpp/dhsa_bench" --benchmark_min_time=0 >/dev/null 2>&1
