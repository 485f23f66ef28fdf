"""Every sentence a user can meet: dhsa::<op>: <argument>: expected <...>, got <...>, before any kernel runs.

A row is an op, the change that spoils a valid call, and the argument that the sentence must name. The rows of NATIVE
concern memory (strides, alignment) and float64, which only the reference takes as they are.
"""

import pytest
import torch
from calls import split, valid_call

INT = torch.int32


def zeros(*shape, dtype=torch.float32):
    return torch.zeros(*shape, dtype=dtype)


def same(name, change):
    """The argument changed by a function of its valid value."""
    return lambda call: call | {name: change(call[name])}


def to(**values):
    return lambda call: call | values


def without(*names):
    return lambda call: {name: value for name, value in call.items() if name not in names}


def chunk_rows(op):
    return [
        (op, "offsets_of_int64", same("offsets", torch.Tensor.long), "offsets"),
        (op, "offsets_of_another_batch", to(offsets=zeros(3, 8, dtype=INT)), "offsets"),
        (op, "offsets_of_rank_1", to(offsets=zeros(8, dtype=INT)), "offsets"),
        (op, "num_chunks_of_float", same("num_chunks", torch.Tensor.float), "num_chunks"),
        (op, "num_chunks_of_another_batch", to(num_chunks=zeros(3, dtype=INT)), "num_chunks"),
    ]


def choice_rows(op, bound):
    return [
        (op, "budget_one_below_its_bound", to(budget=bound - 1), "budget"),
        (op, "budget_negative", to(budget=-1), "budget"),
        (op, "sink_negative", to(sink=-1), "sink"),
        (op, "local_negative", to(local=-1), "local"),
        (op, "window_0", to(window=0), "window"),
    ]


def softmax_rows(op):
    return [
        (op, "softcap_negative", to(softcap=-1.0), "softcap"),
        (op, "softcap_nan", to(softcap=float("nan")), "softcap"),
        (op, "window_0", to(window=0), "window"),
    ]


def qkv_rows(op, v=True):
    rows = [
        (op, "q_of_rank_3", same("q", lambda q: q[0]), "q"),
        (op, "q_of_int32", same("q", lambda q: q.int()), "q"),
        (op, "head_dim_12", lambda c: c | {n: c[n][..., :12] for n in "qkv" if n in c}, "q"),
        (op, "head_dim_264", lambda c: c | {n: zeros(*c[n].shape[:3], 264) for n in "qkv" if n in c}, "q"),
        (op, "k_of_another_type", same("k", torch.Tensor.half), "k"),
        (op, "k_of_another_batch", same("k", lambda k: k[:1]), "k"),
        (op, "k_of_another_head_dim", same("k", lambda k: k[..., :32]), "k"),
        (op, "k_of_3_heads_for_4", lambda c: c | {n: zeros(2, 3, c[n].shape[2], 64) for n in "kv" if n in c}, "k"),
    ]
    rows += [
        (op, "v_of_another_length", same("v", lambda v: v[:, :, 1:]), "v"),
        (op, "v_of_another_type", same("v", torch.Tensor.half), "v"),
        (op, "v_of_another_head_dim", same("v", lambda v: v[..., :32]), "v"),
    ] * v
    return rows


