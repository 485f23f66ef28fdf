#!/usr/bin/env bash
# The C++ tests of run_cpp.sh under the address and undefined-behaviour sanitizers, on every ISA that the machine has.
set -euo pipefail
PRESET=asan exec "$(dirname "$0")/run_cpp.sh" "$@"
