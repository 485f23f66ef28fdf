"""The torch ops `torch.ops.dhsa.*`, in pipeline order: schema, fake kernel, and the function a user calls.

Letters in shapes: B batch, H query heads, Hkv key/value heads, Lq and Lk lengths, D head_dim, S selection heads,
C chunk capacity, nQ = ceil(Lq / q_block) query blocks, R run capacity.
Sources: Xiong et al., arXiv 2510.24606, by stage in
docs/algorithm.md. Every op is forward only and raises where an input requires grad in grad mode; bad arguments raise
ValueError or RuntimeError with one sentence that names the argument.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from . import checks, reference
from .backend import backend

Tensor = torch.Tensor
library = torch.library.Library("dhsa", "DEF")

SCHEMAS = (
    "boundary_scores(Tensor k, int window=4) -> Tensor",
    "boundary_logits(Tensor k, Tensor in_proj_weight, Tensor in_proj_bias, Tensor out_proj_weight, "
    "Tensor out_proj_bias, Tensor norm_weight, Tensor norm_bias, Tensor? gate_weight, Tensor? gate_bias, "
    "Tensor fc1_weight, Tensor fc1_bias, Tensor fc2_weight, Tensor fc2_bias, int num_heads, int window=4) -> Tensor",
    "select_boundaries(Tensor scores, SymInt max_chunks, int nms_radius=8, float? threshold=None, int segment=0) "
    "-> (Tensor offsets, Tensor num_chunks)",
    'chunk_pool(Tensor x, Tensor offsets, Tensor num_chunks, int heads, str scale="sqrt") -> Tensor',
    'query_pool(Tensor q, int heads, SymInt q_block, str scale="sqrt") -> Tensor',
    "chunk_scores(Tensor q_pooled, Tensor k_pooled) -> Tensor",
    "token_scores(Tensor chunk_scores, Tensor offsets, Tensor num_chunks, SymInt k_len) -> Tensor",
    "select_keys(Tensor chunk_scores, Tensor offsets, Tensor num_chunks, SymInt q_len, SymInt k_len, SymInt q_block, "
    "SymInt budget, *, int sink=16, int local=64, int? window=None, int dense_tail=0, int min_chunk=1) "
    "-> (Tensor runs, Tensor num_runs)",
    "chunk_mass(Tensor q, Tensor k_mean, Tensor offsets, Tensor num_chunks, SymInt k_len, SymInt q_block, "
    'int q_stride=8, *, str rows="sample", float? scale=None, float softcap=0.0, int? window=None) '
    "-> (Tensor scores, Tensor row_lse)",
    "refine_keys(Tensor q, Tensor k, Tensor chunk_scores, Tensor? row_lse, Tensor offsets, Tensor num_chunks, "
    "SymInt q_block, SymInt budget, int refine, *, int sink=16, int local=64, int? window=None, int dense_tail=0, "
    'int q_stride=8, str rows="sample", float? scale=None, float softcap=0.0) -> (Tensor runs, Tensor num_runs)',
    "sparse_attention(Tensor q, Tensor k, Tensor v, Tensor runs, Tensor num_runs, SymInt q_block, *, "
    "float? scale=None, float softcap=0.0, int? window=None) -> (Tensor out, Tensor lse)",
    "sparse_prefill(Tensor q, Tensor k, Tensor v, SymInt budget, *, SymInt? max_chunks=None, int q_block=64, "
    'int? select_heads=None, str score="dot", str pool="sqrt", int refine=0, int q_stride=8, str rows="sample", '
    "int sink=16, int local=64, int dense_tail=0, int boundary_window=4, int nms_radius=8, float? threshold=None, "
    "int segment=0, bool strict=False, Tensor? offsets=None, Tensor? num_chunks=None, float? scale=None, "
    "float softcap=0.0, int? window=None) -> (Tensor out, Tensor lse)",
    "sparse_decode(Tensor q, Tensor k, Tensor v, Tensor k_pooled, Tensor offsets, Tensor num_chunks, SymInt budget, "
    '*, str score="dot", int refine=0, int sink=16, int local=64, int min_chunk=1, float? scale=None, '
    "float softcap=0.0, int? window=None, Tensor? cache_seqlens=None) -> (Tensor out, Tensor lse)",
)
OPS = tuple(schema.split("(")[0] for schema in SCHEMAS)

for _schema in SCHEMAS:
    library.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))


# --- fake kernels: the checks and the shapes, no data ----------------------------------------------------------------


def _refuse_grad(op: str, args: tuple) -> None:
    """As the native kernels do: torch's own kernel for autograd, in Python, would take a third of a small call."""
    if not torch.is_grad_enabled():
        return
    for i, value in enumerate(args):
        if isinstance(value, Tensor) and value.requires_grad:
            name = getattr(torch.ops.dhsa, op).default._schema.arguments[i].name
            raise RuntimeError(
                f"dhsa::{op}: {name}: expected an input that does not require grad (the op is forward only), got one "
                "that does: call it under torch.no_grad() or detach it"
            )