ROWS = [
    ("boundary_scores", "k_of_rank_3", same("k", lambda k: k[0]), "k"),
    ("boundary_scores", "k_of_int32", same("k", torch.Tensor.int), "k"),
    ("boundary_scores", "head_dim_12", same("k", lambda k: k[..., :12]), "k"),
    ("boundary_scores", "window_0", to(window=0), "window"),
    ("boundary_logits", "k_of_rank_3", same("k", lambda k: k[0]), "k"),
    ("boundary_logits", "num_heads_3_for_width_128", to(num_heads=3), "num_heads"),
    ("boundary_logits", "window_0", to(window=0), "window"),
    ("boundary_logits", "in_proj_of_int32", same("in_proj_weight", torch.Tensor.int), "in_proj_weight"),
    ("boundary_logits", "in_proj_of_another_width", to(in_proj_weight=zeros(96, 128)), "in_proj_weight"),
    ("boundary_logits", "fc1_of_another_width", to(fc1_weight=zeros(256, 512)), "fc1_weight"),
    ("boundary_logits", "gate_without_its_bias", to(gate_bias=None), "gate_bias"),
    ("select_boundaries", "scores_of_rank_1", same("scores", lambda s: s[0]), "scores"),
    ("select_boundaries", "scores_of_half", same("scores", torch.Tensor.half), "scores"),
    ("select_boundaries", "max_chunks_0", to(max_chunks=0), "max_chunks"),
    ("select_boundaries", "nms_radius_negative", to(nms_radius=-1), "nms_radius"),
    ("select_boundaries", "segment_negative", to(segment=-1), "segment"),
    ("chunk_pool", "x_of_rank_3", same("x", lambda x: x[0]), "x"),
    ("chunk_pool", "x_of_int32", same("x", torch.Tensor.int), "x"),
    ("chunk_pool", "heads_0", to(heads=0), "heads"),
    ("chunk_pool", "heads_3_of_2", to(heads=3), "heads"),
    ("chunk_pool", "unknown_scale", to(scale="median"), "scale"),
    *chunk_rows("chunk_pool"),
    ("query_pool", "q_of_rank_3", same("q", lambda q: q[0]), "q"),
    ("query_pool", "q_block_0", to(q_block=0), "q_block"),
    ("query_pool", "heads_3_of_4", to(heads=3), "heads"),
    ("query_pool", "unknown_scale", to(scale=""), "scale"),
    ("chunk_scores", "q_pooled_of_half", same("q_pooled", torch.Tensor.half), "q_pooled"),
    ("chunk_scores", "q_pooled_of_rank_3", same("q_pooled", lambda q: q[0]), "q_pooled"),
    ("chunk_scores", "k_pooled_of_other_heads", to(k_pooled=zeros(2, 3, 7, 64)), "k_pooled"),
    ("chunk_scores", "k_pooled_of_another_head_dim", to(k_pooled=zeros(2, 2, 7, 32)), "k_pooled"),
    ("token_scores", "scores_of_half", same("chunk_scores", torch.Tensor.half), "chunk_scores"),
    ("token_scores", "scores_of_rank_3", same("chunk_scores", lambda s: s[0]), "chunk_scores"),
    ("token_scores", "offsets_without_the_last_column", same("offsets", lambda o: o[:, :7].contiguous()), "offsets"),
    ("token_scores", "k_len_negative", to(k_len=-1), "k_len"),
    *chunk_rows("token_scores"),
    ("select_keys", "scores_of_half", same("chunk_scores", torch.Tensor.half), "chunk_scores"),
    ("select_keys", "scores_for_other_blocks", to(q_len=300), "chunk_scores"),
    ("select_keys", "offsets_without_the_last_column", same("offsets", lambda o: o[:, :7].contiguous()), "offsets"),
    ("select_keys", "q_len_negative", to(q_len=-1), "q_len"),
    ("select_keys", "k_len_negative", to(k_len=-1), "k_len"),
    ("select_keys", "q_block_0", to(q_block=0), "q_block"),
    ("select_keys", "min_chunk_0", to(min_chunk=0), "min_chunk"),
    ("select_keys", "dense_tail_negative", to(dense_tail=-1), "dense_tail"),
    *choice_rows("select_keys", 2 + 5 + 16 - 1),
    *chunk_rows("select_keys"),
    ("chunk_mass", "q_of_rank_3", same("q", lambda q: q[0]), "q"),
    ("chunk_mass", "k_mean_of_half", same("k_mean", torch.Tensor.half), "k_mean"),
    ("chunk_mass", "k_mean_of_3_heads_for_4", to(k_mean=zeros(2, 3, 7, 64)), "k_mean"),
    ("chunk_mass", "k_mean_of_another_head_dim", to(k_mean=zeros(2, 2, 7, 32)), "k_mean"),
    ("chunk_mass", "q_block_0", to(q_block=0), "q_block"),
    ("chunk_mass", "q_stride_0", to(q_stride=0), "q_stride"),
    ("chunk_mass", "unknown_rows", to(rows="max"), "rows"),
    ("chunk_mass", "k_len_negative", to(k_len=-1), "k_len"),
    *chunk_rows("chunk_mass"),
    *softmax_rows("chunk_mass"),
    ("refine_keys", "refine_0", to(refine=0), "refine"),
    ("refine_keys", "q_stride_0", to(q_stride=0), "q_stride"),
    ("refine_keys", "unknown_rows", to(rows="max"), "rows"),
    ("refine_keys", "q_block_0", to(q_block=0), "q_block"),
    ("refine_keys", "scores_for_3_lists", to(chunk_scores=zeros(2, 3, 5, 7)), "chunk_scores"),
    ("refine_keys", "scores_for_other_blocks", to(chunk_scores=zeros(2, 2, 4, 7)), "chunk_scores"),
    ("refine_keys", "row_lse_of_other_rows", to(row_lse=zeros(2, 4, 5, 3)), "row_lse"),
    *choice_rows("refine_keys", 2 + 5 + 16 - 1),
    *chunk_rows("refine_keys"),
    *qkv_rows("refine_keys", v=False),
    *softmax_rows("refine_keys"),
    ("sparse_attention", "runs_of_int64", same("runs", torch.Tensor.long), "runs"),
    ("sparse_attention", "runs_of_rank_4", same("runs", lambda r: r[0]), "runs"),
    ("sparse_attention", "runs_of_triples", to(runs=zeros(2, 2, 5, 2, 3, dtype=INT)), "runs"),
    ("sparse_attention", "runs_of_3_lists", to(runs=zeros(2, 3, 5, 2, 2, dtype=INT)), "runs"),
    ("sparse_attention", "runs_for_another_q_block", to(q_block=32), "runs"),
    ("sparse_attention", "num_runs_of_another_shape", to(num_runs=zeros(2, 2, 4, dtype=INT)), "num_runs"),
    ("sparse_attention", "num_runs_of_int64", same("num_runs", torch.Tensor.long), "num_runs"),
    ("sparse_attention", "q_block_0", to(q_block=0), "q_block"),
    *qkv_rows("sparse_attention"),
    *softmax_rows("sparse_attention"),
    ("sparse_prefill", "max_chunks_0", to(max_chunks=0), "max_chunks"),
    ("sparse_prefill", "q_block_0", to(q_block=0), "q_block"),
    ("sparse_prefill", "select_heads_3", to(select_heads=3), "select_heads"),
    ("sparse_prefill", "unknown_score", to(score="cosine"), "score"),
    ("sparse_prefill", "unknown_pool", to(pool="max"), "pool"),
    ("sparse_prefill", "refine_negative", to(refine=-1), "refine"),
    ("sparse_prefill", "q_stride_0", to(q_stride=0), "q_stride"),
    ("sparse_prefill", "unknown_rows", to(rows="max"), "rows"),
    ("sparse_prefill", "dense_tail_negative", to(dense_tail=-1), "dense_tail"),
    ("sparse_prefill", "boundary_window_0", to(boundary_window=0), "boundary_window"),
    ("sparse_prefill", "nms_radius_negative", to(nms_radius=-1), "nms_radius"),
    ("sparse_prefill", "segment_negative", to(segment=-1), "segment"),
    ("sparse_prefill", "offsets_without_num_chunks", to(offsets=zeros(2, 8, dtype=INT)), "num_chunks"),
    ("sparse_prefill", "num_chunks_without_offsets", to(num_chunks=zeros(2, dtype=INT)), "offsets"),
    (
        "sparse_prefill",
        "offsets_of_int64",
        to(offsets=zeros(2, 8, dtype=torch.int64), num_chunks=zeros(2, dtype=INT)),
        "offsets",
    ),
    *choice_rows("sparse_prefill", 2 + 5 + 16 - 1),
    *qkv_rows("sparse_prefill"),
    *softmax_rows("sparse_prefill"),
    ("sparse_decode", "17_queries", to(q=zeros(2, 4, 17, 64)), "q"),
    ("sparse_decode", "k_pooled_of_3_heads", to(k_pooled=zeros(2, 3, 7, 64)), "k_pooled"),
    ("sparse_decode", "k_pooled_of_half", same("k_pooled", torch.Tensor.half), "k_pooled"),
    ("sparse_decode", "k_pooled_of_fewer_columns", to(k_pooled=zeros(2, 2, 6, 64)), "offsets"),
    ("sparse_decode", "unknown_score", to(score="sum"), "score"),
    ("sparse_decode", "refine_negative", to(refine=-1), "refine"),
    ("sparse_decode", "min_chunk_0", to(min_chunk=0), "min_chunk"),
    ("sparse_decode", "cache_seqlens_of_one_row", to(cache_seqlens=zeros(1, dtype=INT)), "cache_seqlens"),
    ("sparse_decode", "cache_seqlens_of_int64", to(cache_seqlens=zeros(2, dtype=torch.int64)), "cache_seqlens"),
    *choice_rows("sparse_decode", 2 + 5 + 1 - 1),
    *chunk_rows("sparse_decode"),
    *qkv_rows("sparse_decode"),
    *softmax_rows("sparse_decode"),
]


