"""Everybody else's attention, as calls to time: (q, k, v, ...) to a function without arguments that gives `out`.

A peer that is not installed, or that refuses a shape, raises when it is made or called; the timer turns that into one
line. All are causal, none gets expanded keys.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from answers import keys_of
from lists import BLOCK, Lists, block_ends, kept_blocks
from shapes import Shape

Call = Callable[[], Tensor]


def sdpa(q: Tensor, k: Tensor, v: Tensor, backend: str | None = None) -> Call:
    """Dense scaled_dot_product_attention: "flash" is FlashAttention-2 on a GPU, "cudnn" cuDNN's, None torch's choice.

    SDPA's own causal mask is for as many queries as keys; fewer get a mask that aligns their last with the last key.
    """
    queries, keys, grouped = q.shape[2], k.shape[2], q.shape[1] != k.shape[1]
    options: dict[str, Any] = dict(is_causal=True) if queries == keys else {}
    if 1 < queries < keys:
        options["attn_mask"] = torch.ones(queries, keys, dtype=torch.bool, device=q.device).tril(keys - queries)
    chosen = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION, None: None}[backend]

    def call() -> Tensor:
        with sdpa_kernel(chosen) if chosen is not None else nullcontext():
            return F.scaled_dot_product_attention(q, k, v, enable_gqa=grouped, **options)

    return call


def gathered_sdpa(q: Tensor, k: Tensor, v: Tensor, lists: Lists, shape: Shape) -> Call:
    """What a user would write: for each query block index_select the kept keys, then SDPA with a mask on them.

    Indices and masks are made beforehand and not timed; a block that sees all of its keys needs no mask.
    """
    grouped = q.shape[1] != k.shape[1]
    first = shape.seqlen_k - shape.queries
    steps = []
    for j, end in enumerate(block_ends(shape)):
        rows = slice(j * shape.q_block, min((j + 1) * shape.q_block, shape.queries))
        keys = keys_of(lists[0][0, 0, j], int(lists[1][0, 0, j]), end)
        position = torch.arange(first + rows.start, end, device=q.device)
        seen = keys <= position[:, None]
        steps.append((rows, keys, None if bool(seen.all()) else seen))

    def call() -> Tensor:
        out = torch.empty_like(q)
        for rows, keys, seen in steps:
            out[:, :, rows] = F.scaled_dot_product_attention(
                q[:, :, rows], k.index_select(2, keys), v.index_select(2, keys), attn_mask=seen, enable_gqa=grouped
            )
        return out

    return call


def _causal(_b: Tensor, _h: Tensor, row: Tensor, key: Tensor) -> Tensor:
    return row >= key


@cache
def _compiled_flex() -> Callable[..., Any]:
    from torch._inductor import config
    from torch.nn.attention.flex_attention import flex_attention

    config.compile_threads = 1  # a pool of compilers would work on beside what is timed
    return torch.compile(flex_attention, dynamic=False)


def flex_blocks(q: Tensor, k: Tensor, v: Tensor, shape: Shape) -> Call:
    """FlexAttention, compiled, on lists B: its BlockMask made from the block indices, never from an Lq x Lk mask."""
    counts, indices = kept_blocks(shape)
    kept = torch.tensor(counts, dtype=torch.int32, device=q.device)[None, None]
    full = indices.to(q.device)[None, None]
    diagonal = torch.zeros_like(full)
    # The diagonal block, last of its row, is masked; those before it are seen whole.
    diagonal[0, 0, :, 0] = full[0, 0].gather(1, kept[0, 0, :, None].long() - 1)[:, 0]
    return _flex(q, k, v, (torch.ones_like(kept), diagonal, kept - 1, full), (shape.q_block, BLOCK), _causal)


def flex_lists(q: Tensor, k: Tensor, v: Tensor, lists: Lists, shape: Shape, block: int = 128) -> Call:
    """FlexAttention, compiled, on any lists: key blocks that hold a kept key, each masked by a bitmap of kept keys."""
    blocks, seqlen = len(block_ends(shape)), shape.seqlen_k
    marks = torch.zeros(blocks, seqlen, dtype=torch.bool, device=q.device)
    for j, end in enumerate(block_ends(shape)):
        marks[j, keys_of(lists[0][0, 0, j], int(lists[1][0, 0, j]), end)] = True
    held = F.pad(marks, (0, -seqlen % block)).unflatten(1, (-1, block)).any(-1)
    order = held.int().argsort(dim=1, descending=True, stable=True).int()
    q_block, first = shape.q_block, seqlen - shape.queries

    def kept(_b: Tensor, _h: Tensor, row: Tensor, key: Tensor) -> Tensor:
        return marks[row // q_block, key] & (row + first >= key)

    return _flex(q, k, v, (held.sum(1).int()[None, None], order[None, None], None, None), (q_block, block), kept)


def _flex(
    q: Tensor, k: Tensor, v: Tensor, blocks: Sequence[Tensor | None], size: tuple[int, int], mask: Callable
) -> Call:
    """`blocks` are the counts and indices of masked blocks, then those of blocks that are seen whole, or None."""
    from torch.nn.attention.flex_attention import BlockMask

    counts, indices, full_counts, full_indices = blocks
    assert counts is not None and indices is not None
    block_mask = BlockMask.from_kv_blocks(
        counts, indices, full_counts, full_indices, BLOCK_SIZE=size, mask_mod=mask,
        seq_lengths=(q.shape[2], k.shape[2]),
    )  # fmt: skip
    flex, grouped = _compiled_flex(), q.shape[1] != k.shape[1]
    return lambda: flex(q, k, v, block_mask=block_mask, enable_gqa=grouped)


def flash_attention_4(q: Tensor, k: Tensor, v: Tensor, shape: Shape | None) -> Call:
    """flash-attn-4: block-sparse on lists B, dense where shape is None. Its layout, [B, L, H, D], copied beforehand."""
    from flash_attn.cute import flash_attn_func
    from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch

    options: dict[str, Any] = {}
    if shape is not None:
        counts, indices = kept_blocks(shape)
        kept = torch.tensor(counts, dtype=torch.int32, device=q.device).expand(shape.batch, shape.heads, -1)
        full = indices.to(q.device).expand(shape.batch, shape.heads, -1, -1)
        diagonal = torch.zeros_like(full)
        diagonal[..., 0] = full.gather(3, kept[..., None].long() - 1)[..., 0]
        options["block_sparse_tensors"] = BlockSparseTensorsTorch(
            mask_block_cnt=torch.ones_like(kept), mask_block_idx=diagonal,
            full_block_cnt=(kept - 1).contiguous(), full_block_idx=full.contiguous(), block_size=(BLOCK, BLOCK),
        )  # fmt: skip
    by_token = [x.transpose(1, 2).contiguous() for x in (q, k, v)]

    def call() -> Tensor:
        answer = flash_attn_func(*by_token, causal=True, **options)
        return (answer[0] if isinstance(answer, tuple) else answer).transpose(1, 2)

    return call
