"""Dynamic Hierarchical Sparse Attention (arXiv 2510.24606): kernels, torch ops and a reference in plain torch."""

from __future__ import annotations

__version__ = "0.1.0"

from . import reference
from .config import DHSAConfig
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
