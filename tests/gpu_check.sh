#!/usr/bin/env bash
# Build for the GPU that is there, test on it, bench on it: `make gpu-check`. PYTHON picks the interpreter; STEPS names
# the steps (default: build kernels sanitizer pytest bench); OUT is where logs and results go (default: build/gpu-check).
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
steps=${STEPS:-build kernels sanitizer pytest bench}
out=${OUT:-build/gpu-check}
build=build/gpu
mkdir -p "$out"
failed=0

step() { [[ " $steps " == *" $1 "* ]]; }
run() {  # run NAME SECONDS COMMAND...
  local name=$1 limit=$2 start=$SECONDS
  shift 2
  if timeout "$limit" "$@" >"$out/$name.log" 2>&1; then
    echo "ok    $name ($((SECONDS - start)) s)"
  else
    echo "FAIL  $name (exit $?, $((SECONDS - start)) s)"
    failed=1
  fi
  tail -n "${LINES_SHOWN:-15}" "$out/$name.log" | cut -c1-220
}

archs=${DHSA_CUDA_ARCHS:-80;90a}
torch_dir=$("$python" -c 'import os, torch; print(os.path.dirname(torch.__file__))')
if step build; then
  LINES_SHOWN=4 run configure 60 cmake -S . -B $build -G Ninja -DCMAKE_BUILD_TYPE=Release \
    "-DDHSA_TORCH_DIR=$torch_dir" "-DDHSA_CUDA_ARCHS=$archs"
  LINES_SHOWN=4 run build 400 cmake --build $build --target _native
  find $build -name _native.so -exec cp {} python/dhsa_ext/ \;
fi
if step kernels; then
  for test in tests/cuda/*_test.cu; do
    name=$(basename "$test" .cu)
    LINES_SHOWN=2 run "build_$name" 200 cmake --build $build --target "$name"
    run "$name" 120 "$(find $build -type f -name "$name" -perm -u+x | head -1)"
  done
fi
export PYTHONPATH=python
if step sanitizer; then
  for tool in memcheck racecheck initcheck synccheck; do
    LINES_SHOWN=4 run "$tool" 150 compute-sanitizer --tool $tool --error-exitcode 1 "$python" tests/cuda/small_shapes.py
  done
fi
step pytest && run pytest 400 "$python" -m pytest -q -x tests -k "cuda or Cuda or device"
step bench && LINES_SHOWN=60 run bench 500 "$python" bench/bench_prefill.py --device cuda
exit $failed
