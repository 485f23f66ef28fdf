"""The ops on NumPy arrays, without torch: names, arguments, kernels and results of the functions of `dhsa_ext`.

Letters in shapes: B batch, H query heads, Hkv key/value heads, Lq and Lk lengths, D head_dim, S selection heads,
C chunk capacity, nQ = ceil(Lq / q_block) query blocks, R run capacity.

q, k, v and x are float32, float16, or uint16 with `dtype="bfloat16"`: NumPy has no bfloat16, so its bits travel as
uint16, into the call and out of it. Scores are float32, indices int32. `threads` is how many threads work on a call: by
default DHSA_NUM_THREADS, else one for each CPU this process may use; results are the same bits for any number.
Bad arguments raise ValueError with one sentence that names the argument; nothing is converted or copied on the way in.
"""

from __future__ import annotations

import os
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

try:
    from . import _numpy
except ImportError as error:
    raise ImportError(
        "dhsa_ext.numpy: the NumPy module was not built for this interpreter; install dhsa_ext from its sources, with "
        "Python's headers there and DHSA_BUILD unset"
    ) from error

_numpy.isa_active()  # fails here, not in the middle of a run, when DHSA_FORCE_ISA cannot be had

Array = NDArray[Any]
Floats = NDArray[np.float32]
Ints = NDArray[np.int32]
DType = Literal["bfloat16"] | None
PoolScale = Literal["sqrt", "mean", "sum"]
ChunkScore = Literal["dot", "mass"]
QueryRows = Literal["sample", "mean"]

__all__ = [
    "boundary_logits",
    "boundary_scores",
    "chunk_mass",
    "chunk_pool",
    "chunk_scores",
    "query_pool",
    "refine_keys",
    "select_boundaries",
    "select_keys",
    "sparse_attention",
    "sparse_decode",
    "sparse_prefill",
    "token_scores",
]


def boundary_scores(k: Array, window: int = 4, *, dtype: DType = None, threads: int | None = None) -> Floats:
    """How much a new chunk should begin at each token: 1 - cosine of the mean keys before and after it.

    k [B, Hkv, Lk, D]; `window` tokens are averaged on each side, all heads concatenated. Returns float32 [B, Lk], -inf
    where a whole window does not fit.
    """
    return _numpy.boundary_scores(k, window, dtype, _threads(threads))


def boundary_logits(
    k: Array,
    in_proj_weight: Array,
    in_proj_bias: Array,
    out_proj_weight: Array,
    out_proj_bias: Array,
    norm_weight: Array,
    norm_bias: Array,
    gate_weight: Array | None,
    gate_bias: Array | None,
    fc1_weight: Array,
    fc1_bias: Array,
    fc2_weight: Array,
    fc2_bias: Array,
    num_heads: int,
    window: int = 4,
    *,
    dtype: DType = None,
    threads: int | None = None,
) -> Floats:
    """The learned boundary detector: same shape and meaning as `boundary_scores`, as logits.

    k [B, Hkv, Lk, D]; with C_in = Hkv D: in_proj [3 C_in, C_in], out_proj [C_in, C_in], norm [C_in], gate [1, C_in] or
    None (mean pooling), fc1 [256, 4 C_in + 1], fc2 [1, 256], and their biases, all of one type.
    """
    return _numpy.boundary_logits(
        k, in_proj_weight, in_proj_bias, out_proj_weight, out_proj_bias, norm_weight, norm_bias, gate_weight, gate_bias,
        fc1_weight, fc1_bias, fc2_weight, fc2_bias, num_heads, window, dtype, _threads(threads),
    )  # fmt: skip


def select_boundaries(
    scores: Floats,
    max_chunks: int,
    nms_radius: int = 8,
    threshold: float | None = None,
    segment: int = 0,
    *,
    threads: int | None = None,
) -> tuple[Ints, Ints]:
    """Chunk offsets by greedy 1-D non-maximum suppression of the scores.

    scores float32 [B, Lk]; at most `max_chunks` chunks a row (or a whole segment of `segment` tokens), cuts more than
    `nms_radius` tokens apart; scores <= `threshold` are no cuts. Returns offsets int32 [B, C + 1], half-open, rising
    and padded with Lk, and num_chunks int32 [B].
    """
    return _numpy.select_boundaries(scores, max_chunks, nms_radius, threshold, segment, _threads(threads))


def chunk_pool(
    x: Array,
    offsets: Ints,
    num_chunks: Ints,
    heads: int,
    scale: PoolScale = "sqrt",
    *,
    dtype: DType = None,
    threads: int | None = None,
) -> Floats:
    """One vector per chunk: the sum of its n tokens over sqrt(n) ("mean": over n, "sum": the sum).

    x [B, Hx, L, D]; offsets int32 [B, C + 1], num_chunks int32 [B]. `heads` = S divides Hx (mean over consecutive
    groups) or is a multiple of it (repeats). Returns float32 [B, S, C, D], columns without a chunk 0.
    """
    return _numpy.chunk_pool(x, offsets, num_chunks, heads, scale, dtype, _threads(threads))


