"""Argument checks of the reference and of the fake kernels; csrc/core/check.cpp says the same for the native library.

Each check raises ValueError with one sentence, `dhsa::<op>: <argument>: expected <...>, got <...>`, before anything is
computed. Strides and alignment matter to the native kernels alone and are checked there.
"""

from __future__ import annotations

from typing import Any

import torch

Tensor = torch.Tensor
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
MAX_HEAD_DIM = 256
MAX_DECODE_QUERIES = 16


def _fail(op: str, argument: str, expected: str, got: Any) -> None:
    raise ValueError(f"dhsa::{op}: {argument}: expected {expected}, got {got}")


def _at_least(op: str, low: int, **values: Any) -> None:
    for argument, value in values.items():
        if value is not None and value < low:
            _fail(op, argument, f"an integer >= {low}", value)


def _shape(x: Tensor) -> str:
    return "[" + ", ".join(str(n) for n in x.shape) + "]"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _rank4(op: str, argument: str, x: Tensor) -> None:
    if x.dim() != 4:
        _fail(op, argument, "4 dimensions [batch, heads, length, head_dim]", f"{x.dim()}: {_shape(x)}")
    if x.dtype not in (*FLOATS, torch.float64):
        _fail(op, argument, "float32, float16 or bfloat16", _name(x.dtype))
    if x.shape[3] % 8 != 0 or x.shape[3] < 8 or x.shape[3] > MAX_HEAD_DIM:
        _fail(op, argument, f"a head_dim that is a multiple of 8 up to {MAX_HEAD_DIM}", x.shape[3])


def _like(op: str, argument: str, x: Tensor, shape: tuple, dtype: torch.dtype) -> None:
    same = x.dim() == len(shape) and all(want is None or got == want for got, want in zip(x.shape, shape, strict=True))
    if not same:
        wanted = "[" + ", ".join("any" if n is None else str(n) for n in shape) + "]"
        _fail(op, argument, f"shape {wanted}", _shape(x))
    if x.dtype != dtype:
        _fail(op, argument, _name(dtype), _name(x.dtype))


def _same_device(op: str, first: Tensor, **others: Tensor | None) -> None:
    for argument, x in others.items():
        if x is not None and x.device != first.device:
            _fail(op, argument, f"device {first.device}", x.device)


def _chunks(op: str, batch: int, offsets: Tensor, num_chunks: Tensor, columns: Any = None) -> None:
    _like(op, "offsets", offsets, (batch, None if columns is None else columns + 1), torch.int32)
    if offsets.shape[1] < 1:
        _fail(op, "offsets", "at least 1 column", offsets.shape[1])
    _like(op, "num_chunks", num_chunks, (batch,), torch.int32)


def _qkv(op: str, q: Tensor, k: Tensor, v: Tensor | None = None) -> None:
    _rank4(op, "q", q)
    _rank4(op, "k", k)
    if k.shape[0] != q.shape[0] or k.shape[3] != q.shape[3]:
        _fail(op, "k", f"batch {q.shape[0]} and head_dim {q.shape[3]} as q", _shape(k))
    if k.dtype != q.dtype:
        _fail(op, "k", f"{_name(q.dtype)} as q", _name(k.dtype))
    if k.shape[1] < 1 or q.shape[1] % k.shape[1] != 0:
        _fail(op, "k", "a number of heads that divides q's", f"{k.shape[1]} for {q.shape[1]} query heads")
    if v is not None:
        _like(op, "v", v, tuple(k.shape), k.dtype)
    _same_device(op, q, k=k, v=v)


def _lists(op: str, argument: str, lists: Any, q_heads: Any, kv_heads: Any) -> None:
    if lists != 1 and lists != kv_heads and lists != q_heads:
        _fail(op, argument, f"1, {kv_heads} (KV heads) or {q_heads} (query heads) selection heads", lists)


def _choice(op, q_len, q_block, budget, sink, local, window, dense_tail) -> None:
    _at_least(op, 1, q_block=q_block, window=window)
    _at_least(op, 0, sink=sink, local=local, dense_tail=dense_tail)
    forced = sink + local + torch.sym_min(q_block, q_len) - 1 if q_len > 0 else 0
    if budget < forced or budget < 0:
        _fail(op, "budget", f"at least sink + local + min(q_block, Lq) - 1 = {max(forced, 0)}", budget)


def _softcap(op: str, softcap: float) -> None:
    if not softcap >= 0:
        _fail(op, "softcap", "a number >= 0", softcap)


def _word(op: str, argument: str, value: str, words: tuple[str, ...]) -> None:
    if value not in words:
        _fail(op, argument, "one of " + ", ".join(repr(w) for w in words), repr(value))


SCALES = ("sqrt", "mean", "sum")
SCORES = ("dot", "mass")
ROWS = ("sample", "mean")


def boundary_scores(k: Tensor, window: int) -> None:
    _rank4("boundary_scores", "k", k)
    _at_least("boundary_scores", 1, window=window)


