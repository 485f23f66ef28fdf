"""Stage 4 of the accurate mode: the attention mass that one token of each chunk is estimated to get."""

import brute
import pytest
import torch
from cases import DTYPES, chunks, heads_last, on, params, qkv, rand
from compare import NEAR_CUT, same_scores
from hypothesis import given
from hypothesis import strategies as st

from dhsa_ext import reference


def same_mass(got, want):
    """Within the scores' tolerance, and finer: mass is spread thin, but an order depends on its largest entries."""
    (scores, lse), (want_scores, want_lse) = got, (torch.as_tensor(w) for w in want)
    same_scores(scores, want_scores, "scores")
    same_scores(lse, want_lse, "row_lse")
    largest = want_scores.amax(-1, keepdim=True) if want_scores.shape[-1] else want_scores
    assert ((scores - want_scores).abs() <= NEAR_CUT * largest + 1e-30).all()


@given(data=st.data())
def test_any_shape_equals_brute_force(run, data):
    q_len, k_len = data.draw(st.integers(0, 20)), data.draw(st.integers(0, 30))
    kv_heads, group = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 3))
    heads = kv_heads * group
    lists = data.draw(st.sampled_from([1, kv_heads, heads]))
    q_block, q_stride = data.draw(st.sampled_from(run.q_blocks)), data.draw(st.integers(1, 9))
    options = dict(
        rows=data.draw(st.sampled_from(["sample", "mean"])),
        scale=data.draw(st.sampled_from([None, 0.5, 2.0])),
        softcap=data.draw(st.sampled_from([0.0, 1.5, 30.0])),
        window=data.draw(st.one_of(st.none(), st.integers(1, 40))),
    )
    rng = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
    capacity, dim = data.draw(st.integers(1, 7)), run.head_dims[0]
    offsets, counts = chunks(rng, 1, k_len, capacity, covered=data.draw(st.integers(0, k_len)))
    q, k_mean = rand(rng, 1, heads, q_len, dim), rand(rng, 1, lists, capacity, dim)
    if q_len and data.draw(st.booleans()):
        q[0, 0, data.draw(st.integers(0, q_len - 1)), 3] = float("nan")
    args = (k_len, q_block, q_stride)
    want = brute.chunk_mass(
        q.double().numpy(), k_mean.double().numpy(), offsets.numpy(), counts.numpy(), *args, **options
    )
    same_mass(run.chunk_mass(q, k_mean, offsets, counts, *args, **options), want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "q_stride"), [("sample", 8), ("mean", 12)])  # 12 divides no block
@pytest.mark.parametrize("case", params())
def test_shapes(ops, rng, case, rows, q_stride, dtype):
    on(ops, case)
    q, k, _ = qkv(case, rng, dtype, heads_last)
    offsets, counts = chunks(rng, case.B, case.k_len)
    k_mean = reference.chunk_pool(k, offsets, counts, case.S, "mean")
    options = dict(rows=rows, scale=case.scale, softcap=case.softcap, window=case.window)
    args = (k_mean, offsets, counts, case.k_len, case.q_block, q_stride)
    same_mass(ops.chunk_mass(q, *args, **options), reference.chunk_mass(q, *args, **options))


def test_mass_of_all_chunks_is_one(run, rng):
    """Sum over chunks of n_c times the score: a softmax averaged over rows and heads."""
    q, k_mean = rand(rng, 2, 4, 70, 64), rand(rng, 2, 2, 9, 64)
    offsets, counts = chunks(rng, 2, 200, 9)
    scores, _ = run.chunk_mass(q, k_mean, offsets, counts, 200, 32, 8)
    sizes = (offsets[:, 1:] - offsets[:, :-1]).float()
    assert torch.allclose((scores * sizes[:, None, None]).sum(-1), torch.ones(2, 2, 3), atol=1e-5)


def test_chunk_of_equal_keys_gets_their_true_mass(run, rng):
    """Where all keys of a chunk are its mean the estimate is exact: the dense softmax of the sampled row."""
    means, offsets = rand(rng, 3, 64), torch.tensor([[0, 5, 6, 20]], dtype=torch.int32)
    k = means.repeat_interleave(torch.tensor([5, 1, 14]), 0)
    q = rand(rng, 1, 1, 1, 64)
    scores, lse = run.chunk_mass(q, means[None, None], offsets, torch.tensor([3], dtype=torch.int32), 20, 16, 16)
    logits = q[0, 0, 0] @ k.T / 8
    assert torch.allclose(scores[0, 0, 0], logits.softmax(-1)[[0, 5, 6]], rtol=1e-4)
    assert abs(lse[0, 0, 0, 0] - logits.logsumexp(-1)) < 1e-4