def query_pool(
    q: Array,
    heads: int,
    q_block: int,
    scale: PoolScale = "sqrt",
    *,
    dtype: DType = None,
    threads: int | None = None,
) -> Floats:
    """`chunk_pool` over fixed blocks of q_block queries: q [B, H, Lq, D] to float32 [B, heads, nQ, D]."""
    return _numpy.query_pool(q, heads, q_block, scale, dtype, _threads(threads))


def chunk_scores(q_pooled: Floats, k_pooled: Floats, *, threads: int | None = None) -> Floats:
    """Dot products [B, S, nQ, D] x [B, S, C, D] to float32 [B, S, nQ, C]; no softmax scale."""
    return _numpy.chunk_scores(q_pooled, k_pooled, _threads(threads))


def token_scores(
    chunk_scores: Floats, offsets: Ints, num_chunks: Ints, k_len: int, *, threads: int | None = None
) -> Floats:
    """Chunk-to-token upsampling: float32 [B, S, nQ, C] to [B, S, nQ, Lk], -inf outside every chunk."""
    return _numpy.token_scores(chunk_scores, offsets, num_chunks, k_len, _threads(threads))


def select_keys(
    chunk_scores: Floats,
    offsets: Ints,
    num_chunks: Ints,
    q_len: int,
    k_len: int,
    q_block: int,
    budget: int,
    *,
    sink: int = 16,
    local: int = 64,
    window: int | None = None,
    dense_tail: int = 0,
    min_chunk: int = 1,
    threads: int | None = None,
) -> tuple[Ints, Ints]:
    """The `budget` keys that each query block keeps, as runs.

    chunk_scores float32 [B, S, nQ, C]. Forced: the first `sink` keys, the `local` ones before each query, keys of no
    chunk; then tokens by falling chunk score, ties to the lower index. Blocks with one of the last `dense_tail` queries
    keep every candidate. Returns runs int32 [B, S, nQ, R, 2], half-open, rising and merged, R = min(C, budget //
    min_chunk + 1) + 3, and num_runs int32 [B, S, nQ]. Raises where budget < sink + local + min(q_block, q_len) - 1.
    """
    return _numpy.select_keys(
        chunk_scores, offsets, num_chunks, q_len, k_len, q_block, budget, sink, local, window, dense_tail, min_chunk,
        _threads(threads),
    )  # fmt: skip


def chunk_mass(
    q: Array,
    k_mean: Floats,
    offsets: Ints,
    num_chunks: Ints,
    k_len: int,
    q_block: int,
    q_stride: int = 8,
    *,
    rows: QueryRows = "sample",
    scale: float | None = None,
    softcap: float = 0.0,
    window: int | None = None,
    dtype: DType = None,
    threads: int | None = None,
) -> tuple[Floats, Floats]:
    """The accurate mode's chunk scores: the attention mass that one token of a chunk is estimated to get.

    q [B, H, Lq, D], k_mean float32 [B, S, C, D] (chunk_pool "mean"). Every q_stride-th query of a block, counted back
    from its last, votes with softmax(scale q.mean + ln n); with rows "mean", the means of the q_stride queries that end
    there do, rounded to q's type. Returns scores float32 [B, S, nQ, C] and the rows' logsumexp row_lse float32
    [B, H, nQ, ceil(q_block / q_stride)], unused entries +inf.
    """
    return _numpy.chunk_mass(
        q, k_mean, offsets, num_chunks, k_len, q_block, q_stride, rows, scale, softcap, window, dtype, _threads(threads)
    )


def refine_keys(
    q: Array,
    k: Array,
    chunk_scores: Floats,
    row_lse: Floats | None,
    offsets: Ints,
    num_chunks: Ints,
    q_block: int,
    budget: int,
    refine: int,
    *,
    sink: int = 16,
    local: int = 64,
    window: int | None = None,
    dense_tail: int = 0,
    q_stride: int = 8,
    rows: QueryRows = "sample",
    scale: float | None = None,
    softcap: float = 0.0,
    dtype: DType = None,
    threads: int | None = None,
) -> tuple[Ints, Ints]:
    """`select_keys` with a second, token-level look at `refine` times as many keys as there is room for.

    q [B, H, Lq, D], k [B, Hkv, Lk, D], chunk_scores float32 [B, S, nQ, C], row_lse of `chunk_mass` with the same
    q_stride and rows (None: score by the pooled query, which asks for neither). Returns runs int32 [B, S, nQ, R, 2]
    with R = max(1, min(budget, (Lk + 1) // 2)), num_runs int32.
    """
    return _numpy.refine_keys(
        q, k, chunk_scores, row_lse, offsets, num_chunks, q_block, budget, refine, sink, local, window, dense_tail,
        q_stride, rows, scale, softcap, dtype, _threads(threads),
    )  # fmt: skip


