"""What the machine offers to a build of dhsa_ext: torch, Python's headers, cmake, ninja, pybind11, nvcc, a GPU.

Standard library only. Used by the build backend (which runs in an environment of its own, without the user's packages)
and by setup.py.
Every mistake of a user ends in one BuildError of one sentence.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

TORCH_FLOOR = (2, 10)  # the first LibTorch whose stable ABI has all that csrc/torch uses
CMAKE_FLOOR = (3, 24)  # csrc/cuda
PYBIND11_FLOOR = (2, 11)  # third_party/pybind11.cmake
BUILD_CHOICES = ("auto", "cpu", "cuda", "none")
DEFAULT_CUDA = Path("/usr/local/cuda")  # where NVIDIA's installers put the toolkit, often without a word on PATH

# The child looks for torch as the target interpreter would after installation: without the build environment's
# PYTHONPATH, and without the current folder, which may hold something of that name.
_FIND_TORCH = """
import importlib.util, sys
sys.path = [p for p in sys.path if p]
spec = importlib.util.find_spec("torch")
print(spec.submodule_search_locations[0] if spec and spec.submodule_search_locations else "")
"""


class BuildError(SystemExit):
    """Stops the build; its one argument is the sentence that the user reads."""

    def __init__(self, sentence: str) -> None:
        super().__init__(f"dhsa_ext: {sentence}")
        self.sentence = sentence


class NoTorchError(BuildError):
    """There is no torch at all."""


@dataclass(frozen=True)
class Torch:
    """A torch package that is installed: its folder and its version, "2.13.0+cpu"."""

    path: Path
    version: str


@dataclass(frozen=True)
class NativePlan:
    """What is built, and from what. No torch: no torch adapter. `cuda_archs` is empty for a build without CUDA."""

    torch: Torch | None
    numpy: bool
    cuda_archs: tuple[str, ...]
    nvcc: Path | None
    missing: str  # one sentence about the adapter that is left out, "" where both are built

    @property
    def modules(self) -> tuple[str, ...]:
        """The extension modules of the package, which are CMake's targets too."""
        return (("_native",) if self.torch else ()) + (("_numpy",) if self.numpy else ())

    @property
    def name(self) -> str:
        return "cuda" if self.cuda_archs else "cpu" if self.torch else "numpy"


def requested_build(env: Mapping[str, str] = os.environ) -> str:
    """DHSA_BUILD: auto, cpu, cuda or none."""
    choice = env.get("DHSA_BUILD", "") or "auto"
    if choice not in BUILD_CHOICES:
        raise BuildError(f"DHSA_BUILD: expected one of {', '.join(BUILD_CHOICES)}, got {choice!r}.")
    return choice


def native_plan(env: Mapping[str, str] = os.environ) -> NativePlan:
    """Decide what to build, or stop with the sentence that says what is missing. DHSA_BUILD=none has no plan.

    The torch adapter is built where there is a torch, the NumPy one where there are Python's headers; one is enough.
    """
    archs = cuda_archs(env)
    headers = has_python_headers()
    try:
        torch = find_torch(env)
    except NoTorchError as absent:
        # CUDA that was asked for by name is the torch adapter's; CUDA that is merely there changes nothing.
        if not headers or requested_build(env) == "cuda" or env.get("DHSA_CUDA_ARCHS"):
            raise
        return NativePlan(None, True, (), None, f"only the NumPy module is built: {absent.sentence}")
    missing = (
        ""
        if headers
        else "the NumPy module is not built: no Python.h of this interpreter; apt-get install python3-dev, or what "
        "brings it where this Python comes from."
    )
    return NativePlan(torch, headers, archs, find_nvcc(env) if archs else None, missing)


def has_python_headers() -> bool:
    """Python.h of the interpreter that runs the build, which is the one that the package is installed for."""
    return (Path(sysconfig.get_path("include")) / "Python.h").is_file()


# ---- torch ----------------------------------------------------------------------------------------------------------


