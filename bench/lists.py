"""Run lists to time attention with, and the work that a list asks for.

Lists are int32 [B, S, nQ, R, 2] runs and [B, S, nQ] counts as dhsa_ext.sparse_attention takes them. Three kinds, all
of `budget` keys for each query block:

    A  chosen by the ops as sparse_prefill chooses: chunks of about 16 tokens (accurate mode: single tokens)
    B  128-key aligned blocks: the first, the diagonal one and random others, what block-sparse kernels are given
    C  single keys: random keys with a gap after each, so that no two make a run

B is for a whole prefill with a q_block that divides 128.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import dhsa_ext
from shapes import Shape

Lists = tuple[Tensor, Tensor]
BLOCK = 128  # keys of a block of lists B


def block_ends(shape: Shape) -> list[int]:
    """One past the position of each query block's last query."""
    first = shape.seqlen_k - shape.queries
    return [first + min(b + shape.q_block, shape.queries) for b in range(0, shape.queries, shape.q_block)]


def chosen_lists(q: Tensor, k: Tensor, shape: Shape) -> Lists:
    """Lists A: stages 1 to 6, stage by stage, or the accurate mode's."""
    chunks = dhsa_ext.select_boundaries(dhsa_ext.boundary_scores(k), shape.max_chunks, shape.nms_radius)
    forced: dict[str, Any] = dict(
        sink=min(shape.sink, k.shape[2]), local=min(shape.local, k.shape[2]), dense_tail=shape.dense_tail
    )
    if shape.refine:
        means = dhsa_ext.chunk_pool(k, *chunks, shape.select_heads, "mean")
        rows: dict[str, Any] = dict(q_stride=shape.q_stride, rows=shape.rows, softcap=shape.softcap)
        mass = dhsa_ext.chunk_mass(q, means, *chunks, k.shape[2], shape.q_block, **rows)
        return dhsa_ext.refine_keys(
            q, k, *mass, *chunks, shape.q_block, shape.budget, shape.refine, **forced, **rows
        )  # fmt: skip
    scores = dhsa_ext.chunk_scores(
        dhsa_ext.query_pool(q, shape.select_heads, shape.q_block), dhsa_ext.chunk_pool(k, *chunks, shape.select_heads)
    )
    return dhsa_ext.select_keys(
        scores, *chunks, q.shape[2], k.shape[2], shape.q_block, shape.budget, **forced, min_chunk=shape.nms_radius + 1
    )


def aligned_lists(shape: Shape, device: str = "cpu", seed: int = 0) -> Lists:
    """Lists B: the first 128-key block, those of the diagonal, and random ones between, budget / 128 in all."""
    counts, blocks = kept_blocks(shape, seed)
    rows = [
        torch.tensor(merged([(i * BLOCK, min((i + 1) * BLOCK, end)) for i in kept[:count].tolist()]))
        for kept, count, end in zip(blocks, counts, block_ends(shape), strict=True)
    ]
    return packed(rows, shape, device)


