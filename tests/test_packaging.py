"""The build: what it finds on a machine, the sentence it stops with, and what a source archive and a wheel hold."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import dhsa_machine
import pytest

ROOT = Path(__file__).resolve().parents[1]


def put_tool(folder: Path, name: str, script: str) -> Path:
    """An executable shell script."""
    folder.mkdir(parents=True, exist_ok=True)
    tool = folder / name
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(0o755)
    return tool


def put_torch(folder: Path, version: str) -> Path:
    """The two things that a build looks at in a torch package."""
    (folder / "torch" / "include").mkdir(parents=True)
    (folder / "torch" / "version.py").write_text(f"__version__ = '{version}'\n")
    return folder / "torch"


@pytest.fixture
def bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The environment of a machine with neither a CUDA toolkit nor a GPU."""
    monkeypatch.setattr(dhsa_machine, "DEFAULT_CUDA", tmp_path / "no-cuda")
    monkeypatch.setattr(dhsa_machine, "_device_tree", lambda: "")
    return {"PATH": str(tmp_path / "bin")}


# ---- what is built --------------------------------------------------------------------------------------------------


def test_auto_without_nvcc_is_cpu(bare: dict[str, str]) -> None:
    assert dhsa_machine.cuda_archs(bare) == ()


def test_auto_with_nvcc_without_gpu_is_cpu(bare: dict[str, str], tmp_path: Path) -> None:
    put_tool(tmp_path / "bin", "nvcc", "exit 0")
    assert dhsa_machine.cuda_archs(bare) == ()


def test_auto_takes_the_architectures_of_the_gpus(bare: dict[str, str], tmp_path: Path) -> None:
    put_tool(tmp_path / "bin", "nvcc", "exit 0")
    put_tool(tmp_path / "bin", "nvidia-smi", "echo 9.0; echo 8.9; echo 9.0; echo 12.0")
    assert dhsa_machine.cuda_archs(bare) == ("90a", "89", "120")


