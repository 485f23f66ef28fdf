"""Stage 3 over fixed blocks of queries."""

import brute
import pytest
import torch
from cases import DTYPES, heads_last, rand
from compare import same_scores
from hypothesis import given
from hypothesis import strategies as st

from dhsa_ext import reference


@given(
    length=st.integers(0, 40), scale=st.sampled_from(["sqrt", "mean", "sum"]), seed=st.integers(0, 999), data=st.data()
)
def test_any_blocks_equal_brute_force(run, length, scale, seed, data):
    q_block = data.draw(st.sampled_from(run.q_blocks))
    heads = data.draw(st.sampled_from([1, 2, 4, 8]))
    q = rand(torch.Generator().manual_seed(seed), 2, 4, length, run.head_dims[0])
    same_scores(run.query_pool(q, heads, q_block, scale), brute.query_pool(q.double().numpy(), heads, q_block, scale))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("length", [0, 1, 15, 16, 17, 129, 700])
@pytest.mark.parametrize(("heads", "q_block", "dim"), [(1, 128, 128), (2, 64, 96), (8, 16, 256)])
def test_lengths_around_a_block(ops, rng, heads, q_block, dim, length, dtype):
    q = heads_last(rng, 2, 8, length, dim, dtype)
    same_scores(ops.query_pool(q, heads, q_block), reference.query_pool(q.double(), heads, q_block))


def test_last_block_divides_by_its_own_length(run):
    """Ones over a ragged block of 3: sqrt gives sqrt(3), mean 1, sum 3."""
    q = torch.ones(1, 1, 19, 64)
    for scale, value in (("sqrt", 3**0.5), ("mean", 1.0), ("sum", 3.0)):
        assert torch.allclose(run.query_pool(q, 1, 16, scale)[0, 0, 1], torch.tensor(value))


@pytest.mark.parametrize("q_block", [16, 64])
def test_block_is_a_chunk_of_chunk_pool(ops, rng, q_block):
    q = rand(rng, 1, 4, 150, 64)
    edges = torch.arange(0, 150 + q_block, q_block).clamp(max=150).int()[None]
    counts = torch.tensor([edges.shape[1] - 1], dtype=torch.int32)
    same_scores(ops.query_pool(q, 2, q_block), ops.chunk_pool(q, edges, counts, 2))