def test_rows_count_back_from_the_last_and_unused_ones_are_infinite(run, rng):
    """Blocks of 16 and 5 queries, every 4th: 4 rows, then queries 20 and 16 and two unused entries."""
    q, k_mean = rand(rng, 1, 1, 21, 64), rand(rng, 1, 1, 2, 64)
    offsets, counts = torch.tensor([[0, 9, 21]], dtype=torch.int32), torch.tensor([2], dtype=torch.int32)
    _, lse = run.chunk_mass(q, k_mean, offsets, counts, 21, 16, 4)
    assert lse.shape == (1, 1, 2, 4) and (lse[0, 0, 1, 2:] == torch.inf).all() and lse[0, 0, 0].isfinite().all()
    logits = q[0, 0] @ k_mean[0, 0].T / 8 + torch.tensor([9.0, 12.0]).log()
    assert torch.allclose(lse[0, 0, 1, :2], logits[[20, 16]].logsumexp(-1), atol=1e-4)
    assert torch.allclose(lse[0, 0, 0, :1], logits[[15], :].logsumexp(-1), atol=1e-4)


def test_chunks_after_the_block_or_before_its_window_score_zero(run, rng):
    q, k_mean = rand(rng, 1, 1, 1, 64), rand(rng, 1, 1, 4, 64)
    offsets, counts = torch.tensor([[0, 10, 20, 30, 40]], dtype=torch.int32), torch.tensor([4], dtype=torch.int32)
    scores, _ = run.chunk_mass(q, k_mean, offsets, counts, 40, 16, 8, window=12)
    assert (scores[0, 0, 0, :2] == 0).all() and (scores[0, 0, 0, 2:] > 0).all()


def test_nan_and_infinite_logits_count_as_minus_infinity(run):
    k_mean = torch.zeros(1, 1, 4, 64)
    k_mean[0, 0, 1], k_mean[0, 0, 2] = float("nan"), float("inf")
    offsets, counts = torch.tensor([[0, 10, 20, 30, 40]], dtype=torch.int32), torch.tensor([4], dtype=torch.int32)
    scores, lse = run.chunk_mass(torch.ones(1, 1, 1, 64), k_mean, offsets, counts, 40, 16, 8)
    assert torch.allclose(scores.flatten(), torch.tensor([0.05, 0.0, 0.0, 0.05]))
    assert abs(lse.flatten()[0] - torch.tensor(20.0).log()) < 1e-5


def mean_of(queries):
    """The mean of queries [n, D] as rows "mean" are defined: in float32, one after the other, rounded to their type."""
    total = torch.zeros(queries.shape[1])
    for query in queries:
        total = total + query.float()
    return (total / torch.full((1,), float(len(queries)))).to(queries.dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_means_are_rows_rounded_to_the_queries_type(run, rng, dtype):
    """A block of 29 queries by tens is the sampled block of its three means: of 9, 10 and 10 queries."""
    q, k_mean = (2 * rand(rng, 1, 2, 29, 64)).to(dtype), rand(rng, 1, 1, 5, 64)
    means = torch.stack([torch.stack([mean_of(part) for part in head.split([9, 10, 10])]) for head in q[0]])[None]
    offsets, counts = chunks(rng, 1, 90, 5)
    got = run.chunk_mass(q, k_mean, offsets, counts, 90, 32, 10, rows="mean", scale=0.5)
    want = run.chunk_mass(means.contiguous(), k_mean, offsets, counts, 90, 32, 1, scale=0.5)
    assert got[1].shape == (1, 2, 1, 4) and (got[1][..., 3:] == torch.inf).all()
    same_mass((got[0], got[1][..., :3]), (want[0], want[1][..., :3]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_stride_of_one_makes_both_kinds_of_rows_the_same(run, rng, dtype):
    q, k_mean = rand(rng, 1, 4, 37, 64).to(dtype), rand(rng, 1, 2, 5, 64)
    args = (q, k_mean, *chunks(rng, 1, 60, 5), 60, 16, 1)
    for mean, sample in zip(run.chunk_mass(*args, rows="mean"), run.chunk_mass(*args), strict=True):
        assert torch.equal(mean, sample)


def test_a_nan_query_takes_its_own_mean_and_no_other(run, rng):
    q, k_mean = rand(rng, 1, 1, 16, 64), rand(rng, 1, 1, 4, 64)
    q[0, 0, 6] = float("nan")
    offsets, counts = chunks(rng, 1, 40, 4)
    scores, lse = run.chunk_mass(q, k_mean, offsets, counts, 40, 16, 4, rows="mean")
    assert torch.equal(lse[0, 0, 0].isfinite(), torch.tensor([True, True, False, True])) and scores.isfinite().all()
    assert lse[0, 0, 0, 2] == -torch.inf
