"""The PEP 517 backend of dhsa_ext: setuptools', which also says what this machine lacks for the native library.

`pip install .` builds in an environment of its own, where torch is not installed. Listing torch as a build requirement
would download a second one, gigabytes of it, and perhaps another version. The library needs torch's headers and
libtorch_cpu.so alone, so it is built against the files of the torch that is already there (dhsa_machine.find_torch).
Where there is none, the NumPy module is all that is built.
"""

from __future__ import annotations

from typing import Any

import dhsa_machine
from setuptools import build_meta
from setuptools.build_meta import (
    build_editable,
    build_sdist,
    build_wheel,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]

Settings = dict[str, Any] | None


def get_requires_for_build_wheel(config_settings: Settings = None) -> list[str]:
    """What to install before a wheel is built; a build that cannot work stops here, before anything is downloaded."""
    return [*build_meta.get_requires_for_build_wheel(config_settings), *_native_requires()]


def get_requires_for_build_editable(config_settings: Settings = None) -> list[str]:
    """The same for `pip install -e .`."""
    return [*build_meta.get_requires_for_build_editable(config_settings), *_native_requires()]


def _native_requires() -> list[str]:
    if dhsa_machine.requested_build() == "none":
        return []
    return dhsa_machine.missing_tools(dhsa_machine.native_plan())
