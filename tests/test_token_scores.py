"""Stage 5: each token gets its chunk's score."""

import brute
import pytest
import torch
from cases import chunks, rand
from hypothesis import given
from hypothesis import strategies as st

from dhsa_ext import reference


@given(
    length=st.integers(0, 30),
    capacity=st.integers(1, 8),
    heads=st.integers(1, 2),
    blocks=st.integers(0, 3),
    data=st.data(),
)
def test_any_chunks_equal_brute_force(run, length, capacity, heads, blocks, data):
    rng = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
    offsets, counts = chunks(rng, 2, length, capacity, covered=data.draw(st.integers(0, length)))
    scores = rand(rng, 2, heads, blocks, capacity)
    want = torch.from_numpy(brute.token_scores(scores.numpy(), offsets.numpy(), counts.numpy(), length)).float()
    assert torch.equal(run.token_scores(scores, offsets, counts, length), want)


@pytest.mark.parametrize("length", [1, 31, 32, 33, 1000])
def test_lengths_are_copied_exactly(ops, rng, length):
    offsets, counts = chunks(rng, 3, length, 40, covered=length - length // 4)
    scores = rand(rng, 3, 2, 9, 40)
    got = ops.token_scores(scores, offsets, counts, length)
    assert torch.equal(got, reference.token_scores(scores, offsets, counts, length))


def test_tokens_outside_every_chunk_are_minus_infinity(run):
    offsets, counts = torch.tensor([[0, 2, 5, 5]], dtype=torch.int32), torch.tensor([2], dtype=torch.int32)
    tokens = run.token_scores(torch.tensor([[[[1.0, 2.0, 9.0]]]]), offsets, counts, 7)
    assert tokens.flatten().tolist() == [1, 1, 2, 2, 2, -torch.inf, -torch.inf]


@given(seed=st.integers(0, 10**6))
def test_malformed_offsets_never_read_outside(run, seed):
    rng = torch.Generator().manual_seed(seed)
    offsets = torch.randint(-60, 90, (2, 9), generator=rng).int()
    counts = torch.randint(-20, 60, (2,), generator=rng).int()
    scores = torch.arange(8.0).expand(2, 1, 2, 8).contiguous()
    tokens = run.token_scores(scores, offsets, counts, 40)
    known = (tokens == -torch.inf) | ((tokens >= 0) & (tokens <= 7) & (tokens == tokens.round()))
    assert tokens.shape == (2, 1, 2, 40) and known.all()
