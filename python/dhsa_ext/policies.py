"""Policies: functions that choose the keys of each query block, all for one kernel, ops.sparse_attention.

    runs, num_runs = policy(q, k, config, scale=None, softcap=0.0)
    out = ops.sparse_attention(q, k, v, runs, num_runs, config.q_block, scale=..., softcap=...)

q is [B, H, Lq, D], k [B, Hkv, Lk, D], query i at position Lk - Lq + i. A policy reads of the DHSAConfig the budget, the
query block, the selection heads S, and what is always kept (sink, local, dense_tail); what it is named for (how chunks
are made and scored) is its own. runs is int32 [B, S or 1, nQ, R, 2], num_runs int32 [B, S or 1, nQ]; no list goes past
its block's last query, and sparse_attention masks each row at its own position.

A new policy is a few lines: make chunks and score them, and hand them to `select`; or mark the keys, and hand the marks
to `runs_of`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from . import ops, reference
from .backend import backend
from .config import PRESETS, DHSAConfig
from .selection import choose_keys, cut_chunks

Policy: TypeAlias = Callable[..., "tuple[Tensor, Tensor]"]
Chunks: TypeAlias = "tuple[Tensor, Tensor]"  # offsets int32 [B, C + 1], num_chunks int32 [B]


def attend(
    policy: Policy, q: Tensor, k: Tensor, v: Tensor, config: DHSAConfig, *,
    scale: float | None = None, softcap: float = 0.0, return_lse: bool = False,
) -> Any:  # fmt: skip
    """Attention over the keys that `policy` chooses: out [B, H, Lq, D], and with return_lse the lse [B, H, Lq]."""
    config = config.over(k.shape[2])
    runs, num_runs = policy(q, k, config, scale=scale, softcap=softcap)
    return ops.sparse_attention(
        q, k, v, runs, num_runs, config.q_block, scale=scale, softcap=softcap, return_lse=return_lse
    )


# ---- what policies are made of


def fixed_chunks(k: Tensor, size: int) -> Chunks:
    """Chunks of `size` keys each, the last one shorter."""
    batch, seqlen_k = k.shape[0], k.shape[2]
    edges = torch.arange(0, seqlen_k + size, size, dtype=torch.int32, device=k.device).clamp(max=seqlen_k)
    edges = edges if seqlen_k else edges[:1]
    return edges.expand(batch, -1).contiguous(), torch.full_like(edges[:1].expand(batch), len(edges) - 1)


def select(scores: Tensor, chunks: Chunks, q: Tensor, k: Tensor, config: DHSAConfig) -> tuple[Tensor, Tensor]:
    """The forced keys, then whole chunks by falling score [B, S, nQ, C] until the budget is full."""
    return ops.select_keys(
        scores, *chunks, q.shape[2], k.shape[2], config.q_block, config.budget,
        sink=min(config.sink, k.shape[2]), local=min(config.local, k.shape[2]), dense_tail=config.dense_tail,
    )  # fmt: skip


def runs_of(kept: Tensor) -> tuple[Tensor, Tensor]:
    """Marks [B, S, nQ, Lk] to runs and num_runs; as wide as the longest list, so it waits for the device."""
    steps = torch.diff(torch.nn.functional.pad(kept.to(torch.int8), (1, 1)))
    capacity = max(1, int((steps == 1).sum(-1).max())) if kept.numel() else 1
    runs, num_runs = reference._runs(kept.flatten(0, 2), capacity)
    return runs.unflatten(0, kept.shape[:3]), num_runs.unflatten(0, kept.shape[:3])


def block_ends(q: Tensor, k: Tensor, q_block: int) -> Tensor:
    """int64 [nQ]: one past the position of each block's last query."""
    seqlen_q, seqlen_k = q.shape[2], k.shape[2]
    ends = torch.arange(q_block, seqlen_q + q_block, q_block, device=q.device)
    return ends.clamp(max=seqlen_q) + seqlen_k - seqlen_q


def dense_blocks(q: Tensor, config: DHSAConfig) -> Tensor:
    """Bool [nQ]: the blocks that hold one of the call's last `dense_tail` queries, and so keep every key."""
    ends = torch.arange(config.q_block, q.shape[2] + config.q_block, config.q_block, device=q.device)
    return ends.clamp(max=q.shape[2]) > q.shape[2] - config.dense_tail