def odd_start(x):
    """The same shape, 4 bytes into its memory."""
    flat = torch.zeros(x.numel() + 1, dtype=x.dtype)
    return flat[1:].view(x.shape)


def odd_rows(x):
    """The same shape, rows of D + 1 elements."""
    return torch.zeros(*x.shape[:3], x.shape[3] + 1, dtype=x.dtype)[..., : x.shape[3]]


def every_second(x):
    """The same shape, every second element of a row."""
    return torch.zeros(*x.shape[:3], 2 * x.shape[3], dtype=x.dtype)[..., ::2]


FIRST = dict(
    boundary_scores="k", chunk_pool="x", query_pool="q", sparse_attention="q", sparse_prefill="q", sparse_decode="q"
)
NATIVE = [
    (op, f.__name__, same(name, f), name) for op, name in FIRST.items() for f in (odd_start, odd_rows, every_second)
]
NATIVE += [
    (op, "float64", lambda c: {n: v.double() if n in ("q", "k", "v", "x") else v for n, v in c.items()}, name)
    for op, name in FIRST.items()
]
NATIVE += [
    ("sparse_attention", "odd_v", same("v", odd_rows), "v"),
    ("sparse_prefill", "odd_k", same("k", odd_rows), "k"),
]


def table(rows):
    return pytest.mark.parametrize(
        ("op", "spoil", "argument"), [pytest.param(op, spoil, arg, id=f"{op}-{name}") for op, name, spoil, arg in rows]
    )


