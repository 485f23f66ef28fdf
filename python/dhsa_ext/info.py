"""`python -m dhsa_ext.info`: what is installed, what the machine has, what runs."""

from __future__ import annotations

import platform
from importlib.util import find_spec

from . import __version__


def facts() -> dict[str, str]:
    """Version, build, ISAs, torch and CUDA, as the command prints them."""
    about = {"dhsa_ext": __version__, "machine": f"{platform.system()} {platform.machine()}"}
    if find_spec("torch") is None:
        return about | {"backend": "none (torch is not installed)"} | _numpy_facts()

    import torch

    from .backend import backend

    native = backend.name == "native"
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        **about,
        "backend": f"{backend.name} ({backend.reason})",
        "ISAs compiled": backend.info("isas_compiled") if native else "none",
        "ISAs detected": backend.info("isas_detected") if native else "none",
        "ISA active": backend.info("isa_active") if native else "none",
        "caches": backend.info("cache_sizes") if native else "none",
        "NumPy module": _numpy_facts()["NumPy module"],
        "CUDA archs": backend.info("cuda_archs") or "none (built without CUDA)",
        "CUDA kernels": (backend.info("cuda_kernel") if gpus else "") or "none",
        "torch": f"{torch.__version__} (CUDA {torch.version.cuda or 'none'})",
        "GPUs": ", ".join(gpus) or "none",
    }


def _numpy_facts() -> dict[str, str]:
    """The compiled module of dhsa_ext.numpy, which is there or not whatever becomes of torch."""
    try:
        from . import _numpy
    except ImportError:
        return {"NumPy module": "none (not built)"}
    return {
        "NumPy module": "built",
        "ISAs compiled": _numpy.isas_compiled(),
        "ISAs detected": _numpy.isas_detected(),
        "ISA active": _numpy.isa_active(),
        "caches": _numpy.cache_sizes(),
    }


def main() -> None:
    for name, value in facts().items():
        print(f"{name:14} {value}")


if __name__ == "__main__":
    main()
