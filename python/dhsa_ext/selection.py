"""Which keys a DHSAConfig keeps: stages 1 to 6 as one call, and how many query-key pairs that leaves."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from . import ops
from .config import DHSAConfig


@dataclass(frozen=True)
class Selection:
    """The chunks of a prompt and the keys that each query block keeps."""

    offsets: Tensor  # int32 [B, C + 1]
    num_chunks: Tensor  # int32 [B]
    runs: Tensor  # int32 [B, S, nQ, R, 2]
    num_runs: Tensor  # int32 [B, S, nQ]
    q_block: int
    seqlen_q: int
    seqlen_k: int

    def kept(self, row: int = 0) -> Tensor:
        """float32 [nQ, Lk]: the share of selection heads that keep each key."""
        heads, blocks = self.num_runs.shape[1:]
        edges = torch.zeros(heads, blocks, self.seqlen_k + 1, dtype=torch.int32)
        begins, ends = self.runs[row, ..., 0].cpu().long(), self.runs[row, ..., 1].cpu().long()  # unused ones are 0, 0
        ones = torch.ones_like(begins, dtype=torch.int32)
        edges.scatter_add_(2, begins, ones).scatter_add_(2, ends, -ones)
        return edges.cumsum(2)[..., :-1].float().mean(0)

    def keys_per_block(self) -> float:
        """The mean number of keys that a block keeps."""
        return (self.runs[..., 1] - self.runs[..., 0]).sum(-1).float().mean().item()

    def causal_share(self, row: int = 0) -> float:
        """Kept query-key pairs over all causal pairs, averaged over the selection heads."""
        kept = self.kept(row)
        seen = torch.nn.functional.pad(kept.cumsum(1, dtype=torch.float64), (1, 0))  # [nQ, Lk + 1]
        reach = torch.arange(self.seqlen_k - self.seqlen_q, self.seqlen_k) + 1  # keys at or before each query
        blocks = torch.arange(self.seqlen_q) // self.q_block
        return (seen[blocks, reach].sum() / reach.sum()).item()


def cut_chunks(k: Tensor, config: DHSAConfig) -> tuple[Tensor, Tensor]:
    """The training-free chunks of k [B, Hkv, Lk, D]: offsets int32 [B, C + 1], num_chunks int32 [B]."""
    scores = ops.boundary_scores(k, config.boundary_window)
    return ops.select_boundaries(
        scores, config.max_chunks(k.shape[2]), config.nms_radius, config.threshold, config.segment
    )


def choose_keys(
    q: Tensor, k: Tensor, config: DHSAConfig, *,
    scale: float | None = None, softcap: float = 0.0, chunks: tuple[Tensor, Tensor] | None = None,
) -> Selection:  # fmt: skip
    """The selection that sparse_prefill makes from q [B, H, Lq, D] and k [B, Hkv, Lk, D] under `config`.

    `chunks`, offsets and num_chunks, replace the training-free ones.
    """
    if config.strict:
        raise ValueError("dhsa_ext.choose_keys: strict: expected False (the stages score whole chunks), got True")
    seqlen_q, seqlen_k = q.shape[2], k.shape[2]
    config = config.over(seqlen_k)
    heads = config.heads(q.shape[1], k.shape[1])
    offsets, num_chunks = cut_chunks(k, config) if chunks is None else chunks
    row_lse = None
    if config.score == "mass":
        k_mean = ops.chunk_pool(k, offsets, num_chunks, heads, "mean")
        chunk_scores, row_lse = ops.chunk_mass(
            q, k_mean, offsets, num_chunks, seqlen_k, config.q_block, config.q_stride,
            rows=config.rows, scale=scale, softcap=softcap,
        )  # fmt: skip
    else:
        k_pooled = ops.chunk_pool(k, offsets, num_chunks, heads, config.pool)
        chunk_scores = ops.chunk_scores(ops.query_pool(q, heads, config.q_block), k_pooled)
    sink, local = min(config.sink, seqlen_k), min(config.local, seqlen_k)
    min_chunk = config.nms_radius + 1 if chunks is None and not config.segment else 1
    if config.refine:
        runs, num_runs = ops.refine_keys(
            q, k, chunk_scores, row_lse, offsets, num_chunks, config.q_block, config.budget, config.refine,
            q_stride=config.q_stride, rows=config.rows, sink=sink, local=local, dense_tail=config.dense_tail,
            scale=scale, softcap=softcap,
        )  # fmt: skip
    else:
        runs, num_runs = ops.select_keys(
            chunk_scores, offsets, num_chunks, seqlen_q, seqlen_k, config.q_block, config.budget,
            sink=sink, local=local, dense_tail=config.dense_tail, min_chunk=min_chunk,
        )  # fmt: skip
    return Selection(offsets, num_chunks, runs, num_runs, config.q_block, seqlen_q, seqlen_k)