def boundary_logits(k, weights, gate_weight, gate_bias, num_heads, window) -> None:
    op = "boundary_logits"
    _rank4(op, "k", k)
    _at_least(op, 1, window=window, num_heads=num_heads)
    width = k.shape[1] * k.shape[3]
    if width % num_heads != 0:
        _fail(op, "num_heads", f"a divisor of the keys' width {width}", num_heads)
    if weights[0].dtype not in (*FLOATS, torch.float64):
        _fail(op, "in_proj_weight", "float32, float16 or bfloat16", _name(weights[0].dtype))
    names: tuple[str, ...] = (
        "in_proj_weight",
        "in_proj_bias",
        "out_proj_weight",
        "out_proj_bias",
        "norm_weight",
        "norm_bias",
    )
    names += ("fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias")
    hidden = weights[6].shape[0]
    shapes: tuple = ((3 * width, width), (3 * width,), (width, width), (width,), (width,), (width,))
    shapes += ((hidden, 4 * width + 1), (hidden,), (1, hidden), (1,))
    for name, weight, shape in zip(names, weights, shapes, strict=True):
        _like(op, name, weight, shape, weights[0].dtype)
    if (gate_weight is None) != (gate_bias is None):
        _fail(op, "gate_bias", "gate_weight and gate_bias, both or neither", "one of them")
    if gate_weight is not None:
        _like(op, "gate_weight", gate_weight, (1, width), weights[0].dtype)
        _like(op, "gate_bias", gate_bias, (1,), weights[0].dtype)


def select_boundaries(scores, max_chunks, nms_radius, threshold, segment) -> None:
    op = "select_boundaries"
    _like(op, "scores", scores, (None, None), torch.float32)
    _at_least(op, 1, max_chunks=max_chunks)
    _at_least(op, 0, nms_radius=nms_radius, segment=segment)
    if threshold is not None and threshold != threshold:
        _fail(op, "threshold", "a number", threshold)


def _heads(op: str, heads: int, have: Any) -> None:
    _at_least(op, 1, heads=heads)
    if have % heads != 0 and (have == 0 or heads % have != 0):
        _fail(op, "heads", f"a divisor or a multiple of the {have} heads given", heads)


def chunk_pool(x, offsets, num_chunks, heads, scale) -> None:
    op = "chunk_pool"
    _rank4(op, "x", x)
    _chunks(op, x.shape[0], offsets, num_chunks)
    _heads(op, heads, x.shape[1])
    _word(op, "scale", scale, SCALES)
    _same_device(op, x, offsets=offsets, num_chunks=num_chunks)


def query_pool(q, heads, q_block, scale) -> None:
    op = "query_pool"
    _rank4(op, "q", q)
    _at_least(op, 1, q_block=q_block)
    _heads(op, heads, q.shape[1])
    _word(op, "scale", scale, SCALES)


def chunk_scores(q_pooled, k_pooled) -> None:
    op = "chunk_scores"
    _like(op, "q_pooled", q_pooled, (None, None, None, None), torch.float32)
    _like(op, "k_pooled", k_pooled, (*q_pooled.shape[:2], None, q_pooled.shape[3]), torch.float32)
    _same_device(op, q_pooled, k_pooled=k_pooled)


def token_scores(chunk_scores, offsets, num_chunks, k_len) -> None:
    op = "token_scores"
    _like(op, "chunk_scores", chunk_scores, (None, None, None, None), torch.float32)
    _chunks(op, chunk_scores.shape[0], offsets, num_chunks, chunk_scores.shape[3])
    _at_least(op, 0, k_len=k_len)
    _same_device(op, chunk_scores, offsets=offsets, num_chunks=num_chunks)


def _blocks(op: str, argument: str, blocks: Any, q_len: Any, q_block: Any) -> None:
    wanted = (q_len + q_block - 1) // q_block
    if blocks != wanted:
        _fail(op, argument, f"ceil(Lq / q_block) = {wanted} query blocks", blocks)


def select_keys(
    chunk_scores, offsets, num_chunks, q_len, k_len, q_block, budget, sink, local, window, dense_tail, min_chunk
) -> None:
    op = "select_keys"
    _like(op, "chunk_scores", chunk_scores, (None, None, None, None), torch.float32)
    _chunks(op, chunk_scores.shape[0], offsets, num_chunks, chunk_scores.shape[3])
    _at_least(op, 0, q_len=q_len, k_len=k_len)
    _at_least(op, 1, min_chunk=min_chunk)
    _choice(op, q_len, q_block, budget, sink, local, window, dense_tail)
    _blocks(op, "chunk_scores", chunk_scores.shape[2], q_len, q_block)
    _same_device(op, chunk_scores, offsets=offsets, num_chunks=num_chunks)


def chunk_mass(q, k_mean, offsets, num_chunks, k_len, q_block, q_stride, rows, softcap, window) -> None:
    op = "chunk_mass"
    _rank4(op, "q", q)
    _like(op, "k_mean", k_mean, (q.shape[0], None, None, q.shape[3]), torch.float32)
    if k_mean.shape[1] < 1 or q.shape[1] % k_mean.shape[1] != 0:
        _fail(op, "k_mean", "a number of heads that divides q's", f"{k_mean.shape[1]} for {q.shape[1]} query heads")
    _chunks(op, q.shape[0], offsets, num_chunks, k_mean.shape[2])
    _at_least(op, 0, k_len=k_len)
    _at_least(op, 1, q_block=q_block, q_stride=q_stride, window=window)
    _word(op, "rows", rows, ROWS)
    _softcap(op, softcap)
    _same_device(op, q, k_mean=k_mean, offsets=offsets, num_chunks=num_chunks)