def test_jetson_orin_is_known_by_its_device_tree(
    bare: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_tool(tmp_path / "bin", "nvcc", "exit 0")
    monkeypatch.setattr(dhsa_machine, "_device_tree", lambda: "nvidia,p3737-0000+p3701-0005\0nvidia,tegra234\0")
    assert dhsa_machine.cuda_archs(bare) == ("87",)


@pytest.mark.parametrize("text", ["80;90a", "80,90a", "8.0 9.0a", " 80; 90a;80 "])
def test_forms_of_an_arch_list(bare: dict[str, str], tmp_path: Path, text: str) -> None:
    put_tool(tmp_path / "bin", "nvcc", "exit 0")
    assert dhsa_machine.cuda_archs({**bare, "DHSA_CUDA_ARCHS": text}) == ("80", "90a")


def test_nvcc_of_cuda_home_comes_first(bare: dict[str, str], tmp_path: Path) -> None:
    put_tool(tmp_path / "bin", "nvcc", "exit 0")
    nvcc = put_tool(tmp_path / "toolkit" / "bin", "nvcc", "exit 0")
    assert dhsa_machine.find_nvcc({**bare, "CUDA_HOME": str(tmp_path / "toolkit")}) == nvcc


def test_nvcc_of_the_default_folder_is_found(
    bare: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvcc = put_tool(tmp_path / "default" / "bin", "nvcc", "exit 0")
    monkeypatch.setattr(dhsa_machine, "DEFAULT_CUDA", tmp_path / "default")
    assert dhsa_machine.find_nvcc(bare) == nvcc


@pytest.mark.parametrize(
    ("variables", "nvcc", "sentence"),
    [
        ({"DHSA_BUILD": "gpu"}, False, "DHSA_BUILD: expected one of auto, cpu, cuda, none, got 'gpu'"),
        ({"DHSA_BUILD": "cuda"}, False, "DHSA_BUILD=cuda asks for CUDA, but there is no nvcc"),
        ({"DHSA_CUDA_ARCHS": "80"}, False, "DHSA_CUDA_ARCHS asks for CUDA, but there is no nvcc"),
        ({"DHSA_BUILD": "cuda"}, True, "DHSA_BUILD=cuda found no GPU"),
        ({"DHSA_CUDA_ARCHS": "hopper"}, True, "DHSA_CUDA_ARCHS: expected a list such as '80;87;90a', got 'hopper'"),
        ({"DHSA_BUILD": "cpu", "DHSA_CUDA_ARCHS": "80"}, True, "expected none with DHSA_BUILD=cpu, got 80"),
    ],
)
def test_contradictions_stop_the_build(
    bare: dict[str, str], tmp_path: Path, variables: dict[str, str], nvcc: bool, sentence: str
) -> None:
    if nvcc:
        put_tool(tmp_path / "bin", "nvcc", "exit 0")
    with pytest.raises(dhsa_machine.BuildError) as stopped:
        dhsa_machine.cuda_archs({**bare, **variables})
    assert sentence in str(stopped.value)


# ---- torch, cmake, ninja --------------------------------------------------------------------------------------------


def test_the_torch_of_this_environment_is_found() -> None:
    import torch

    found = dhsa_machine.find_torch(dict(os.environ, DHSA_TORCH_DIR=""))
    assert found.path.samefile(Path(torch.__file__).parent)
    assert found.version == torch.__version__


def test_a_clean_child_sees_the_torch_that_isolation_hides(tmp_path: Path) -> None:
    # As in pip's build environment: this process has only the standard library, its children see what it hides.
    script = (
        "import sys; sys.path = [p for p in sys.path if 'site-packages' not in p]; import dhsa_machine; "
        "print(dhsa_machine.find_torch({**dict(__import__('os').environ), 'PYTHONPATH': '/nowhere'}).path)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], env={"PYTHONPATH": str(ROOT / "build_tools")}, cwd=tmp_path,
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    import torch

    assert Path(done.stdout.strip()).samefile(Path(torch.__file__).parent)


def test_the_interpreter_that_started_the_build_is_found_by_a_relative_name(tmp_path: Path) -> None:
    # As `.venv/bin/python -m build` runs the backend: from another folder, in an environment without torch.
    backend = "import dhsa_machine; print(dhsa_machine._parent_python())"
    script = (
        "import subprocess, sys; "
        f"subprocess.run([sys.executable, '-c', {backend!r}], cwd={str(tmp_path / 'elsewhere')!r}, check=True)"
    )
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").symlink_to(sys.executable)
    done = subprocess.run(
        ["bin/python", "-c", script], env={"PYTHONPATH": str(ROOT / "build_tools")}, cwd=tmp_path,
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.strip() == str(tmp_path / "bin" / "python")


def test_dhsa_torch_dir_overrides(tmp_path: Path) -> None:
    folder = put_torch(tmp_path, "2.12.1+mine")
    found = dhsa_machine.find_torch({"DHSA_TORCH_DIR": str(folder)})
    assert (found.path, found.version) == (folder, "2.12.1+mine")


def test_dhsa_torch_dir_that_is_no_torch(tmp_path: Path) -> None:
    with pytest.raises(dhsa_machine.BuildError) as stopped:
        dhsa_machine.find_torch({"DHSA_TORCH_DIR": str(tmp_path)})
    assert "DHSA_TORCH_DIR: expected the folder of a torch package, got" in str(stopped.value)


def test_a_torch_below_the_floor(tmp_path: Path) -> None:
    with pytest.raises(dhsa_machine.BuildError) as stopped:
        dhsa_machine.find_torch({"DHSA_TORCH_DIR": str(put_torch(tmp_path, "2.9.1"))})
    assert "torch: expected version 2.10 or later, got 2.9.1 in" in str(stopped.value)


def test_no_torch_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dhsa_machine, "_torch_candidates", lambda env: iter([("/usr/bin/python3", None)]))
    with pytest.raises(dhsa_machine.BuildError) as stopped:
        dhsa_machine.find_torch({})
    sentence = str(stopped.value)
    assert "no torch found (looked in: /usr/bin/python3)" in sentence
    assert "pip install 'torch>=2.10'" in sentence and "DHSA_BUILD=none" in sentence


def plan(torch: bool = True, numpy: bool = True) -> dhsa_machine.NativePlan:
    return dhsa_machine.NativePlan(dhsa_machine.Torch(Path("torch"), "2.13.0") if torch else None, numpy, (), None, "")


@pytest.fixture
def no_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dhsa_machine, "_torch_candidates", lambda env: iter([("/usr/bin/python3", None)]))


def test_without_torch_the_numpy_module_is_built(
    bare: dict[str, str], no_torch: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dhsa_machine, "has_python_headers", lambda: True)
    for choice in ("auto", "cpu"):
        found = dhsa_machine.native_plan({**bare, "DHSA_BUILD": choice})
        assert (found.modules, found.name) == (("_numpy",), "numpy")
        assert found.missing.startswith("only the NumPy module is built: no torch found")


def test_cuda_that_is_merely_there_needs_no_torch(
    bare: dict[str, str], no_torch: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dhsa_machine, "has_python_headers", lambda: True)
    put_tool(tmp_path / "bin", "nvcc", "exit 0")
    put_tool(tmp_path / "bin", "nvidia-smi", "echo 9.0")
    assert dhsa_machine.native_plan(bare).modules == ("_numpy",)
    for asked in ({"DHSA_BUILD": "cuda"}, {"DHSA_CUDA_ARCHS": "80"}):
        with pytest.raises(dhsa_machine.BuildError) as stopped:
            dhsa_machine.native_plan({**bare, **asked})
        assert "no torch found" in str(stopped.value)


def test_without_python_headers_the_torch_adapter_is_built(
    bare: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dhsa_machine.sysconfig, "get_path", lambda name: str(tmp_path))
    found = dhsa_machine.native_plan({**bare, "DHSA_TORCH_DIR": str(put_torch(tmp_path, "2.13.0"))})
    assert found.modules == ("_native",)
    assert "no Python.h" in found.missing and "python3-dev" in found.missing


def test_neither_torch_nor_headers(bare: dict[str, str], no_torch: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dhsa_machine, "has_python_headers", lambda: False)
    with pytest.raises(dhsa_machine.BuildError):
        dhsa_machine.native_plan(bare)


def test_pybind11_is_asked_for_where_the_numpy_module_needs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dhsa_machine, "_working_tool", lambda name, floor: name)
    monkeypatch.setattr(dhsa_machine, "has_pybind11", lambda: False)
    assert dhsa_machine.missing_tools(plan(numpy=True)) == ["pybind11>=2.11"]
    assert dhsa_machine.missing_tools(plan(numpy=False)) == []


@pytest.mark.parametrize(
    ("cmake", "ninja", "missing"),
    [
        ("echo cmake version 3.25.1", "echo 1.11.1", []),
        ("echo cmake version 3.18.4", "echo 1.11.1", ["cmake>=3.24"]),
        ("echo ModuleNotFoundError >&2; exit 1", "exit 127", ["cmake>=3.24", "ninja"]),
        (None, None, ["cmake>=3.24", "ninja"]),
    ],
)
def test_only_tools_that_do_not_work_are_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cmake: str | None, ninja: str | None, missing: list[str]
) -> None:
    if cmake and ninja:
        put_tool(tmp_path / "bin", "cmake", cmake)
        put_tool(tmp_path / "bin", "ninja", ninja)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert dhsa_machine.missing_tools(plan(numpy=False)) == missing


