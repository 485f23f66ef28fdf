"""Which code runs the ops, and why: the native library where it is installed, else the Python reference, said once.

`DHSA_BACKEND` is read at import: "auto" (the default) takes the native library when it was built, "native" fails
without it, "reference" runs the float64 reference.
"""

from __future__ import annotations

import ctypes
import os
import warnings
from pathlib import Path

import torch

LIBRARY = Path(__file__).with_name("_native.so")


class Backend:
    """The choice made at import. `name` is "native" or "reference", `reason` a sentence."""

    def __init__(self) -> None:
        wanted = os.environ.get("DHSA_BACKEND", "auto")
        if wanted not in ("auto", "native", "reference"):
            raise ValueError(f"DHSA_BACKEND: expected auto, native or reference, got {wanted!r}")
        self._said: set[str] = set()
        self._library: ctypes.CDLL | None = None
        if wanted == "reference":
            self.name, self.reason = "reference", "DHSA_BACKEND=reference"
        elif LIBRARY.exists():
            torch.ops.load_library(str(LIBRARY))
            self._library = ctypes.CDLL(str(LIBRARY))
            self._library.dhsa_info.restype = ctypes.c_char_p
            self.info("isa_active")  # fails here, not in the middle of a run, when DHSA_FORCE_ISA cannot be had
            self.name, self.reason = "native", "the native library is installed"
        elif wanted == "native":
            raise ImportError(f"DHSA_BACKEND=native, but the native library {LIBRARY.name} was not built")
        else:
            self.name, self.reason = "reference", "the native library was not built"

    def info(self, what: str) -> str:
        """A fact of the native library (isas_compiled, isa_active, cache_sizes, cuda_archs, ...), or ""."""
        if self._library is None:
            return ""
        text = self._library.dhsa_info(what.encode()).decode()
        if text.startswith("error: "):
            raise RuntimeError(text.removeprefix("error: "))
        return text

    @property
    def has_cuda(self) -> bool:
        return self.info("cuda_archs") != ""

    def say_once(self, sentence: str) -> None:
        if sentence not in self._said:
            self._said.add(sentence)
            warnings.warn(sentence, RuntimeWarning, stacklevel=3)


backend = Backend()
