#!/usr/bin/env bash
# Runs the benches that this machine can: the stages, then the whole, on the GPU where there is one and else on the CPU.
# Results: bench/results/*.json. Called by `make bench`, which prepares $VENV. Arguments:
#   stages|cpu|prefill|models|plot [OPTIONS]   that bench alone, with its own options (bench/README.md)
#   [OPTIONS]                                  both; --tiny, --append and --seconds are what both take
set -euo pipefail
cd "$(dirname "$0")/.."

python=$(cd "${VENV:-.venv}" && pwd)/bin/python
export PYTHONPATH=python${PYTHONPATH:+:$PYTHONPATH}

run() {
  printf '\n==== python %s\n' "$*"
  "$python" "$@"
}

case ${1:-} in
  stages | cpu | prefill | models)
    name=$1
    shift
    run "bench/bench_$name.py" "$@"
    exit
    ;;
  plot)
    shift
    run bench/plot.py "$@"
    exit
    ;;
esac

if command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; then
  run bench/bench_stages.py --device cuda "$@"
  run bench/bench_prefill.py --device cuda "$@"
else
  run bench/bench_stages.py --device cpu "$@"
  run bench/bench_cpu.py "$@"
fi