def _fake(op: str) -> Callable:
    """Registers a function as the op's fake kernel."""

    def register(function: Callable) -> None:
        def kernel(*args, **kwargs):
            _refuse_grad(op, args)
            return function(*args, **kwargs)

        torch.library.register_fake(f"dhsa::{op}", kernel, lib=library)

    return register


def _float(x: Tensor, *shape) -> Tensor:
    return x.new_empty(shape, dtype=torch.float32)


def _int(x: Tensor, *shape) -> Tensor:
    return x.new_empty(shape, dtype=torch.int32)


def _num_blocks(q_len, q_block):
    return (q_len + q_block - 1) // q_block


def _attention_outputs(q: Tensor) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), _float(q, *q.shape[:3])


@_fake("boundary_scores")
def _(k, window=4):
    checks.boundary_scores(k, window)
    return _float(k, k.shape[0], k.shape[2])


@_fake("boundary_logits")
def _(k, win, bin_, wout, bout, wnorm, bnorm, gate_weight, gate_bias, w1, b1, w2, b2, num_heads, window=4):
    weights = [win, bin_, wout, bout, wnorm, bnorm, w1, b1, w2, b2]
    checks.boundary_logits(k, weights, gate_weight, gate_bias, num_heads, window)
    return _float(k, k.shape[0], k.shape[2])


@_fake("select_boundaries")
def _(scores, max_chunks, nms_radius=8, threshold=None, segment=0):
    checks.select_boundaries(scores, max_chunks, nms_radius, threshold, segment)
    batch, length = scores.shape
    return _int(scores, batch, reference.chunk_capacity(length, max_chunks, segment) + 1), _int(scores, batch)


@_fake("chunk_pool")
def _(x, offsets, num_chunks, heads, scale="sqrt"):
    checks.chunk_pool(x, offsets, num_chunks, heads, scale)
    return _float(x, x.shape[0], heads, offsets.shape[1] - 1, x.shape[3])


@_fake("query_pool")
def _(q, heads, q_block, scale="sqrt"):
    checks.query_pool(q, heads, q_block, scale)
    return _float(q, q.shape[0], heads, _num_blocks(q.shape[2], q_block), q.shape[3])


@_fake("chunk_scores")
def _(q_pooled, k_pooled):
    checks.chunk_scores(q_pooled, k_pooled)
    return _float(q_pooled, *q_pooled.shape[:3], k_pooled.shape[2])


@_fake("token_scores")
def _(chunk_scores, offsets, num_chunks, k_len):
    checks.token_scores(chunk_scores, offsets, num_chunks, k_len)
    return _float(chunk_scores, *chunk_scores.shape[:3], k_len)


@_fake("select_keys")
def _(
    chunk_scores, offsets, num_chunks, q_len, k_len, q_block, budget, *,
    sink=16, local=64, window=None, dense_tail=0, min_chunk=1,
):  # fmt: skip
    checks.select_keys(
        chunk_scores, offsets, num_chunks, q_len, k_len, q_block, budget, sink, local, window, dense_tail, min_chunk
    )
    lists = chunk_scores.shape[:3]
    capacity = reference.run_capacity(chunk_scores.shape[3], budget, min_chunk)
    return _int(chunk_scores, *lists, capacity, 2), _int(chunk_scores, *lists)


@_fake("chunk_mass")
def _(
    q, k_mean, offsets, num_chunks, k_len, q_block, q_stride=8, *,
    rows="sample", scale=None, softcap=0.0, window=None,
):  # fmt: skip
    checks.chunk_mass(q, k_mean, offsets, num_chunks, k_len, q_block, q_stride, rows, softcap, window)
    blocks = _num_blocks(q.shape[2], q_block)
    scores = _float(q, q.shape[0], k_mean.shape[1], blocks, k_mean.shape[2])
    return scores, _float(q, q.shape[0], q.shape[1], blocks, _num_blocks(q_block, q_stride))


