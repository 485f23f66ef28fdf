"""Dynamic Hierarchical Sparse Attention (arXiv 2510.24606): kernels, torch ops and a reference in plain torch.

Where torch is not installed this package holds the version, DHSAConfig and `dhsa_ext.numpy`, the ops on NumPy arrays.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

__version__ = "0.1.0"

from .config import DHSAConfig

if TYPE_CHECKING or find_spec("torch") is not None:
    from . import reference
    from .ops import (
        boundary_logits,
        boundary_scores,
        chunk_mass,
        chunk_pool,
        chunk_scores,
        query_pool,
        refine_keys,
        select_boundaries,
        select_keys,
        sparse_attention,
        sparse_decode,
        sparse_prefill,
        token_scores,
    )
else:

    def __getattr__(name: str) -> None:
        if name in __all__:
            raise ImportError(
                f"dhsa_ext.{name} needs torch >= 2.10, which is not installed here; the ops on NumPy arrays are in "
                "dhsa_ext.numpy"
            )
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "DHSAConfig",
    "boundary_logits",
    "boundary_scores",
    "chunk_mass",
    "chunk_pool",
    "chunk_scores",
    "query_pool",
    "reference",
    "refine_keys",
    "select_boundaries",
    "select_keys",
    "sparse_attention",
    "sparse_decode",
    "sparse_prefill",
    "token_scores",
]