def sparse_attention(
    q: Array,
    k: Array,
    v: Array,
    runs: Ints,
    num_runs: Ints,
    q_block: int,
    *,
    scale: float | None = None,
    softcap: float = 0.0,
    window: int | None = None,
    return_lse: bool = False,
    dtype: DType = None,
    threads: int | None = None,
) -> Any:
    """Causal softmax attention over the keys of each query block's runs.

    q [B, H, Lq, D], k and v [B, Hkv, Lk, D], query i at position Lk - Lq + i; runs int32 [B, S, nQ, R, 2] with S = 1,
    Hkv or H. scale defaults to 1 / sqrt(D); softcap > 0 gives softcap tanh(logit / softcap). Returns out (q's dtype),
    and with return_lse also lse float32 [B, H, Lq] in natural log; a row without a key gives 0 and -inf.
    """
    out, lse = _numpy.sparse_attention(
        q, k, v, runs, num_runs, q_block, scale, softcap, window, dtype, _threads(threads)
    )
    return (out, lse) if return_lse else out


def sparse_prefill(
    q: Array,
    k: Array,
    v: Array,
    budget: int,
    *,
    max_chunks: int | None = None,
    q_block: int = 64,
    select_heads: int | None = None,
    score: ChunkScore = "dot",
    pool: PoolScale = "sqrt",
    refine: int = 0,
    q_stride: int = 8,
    rows: QueryRows = "sample",
    sink: int = 16,
    local: int = 64,
    dense_tail: int = 0,
    boundary_window: int = 4,
    nms_radius: int = 8,
    threshold: float | None = None,
    segment: int = 0,
    strict: bool = False,
    offsets: Ints | None = None,
    num_chunks: Ints | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    window: int | None = None,
    return_lse: bool = False,
    dtype: DType = None,
    threads: int | None = None,
) -> Any:
    """Every stage in one call: choose `budget` keys for each query block, and attend to them.

    q [B, H, Lq, D], k and v [B, Hkv, Lk, D]; max_chunks defaults to Lk // 16, select_heads (1, Hkv or H) to Hkv;
    offsets and num_chunks share boundaries that are known. Returns out (q's dtype), with return_lse also lse float32
    [B, H, Lq]. Boundaries and chunk vectors may look past a block's last query, outputs never attend past their own
    position; strict=True scores the chunk that holds the block's end without its future.
    """
    out, lse = _numpy.sparse_prefill(
        q, k, v, budget, max_chunks, q_block, select_heads, score, pool, refine, q_stride, rows, sink, local,
        dense_tail, boundary_window, nms_radius, threshold, segment, strict, offsets, num_chunks, scale, softcap,
        window, dtype, _threads(threads),
    )  # fmt: skip
    return (out, lse) if return_lse else out


def sparse_decode(
    q: Array,
    k: Array,
    v: Array,
    k_pooled: Floats,
    offsets: Ints,
    num_chunks: Ints,
    budget: int,
    *,
    score: ChunkScore = "dot",
    refine: int = 0,
    sink: int = 16,
    local: int = 64,
    min_chunk: int = 1,
    scale: float | None = None,
    softcap: float = 0.0,
    window: int | None = None,
    cache_seqlens: Ints | None = None,
    return_lse: bool = False,
    dtype: DType = None,
    threads: int | None = None,
) -> Any:
    """Lq <= 16 new queries over a cache whose chunks are known, each choosing `budget` keys of its own.

    q [B, H, Lq, D], k and v [B, Hkv, Lk, D], k_pooled float32 [B, S, C, D] (chunk_pool "sqrt" for score "dot", "mean"
    for "mass"), cache_seqlens int32 [B]: the keys that each row's cache holds, where Lk is its room. Returns as
    `sparse_prefill`.
    """
    out, lse = _numpy.sparse_decode(
        q, k, v, k_pooled, offsets, num_chunks, budget, score, refine, sink, local, min_chunk, scale, softcap, window,
        cache_seqlens, dtype, _threads(threads),
    )  # fmt: skip
    return (out, lse) if return_lse else out


def _threads(threads: int | None) -> int:
    if threads is not None:
        return threads
    wanted = os.environ.get("DHSA_NUM_THREADS")
    if not wanted:
        return len(os.sched_getaffinity(0))
    if not wanted.isdecimal() or int(wanted) < 1:
        raise ValueError(f"DHSA_NUM_THREADS: expected an integer >= 1, got {wanted!r}")
    return int(wanted)
