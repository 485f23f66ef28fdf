"""Stage 6 of the accurate mode: the best keys among the first refine * (budget - forced)."""

import brute
import numpy as np
import pytest
import torch
from cases import DTYPES, Case, choice_options, chunks, heads_last, on, params, qkv, rand
from compare import canonical, keys_of, same_integers
from hypothesis import given
from hypothesis import strategies as st
from pipeline import second_score

from dhsa_ext import reference


def whole_numbers(rng, *shape, dtype=torch.float32):
    """Entries -2 ... 2: every product and sum is exact in every type, so pooled scores tie exactly or not at all."""
    return torch.randint(-2, 3, shape, generator=rng).to(dtype)


def numpy_args(*tensors):
    return [t.double().numpy() if t.is_floating_point() else t.numpy() for t in tensors]


@given(data=st.data(), by_rows=st.booleans())
def test_any_shape_equals_brute_force(run, data, by_rows):
    q_len, k_len = data.draw(st.integers(0, 20)), data.draw(st.integers(0, 36))
    kv_heads, group = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 2))
    heads, dim = kv_heads * group, run.head_dims[0]
    lists = data.draw(st.sampled_from([1, kv_heads, heads]))
    q_block, q_stride = data.draw(st.sampled_from(run.q_blocks)), data.draw(st.integers(1, 5))
    sink, local = data.draw(st.integers(0, 4)), data.draw(st.integers(0, 4))
    least = max(1, sink + local + min(q_block, q_len) - 1)
    budget, refine = data.draw(st.integers(least, least + 12)), data.draw(st.integers(1, 4))
    choice = dict(
        sink=sink,
        local=local,
        window=data.draw(st.one_of(st.none(), st.integers(1, 40))),
        dense_tail=data.draw(st.sampled_from([0, 0, 4])),
    )
    logits = dict(
        scale=0.25,
        softcap=data.draw(st.sampled_from([0.0, 2.0])),
        q_stride=q_stride,
        rows=data.draw(st.sampled_from(["sample", "mean"])),
    )
    rng = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
    capacity = data.draw(st.integers(1, 7))
    offsets, counts = chunks(rng, 1, k_len, capacity, covered=data.draw(st.integers(0, k_len)))
    q, k = rand(rng, 1, heads, q_len, dim), rand(rng, 1, kv_heads, k_len, dim)
    if by_rows and q_len and data.draw(st.booleans()):
        q[0, 0, data.draw(st.integers(0, q_len - 1)), 3] = float("nan")
    blocks = -(-q_len // q_block)
    scores = rand(rng, 1, lists, blocks, capacity)
    row_lse = rand(rng, 1, heads, blocks, -(-q_block // q_stride)) + 1 if by_rows else None
    args = (q_block, budget, refine)
    q_np, k_np, scores_np, offsets_np, counts_np = numpy_args(q, k, scores, offsets, counts)
    lse_np = None if row_lse is None else row_lse.double().numpy()
    want = brute.refine_keys(q_np, k_np, scores_np, lse_np, offsets_np, counts_np, *args, **choice, **logits)
    got = run.refine_keys(q, k, scores, row_lse, offsets, counts, *args, **choice, **logits)
    same_integers(got, want)


def accurate(case, rng, dtype, q_stride=8, rows="sample"):
    """What a prefill of the accurate mode hands to the stage; made once, so that both sides get identical floats."""
    q, k, _ = qkv(case, rng, dtype, heads_last)
    offsets, counts = chunks(rng, case.B, case.k_len)
    k_mean = reference.chunk_pool(k, offsets, counts, case.S, "mean")
    logits = dict(scale=case.scale, softcap=case.softcap)
    args = (k_mean, offsets, counts, case.k_len, case.q_block, q_stride)
    mass = reference.chunk_mass(q, *args, rows=rows, window=case.window, **logits)
    return q, k, *mass, offsets, counts


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "q_stride"), [("sample", 8), ("mean", 12)])  # 12 divides no block
@pytest.mark.parametrize("case", params(lambda case: case.k_len > 0))
def test_shapes_by_rows(ops, rng, case, rows, q_stride, dtype):
    """Equal but for keys whose score is within 1e-4 of the block's largest from the cut-off."""
    on(ops, case)
    q, k, scores, row_lse, offsets, counts = accurate(case, rng, dtype, q_stride, rows)
    args = (scores, row_lse, offsets, counts, case.q_block, case.budget, 3)
    options = choice_options(case) | dict(scale=case.scale, softcap=case.softcap, q_stride=q_stride, rows=rows)
    runs, n = ops.refine_keys(q, k, *args, **options)
    want_runs, want_n = reference.refine_keys(q, k, *args, **options)
    assert runs.shape == want_runs.shape
    canonical(runs, n, case.k_len)
    for b, s, block in np.ndindex(*n.shape):
        got, want = keys_of(runs[b, s, block], n[b, s, block]), keys_of(want_runs[b, s, block], want_n[b, s, block])
        assert len(got) == len(want)
        if got != want:
            first, last = block * case.q_block, min(case.Lq, (block + 1) * case.q_block) - 1
            share = second_score(q, k, row_lse, case, b, s, block, first, last, q_stride, rows)
            limit = 1e-4 * float(share.max())
            lost, won = want - got, got - want
            assert max(share[sorted(lost)]) - min(share[sorted(won)]) <= 2 * limit


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", params(lambda case: case.k_len > 0 and case.Lq > 0))
def test_shapes_by_pooled_query(ops, rng, case, dtype):
    on(ops, case)
    q, k, _ = qkv(case, rng, dtype, heads_last)
    offsets, counts = chunks(rng, case.B, case.k_len)
    scores = rand(rng, case.B, case.S, case.blocks, offsets.shape[1] - 1)
    args = (scores, None, offsets, counts, case.q_block, case.budget, 3)
    got = ops.refine_keys(q, k, *args, **choice_options(case))
    want = reference.refine_keys(q.double(), k.double(), *args, **choice_options(case))
    assert got[0].shape == want[0].shape
    canonical(*got, case.k_len)
    for b, s, block in np.ndindex(*got[1].shape):
        mine, theirs = (keys_of(r[b, s, block], n[b, s, block]) for r, n in (got, want))
        assert len(mine) == len(theirs)
        if mine != theirs:
            first, last = block * case.q_block, min(case.Lq, (block + 1) * case.q_block) - 1
            score = second_score(q.double(), k.double(), None, case, b, s, block, first, last, 8)
            near = 1e-4 * float(score.abs().max())
            assert max(score[sorted(theirs - mine)]) - min(score[sorted(mine - theirs)]) <= 2 * near


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lists", [1, 2, 4])
def test_tied_keys_go_to_the_lower_index(run, rng, lists, dtype):
    """Whole numbers, 16 queries, 2 heads a list: every score is exact, many tie, the lists agree bit for bit."""
    q, k = whole_numbers(rng, 1, 4, 32, 64, dtype=dtype), whole_numbers(rng, 1, 2, 90, 64, dtype=dtype)
    k[..., 2:] = 0
    offsets, counts = chunks(rng, 1, 90)
    scores = rand(rng, 1, lists, 2, offsets.shape[1] - 1)
    want = brute.refine_keys(*numpy_args(q, k, scores), None, *numpy_args(offsets, counts), 16, 40, 2, sink=2, local=4)
    same_integers(run.refine_keys(q, k, scores, None, offsets, counts, 16, 40, 2, sink=2, local=4), want)


BASE = Case("base", "one block over 120 keys", Lq=16, Lk=120, H=2, Hkv=1, S=1, q_block=16, budget=50)


def test_refine_one_keeps_what_select_keys_keeps(run, rng):
    """With refine 1 every candidate of the filter fits: the second look changes nothing."""
    q, k, scores, row_lse, offsets, counts = accurate(BASE, rng, torch.float32)
    refined = run.refine_keys(q, k, scores, row_lse, offsets, counts, 16, 50, 1, sink=4, local=8)
    chosen = run.select_keys(scores, offsets, counts, 16, 120, 16, 50, sink=4, local=8)
    assert keys_of(refined[0][0, 0, 0], refined[1][0, 0, 0]) == keys_of(chosen[0][0, 0, 0], chosen[1][0, 0, 0])


def test_wide_refine_finds_the_planted_key(run, rng):
    """A key that every query wants, in the chunk that scores worst: refine 1 misses it, a wide one keeps it."""
    q, k, scores, _row_lse, offsets, counts = accurate(BASE, rng, torch.float32)
    k[0, 0, 40] = q[0].mean((0, 1)) * 50
    chunk = int((offsets[0] <= 40).sum()) - 1
    scores[..., chunk] = -1.0
    for refine, found in ((1, False), (5, True)):
        runs, n = run.refine_keys(q, k, scores, None, offsets, counts, 16, 50, refine, sink=4, local=8)
        assert (40 in keys_of(runs[0, 0, 0], n[0, 0, 0])) is found


@pytest.mark.parametrize(("k_len", "budget", "capacity"), [(1, 30, 1), (9, 30, 5), (200, 30, 30)])
def test_run_capacity_comes_from_the_arguments(run, rng, k_len, budget, capacity):
    q, k = rand(rng, 1, 1, 1, 64), rand(rng, 1, 1, k_len, 64)
    offsets, counts = torch.tensor([[0, k_len]], dtype=torch.int32), torch.tensor([1], dtype=torch.int32)
    runs, _ = run.refine_keys(q, k, torch.zeros(1, 1, 1, 1), None, offsets, counts, 16, budget, 2, sink=2, local=4)
    assert runs.shape == (1, 1, 1, capacity, 2)


def test_the_pooled_query_asks_for_no_rows(run, rng):
    q, k, scores, _row_lse, offsets, counts = accurate(BASE, rng, torch.float32)
    args = (q, k, scores, None, offsets, counts, 16, 50, 3)
    sample, mean = (run.refine_keys(*args, sink=4, local=8, q_stride=5, rows=rows) for rows in ("sample", "mean"))
    same_integers(sample, mean)