@_fake("refine_keys")
def _(
    q, k, chunk_scores, row_lse, offsets, num_chunks, q_block, budget, refine, *,
    sink=16, local=64, window=None, dense_tail=0, q_stride=8, rows="sample", scale=None, softcap=0.0,
):  # fmt: skip
    checks.refine_keys(
        q, k, chunk_scores, row_lse, offsets, num_chunks, q_block, budget, refine,
        sink, local, window, dense_tail, q_stride, rows, softcap,
    )  # fmt: skip
    lists = chunk_scores.shape[:3]
    return _int(q, *lists, reference.refined_run_capacity(k.shape[2], budget), 2), _int(q, *lists)


@_fake("sparse_attention")
def _(q, k, v, runs, num_runs, q_block, *, scale=None, softcap=0.0, window=None):
    checks.sparse_attention(q, k, v, runs, num_runs, q_block, softcap, window)
    return _attention_outputs(q)


@_fake("sparse_prefill")
def _(
    q, k, v, budget, *, max_chunks=None, q_block=64, select_heads=None, score="dot", pool="sqrt", refine=0,
    q_stride=8, rows="sample", sink=16, local=64, dense_tail=0, boundary_window=4, nms_radius=8, threshold=None,
    segment=0, strict=False, offsets=None, num_chunks=None, scale=None, softcap=0.0, window=None,
):  # fmt: skip
    checks.sparse_prefill(
        q, k, v, budget, max_chunks, q_block, select_heads, score, pool, refine, q_stride, rows, sink, local,
        dense_tail, boundary_window, nms_radius, segment, offsets, num_chunks, softcap, window,
    )  # fmt: skip
    return _attention_outputs(q)


@_fake("sparse_decode")
def _(
    q, k, v, k_pooled, offsets, num_chunks, budget, *,
    score="dot", refine=0, sink=16, local=64, min_chunk=1, scale=None, softcap=0.0, window=None, cache_seqlens=None,
):  # fmt: skip
    checks.sparse_decode(
        q, k, v, k_pooled, offsets, num_chunks, budget, score, refine, sink, local, min_chunk, softcap, window,
        cache_seqlens,
    )  # fmt: skip
    return _attention_outputs(q)


# --- who runs the ops ------------------------------------------------------------------------------------------------


def _on_reference(op: str, why: str) -> Callable:
    run = getattr(reference, op)

    def kernel(*args, **kwargs):
        _refuse_grad(op, args)
        backend.say_once(f"dhsa::{op} runs on the float64 Python reference ({why}): right, but slow")
        return run(*args, **kwargs)

    return kernel


def _refused_on_cuda(op: str) -> Callable:
    def kernel(*args, **kwargs):
        raise RuntimeError(
            f"dhsa::{op}: expected CPU tensors, got CUDA ones: this library was built without CUDA; "
            "rebuild with DHSA_BUILD=cuda, or set DHSA_BACKEND=reference"
        )

    return kernel


def _register_kernels() -> None:
    for op in OPS:
        library.impl(op, torch.library.fallthrough_kernel, "Autograd")  # kernels refuse inputs that require grad
        if backend.name == "reference":
            library.impl(op, _on_reference(op, backend.reason), "CompositeExplicitAutograd")
            continue
        if not backend.has_cuda:
            library.impl(op, _refused_on_cuda(op), "CUDA")


_register_kernels()
_ops = torch.ops.dhsa


# --- the functions ---------------------------------------------------------------------------------------------------


def boundary_scores(k: Tensor, window: int = 4) -> Tensor:
    """How much a new chunk should begin at each token: 1 - cosine of the mean keys before and after it.

    k [B, Hkv, Lk, D] float32, float16 or bfloat16; `window` tokens are averaged on each side, all heads concatenated.
    Returns float32 [B, Lk], -inf where a whole window does not fit. Source: the training-free detector of the paper's
    published code.
    """
    return _ops.boundary_scores(k, window)


def boundary_logits(
    k: Tensor,
    in_proj_weight: Tensor,
    in_proj_bias: Tensor,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    gate_weight: Tensor | None,
    gate_bias: Tensor | None,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    num_heads: int,
    window: int = 4,
) -> Tensor:
    """The learned boundary detector: same shape and meaning as `boundary_scores`, as logits.

    k [B, Hkv, Lk, D]; with C_in = Hkv D: in_proj [3 C_in, C_in], out_proj [C_in, C_in], norm [C_in], gate [1, C_in] or
    None (mean pooling), fc1 [256, 4 C_in + 1], fc2 [1, 256], and their biases. Source: the paper's boundary predictor.
    """
    return _ops.boundary_logits(
        k, in_proj_weight, in_proj_bias, out_proj_weight, out_proj_bias, norm_weight, norm_bias, gate_weight, gate_bias,
        fc1_weight, fc1_bias, fc2_weight, fc2_bias, num_heads, window,
    )  # fmt: skip


