#!/usr/bin/env bash
# The Python package on ARM64, without one: an ARM64 Debian's Python and torch run under qemu, `pip install .` builds
# there with the cross compiler, and a part of the tests runs as each CPU model. run_arm_python.sh [PYTEST ARGUMENTS]
#
# Without torch, as a Cortex-A72: the wheel of torch 2.10.0 ends there in an illegal instruction as it is imported. With
# torch, as a Cortex-A76 and with all there is. Importing torch alone takes 15 s under emulation: the few tests here are
# those of the seam between Python and the kernels; run_arm.sh has the kernels.
#
# Needs g++-aarch64-linux-gnu, qemu-user-static, mmdebstrap, cmake, ninja and a pip (PIP names another); ccache halves
# it. What is downloaded, 180 MB, stays in build/arm-python.
set -euo pipefail
cd "$(dirname "$0")/.."
pip=(${PIP:-python3 -m pip} --disable-pip-version-check)
work=$PWD/build/arm-python
export ARM_ROOT=$work/root OMP_NUM_THREADS=1
# Two builds of one core, which is run_arm.sh's too: a cache of the caller's is used.
export CCACHE_DIR=${CCACHE_DIR:-$work/ccache}
! command -v ccache >/dev/null || export CMAKE_CXX_COMPILER_LAUNCHER=ccache
unset PYTHONDONTWRITEBYTECODE  # what the emulated Python compiles at its first import, it need not again
site=$ARM_ROOT/usr/local/lib/python3.11/dist-packages
python=$ARM_ROOT/usr/bin/python

say() { printf '\n-- %s (%d s)\n' "$1" "$SECONDS"; }
fail() {
  printf 'run_arm_python.sh: %s\n' "$1" >&2
  exit 1
}

# 2.10.0 is the last torch that brings no CUDA packages on ARM64. Wheels are named one by one: pip would decide what
# else they need by the markers of this machine.
torch=(torch==2.10.0 hypothesis sortedcontainers filelock typing_extensions sympy mpmath==1.3.0 networkx jinja2 markupsafe fsspec)
base=(pip setuptools pybind11 numpy pytest pluggy iniconfig packaging pygments)
wheels() {
  "${pip[@]}" download -q --no-deps --only-binary=:all: --python-version 3.11 --implementation cp \
    --abi cp311 --abi abi3 --abi none --platform manylinux_2_28_aarch64 --platform manylinux_2_27_aarch64 \
    --platform manylinux_2_17_aarch64 --platform manylinux2014_aarch64 -d "$work/wheels" "$@"
}
unpack() { # NAME...: the wheels of these packages into the emulated Python's site
  local name
  for name in "$@"; do
    python3 -m zipfile -e "$work/wheels/${name%%==*}"-*.whl "$site"
  done
  compile "$site"
}
compile() { # FOLDER...: to byte code, which any Python 3.11 can; under emulation `import torch` takes twice as long without
  python3 -m compileall -q -x '/tests?/' "$@"
}

if [[ ! -e $work/wheels/complete ]]; then
  say "wheels for ARM64"
  rm -rf "$work/wheels"
  wheels "${base[@]}" "${torch[@]}"
  touch "$work/wheels/complete"
fi
if [[ ! -e $work/root/complete ]]; then
  say "an ARM64 Debian with Python"
  rm -rf "$work/root"
  mmdebstrap --quiet --variant=extract --architectures=arm64 \
    --include=python3.11,libpython3.11-dev,libgomp1,libstdc++6,libc6-dev bookworm "$work/root"
  rm -f "$ARM_ROOT"/usr/lib/python3.11/EXTERNALLY-MANAGED
  compile "$ARM_ROOT/usr/lib/python3.11"
  touch "$work/root/complete"
fi
# Started as `python`, so that what Python starts again as sys.executable runs under the emulator too.
cat >"$python" <<'SCRIPT'
#!/bin/sh
exec qemu-aarch64-static -cpu "${ARM_CPU:-max}" -L "$ARM_ROOT" -0 "$0" "$ARM_ROOT/usr/bin/python3.11" "$@"
SCRIPT
chmod +x "$python"
rm -rf "$ARM_ROOT/usr/local/lib/python3.11"
mkdir -p "$site"

# A copy of the tree: build/ of the real one holds this machine's own objects.
source=$work/source
mkdir -p "$source"
git ls-files -z --cached --others --exclude-standard -- . ':!bench/results' | while IFS= read -r -d '' file; do
  [[ ! -f $file ]] || printf '%s\0' "$file"
done | xargs -0 cp -pu --parents -t "$source"

build() { # PIP ARGUMENTS...: pip install . as a user of the board would
  (cd "$source" && CC=aarch64-linux-gnu-gcc CXX=aarch64-linux-gnu-g++ DHSA_JOBS=${JOBS:-2} \
    CMAKE_TOOLCHAIN_FILE=$source/tests/arm/python.cmake "$python" -m pip --disable-pip-version-check install -v "$@" .) \
    >"$work/pip.log" 2>&1 || { tail -n 40 "$work/pip.log"; fail "pip install $* . failed, see $work/pip.log"; }
  grep -a '^ *dhsa_ext: ' "$work/pip.log" | sort -u || true
}

say "pip install --no-deps . without torch"
unpack "${base[@]}"
build --no-deps --no-build-isolation  # an isolated build costs a minute more of emulated pip: the next one is
grep -q 'only the NumPy module is built' "$work/pip.log" || fail "expected a build that says it has no torch"
say "the NumPy module as cortex-a72"
(cd "$source" && ARM_CPU=cortex-a72 "$python" -m pytest -q -p no:cacheprovider --noconftest tests/arm/test_numpy_alone.py)
(cd "$work" && ARM_CPU=cortex-a72 "$python" "$source/examples/without_torch.py")
say "bfloat16 products forced on a Cortex-A72, which has none"
if (cd "$work" && ARM_CPU=cortex-a72 DHSA_FORCE_ISA=neonbf16 "$python" "$source/examples/without_torch.py") \
  >"$work/forced.log" 2>&1; then
  fail "DHSA_FORCE_ISA=neonbf16 on a Cortex-A72: expected a failure, got success"
fi
grep 'DHSA_FORCE_ISA: expected one of scalar,neon ' "$work/forced.log" || { cat "$work/forced.log"; fail "no sentence"; }

say "pip install . with torch"
unpack "${torch[@]}"
build

# Both models at once, each on one thread.
chosen=("$@")
((${#chosen[@]})) || chosen=(
  tests/test_numpy.py::test_same_bits_as_the_torch_op
  tests/test_ops.py::test_output_of_a_transposed_input_is_dense
  tests/test_sparse_attention.py::test_every_key_in_one_run_equals_dense_sdpa
)
models=(cortex-a76 max) pids=() status=0
for cpu in "${models[@]}"; do
  (cd "$source" && ARM_CPU=$cpu exec "$python" -m pytest -q -p no:cacheprovider "${chosen[@]}") \
    >"$work/pytest-$cpu.log" 2>&1 &
  pids+=($!)
done
for pid in "${pids[@]}"; do wait "$pid" || status=1; done
for cpu in "${models[@]}"; do
  say "pytest as $cpu"
  cat "$work/pytest-$cpu.log"
done
exit $status
