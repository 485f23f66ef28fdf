"""The layers that the source tree promises: what may include what, and what the library links to."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dhsa_ext.backend import LIBRARY

ROOT = Path(__file__).resolve().parents[1]
SOURCES = {".h", ".cpp", ".cu", ".cuh", ".inc"}
INCLUDE = re.compile(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', re.MULTILINE)
FRAMEWORK = re.compile(r"^(torch/|ATen/|c10/|Python\.h|pybind11/|numpy/|headeronly/|torch\.h)")
INTRINSIC = re.compile(
    r"__global__|<<<|\b_mm(?:256|512)?_\w+\(|\bv(?:ld|st)[1-4]q?_\w+\(|\bv(?:fma|mul|add)q?_f(?:16|32)\(|\basm\b|__nv_\w+\("
)
SIMD_HEADER = re.compile(r"^(\w*mmintrin\.h|arm_(neon|sve|bf16)\.h|cuda_(fp16|bf16)\.h|mma\.h)$")


def files(*layers):
    found = [p for layer in layers for p in (ROOT / "csrc" / layer).rglob("*") if p.suffix in SOURCES]
    return [pytest.param(p, id=str(p.relative_to(ROOT / "csrc"))) for p in sorted(found)]


def code(path):
    """The file without comments."""
    return re.sub(r"//[^\n]*|/\*.*?\*/", "", path.read_text(), flags=re.DOTALL)


@pytest.mark.parametrize("path", files("core", "cpu", "cuda"))
def test_core_includes_no_framework(path):
    assert [name for name in INCLUDE.findall(code(path)) if FRAMEWORK.match(name)] == []


@pytest.mark.parametrize("path", files("core", "cpu"))
def test_cpu_core_includes_no_cuda(path):
    assert [name for name in INCLUDE.findall(code(path)) if name.startswith(("cuda", "cutlass"))] == []


@pytest.mark.parametrize("path", files("torch", "numpy"))
def test_adapter_holds_no_kernel_and_no_intrinsic(path):
    text = code(path)
    assert INTRINSIC.findall(text) == []
    assert [name for name in INCLUDE.findall(text) if SIMD_HEADER.match(name)] == []


@pytest.mark.parametrize("path", files("torch"))
def test_torch_adapter_keeps_to_the_stable_abi(path):
    """torch/csrc/stable and its headers only: nothing of ATen or c10, whose symbols change with every release."""
    names = [name for name in INCLUDE.findall(code(path)) if name.startswith(("torch/csrc/", "ATen/", "c10/"))]
    stable = ("torch/csrc/stable/", "torch/csrc/inductor/aoti_torch/c/", "torch/headeronly/")
    assert [name for name in names if not name.startswith(stable)] == []


def test_every_layer_has_files():
    """An empty list would pass every test above."""
    assert len(files("core", "cpu", "cuda")) > 20 and len(files("torch")) >= 2 and len(files("numpy")) >= 2


def test_public_header_needs_the_standard_library_only():
    assert set(INCLUDE.findall((ROOT / "csrc" / "dhsa.h").read_text())) <= {"cstdint", "functional", "core/types.h"}


@pytest.mark.skipif(not LIBRARY.exists(), reason="the native library is not built: run pip install -e .")
@pytest.mark.skipif(shutil.which("nm") is None, reason="nm is not installed: apt-get install binutils")
def test_native_library_needs_no_symbol_of_at_or_c10():
    listed = subprocess.run(["nm", "-DC", "--undefined-only", LIBRARY], capture_output=True, text=True, check=True)
    needed = [line.split(None, 1)[1] for line in listed.stdout.splitlines()]
    assert [name for name in needed if re.search(r"\b(at|c10)::", name)] == []
    assert any("aoti_torch" in name or "torch_" in name for name in needed), "not the torch adapter at all"


@pytest.mark.skipif(not LIBRARY.exists(), reason="the native library is not built: run pip install -e .")
@pytest.mark.skipif(shutil.which("readelf") is None, reason="readelf is not installed: apt-get install binutils")
def test_native_library_links_no_python_and_no_shared_cuda():
    listed = subprocess.run(["readelf", "-d", LIBRARY], capture_output=True, text=True, check=True).stdout
    linked = re.findall(r"NEEDED.*\[(.+)\]", listed)
    assert [name for name in linked if name.startswith(("libpython", "libcudart", "libc10", "libtorch_python"))] == []


NUMPY_MODULE = next(LIBRARY.parent.glob("_numpy.*so"), None)


@pytest.mark.skipif(NUMPY_MODULE is None, reason="the NumPy module is not built: run pip install -e .")
@pytest.mark.skipif(shutil.which("readelf") is None, reason="readelf is not installed: apt-get install binutils")
def test_numpy_module_links_no_torch():
    listed = subprocess.run(["readelf", "-d", NUMPY_MODULE], capture_output=True, text=True, check=True).stdout
    linked = re.findall(r"NEEDED.*\[(.+)\]", listed)
    assert linked != [] and [name for name in linked if re.match("lib(torch|c10|python|cuda)", name)] == []


def test_the_package_needs_torch_and_numpy_only():
    """`import dhsa_ext` works where nothing but its required dependencies is installed."""
    optional = [
        "transformers",
        "gguf",
        "matplotlib",
        "tqdm",
        "psutil",
        "sentencepiece",
        "safetensors",
        "hypothesis",
        "pytest",
        "PIL",
    ]
    script = f"import sys; sys.modules.update(dict.fromkeys({optional})); import dhsa_ext"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