def refine_keys(
    q, k, chunk_scores, row_lse, offsets, num_chunks, q_block, budget, refine,
    sink, local, window, dense_tail, q_stride, rows, softcap,
) -> None:  # fmt: skip
    op = "refine_keys"
    _qkv(op, q, k)
    _at_least(op, 1, q_block=q_block, refine=refine, q_stride=q_stride)
    _word(op, "rows", rows, ROWS)
    _like(op, "chunk_scores", chunk_scores, (q.shape[0], None, None, None), torch.float32)
    _lists(op, "chunk_scores", chunk_scores.shape[1], q.shape[1], k.shape[1])
    _blocks(op, "chunk_scores", chunk_scores.shape[2], q.shape[2], q_block)
    if row_lse is not None:
        samples = (q_block + q_stride - 1) // q_stride
        _like(op, "row_lse", row_lse, (q.shape[0], q.shape[1], chunk_scores.shape[2], samples), torch.float32)
    _chunks(op, q.shape[0], offsets, num_chunks, chunk_scores.shape[3])
    _choice(op, q.shape[2], q_block, budget, sink, local, window, dense_tail)
    _softcap(op, softcap)
    _same_device(op, q, chunk_scores=chunk_scores, row_lse=row_lse, offsets=offsets, num_chunks=num_chunks)


def sparse_attention(q, k, v, runs, num_runs, q_block, softcap, window) -> None:
    op = "sparse_attention"
    _qkv(op, q, k, v)
    _at_least(op, 1, q_block=q_block, window=window)
    _like(op, "runs", runs, (q.shape[0], None, None, None, 2), torch.int32)
    _lists(op, "runs", runs.shape[1], q.shape[1], k.shape[1])
    _blocks(op, "runs", runs.shape[2], q.shape[2], q_block)
    _like(op, "num_runs", num_runs, tuple(runs.shape[:3]), torch.int32)
    _softcap(op, softcap)
    _same_device(op, q, runs=runs, num_runs=num_runs)


def sparse_prefill(
    q, k, v, budget, max_chunks, q_block, select_heads, score, pool, refine, q_stride, rows, sink, local, dense_tail,
    boundary_window, nms_radius, segment, offsets, num_chunks, softcap, window,
) -> None:  # fmt: skip
    op = "sparse_prefill"
    _qkv(op, q, k, v)
    _word(op, "score", score, SCORES)
    _word(op, "pool", pool, SCALES)
    _word(op, "rows", rows, ROWS)
    _at_least(op, 1, max_chunks=max_chunks, q_stride=q_stride, boundary_window=boundary_window)
    _at_least(op, 0, refine=refine, nms_radius=nms_radius, segment=segment)
    if select_heads is not None:
        _lists(op, "select_heads", select_heads, q.shape[1], k.shape[1])
    if (offsets is None) != (num_chunks is None):
        _fail(op, "num_chunks" if num_chunks is None else "offsets", "offsets and num_chunks, both or neither", "one")
    if offsets is not None:
        _chunks(op, q.shape[0], offsets, num_chunks)
    k_len = k.shape[2]
    _choice(
        op, q.shape[2], q_block, budget, torch.sym_min(sink, k_len), torch.sym_min(local, k_len), window, dense_tail
    )
    _softcap(op, softcap)
    _same_device(op, q, offsets=offsets, num_chunks=num_chunks)


def sparse_decode(
    q, k, v, k_pooled, offsets, num_chunks, budget, score, refine, sink, local, min_chunk, softcap, window,
    cache_seqlens,
) -> None:  # fmt: skip
    op = "sparse_decode"
    _qkv(op, q, k, v)
    if q.shape[2] > MAX_DECODE_QUERIES:
        _fail(op, "q", f"at most {MAX_DECODE_QUERIES} queries", q.shape[2])
    _word(op, "score", score, SCORES)
    _like(op, "k_pooled", k_pooled, (q.shape[0], None, None, q.shape[3]), torch.float32)
    _lists(op, "k_pooled", k_pooled.shape[1], q.shape[1], k.shape[1])
    _chunks(op, q.shape[0], offsets, num_chunks, k_pooled.shape[2])
    if cache_seqlens is not None:
        _like(op, "cache_seqlens", cache_seqlens, (q.shape[0],), torch.int32)
    _at_least(op, 1, min_chunk=min_chunk)
    _at_least(op, 0, refine=refine)
    k_len = k.shape[2]
    _choice(op, q.shape[2], 1, budget, torch.sym_min(sink, k_len), torch.sym_min(local, k_len), window, 0)
    _softcap(op, softcap)
    _same_device(op, q, k_pooled=k_pooled, offsets=offsets, num_chunks=num_chunks, cache_seqlens=cache_seqlens)
