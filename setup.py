"""Builds the native library of dhsa_ext with CMake and ninja; the metadata is in pyproject.toml.

Variables: DHSA_BUILD=auto|cpu|cuda|none, DHSA_CUDA_ARCHS="80;90a", DHSA_TORCH_DIR=<folder of the torch package>,
DHSA_JOBS=<compilers at once>. build_tools/dhsa_machine.py says what each of them does.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import dhsa_machine
from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
NATIVE = "dhsa_ext._native"


class NativeBuild(build_ext):
    """Runs CMake for the one extension. It links LibTorch's stable ABI, not Python: its name carries no ABI tag."""

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + ".so"

    def build_extension(self, ext: Extension) -> None:
        plan = dhsa_machine.native_plan()
        cmake, ninja = dhsa_machine.find_cmake(), dhsa_machine.find_ninja()
        if cmake is None or ninja is None:
            missing = " ".join(f"'{tool}'" for tool in dhsa_machine.missing_tools())
            raise dhsa_machine.BuildError(f"the native library needs more tools: pip install {missing}.")
        cuda = f"CUDA {';'.join(plan.cuda_archs)} by {plan.nvcc}" if plan.cuda_archs else "no CUDA"
        print(f"dhsa_ext: native library for torch {plan.torch.version} in {plan.torch.path}, {cuda}", flush=True)

        # One folder per kind of build, so that changing DHSA_BUILD back and forth compiles nothing twice.
        folder = ROOT / "build" / f"native-{plan.name}"
        configure = [
            cmake, "-S", str(ROOT), "-B", str(folder), "-G", "Ninja",
            f"-DCMAKE_MAKE_PROGRAM={ninja}",  # the last build's may have lived in an environment that is gone
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={folder}",
            "-DCMAKE_SKIP_RPATH=ON",  # torch is loaded before the module: no path of this machine goes into a wheel
            f"-DDHSA_TORCH_DIR={plan.torch.path}",
            f"-DDHSA_CUDA_ARCHS={';'.join(plan.cuda_archs)}",
            "-DDHSA_BUILD_TESTS=OFF",
            "-DDHSA_BUILD_BENCH=OFF",
        ]  # fmt: skip
        if plan.nvcc is not None:
            configure.append(f"-DCMAKE_CUDA_COMPILER={plan.nvcc}")
        jobs = os.environ.get("DHSA_JOBS") or str(len(os.sched_getaffinity(0)))
        make = [cmake, "--build", str(folder), "--target", "_native", "-j", jobs]
        for step, command in (("configuring", configure), ("compiling", make)):
            if subprocess.run(command, check=False).returncode != 0:
                raise dhsa_machine.BuildError(f"{step} the native library failed; the reason is above.")

        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / "_native.so", target)


class CleanBuild(build):
    """Starts from an empty build/lib: what an earlier build left there would go into the wheel."""

    def run(self) -> None:
        shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


class PurePython(build_py):
    """DHSA_BUILD=none: `pip install -e .` must not leave an earlier build's library beside the sources."""

    def run(self) -> None:
        if self.editable_mode and not self.distribution.has_ext_modules():
            (ROOT / "python" / "dhsa_ext" / "_native.so").unlink(missing_ok=True)
        super().run()


class AnyPythonWheel(bdist_wheel):
    """One wheel per platform serves every Python 3: the library knows nothing of the interpreter."""

    def get_tag(self) -> tuple[str, str, str]:
        return ("py3", "none", super().get_tag()[2])


setup(
    ext_modules=[] if dhsa_machine.requested_build() == "none" else [Extension(NATIVE, sources=[])],
    cmdclass={"build": CleanBuild, "build_ext": NativeBuild, "build_py": PurePython, "bdist_wheel": AnyPythonWheel},
)