def find_torch(env: Mapping[str, str] = os.environ) -> Torch:
    """The torch of the environment that the package is being installed into."""
    looked_in = []
    for where, path in _torch_candidates(env):
        looked_in.append(where)
        if path is not None:
            version = _torch_version(path)
            if _numbers(version)[:2] < TORCH_FLOOR:
                floor = ".".join(map(str, TORCH_FLOOR))
                raise BuildError(f"torch: expected version {floor} or later, got {version} in {path}.")
            return Torch(path, version)
    raise NoTorchError(
        f"no torch found (looked in: {', '.join(looked_in)}); install it first (pip install 'torch>=2.10', or your "
        "machine's own build of it), or give its folder in DHSA_TORCH_DIR, or set DHSA_BUILD=none for pure Python, "
        "which needs torch only when it runs."
    )


def _torch_candidates(env: Mapping[str, str]) -> Iterator[tuple[str, Path | None]]:
    """Where torch may be, best first: (the place in words, the package's folder or None)."""
    override = env.get("DHSA_TORCH_DIR")
    if override:
        if not (Path(override) / "include").is_dir():
            raise BuildError(f"DHSA_TORCH_DIR: expected the folder of a torch package, got {override}.")
        yield "DHSA_TORCH_DIR", Path(override).resolve()

    # Without build isolation this very process sees it; within, a clean child of the same interpreter does (pip), or
    # one of the interpreter that started us (`python -m build` runs the backend in a fresh virtual environment).
    spec = importlib.util.find_spec("torch")
    if spec is not None and spec.submodule_search_locations:
        yield "this process", Path(spec.submodule_search_locations[0])
    pythons = [Path(sys.executable)]
    parent = _parent_python()
    if parent is not None:
        pythons.append(parent)
    for variable in ("VIRTUAL_ENV", "CONDA_PREFIX"):
        if env.get(variable):
            pythons.append(Path(env[variable]) / "bin" / "python")
    for python in dict.fromkeys(pythons):
        yield str(python), _torch_of(python, env)


def _parent_python() -> Path | None:
    """The interpreter that runs our parent, under the name it was started by (which says its environment)."""
    parent = Path(f"/proc/{os.getppid()}")
    try:
        command = parent.joinpath("cmdline").read_bytes().split(b"\0")[0].decode()
        if "/" in command:  # as seen from where the parent stands: a build of an sdist runs in another folder
            command = str(parent.joinpath("cwd").readlink() / command)
    except OSError:
        return None
    found = shutil.which(command) if Path(command).name.startswith("python") else None
    return Path(found).absolute() if found else None


def _torch_of(python: Path, env: Mapping[str, str]) -> Path | None:
    clean = {k: v for k, v in env.items() if k not in ("PYTHONPATH", "PYTHONNOUSERSITE", "PYTHONHOME")}
    found = _output([str(python), "-c", _FIND_TORCH], clean)
    return Path(found) if found else None


def _torch_version(path: Path) -> str:
    try:
        text = (path / "version.py").read_text()
    except OSError:
        text = ""
    match = re.search(r"""^__version__\s*=\s*['"]([^'"]+)""", text, re.MULTILINE)
    if match is None:
        raise BuildError(f"torch: expected a version in {path / 'version.py'}, got none.")
    return match.group(1)


# ---- cmake, ninja, pybind11 -----------------------------------------------------------------------------------------


def find_cmake() -> str | None:
    """A cmake that runs and is new enough."""
    return _working_tool("cmake", CMAKE_FLOOR)


def find_ninja() -> str | None:
    """A ninja that runs."""
    return _working_tool("ninja", (1, 8))


def has_pybind11() -> bool:
    """Whether this process can import pybind11: the machine's own does not count within pip's build environment."""
    return importlib.util.find_spec("pybind11") is not None


def missing_tools(plan: NativePlan) -> list[str]:
    """The requirements that a build environment must add to what the machine has."""

    def at_least(name: str, floor: tuple[int, ...]) -> str:
        return f"{name}>={'.'.join(map(str, floor))}"

    missing = [] if find_cmake() else [at_least("cmake", CMAKE_FLOOR)]
    missing += [] if find_ninja() else ["ninja"]
    return missing + ([at_least("pybind11", PYBIND11_FLOOR)] if plan.numpy and not has_pybind11() else [])