# ---- source archive and wheel ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources, with what earlier builds leave behind."""
    tree = tmp_path_factory.mktemp("packaging") / "tree"
    ignore = shutil.ignore_patterns(
        ".git", ".venv*", "build", "dist", "*.egg-info", "__pycache__", "*.so", ".*_cache", ".hypothesis", ".cache"
    )
    shutil.copytree(ROOT, tree, ignore=ignore)
    lib = tree / "build" / "lib" / "dhsa_ext"
    lib.mkdir(parents=True)
    package = tree / "python" / "dhsa_ext"
    for stale in (lib / "_native.so", lib / "removed.py", package / "_native.so", package / "_numpy.so"):
        stale.write_bytes(b"stale")
    return tree


def build(tree: Path, hook: str, out: Path) -> Path:
    """Run one hook of the backend as pip does, without a native library."""
    script = f"import sys, dhsa_backend; print(dhsa_backend.{hook}(sys.argv[1]))"
    env = {**os.environ, "DHSA_BUILD": "none", "DHSA_CUDA_ARCHS": "", "PYTHONPATH": str(tree / "build_tools")}
    done = subprocess.run(
        [sys.executable, "-c", script, str(out)], cwd=tree, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return out / done.stdout.split()[-1]


def test_the_sdist_holds_every_source(tree: Path, tmp_path: Path) -> None:
    with tarfile.open(build(tree, "build_sdist", tmp_path)) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    folders = ["csrc", "build_tools", "tests", "bench", "docs", "examples", "third_party", "python/dhsa_ext"]
    sources = {
        path.relative_to(tree).as_posix()
        for folder in folders
        for path in (tree / folder).rglob("*")
        if path.is_file() and path.suffix not in (".so", ".pyc")
    }
    sources |= {"setup.py", "pyproject.toml", "CMakeLists.txt", "LICENSE", "README.md", "Makefile"}
    assert sources - held == set()
    assert [name for name in held if name.endswith((".so", ".o", ".pyc"))] == []


def test_a_pure_wheel_holds_nothing_stale(tree: Path, tmp_path: Path) -> None:
    wheel = build(tree, "build_wheel", tmp_path)
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if name.startswith("dhsa_ext/")}
    package = tree / "python"
    sources = {path.relative_to(package).as_posix() for path in package.rglob("dhsa_ext/*") if path.is_file()}
    assert held == sources - {"dhsa_ext/_native.so", "dhsa_ext/_numpy.so"}


def test_no_extra_names_torch() -> None:
    # An extra that did could replace the torch that is there by another build of it.
    from importlib.metadata import requires

    named = [line for line in requires("dhsa_ext") or [] if line.partition(";")[0].strip().startswith("torch")]
    assert named == ["torch>=2.10"]
