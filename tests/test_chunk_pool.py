"""Stage 3: one vector per chunk."""

import brute
import pytest
import torch
from cases import DTYPES, chunks, heads_last, rand
from compare import same_scores
from hypothesis import given
from hypothesis import strategies as st

from dhsa_ext import reference

SCALES = ("sqrt", "mean", "sum")


@given(
    batch=st.integers(1, 2), given_heads=st.sampled_from([1, 2, 4, 6]), length=st.integers(0, 30),
    capacity=st.integers(1, 8), scale=st.sampled_from(SCALES), data=st.data(),
)  # fmt: skip
def test_any_chunks_equal_brute_force(run, batch, given_heads, length, capacity, scale, data):
    fitting = [s for s in (1, 2, 3, 4, 6, 8, 12) if given_heads % s == 0 or s % given_heads == 0]
    heads = data.draw(st.sampled_from(fitting))
    rng = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
    offsets, counts = chunks(rng, batch, length, capacity, covered=data.draw(st.integers(0, length)))
    x = rand(rng, batch, given_heads, length, run.head_dims[0])
    want = brute.chunk_pool(x.double().numpy(), offsets.numpy(), counts.numpy(), heads, scale)
    same_scores(run.chunk_pool(x, offsets, counts, heads, scale), want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize(
    ("given_heads", "heads", "dim"), [(1, 1, 256), (8, 1, 128), (8, 8, 64), (2, 8, 96), (4, 2, 128)]
)
def test_strided_heads_last(ops, rng, given_heads, heads, dim, scale, dtype):
    x = heads_last(rng, 2, given_heads, 700, dim, dtype)
    offsets, counts = chunks(rng, 2, 700, 50)
    same_scores(
        ops.chunk_pool(x, offsets, counts, heads, scale),
        reference.chunk_pool(x.double(), offsets, counts, heads, scale),
    )


@pytest.mark.parametrize("scale", SCALES)
def test_chunk_of_one_token_is_that_token(run, rng, scale):
    x = rand(rng, 1, 1, 5, 64)
    offsets, counts = torch.arange(6, dtype=torch.int32)[None], torch.tensor([5], dtype=torch.int32)
    assert torch.equal(run.chunk_pool(x, offsets, counts, 1, scale), x)


def test_one_long_chunk_beside_many_short_ones(ops, rng):
    """The whole row but 8 tokens in one chunk: work split by chunk must still be right."""
    x = rand(rng, 1, 2, 5000, 64)
    offsets = torch.tensor([[0, 2, 4, 4996, 4998, 5000]], dtype=torch.int32)
    counts = torch.tensor([5], dtype=torch.int32)
    for scale in SCALES:
        same_scores(
            ops.chunk_pool(x, offsets, counts, 2, scale), reference.chunk_pool(x.double(), offsets, counts, 2, scale)
        )


def test_columns_without_a_chunk_are_zero_and_unread(run, rng):
    """NaN in the tokens after the last chunk reaches no column."""
    x = rand(rng, 1, 1, 20, 64)
    x[:, :, 12:] = float("nan")
    offsets = torch.tensor([[0, 5, 12, 20, 20]], dtype=torch.int32)
    pooled = run.chunk_pool(x, offsets, torch.tensor([2], dtype=torch.int32), 1)
    assert (pooled[:, :, 2:] == 0).all() and pooled[:, :, :2].isfinite().all()


def test_repeated_heads_read_their_group(run, rng):
    x = rand(rng, 1, 2, 10, 64)
    offsets, counts = torch.tensor([[0, 4, 10]], dtype=torch.int32), torch.tensor([2], dtype=torch.int32)
    two, six = run.chunk_pool(x, offsets, counts, 2), run.chunk_pool(x, offsets, counts, 6)
    assert torch.equal(six, two.repeat_interleave(3, 1))


@given(seed=st.integers(0, 10**6))
def test_malformed_offsets_never_read_outside(run, seed):
    """Any integers: a wrong answer is allowed, a crash or a NaN out of nowhere is not."""
    rng = torch.Generator().manual_seed(seed)
    offsets = torch.randint(-(2**31), 2**31 - 1, (2, 9), generator=rng).int()
    offsets[1] = torch.randint(-50, 90, (9,), generator=rng).int()
    counts = torch.randint(-20, 60, (2,), generator=rng).int()
    x = torch.ones(2, 2, 40, 64)
    pooled = run.chunk_pool(x, offsets, counts, 2, "mean")
    assert pooled.shape == (2, 2, 8, 64) and pooled.isfinite().all()