def _working_tool(name: str, floor: tuple[int, ...]) -> str | None:
    """The first `name` on PATH that answers --version: some are scripts of an environment that is hidden in here."""
    for folder in os.get_exec_path():
        tool = shutil.which(name, path=folder)
        if tool and _numbers(_output([tool, "--version"])) >= floor:
            return tool
    return None


# ---- CUDA -----------------------------------------------------------------------------------------------------------


def cuda_archs(env: Mapping[str, str] = os.environ) -> tuple[str, ...]:
    """The architectures to compile for, as ("80", "90a"); empty for a build without CUDA.

    `auto` takes CUDA only when nvcc and a GPU are there, or when DHSA_CUDA_ARCHS asks for it; `cuda` insists.
    """
    choice = requested_build(env)
    listed = _listed_archs(env.get("DHSA_CUDA_ARCHS", ""))
    if choice in ("cpu", "none"):
        if listed:
            raise BuildError(f"DHSA_CUDA_ARCHS: expected none with DHSA_BUILD={choice}, got {';'.join(listed)}.")
        return ()
    asked = choice == "cuda" or bool(listed)
    if find_nvcc(env) is None:
        if asked:
            why = "DHSA_BUILD=cuda" if choice == "cuda" else "DHSA_CUDA_ARCHS"
            raise BuildError(
                f"{why} asks for CUDA, but there is no nvcc (looked in CUDA_HOME, CUDA_PATH, PATH and "
                f"{DEFAULT_CUDA}); install the CUDA toolkit, or set DHSA_BUILD=cpu."
            )
        return ()
    archs = listed or gpu_archs(env)
    if asked and not archs:
        raise BuildError(
            "DHSA_BUILD=cuda found no GPU whose architecture it could take; name some in DHSA_CUDA_ARCHS, such as "
            "'80;87;90a'."
        )
    return archs


def _listed_archs(text: str) -> tuple[str, ...]:
    archs = tuple(dict.fromkeys(a for a in re.split(r"[;,\s]+", text.replace(".", "")) if a))
    for arch in archs:
        if not re.fullmatch(r"[1-9]\d{1,2}[af]?", arch):
            raise BuildError(f"DHSA_CUDA_ARCHS: expected a list such as '80;87;90a', got {text!r}.")
    return archs


def find_nvcc(env: Mapping[str, str] = os.environ) -> Path | None:
    """The CUDA compiler: of CUDA_HOME or CUDA_PATH, else on PATH, else of /usr/local/cuda."""
    folders = [str(Path(env[v]) / "bin") for v in ("CUDA_HOME", "CUDA_PATH") if env.get(v)]
    folders += [*os.get_exec_path(dict(env)), str(DEFAULT_CUDA / "bin")]
    found = shutil.which("nvcc", path=os.pathsep.join(folders))
    return Path(found) if found else None


def gpu_archs(env: Mapping[str, str] = os.environ) -> tuple[str, ...]:
    """The architectures of the GPUs in this machine."""
    query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    found = re.findall(r"^\s*(\d+)\.(\d)\s*$", _output(query, dict(env)), re.MULTILINE)
    archs = [major + minor for major, minor in found]
    if not archs:  # Jetson boards have a GPU that nvidia-smi cannot always ask
        archs = ["87"] if "nvidia,tegra234" in _device_tree() else []
    # wgmma and TMA, which the Hopper kernel uses, exist in the architecture-specific target alone.
    return tuple(dict.fromkeys("90a" if arch == "90" else arch for arch in archs))


def _device_tree() -> str:
    try:
        return Path("/proc/device-tree/compatible").read_text(errors="replace")
    except OSError:
        return ""


# ---- helpers --------------------------------------------------------------------------------------------------------


def _numbers(version: str) -> tuple[int, ...]:
    """The first dotted number in a text: "cmake version 3.25.1" gives (3, 25, 1); () where there is none."""
    match = re.search(r"\d+(\.\d+)+", version)
    return tuple(int(n) for n in match.group().split(".")) if match else ()


def _output(command: list[str], env: Mapping[str, str] | None = None) -> str:
    """What a command prints; empty when it is not there, fails or hangs."""
    try:
        done = subprocess.run(
            command, env=env, cwd=tempfile.gettempdir(), capture_output=True, text=True, timeout=60, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