def kept_blocks(shape: Shape, seed: int = 0) -> tuple[list[int], Tensor]:
    """Lists B as block-sparse kernels take them: counts [nQ], and rising indices int32 [nQ, blocks of keys].

    The diagonal block of each query block comes last in its row; entries after the count are 0.
    """
    if shape.q_block > BLOCK or BLOCK % shape.q_block or shape.budget % BLOCK or shape.queries != shape.seqlen_k:
        raise ValueError(f"lists B: expected a whole prefill, q_block a divisor of {BLOCK}, got {shape}")
    generator = torch.Generator().manual_seed(seed)
    keep, counts = shape.budget // BLOCK, []
    indices = torch.zeros(len(block_ends(shape)), -(-shape.seqlen_k // BLOCK), dtype=torch.int32)
    for row, end in enumerate(block_ends(shape)):
        diagonal = (end - 1) // BLOCK
        if diagonal < keep:
            chosen = torch.arange(diagonal + 1)
        else:
            between = torch.randperm(diagonal - 1, generator=generator)[: keep - 2].sort().values + 1
            chosen = torch.cat([torch.tensor([0]), between, torch.tensor([diagonal])])[-keep:]
        indices[row, : len(chosen)] = chosen.int()
        counts.append(len(chosen))
    return counts, indices


def single_key_lists(shape: Shape, device: str = "cpu", seed: int = 0) -> Lists:
    """Lists C: min(budget, keys) keys spread at random, of which no two are neighbours where twice the budget fits.

    Key i of n is drawn from the i-th n-th of the keys before the block's end, short of that share's last key.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for end in block_ends(shape):
        keep = min(shape.budget, end)
        edges = torch.arange(keep + 1) * end // max(1, keep)
        room = (edges.diff() - 1).clamp(min=1)
        keys = edges[:-1] + (torch.rand(keep, generator=generator) * room).long()
        begins = keys[torch.cat([torch.ones(min(1, keep), dtype=torch.bool), keys.diff() > 1])]
        ends = keys[torch.cat([keys.diff() > 1, torch.ones(min(1, keep), dtype=torch.bool)])] + 1
        rows.append(torch.stack([begins, ends], -1))
    return packed(rows, shape, device)


def scattered_lists(shape: Shape, device: str = "cpu", run: int = 16, seed: int = 0) -> Lists:
    """The budget in random runs of `run` keys, all before the call's first query: no pair of them is masked."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in block_ends(shape):
        places = torch.randperm((shape.seqlen_k - shape.queries) // run, generator=generator)[: shape.budget // run]
        rows.append(torch.tensor(merged([(i * run, (i + 1) * run) for i in places.sort().values.tolist()])))
    return packed(rows, shape, device)


def whole_lists(shape: Shape, device: str = "cpu") -> Lists:
    """One run for each block, every key before its end: dense attention."""
    return packed([torch.tensor([[0, end]]) for end in block_ends(shape)], shape, device)


def merged(runs: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Rising runs with neighbours joined."""
    joined: list[tuple[int, int]] = []
    for start, end in runs:
        if joined and joined[-1][1] == start:
            joined[-1] = (joined[-1][0], end)
        else:
            joined.append((start, end))
    return joined


def packed(rows: list[Tensor], shape: Shape, device: str) -> Lists:
    """Runs [n, 2] of each block to one list for all heads: [B, 1, nQ, R, 2], R the longest."""
    runs = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).int()
    counts = torch.tensor([len(row) for row in rows], dtype=torch.int32)
    expand = (shape.batch, 1)
    return runs.expand(*expand, -1, -1, -1).contiguous().to(device), counts.expand(*expand, -1).contiguous().to(device)


# --- the work in a list ----------------------------------------------------------------------------------------------


def kept_pairs(lists: Lists, shape: Shape) -> float:
    """Query-key pairs that sparse_attention weighs for one head (the mean over lists): kept keys, not future ones."""
    runs, counts = (x.cpu().long() for x in lists)
    start, end = runs[..., 0], runs[..., 1]
    valid = torch.arange(runs.shape[-2]) < counts[..., None]
    first = torch.arange(0, shape.queries, shape.q_block)
    last = (first + shape.q_block).clamp(max=shape.queries) - 1
    offset = shape.seqlen_k - shape.queries
    p0, p1 = (x.view(-1, 1) + offset for x in (first, last))
    # Sum over p in p0 ... p1 of clamp(p + 1 - start, 0, end - start), in closed form: 0 until start, then 1, 2, ... .
    below = triangle(p1 + 1 - start) - triangle(p0 - start)
    beyond = triangle(p1 + 1 - end) - triangle(p0 - end)
    return int(((below - beyond) * valid).sum()) / max(1, counts.shape[0] * counts.shape[1])


def triangle(n: Tensor) -> Tensor:
    """1 + 2 + … + n, 0 for n <= 0."""
    n = n.clamp(min=0)
    return n * (n + 1) // 2


def causal_pairs(shape: Shape) -> int:
    """Query-key pairs of dense causal attention, for one head."""
    first = shape.seqlen_k - shape.queries
    return shape.queries * first + shape.queries * (shape.queries + 1) // 2


def budget_pairs(shape: Shape) -> int:
    """Σ_i min(keys at or before query i, budget): the work that a budget stands for, whatever the lists."""
    first = shape.seqlen_k - shape.queries
    growing = max(0, min(shape.budget - first, shape.queries))  # queries with fewer keys than the budget
    return growing * first + growing * (growing + 1) // 2 + (shape.queries - growing) * shape.budget


def attention_flops(pairs: float, shape: Shape) -> float:
    """Two products of head_dim multiply-adds for each pair and query head; `pairs` are those of one head."""
    return 4 * shape.head_dim * shape.heads * shape.batch * pairs


def density(shape: Shape, pairs: float) -> dict[str, float]:
    """The share of the keys that a block may keep, and of the causal area: the second is what time is saved on."""
    area = pairs / causal_pairs(shape)
    return {"density_keys": 1.0 if area == 1 else min(1.0, shape.budget / shape.seqlen_k), "density_area": area}


BINS = ((1, 1), (2, 7), (8, 15), (16, 31), (32, 63), (64, 127), (128, 1 << 62))


def histogram(lists: Lists) -> dict[str, float]:
    """Run lengths: the share of the keys in runs of each length, the mean run, and the runs of a list."""
    runs, counts = lists
    lengths = (runs[..., 1] - runs[..., 0])[torch.arange(runs.shape[-2], device=runs.device) < counts[..., None]]
    lengths = lengths.cpu().long()
    keys = max(1, int(lengths.sum()))
    shares = {
        (f"{low}" if low == high else f"{low}-{high}" if high < 1 << 62 else f"{low}+"): round(
            int(lengths[(lengths >= low) & (lengths <= high)].sum()) / keys, 4
        )
        for low, high in BINS
    }
    return {
        **shares,
        "mean": round(keys / max(1, len(lengths)), 2),
        "runs_per_list": round(len(lengths) / max(1, counts.numel()), 1),
    }


def show_histogram(name: str, lists: Lists) -> str:
    found = histogram(lists)
    bins = ", ".join(f"{length}: {share:.1%}" for length, share in list(found.items())[: len(BINS)] if share)
    return (
        f"lists {name}: {found['runs_per_list']:.0f} runs a list, mean {found['mean']:.1f}; keys by run length {bins}"
    )
