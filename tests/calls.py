"""One valid call of every op: what opcheck, torch.compile and the table of errors start from."""

from __future__ import annotations

import torch
from cases import chunks, heads_last, rand

OPS = (
    "boundary_scores",
    "boundary_logits",
    "select_boundaries",
    "chunk_pool",
    "query_pool",
    "chunk_scores",
    "token_scores",
    "select_keys",
    "chunk_mass",
    "refine_keys",
    "sparse_attention",
    "sparse_prefill",
    "sparse_decode",
)


def valid_call(op, dtype=torch.float32, q_len=70, k_len=90, heads=4, kv_heads=2, lists=2, dim=64, q_block=16, seed=0):
    """{argument: value} of a small call, every argument that a test might change named."""
    rng = torch.Generator().manual_seed(seed)
    if op == "sparse_decode":
        q_len = min(q_len, 3)
    q = heads_last(rng, 2, heads, q_len, dim, dtype)
    k, v = (heads_last(rng, 2, kv_heads, k_len, dim, dtype) for _ in range(2))
    offsets, num_chunks = chunks(rng, 2, k_len, 7)
    blocks = -(-q_len // q_block)
    scores = rand(rng, 2, lists, blocks, 7)
    chunk = dict(offsets=offsets, num_chunks=num_chunks)
    choice = dict(sink=2, local=5)
    if op == "boundary_logits":
        width = kv_heads * dim
        shapes = dict(
            in_proj_weight=(3 * width, width), in_proj_bias=(3 * width,), out_proj_weight=(width, width),
            out_proj_bias=(width,), norm_weight=(width,), norm_bias=(width,), gate_weight=(1, width), gate_bias=(1,),
            fc1_weight=(256, 4 * width + 1), fc1_bias=(256,), fc2_weight=(1, 256), fc2_bias=(1,),
        )  # fmt: skip
        weights = {name: rand(rng, *shape) * 0.1 for name, shape in shapes.items()}
        return dict(k=k, **weights, num_heads=8, window=3)
    return {
        "boundary_scores": dict(k=k, window=3),
        "select_boundaries": dict(scores=rand(rng, 2, k_len), max_chunks=6, nms_radius=3),
        "chunk_pool": dict(x=k, **chunk, heads=lists, scale="sqrt"),
        "query_pool": dict(q=q, heads=lists, q_block=q_block, scale="mean"),
        "chunk_scores": dict(q_pooled=rand(rng, 2, lists, blocks, dim), k_pooled=rand(rng, 2, lists, 7, dim)),
        "token_scores": dict(chunk_scores=scores, **chunk, k_len=k_len),
        "select_keys": dict(
            chunk_scores=scores, **chunk, q_len=q_len, k_len=k_len, q_block=q_block, budget=40, **choice
        ),
        "chunk_mass": dict(
            q=q, k_mean=rand(rng, 2, lists, 7, dim), **chunk, k_len=k_len, q_block=q_block, q_stride=4
        ),
        "refine_keys": dict(
            q=q, k=k, chunk_scores=scores, row_lse=rand(rng, 2, heads, blocks, -(-q_block // 4)) + 3, **chunk,
            q_block=q_block, budget=40, refine=2, **choice, q_stride=4,
        ),
        "sparse_attention": dict(
            q=q, k=k, v=v, runs=torch.tensor([[0, 3], [9, 20]]).int().expand(2, lists, blocks, 2, 2).contiguous(),
            num_runs=torch.full((2, lists, blocks), 2, dtype=torch.int32), q_block=q_block,
        ),
        "sparse_prefill": dict(q=q, k=k, v=v, budget=40, max_chunks=6, q_block=q_block, **choice, nms_radius=3),
        "sparse_decode": dict(
            q=q, k=k, v=v, k_pooled=rand(rng, 2, lists, 7, dim), **chunk, budget=40, **choice,
            cache_seqlens=torch.tensor([k_len, k_len // 2], dtype=torch.int32),
        ),
    }[op]  # fmt: skip


def split(op, call):
    """(args, kwargs): the schema's positional arguments up to the first one left out, the rest by name."""
    args, kwargs = [], dict(call)
    for argument in getattr(torch.ops.dhsa, op).default._schema.arguments:
        if argument.kwarg_only or argument.name not in kwargs:
            break
        args.append(kwargs.pop(argument.name))
    return tuple(args), kwargs
