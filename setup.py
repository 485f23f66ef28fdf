"""Builds the native modules of dhsa_ext with CMake and ninja; the metadata is in pyproject.toml.

`_native` is the torch adapter, `_numpy` the NumPy one; both link the same core, compiled once.
Variables: DHSA_BUILD=auto|cpu|cuda|none, DHSA_CUDA_ARCHS="80;90a", DHSA_TORCH_DIR=<folder of the torch package>,
DHSA_JOBS=<compilers at once>. build_tools/dhsa_machine.py says what each of them does.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import dhsa_machine
from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
PACKAGE = "dhsa_ext"
MODULES = ("_native", "_numpy")
plan = cache(dhsa_machine.native_plan)


class NativeBuild(build_ext):
    """Runs CMake once for the modules of the plan."""

    extensions: list[Extension]

    def run(self) -> None:
        self.extensions = [ext for ext in self.extensions if ext.name.rpartition(".")[2] in plan().modules]
        super().run()

    def get_ext_filename(self, fullname: str) -> str:
        # _native links LibTorch's stable ABI, not Python: its name carries no ABI tag.
        if fullname.endswith("_native"):
            return os.path.join(*fullname.split(".")) + ".so"
        return super().get_ext_filename(fullname)

    def build_extensions(self) -> None:
        folder = _compile()
        for ext in self.extensions:
            target = Path(self.get_ext_fullpath(ext.name))
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / (ext.name.rpartition(".")[2] + ".so"), target)


def _compile() -> Path:
    """Configure and build the plan's modules; the folder that they are in afterwards."""
    cmake, ninja, missing = dhsa_machine.find_cmake(), dhsa_machine.find_ninja(), dhsa_machine.missing_tools(plan())
    if cmake is None or ninja is None or missing:
        tools = " ".join(f"'{tool}'" for tool in missing)
        raise dhsa_machine.BuildError(f"the native library needs more tools: pip install {tools}.")
    torch, nvcc = plan().torch, plan().nvcc
    cuda = f"CUDA {';'.join(plan().cuda_archs)} by {nvcc}" if nvcc else "no CUDA"
    built_for = f"torch {torch.version} in {torch.path}, {cuda}" if torch else "NumPy"
    print(f"dhsa_ext: {' and '.join(plan().modules)} for {built_for}", flush=True)
    if plan().missing:
        print(f"dhsa_ext: {plan().missing}", flush=True)

    # One folder per kind of build, so that changing DHSA_BUILD back and forth compiles nothing twice.
    folder = ROOT / "build" / f"native-{plan().name}"
    configure = [
        cmake, "-S", str(ROOT), "-B", str(folder), "-G", "Ninja",
        f"-DCMAKE_MAKE_PROGRAM={ninja}",  # the last build's may have lived in an environment that is gone
        "-DCMAKE_BUILD_TYPE=Release",
        f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={folder}",
        "-DCMAKE_SKIP_RPATH=ON",  # torch is loaded before the module: no path of this machine goes into a wheel
        f"-DDHSA_TORCH_DIR={torch.path if torch else ''}",
        f"-DDHSA_BUILD_NUMPY={'ON' if plan().numpy else 'OFF'}",
        f"-DPython3_EXECUTABLE={sys.executable}",
        f"-DDHSA_CUDA_ARCHS={';'.join(plan().cuda_archs)}",
        "-DDHSA_BUILD_TESTS=OFF",
        "-DDHSA_BUILD_BENCH=OFF",
    ]  # fmt: skip
    if nvcc is not None:
        configure.append(f"-DCMAKE_CUDA_COMPILER={nvcc}")
    jobs = os.environ.get("DHSA_JOBS") or str(len(os.sched_getaffinity(0)))
    make = [cmake, "--build", str(folder), "-j", jobs, "--target", *plan().modules]
    for step, command in (("configuring", configure), ("compiling", make)):
        if subprocess.run(command, check=False).returncode != 0:
            raise dhsa_machine.BuildError(f"{step} the native library failed; the reason is above.")
    return folder


class CleanBuild(build):
    """Starts from an empty build/lib: what an earlier build left there would go into the wheel."""

    def run(self) -> None:
        shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


class EditableClean(build_py):
    """`pip install -e .` must not leave beside the sources what an earlier build made and this one does not."""

    def run(self) -> None:
        if self.editable_mode:
            modules = plan().modules if self.distribution.has_ext_modules() else ()
            for name in MODULES:
                for stale in (ROOT / "python" / PACKAGE).glob(f"{name}.*so") if name not in modules else ():
                    stale.unlink()
        super().run()


class PlatformWheel(bdist_wheel):
    """_native knows nothing of the interpreter: without _numpy, one wheel per platform serves every Python 3."""

    def get_tag(self) -> tuple[str, str, str]:
        interpreter, abi, platform = super().get_tag()
        if self.distribution.has_ext_modules() and plan().numpy:
            return (interpreter, abi, platform)
        return ("py3", "none", platform)


setup(
    ext_modules=[]
    if dhsa_machine.requested_build() == "none"
    else [Extension(f"{PACKAGE}.{name}", sources=[]) for name in MODULES],
    cmdclass={"build": CleanBuild, "build_ext": NativeBuild, "build_py": EditableClean, "bdist_wheel": PlatformWheel},
)
