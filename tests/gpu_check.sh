#!/usr/bin/env bash
# Build for the GPU that is there, test on it, bench on it: `make gpu-check`. Everything is built in build/gpu, a copy of
# the package included, so that an installed one is neither needed nor changed.
#
#   PYTHON           interpreter with torch and pytest (default: python3)
#   STEPS            of: build kernels sanitizer pytest time bench (default: all)
#   OUT              where logs and results go (default: build/gpu-check)
#   BENCH_ARGS       for bench/bench_prefill.py (default: every row)
#   DHSA_CUDA_ARCHS  default: those of the GPUs that are there
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
steps=${STEPS:-build kernels sanitizer pytest time bench}
out=${OUT:-build/gpu-check}
build=build/gpu
bin=$build/csrc/cuda
mkdir -p "$out"
rm -f "$out/failed"

step() { [[ " $steps " == *" $1 "* ]]; }
run() {  # run NAME SECONDS COMMAND...
  local name=$1 limit=$2 start=$SECONDS
  shift 2
  if timeout "$limit" "$@" >"$out/$name.log" 2>&1 </dev/null; then
    echo "ok    $name ($((SECONDS - start)) s)"
  else
    echo "FAIL  $name (exit $?, $((SECONDS - start)) s)" | tee -a "$out/failed"
  fi
  tail -n "${LINES_SHOWN:-15}" "$out/$name.log" | cut -c1-220
}

spawn() {  # the same beside others, half as many as there are cores
  while (($(jobs -rp | wc -l) >= ($(nproc) + 1) / 2)); do wait -n; done
  run "$@" &
}

if step build; then
  archs=${DHSA_CUDA_ARCHS:-$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | tr -d . | sed 's/^90$/90a/' |
    sort -u | paste -sd';')}
  torch_dir=$("$python" -c 'import os, torch; print(os.path.dirname(torch.__file__))')
  LINES_SHOWN=4 run configure 60 cmake -S . -B $build -G Ninja -DCMAKE_BUILD_TYPE=Release \
    "-DDHSA_TORCH_DIR=$torch_dir" "-DDHSA_CUDA_ARCHS=$archs" -DDHSA_BUILD_CUDA_TESTS=ON
  LINES_SHOWN=2 run build 600 cmake --build $build
  rm -rf $build/python && mkdir -p $build/python && cp -r python/dhsa_ext $build/python/
  find $build/csrc -name _native.so -exec cp {} $build/python/dhsa_ext/ \;
fi
if step kernels; then
  LINES_SHOWN=8 spawn router 120 $bin/router_test
  LINES_SHOWN=6 spawn logits 120 $bin/logits_test
  LINES_SHOWN=5 spawn pipeline 120 $bin/pipeline_test
  LINES_SHOWN=8 spawn accurate 120 $bin/accurate_test
  LINES_SHOWN=3 spawn attention 120 $bin/attention_test
  LINES_SHOWN=3 spawn attention_sm80 120 $bin/attention_test check sm80
  LINES_SHOWN=13 spawn repeat 120 $bin/attention_test repeat
  wait
fi
export PYTHONPATH=$build/python
export OMP_WAIT_POLICY=passive  # the workers of pytest-xdist share the cores
# Python's tests run beside the sanitizers: both ask whether answers are right, and neither fills the GPU.
if step pytest; then
  LINES_SHOWN=20 run info 60 "$python" -m dhsa_ext.info
  workers=$("$python" -c 'import xdist' 2>/dev/null && echo "-n $((($(nproc) * 3 + 3) / 4))")
  # shellcheck disable=SC2086  # two words, or none
  LINES_SHOWN=20 run pytest 1800 "$python" -m pytest -q $workers tests --ignore tests/arm -k "cuda or Cuda" &
fi
if step sanitizer; then
  # racecheck follows neither mbarriers through a warp's leader nor words that are meant to be read while written: it is
  # kept from the sm_90a kernel and from suppress_kernel, which attention_test repeat and bitwise tests watch instead.
  races=(--kernel-name-exclude kns=suppress_kernel,kns=sm90)
  for tool in racecheck memcheck initcheck synccheck; do  # the slowest first
    options=(--tool $tool --error-exitcode 1)
    [[ $tool == racecheck ]] && options+=("${races[@]}")
    while read -r part; do  # the longest test, in parts
      LINES_SHOWN=1 spawn "${tool}_accurate_${part// /_}" 1500 compute-sanitizer "${options[@]}" \
        $bin/accurate_test small "$part"
    done < <($bin/accurate_test list | tail -n +2)  # below the name of the device
    for test in router logits pipeline attention; do
      LINES_SHOWN=1 spawn "${tool}_$test" 1500 compute-sanitizer "${options[@]}" $bin/${test}_test small
    done
    LINES_SHOWN=1 spawn "${tool}_attention_sm80" 600 compute-sanitizer "${options[@]}" $bin/attention_test small sm80
  done
  LINES_SHOWN=1 spawn memcheck_ops 600 \
    compute-sanitizer --tool memcheck --error-exitcode 1 "$python" tests/cuda/small_shapes.py
fi
wait
if step time; then
  LINES_SHOWN=40 run time_attention 120 $bin/attention_test time
  LINES_SHOWN=10 run time_attention_sm80 120 $bin/attention_test time sm80 32K
  LINES_SHOWN=12 run time_boundaries 60 $bin/router_test time
  LINES_SHOWN=4 run time_logits 60 $bin/logits_test time
  LINES_SHOWN=12 run time_pipeline 120 $bin/pipeline_test time
  LINES_SHOWN=20 run time_accurate 120 $bin/accurate_test time
fi
# shellcheck disable=SC2086  # options of the bench
step bench && LINES_SHOWN=60 run bench 600 "$python" bench/bench_prefill.py --device cuda ${BENCH_ARGS:-}
[[ ! -e $out/failed ]]