def select_boundaries(
    scores: Tensor, max_chunks: int, nms_radius: int = 8, threshold: float | None = None, segment: int = 0
) -> tuple[Tensor, Tensor]:
    """Chunk offsets by greedy 1-D non-maximum suppression of the scores.

    scores float32 [B, Lk]; at most `max_chunks` chunks a row (or a whole segment of `segment` tokens), cuts more than
    `nms_radius` tokens apart; scores <= `threshold` are no cuts. Returns offsets int32 [B, C + 1], half-open, rising
    and padded with Lk, and num_chunks int32 [B].
    """
    return _ops.select_boundaries(scores, max_chunks, nms_radius, threshold, segment)


def chunk_pool(x: Tensor, offsets: Tensor, num_chunks: Tensor, heads: int, scale: str = "sqrt") -> Tensor:
    """One vector per chunk: the sum of its n tokens over sqrt(n) ("mean": over n, "sum": the sum).

    x [B, Hx, L, D]; offsets int32 [B, C + 1], num_chunks int32 [B]. `heads` = S divides Hx (mean over consecutive
    groups) or is a multiple of it (repeats). Returns float32 [B, S, C, D], columns without a chunk 0. Source: the
    paper's length-normalised aggregation.
    """
    return _ops.chunk_pool(x, offsets, num_chunks, heads, scale)


def query_pool(q: Tensor, heads: int, q_block: int, scale: str = "sqrt") -> Tensor:
    """`chunk_pool` over fixed blocks of q_block queries: q [B, H, Lq, D] to float32 [B, heads, nQ, D]."""
    return _ops.query_pool(q, heads, q_block, scale)


def chunk_scores(q_pooled: Tensor, k_pooled: Tensor) -> Tensor:
    """Dot products [B, S, nQ, D] x [B, S, C, D] to float32 [B, S, nQ, C]; no softmax scale."""
    return _ops.chunk_scores(q_pooled, k_pooled)


def token_scores(chunk_scores: Tensor, offsets: Tensor, num_chunks: Tensor, k_len: int) -> Tensor:
    """Chunk-to-token upsampling: float32 [B, S, nQ, C] to [B, S, nQ, Lk], -inf outside every chunk."""
    return _ops.token_scores(chunk_scores, offsets, num_chunks, k_len)


def select_keys(
    chunk_scores: Tensor,
    offsets: Tensor,
    num_chunks: Tensor,
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
) -> tuple[Tensor, Tensor]:
    """The `budget` keys that each query block keeps, as runs.

    chunk_scores float32 [B, S, nQ, C]. Forced: the first `sink` keys, the `local` ones before each query, keys of no
    chunk; then tokens by falling chunk score, ties to the lower index. Blocks with one of the last `dense_tail` queries
    keep every candidate. Returns runs int32 [B, S, nQ, R, 2], half-open, rising and merged, R = min(C, budget //
    min_chunk + 1) + 3, and num_runs int32 [B, S, nQ]. Raises where budget < sink + local + min(q_block, q_len) - 1.
    """
    return _ops.select_keys(
        chunk_scores, offsets, num_chunks, q_len, k_len, q_block, budget,
        sink=sink, local=local, window=window, dense_tail=dense_tail, min_chunk=min_chunk,
    )  # fmt: skip


