#!/usr/bin/env bash
# Builds tests/cuda/attention_test.cu with nvcc alone and runs it on the GPU that is there:
#   run_attention.sh [BUILD_DIR]     ARCH=90a JOBS=16 STEPS="build check sanitizer time"
set -uo pipefail
cd "$(dirname "$0")/../.."
build=${1:-build/attention}
arch=${ARCH:-90a}
steps=${STEPS:-build check sanitizer time}
mkdir -p "$build"
step() { [[ " $steps " == *" $1 "* ]]; }

if step build; then
  start=$SECONDS
  flags="-std=c++17 -O3 -Icsrc -gencode=arch=compute_$arch,code=sm_$arch -DDHSA_CUDA_ARCHS=\"$arch\""
  sources="csrc/cuda/attention.cu csrc/cuda/archs.cpp tests/cuda/attention_test.cu $(echo csrc/cuda/sm[89]0/*.cu)"
  printf '%s\n' $sources | xargs -P "${JOBS:-16}" -I{} sh -c \
    'nvcc '"${flags//\"/\\\\\\\"}"' -c {} -o '"$build"'/$(echo {} | tr / _).o || exit 255' || exit 1
  nvcc "$build"/*.o -o "$build/attention_test" || exit 1
  echo "built in $((SECONDS - start)) s"
fi
for kernel in ${KERNELS:-sm90 sm80}; do
  step check && timeout "${LIMIT:-90}" "$build/attention_test" check "$kernel" | tail -n 25
  step sanitizer && timeout 100 compute-sanitizer --tool memcheck "$build/attention_test" small "$kernel" | tail -n 8
  step time && timeout 90 "$build/attention_test" time "$kernel"
done
