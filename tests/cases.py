"""The shapes that the stages are tried on, each with its reason, and the random tensors that go with them."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Case:
    """A whole call. S is the number of selection heads; Lk None means Lq."""

    name: str
    reason: str
    Lq: int = 200
    Lk: int | None = None
    B: int = 1
    H: int = 4
    Hkv: int = 2
    S: int = 2
    D: int = 64
    q_block: int = 32
    budget: int = 96
    sink: int = 4
    local: int = 16
    window: int | None = None
    softcap: float = 0.0
    dense_tail: int = 0
    scale: float | None = None

    @property
    def k_len(self) -> int:
        return self.Lq if self.Lk is None else self.Lk

    @property
    def blocks(self) -> int:
        return -(-self.Lq // self.q_block)

    @property
    def on_cuda(self) -> bool:
        return self.D in (64, 96, 128, 256) and self.q_block in (16, 32, 64, 128)


CASES = (
    Case("plain", "the middle of everything: GQA, a list per KV head, a ragged last block"),
    Case("one_list_for_all", "the paper's way: every head reads list 0", S=1),
    Case("list_per_query_head", "no sharing: the GQA group cannot be packed", S=4),
    Case("no_gqa", "H = Hkv: a group of one", H=2, Hkv=2),
    Case("one_kv_head", "MQA: Hkv = 1 = S", Hkv=1, S=1),
    Case("group_of_three", "a group that is no power of two", H=6, Hkv=2),
    Case("group_of_eight", "more heads in a group than a row tile of 16 queries holds", H=16, Hkv=2, q_block=16),
    Case("batch_of_three", "strides over the batch", B=3, Lq=100),
    Case("head_dim_96", "not a power of two", D=96),
    Case("head_dim_128", "the common one", D=128, q_block=64),
    Case("head_dim_256", "the largest: Gemma's", D=256, Lq=130, softcap=20.0),
    Case("head_dim_8", "the smallest: a single vector register", D=8),
    Case("head_dim_40", "no multiple of 16 or 32: vector tails", D=40),
    Case("q_block_1", "every query its own block", q_block=1, Lq=37),
    Case("q_block_7", "blocks that no tile size divides", q_block=7, Lq=60),
    Case("q_block_16", "the smallest tile", q_block=16),
    Case("q_block_128", "the paper's, longer than half the queries", q_block=128, budget=160),
    Case("block_longer_than_call", "min(q_block, Lq) is Lq", Lq=20, Lk=150, q_block=64),
    Case("chunked_prefill", "queries at the end of a longer cache", Lq=50, Lk=300),
    Case("one_query", "decode through prefill", Lq=1, Lk=300),
    Case("one_token", "length 1: no boundary, one key", Lq=1, budget=20),
    Case("more_queries_than_keys", "p1 < 0: rows without a key", Lq=80, Lk=30),
    Case("no_query", "Lq = 0", Lq=0, Lk=50),
    Case("no_key", "Lk = 0: every row is empty", Lq=5, Lk=0, q_block=16),
    Case("window", "a sliding window shorter than the budget's reach", window=70),
    Case("window_of_one", "a query sees itself only", window=1),
    Case("window_over_length", "a window that cuts nothing", window=10_000),
    Case("softcap", "logits squeezed by tanh", softcap=5.0),
    Case("softcap_saturated", "logits to three times the cap: tanh is flat", softcap=2.0, scale=0.75),
    Case("softcap_and_window", "both, as in Gemma 2", softcap=10.0, window=90),
    Case("large_scale", "a softmax that is almost one key", scale=4.0),
    Case("dense_tail", "the last queries keep every key", dense_tail=40),
    Case("dense_tail_window", "every key of the window", dense_tail=33, window=50),
    Case("budget_at_bound", "sink + local + q_block - 1: nothing to choose", budget=51),
    Case("budget_over_length", "everything is kept: dense attention", budget=400),
    Case("no_sink_no_local", "nothing is forced but the block's own reach", sink=0, local=0, budget=31),
)
BY_NAME = {case.name: case for case in CASES}


def params(select=lambda case: True):
    return [pytest.param(case, id=case.name) for case in CASES if select(case)]


def on(runner, case: Case) -> Case:
    """The case, or a skip where the runner's device does not take its shape."""
    if runner.name == "cuda" and not case.on_cuda:
        pytest.skip(f"CUDA takes head_dim 64, 96, 128, 256 and q_block 16, 32, 64, 128: not {case.D}, {case.q_block}")
    return case


def rand(rng, *shape, dtype=torch.float32):
    return torch.randn(*shape, generator=rng).to(dtype)


def heads_last(rng, batch, heads, length, dim, dtype=torch.float32):
    """[B, heads, L, D] over memory that is [B, L, heads, D], as a projection leaves it."""
    return rand(rng, batch, length, heads, dim, dtype=dtype).transpose(1, 2)


def qkv(case: Case, rng, dtype=torch.float32, make=None):
    make = make or (lambda rng, *shape, dtype: rand(rng, *shape, dtype=dtype))
    q = make(rng, case.B, case.H, case.Lq, case.D, dtype=dtype)
    k, v = (make(rng, case.B, case.Hkv, case.k_len, case.D, dtype=dtype) for _ in range(2))
    return q, k, v


def chunks(rng, batch, length, capacity=None, covered=None):
    """Random offsets int32 [B, C + 1] and num_chunks [B] over the first `covered` keys (all of them by default)."""
    covered = length if covered is None else covered
    capacity = max(1, length // 9) if capacity is None else capacity
    offsets = torch.full((batch, capacity + 1), covered, dtype=torch.int32)
    counts = torch.zeros(batch, dtype=torch.int32)
    for b in range(batch):
        if covered > 0:
            cuts = torch.randint(1, covered + 1, (capacity - 1,), generator=rng).unique()
            cuts = cuts[cuts < covered]
            counts[b] = len(cuts) + 1
            offsets[b, 0] = 0
            offsets[b, 1 : len(cuts) + 1] = cuts
    return offsets, counts


def runs(case: Case, rng, pieces=5):
    """Well-formed random run lists for a case: rising, disjoint, over every key, before and after the diagonal."""
    shape = (case.B, case.S, case.blocks)
    lists = torch.zeros(*shape, pieces, 2, dtype=torch.int32)
    counts = torch.zeros(shape, dtype=torch.int32)
    for b in range(case.B):
        for s in range(case.S):
            for block in range(case.blocks):
                edges = torch.randperm(case.k_len + 1, generator=rng)[: 2 * pieces].sort().values
                count = len(edges) // 2
                lists[b, s, block, :count] = edges[: 2 * count].view(-1, 2).int()
                counts[b, s, block] = count
    return lists, counts


def attention_options(case: Case) -> dict:
    return dict(scale=case.scale, softcap=case.softcap, window=case.window)


def choice_options(case: Case) -> dict:
    return dict(sink=case.sink, local=case.local, window=case.window, dense_tail=case.dense_tail)