# ---- choices by content, at a fixed budget


def paper(
    q: Tensor, k: Tensor, config: DHSAConfig, scale: float | None = None, softcap: float = 0.0,
    chunks: Chunks | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The paper's choice: chunks cut where keys shift, sqrt(n)-pooled, scored by the pooled query.

    Given chunks replace the training-free ones: a learned predictor's, another layer's, or fixed ones.
    """
    config = replace(config, score="dot", pool="sqrt", refine=0)
    chosen = choose_keys(q, k, config, scale=scale, softcap=softcap, chunks=chunks)
    return chosen.runs, chosen.num_runs


def accurate(
    q: Tensor, k: Tensor, config: DHSAConfig, scale: float | None = None, softcap: float = 0.0,
    chunks: Chunks | None = None, refine: int = 0, q_stride: int = 0, rows: str = "",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Chunks by the attention mass they would get, then `refine` times the budget's tokens one by one.

    refine 0 is the config's own, and where that has none, as in the paper preset, the accurate preset's; q_stride 0 and
    rows "" are the config's own.
    """
    known: dict[str, Any] = {
        "refine": refine or config.refine or PRESETS["accurate"]["refine"],
        "q_stride": q_stride or config.q_stride,
        "rows": rows or config.rows,
    }
    config = replace(config, score="mass", pool="mean", **known)
    chosen = choose_keys(q, k, config, scale=scale, softcap=softcap, chunks=chunks)
    return chosen.runs, chosen.num_runs


def block_sparse(
    q: Tensor, k: Tensor, config: DHSAConfig, scale: float | None = None, softcap: float = 0.0, block: int = 64
) -> tuple[Tensor, Tensor]:
    """Fixed blocks of keys, each scored by the product of the block's mean and the query block's mean."""
    config, heads = config.over(k.shape[2]), config.heads(q.shape[1], k.shape[1])
    chunks = fixed_chunks(k, block)
    k_mean = ops.chunk_pool(k, *chunks, heads, "mean")
    scores = ops.chunk_scores(ops.query_pool(q, heads, config.q_block, "mean"), k_mean)
    return select(scores, chunks, q, k, config)


# ---- choices by position


def dense(
    q: Tensor, k: Tensor, config: DHSAConfig, scale: float | None = None, softcap: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Every key, whatever the budget."""
    return _first_and_nearest(q, k, config, 0, k.shape[2])


def sliding_window(
    q: Tensor, k: Tensor, config: DHSAConfig, scale: float | None = None, softcap: float = 0.0
) -> tuple[Tensor, Tensor]:
    """The first `sink` keys, and the nearest ones for the rest of the budget."""
    return _first_and_nearest(q, k, config, config.sink, config.budget)


def a_shape(
    q: Tensor, k: Tensor, config: DHSAConfig, scale: float | None = None, softcap: float = 0.0, first: float = 0.5
) -> tuple[Tensor, Tensor]:
    """The share `first` of the budget at the beginning of the text, the rest nearest to the query block.

    The nearest keys never fall below the forced ones, local + q_block - 1.
    """
    config = config.over(k.shape[2])
    most = config.budget - config.local - config.q_block + 1
    return _first_and_nearest(q, k, config, min(int(first * config.budget), most), config.budget)


def _first_and_nearest(q: Tensor, k: Tensor, config: DHSAConfig, first: int, budget: int) -> tuple[Tensor, Tensor]:
    """Keys [0, first) and the budget - first keys up to each block's end; one list for all heads."""
    config = config.over(k.shape[2])
    end = block_ends(q, k, config.q_block)
    begin = (end - (budget - first)).clamp(min=0)
    one = (begin <= first) | dense_blocks(q, config)  # the two runs touch: merged
    zero = torch.zeros_like(end)
    runs = torch.stack(
        [zero, torch.where(one, end, first), torch.where(one, zero, begin), torch.where(one, zero, end)], -1
    ).clamp(min=0)
    num_runs = torch.where(end <= 0, 0, torch.where(one, 1, 2))
    shape = (q.shape[0], 1, len(end))
    return runs.int().view(-1, 2, 2).expand(*shape, 2, 2).contiguous(), num_runs.int().expand(shape).contiguous()


# ---- for study


def oracle(
    q: Tensor, k: Tensor, config: DHSAConfig, scale: float | None = None, softcap: float = 0.0
) -> tuple[Tensor, Tensor]:
    """The keys with the largest true attention, averaged over the block's rows and the heads that share a list.

    What no router can beat on average. It computes every attention weight: quadratic in the length, slower than dense
    attention, for study only.
    """
    backend.say_once(
        "dhsa_ext.policies.oracle computes every attention weight: quadratic in the length, slower than dense "
        "attention, for study only"
    )
    heads, seqlen_k = config.heads(q.shape[1], k.shape[1]), k.shape[2]
    config = config.over(seqlen_k)
    ends, whole = block_ends(q, k, config.q_block).tolist(), dense_blocks(q, config)
    kept = torch.zeros(q.shape[0], heads, len(ends), seqlen_k, dtype=torch.bool, device=q.device)
    for j, end in enumerate(ends):
        if end <= 0:
            continue
        rows = q[:, :, j * config.q_block : (j + 1) * config.q_block]
        begin = end - rows.shape[2]
        mass = attention_weights(rows, k[:, :, :end], scale, softcap, begin).mean(2)
        mass = mass.unflatten(1, (heads, -1)).mean(2)  # [B, S, end]
        forced = _forced(end, begin, config, q.device)
        best = mass.masked_fill(forced, torch.inf).topk(min(config.budget, end), dim=-1).indices
        kept[:, :, j, :end].scatter_(-1, best, torch.ones_like(best, dtype=torch.bool))
        kept[:, :, j, :end] |= whole[j]
    return runs_of(kept)


def attention_weights(rows: Tensor, k: Tensor, scale: float | None, softcap: float, begin: int) -> Tensor:
    """Causal attention weights float32 [B, H, n, Lk] of the rows at positions begin, begin + 1, ..."""
    position = torch.arange(begin, begin + rows.shape[2], device=k.device)
    future = torch.arange(k.shape[2], device=k.device) > position[:, None]
    return _logits(rows, k, scale, softcap).masked_fill(future, -torch.inf).softmax(-1).nan_to_num(0.0)


def _logits(rows: Tensor, k: Tensor, scale: float | None, softcap: float) -> Tensor:
    """Rows [..., H, n, D] and keys [..., h, m, D], h a divisor of H, to attention logits float32 [..., H, n, m]."""
    grouped = rows.float().unflatten(-3, (k.shape[-3], -1)) @ k.float().unsqueeze(-3).mT
    logits = grouped.flatten(-4, -3) * (rows.shape[-1] ** -0.5 if scale is None else scale)
    return softcap * torch.tanh(logits / softcap) if softcap > 0 else logits


def _forced(end: int, begin: int, config: DHSAConfig, device: torch.device) -> Tensor:
    """Bool [end]: the sinks and the local keys of a block of queries begin ... end - 1."""
    keys = torch.arange(end, device=device)
    return (keys < config.sink) | (keys > begin - config.local)


# ---- a budget that follows the content


def coverage(
    q: Tensor, k: Tensor, config: DHSAConfig, scale: float | None = None, softcap: float = 0.0,
    share: float = 0.9, refine: int = 4, chunks: Chunks | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As many keys as it takes to reach `share` of the estimated attention mass; config.budget is the cap.

    The first `refine` times the cap's keys, by chunk_mass, are weighed one by one for the config's rows; what the
    other keys weigh is taken from their chunks' means, which hide sharp keys: the true share is a little lower.
    """
    if not 0 < share <= 1:
        raise ValueError(f"dhsa_ext.policies.coverage: share: expected more than 0 and at most 1, got {share}")
    heads, seqlen_q, seqlen_k = config.heads(q.shape[1], k.shape[1]), q.shape[2], k.shape[2]
    config = config.over(seqlen_k)
    chunks = cut_chunks(k, config) if chunks is None else chunks
    k_mean = ops.chunk_pool(k, *chunks, heads, "mean")
    scores, row_lse = ops.chunk_mass(
        q, k_mean, *chunks, seqlen_k, config.q_block, config.q_stride, rows=config.rows, scale=scale, softcap=softcap
    )
    wide, num_wide = select(scores, chunks, q, k, replace(config, budget=refine * config.budget))
    ends, whole = block_ends(q, k, config.q_block).tolist(), dense_blocks(q, config).tolist()
    kept = torch.zeros(q.shape[0], heads, len(ends), seqlen_k, dtype=torch.bool, device=q.device)
    for b in range(q.shape[0]):
        one = (chunks[0][b : b + 1], chunks[1][b : b + 1])
        for j, end in enumerate(ends):
            begin = end - min(config.q_block, seqlen_q - j * config.q_block)
            if end <= 0 or whole[j]:
                kept[b, :, j, : max(end, 0)] = True
                continue
            positions = torch.arange(end - 1, max(begin, 0) - 1, -config.q_stride, device=q.device)
            block = begin - (seqlen_k - seqlen_q), end - 1 - (seqlen_k - seqlen_q)  # its first and last query
            rows = reference.block_rows(q[b], *block, config.q_stride, config.rows)[:, : len(positions)]
            rows = rows.float().unflatten(0, (heads, -1))
            lse = row_lse[b, :, j, : len(positions)].unflatten(0, (heads, -1))
            block_scores = scores[b : b + 1, :, j : j + 1].contiguous()
            by_chunk = ops.token_scores(block_scores, *one, seqlen_k)[0, :, 0, :end].clamp(min=0)
            forced = _forced(end, begin, config, q.device)
            for s in range(heads):
                keys = _tokens(wide[b, s, j, : num_wide[b, s, j]], end)
                unseen = (by_chunk[s].sum() - by_chunk[s, keys].sum()).clamp(min=0)
                mass = _mass(rows[s], _keys_of(k[b], keys, s, heads), keys, positions, lse[s], unseen, scale, softcap)
                order = torch.where(forced[keys], torch.inf, mass).argsort(descending=True, stable=True)
                before = mass[order].cumsum(0) - mass[order]
                count = max(int((before < share).sum()), int(forced.sum()))
                kept[b, s, j, keys[order[: min(count, config.budget)]]] = True
    return runs_of(kept)


def _keys_of(k: Tensor, keys: Tensor, s: int, heads: int) -> Tensor:
    """K [Hkv, Lk, D] at `keys`, float32 [1 or Hkv / S, n, D]: for the query heads that read list s."""
    kv_heads = k.shape[0]
    held = slice(s * kv_heads // heads, max(s * kv_heads // heads + 1, (s + 1) * kv_heads // heads))
    return k[held][:, keys].float()


def _mass(
    rows: Tensor, k: Tensor, keys: Tensor, positions: Tensor, row_lse: Tensor, unseen: Tensor,
    scale: float | None, softcap: float,
) -> Tensor:  # fmt: skip
    """The attention mass [m] of the keys k [h, m, D], averaged over rows [H, n, D], h a divisor of H.

    `unseen` is the share of exp(row_lse) that belongs to keys not given.
    """
    logits = _logits(rows, k, scale, softcap).masked_fill(keys > positions[:, None], -torch.inf)
    total = torch.logaddexp(logits.logsumexp(-1), row_lse + unseen.log())
    return (logits - total[..., None]).exp().mean((0, 1))


def _tokens(runs: Tensor, end: int) -> Tensor:
    """The keys below `end` of one block's runs, rising."""
    marks = torch.zeros(end + 1, dtype=torch.int32, device=runs.device)
    edges = runs.long().clamp(max=end)
    marks.index_add_(0, edges[:, 0], torch.ones_like(edges[:, 0], dtype=torch.int32))
    marks.index_add_(0, edges[:, 1], -torch.ones_like(edges[:, 1], dtype=torch.int32))
    return marks.cumsum(0)[:end].nonzero()[:, 0]


POLICIES: dict[str, Policy] = {
    "dense": dense,
    "paper": paper,
    "accurate": accurate,
    "block_sparse": block_sparse,
    "sliding_window": sliding_window,
    "a_shape": a_shape,
    "coverage": coverage,
    "oracle": oracle,
}
