"""`python -m dhsa_ext.info`: what is installed, what the machine has, what runs."""

from __future__ import annotations

import platform

import torch

from . import __version__
from .backend import backend


def facts() -> dict[str, str]:
    """Version, build, ISAs, torch and CUDA, as the command prints them."""
    native = backend.name == "native"
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "dhsa_ext": __version__,
        "backend": f"{backend.name} ({backend.reason})",
        "machine": f"{platform.system()} {platform.machine()}",
        "ISAs compiled": backend.info("isas_compiled") if native else "none",
        "ISAs detected": backend.info("isas_detected") if native else "none",
        "ISA active": backend.info("isa_active") if native else "none",
        "CUDA archs": backend.info("cuda_archs") or "none (built without CUDA)",
        "CUDA kernels": (backend.info("cuda_kernel") if gpus else "") or "none",
        "torch": f"{torch.__version__} (CUDA {torch.version.cuda or 'none'})",
        "GPUs": ", ".join(gpus) or "none",
    }


def main() -> None:
    for name, value in facts().items():
        print(f"{name:14} {value}")


if __name__ == "__main__":
    main()
