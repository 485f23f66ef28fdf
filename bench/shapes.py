"""The shapes that are timed, each with its label and its reason.

A shape says what a call computes and nothing about who computes it. Lengths, budgets and windows count tokens. The
paper preset is q_block 128, one selection for all heads, sink 128, local 128, about 16 tokens a chunk.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Shape:
    """One causal prefill (or, with seqlen_q 1, decode step): sizes, budget and the way keys are chosen."""

    label: str
    why: str
    seqlen_k: int
    budget: int
    seqlen_q: int = 0  # 0: seqlen_k
    batch: int = 1
    heads: int = 32
    heads_kv: int = 8
    head_dim: int = 128
    q_block: int = 128
    select_heads: int = 1
    sink: int = 128
    local: int = 128
    dense_tail: int = 0
    softcap: float = 0.0
    nms_radius: int = 8
    chunk_size: int = 16  # at most seqlen_k // chunk_size chunks
    refine: int = 0  # 0: the paper's choice; more: the accurate mode, chunk_mass and then refine_keys
    q_stride: int = 8  # of the accurate mode, and the next
    rows: str = "mean"

    @property
    def queries(self) -> int:
        return self.seqlen_q or self.seqlen_k

    @property
    def max_chunks(self) -> int:
        return max(1, self.seqlen_k // self.chunk_size)

    def prefill_options(self) -> dict[str, Any]:
        """The keyword arguments of dhsa_ext.sparse_prefill."""
        return dict(
            max_chunks=self.max_chunks, q_block=self.q_block, select_heads=self.select_heads, sink=self.sink,
            local=self.local, dense_tail=self.dense_tail, nms_radius=self.nms_radius, softcap=self.softcap,
            score="mass" if self.refine else "dot", refine=self.refine, q_stride=self.q_stride, rows=self.rows,
        )  # fmt: skip

    def but(self, **changes: Any) -> Shape:
        return replace(self, **changes)

    def __str__(self) -> str:
        queries = "" if self.queries == self.seqlen_k else f"{self.queries} queries of "
        return (
            f"{self.label}: {queries}{self.seqlen_k} keys, budget {self.budget}, heads {self.heads}/{self.heads_kv}, "
            f"head_dim {self.head_dim}, q_block {self.q_block}, S {self.select_heads}"
        )


def paper_twin(shape: Shape) -> Shape:
    """The paper preset with twice the budget of an accurate shape, which it needs for about the same recall."""
    return shape.but(
        budget=2 * shape.budget, q_block=128, select_heads=1, sink=128, local=128, dense_tail=64, refine=0
    )  # fmt: skip


# --- one GPU: Llama-3.1-8B's heads unless said -----------------------------------------------------------------------

KV_LISTS: dict[str, Any] = dict(select_heads=8, sink=16, local=64)  # the accurate preset's lists and forced keys

GPU = {
    shape.label: shape
    for shape in (
        Shape("128k", "the headline: the longest context in common use, 1.6 % of its keys", 131072, 2048),
        Shape("32k", "a long document; the router's fixed costs begin to show", 32768, 2048),
        Shape("8k", "the shortest length with something to leave out at this budget: launches dominate", 8192, 2048),
        Shape(
            "128k-kv64", "one list per KV head and small query blocks: better choice of keys, 16 times the lists",
            131072, 2048, q_block=64, **KV_LISTS,
        ),
        Shape("32k-d256", "Gemma 2's head and cap", 32768, 2048, heads=8, heads_kv=4, head_dim=256, softcap=50.0),
        Shape("32k-d64", "small heads: half the work for each exponential", 32768, 2048, head_dim=64),
        Shape(
            "128k-accurate", "the accurate preset: what a better choice of keys costs",
            131072, 1024, refine=8, q_stride=64, **KV_LISTS,
        ),
        Shape("32k-accurate", "the same on a long document", 32768, 1024, refine=8, q_stride=64, **KV_LISTS),
        Shape(
            "128k-accurate-q64", "its small query blocks at such lengths: twice the lists, half the candidates each",
            131072, 1024, q_block=64, refine=4, q_stride=32, **KV_LISTS,
        ),
        Shape(
            "32k-accurate-q64", "the same on a long document",
            32768, 1024, q_block=64, refine=4, q_stride=32, **KV_LISTS,
        ),
        Shape(
            "8k-accurate", "and on a short prompt, where the preset has small blocks and many rows",
            8192, 1024, q_block=64, refine=8, **KV_LISTS,
        ),
        Shape("32k-full", "every key kept: dense attention's answer, so a dense kernel is the bar", 32768, 32768),
    )
}  # fmt: skip
GPU_DECODE = {
    "1": Shape("decode", "one query over a 128K cache, one list", 131072, 2048, seqlen_q=1, q_block=1),
    "kv": Shape(
        "decode-kv", "the same, one list per KV head", 131072, 2048, seqlen_q=1, q_block=1, select_heads=8,
    ),
}  # fmt: skip
GPU_LENGTHS = (4096, 8192, 16384, 32768, 65536, 131072)  # at budget 2048
GPU_BUDGETS = (1024, 2048, 4096, 8192, 16384, 32768)  # at 32K; below 383 the preset's forced keys do not fit

# --- a CPU: 8 heads of 128, no GQA, so that torch's SDPA needs no expanded keys either -------------------------------

CPU_HEADS: dict[str, Any] = dict(heads=8, heads_kv=8, head_dim=128)
CPU = {
    shape.label: shape
    for shape in (
        Shape(
            "gathered", "one query block on its kept keys: the attention tile by itself, 1 thread", 4096, 1024,
            seqlen_q=64, q_block=64, **CPU_HEADS,
        ),
        Shape(
            "decode", "one new token: every kept key is read once, 1 thread", 4096, 1024,
            seqlen_q=1, q_block=1, **CPU_HEADS,
        ),
        Shape("prefill-2k", "short: nearly half of the causal area is kept", 2048, 512, **CPU_HEADS),
        Shape("prefill-8k", "the whole on a prompt that a small board can hold", 8192, 1024, **CPU_HEADS),
        Shape("prefill-32k", "where dense attention takes tens of seconds", 32768, 2048, **CPU_HEADS),
    )
}  # fmt: skip
CPU_LENGTHS = (1024, 2048, 4096, 8192)  # at budget 512
CPU_BUDGETS = (512, 1024, 2048, 4096)  # at 4K

# --- any machine: the code path in a second --------------------------------------------------------------------------

TINY = Shape(
    "tiny", "every contestant in a moment, to try the benches themselves", 640, 256,
    heads=4, heads_kv=2, head_dim=64, q_block=32, sink=16, local=32,
)  # fmt: skip