def refused(run, op, spoil, argument):
    call = spoil(valid_call(op))
    args, kwargs = split(op, call)
    with pytest.raises((ValueError, RuntimeError)) as caught:
        getattr(run, op)(*args, **kwargs)
    first_line = str(caught.value).strip().splitlines()[0]
    start = f"dhsa::{op}: {argument}: expected "
    assert start in first_line and ", got " in first_line.split(start)[1], f"{first_line!r} does not read {start!r} ..."


@table(ROWS)
def test_call_is_refused_in_one_sentence(run, op, spoil, argument):
    refused(run, op, spoil, argument)


@table(NATIVE)
def test_memory_that_kernels_cannot_read_is_refused(ops, op, spoil, argument):
    from dhsa_ext.backend import backend

    if backend.name != "native":
        pytest.skip("the reference reads any memory: build the native library with pip install -e .")
    refused(ops, op, spoil, argument)


@pytest.mark.parametrize("op", sorted({row[0] for row in ROWS}))
def test_the_unspoiled_call_is_taken(run, op):
    """Without this, every row above could pass for another reason."""
    args, kwargs = split(op, valid_call(op))
    getattr(run, op)(*args, **kwargs)


@pytest.mark.parametrize(
    ("op", "bound"), [("select_keys", 22), ("refine_keys", 22), ("sparse_prefill", 22), ("sparse_decode", 7)]
)
def test_budget_at_its_bound_is_taken(run, op, bound):
    args, kwargs = split(op, valid_call(op) | dict(budget=bound))
    getattr(run, op)(*args, **kwargs)


@pytest.mark.parametrize("op", ["sparse_attention", "sparse_prefill", "sparse_decode", "refine_keys"])
def test_tensors_of_another_device_are_refused(op):
    call = valid_call(op)
    call["k"] = call["k"].to("meta")
    args, kwargs = split(op, call)
    with pytest.raises((ValueError, RuntimeError)):
        getattr(torch.ops.dhsa, op)(*args, **kwargs)