def chunk_mass(
    q: Tensor,
    k_mean: Tensor,
    offsets: Tensor,
    num_chunks: Tensor,
    k_len: int,
    q_block: int,
    q_stride: int = 8,
    *,
    rows: str = "sample",
    scale: float | None = None,
    softcap: float = 0.0,
    window: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The accurate mode's chunk scores: the attention mass that one token of a chunk is estimated to get.

    q [B, H, Lq, D], k_mean float32 [B, S, C, D] (chunk_pool "mean"). Every q_stride-th query of a block, counted back
    from its last, votes with softmax(scale q.mean + ln n); with rows "mean", the means of the q_stride queries that end
    there do, rounded to q's type. Returns scores float32 [B, S, nQ, C] and the rows' logsumexp row_lse float32
    [B, H, nQ, ceil(q_block / q_stride)], unused entries +inf.
    """
    return _ops.chunk_mass(
        q, k_mean, offsets, num_chunks, k_len, q_block, q_stride, rows=rows, scale=scale, softcap=softcap, window=window
    )


def refine_keys(
    q: Tensor,
    k: Tensor,
    chunk_scores: Tensor,
    row_lse: Tensor | None,
    offsets: Tensor,
    num_chunks: Tensor,
    q_block: int,
    budget: int,
    refine: int,
    *,
    sink: int = 16,
    local: int = 64,
    window: int | None = None,
    dense_tail: int = 0,
    q_stride: int = 8,
    rows: str = "sample",
    scale: float | None = None,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """`select_keys` with a second, token-level look at `refine` times as many keys as there is room for.

    q [B, H, Lq, D], k [B, Hkv, Lk, D], chunk_scores float32 [B, S, nQ, C], row_lse of `chunk_mass` with the same
    q_stride and rows (None: score by the pooled query, which asks for neither). Returns runs int32 [B, S, nQ, R, 2]
    with R = max(1, min(budget, (Lk + 1) // 2)), num_runs int32.
    """
    return _ops.refine_keys(
        q, k, chunk_scores, row_lse, offsets, num_chunks, q_block, budget, refine, sink=sink, local=local,
        window=window, dense_tail=dense_tail, q_stride=q_stride, rows=rows, scale=scale, softcap=softcap,
    )  # fmt: skip


def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    runs: Tensor,
    num_runs: Tensor,
    q_block: int,
    *,
    scale: float | None = None,
    softcap: float = 0.0,
    window: int | None = None,
    return_lse: bool = False,
) -> Any:
    """Causal softmax attention over the keys of each query block's runs.

    q [B, H, Lq, D], k and v [B, Hkv, Lk, D], query i at position Lk - Lq + i; runs int32 [B, S, nQ, R, 2] with S = 1,
    Hkv or H. scale defaults to 1 / sqrt(D); softcap > 0 gives softcap tanh(logit / softcap). Returns out (q's dtype),
    and with return_lse also lse float32 [B, H, Lq] in natural log; a row without a key gives 0 and -inf.
    """
    out, lse = _ops.sparse_attention(q, k, v, runs, num_runs, q_block, scale=scale, softcap=softcap, window=window)
    return (out, lse) if return_lse else out


def sparse_prefill(q: Tensor, k: Tensor, v: Tensor, budget: int, *, return_lse: bool = False, **options: Any) -> Any:
    """Every stage in one call: choose `budget` keys for each query block, and attend to them.

    q [B, H, Lq, D], k and v [B, Hkv, Lk, D]. Options, with the schema's defaults: max_chunks (Lk // 16), q_block 64,
    select_heads (1, Hkv or H; Hkv), score "dot" | "mass", pool "sqrt" | "mean" | "sum", refine 0, q_stride 8, rows
    "sample" | "mean", sink 16, local 64, dense_tail 0, boundary_window 4, nms_radius 8, threshold, segment 0, strict,
    offsets and num_chunks (to share boundaries), scale, softcap, window. Returns out (q's dtype), with return_lse also
    lse float32 [B, H, Lq].
    Boundaries and chunk vectors may look past a block's last query, outputs never attend past their own position;
    strict=True scores the chunk that holds the block's end without its future.
    """
    out, lse = _ops.sparse_prefill(q, k, v, budget, **options)
    return (out, lse) if return_lse else out


def sparse_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_pooled: Tensor,
    offsets: Tensor,
    num_chunks: Tensor,
    budget: int,
    *,
    return_lse: bool = False,
    **options: Any,
) -> Any:
    """Lq <= 16 new queries over a cache whose chunks are known, each choosing `budget` keys of its own.

    q [B, H, Lq, D], k and v [B, Hkv, Lk, D], k_pooled float32 [B, S, C, D] (chunk_pool "sqrt" for score "dot", "mean"
    for "mass"). Options: score, refine, sink 16, local 64, min_chunk 1, scale, softcap, window, cache_seqlens. Returns
    as `sparse_prefill`.

    cache_seqlens, int32 [B], says how many keys each row's cache holds, the new ones included; Lk is its room then, and
    what lies past them is not read. The result is that of k[b, :, : cache_seqlens[b]], without its length on the host.
    """
    out, lse = _ops.sparse_decode(q, k, v, k_pooled, offsets, num_chunks, budget, **options)
    return (out, lse) if return_lse else out
