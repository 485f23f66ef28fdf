"""Stage 4: dot products of pooled queries and pooled keys."""

import brute
import pytest
import torch
from cases import rand
from compare import same_scores
from hypothesis import given
from hypothesis import strategies as st

from dhsa_ext import reference


@given(
    batch=st.integers(0, 2),
    heads=st.integers(1, 3),
    blocks=st.integers(0, 5),
    columns=st.integers(1, 7),
    seed=st.integers(0, 999),
)
def test_any_shape_equals_brute_force(run, batch, heads, blocks, columns, seed):
    rng = torch.Generator().manual_seed(seed)
    q, k = rand(rng, batch, heads, blocks, run.head_dims[0]), rand(rng, batch, heads, columns, run.head_dims[0])
    same_scores(run.chunk_scores(q, k), brute.chunk_scores(q.double().numpy(), k.double().numpy()))


@pytest.mark.parametrize(("blocks", "columns"), [(1, 1), (1, 500), (65, 129), (128, 256), (33, 1000)])
@pytest.mark.parametrize("dim", [64, 96, 128, 256])
def test_tile_edges(ops, rng, blocks, columns, dim):
    q, k = rand(rng, 2, 2, blocks, dim), rand(rng, 2, 2, columns, dim)
    same_scores(ops.chunk_scores(q, k), reference.chunk_scores(q, k))


def test_scores_are_finer_than_tf32(ops, rng):
    """Products whose parts cancel: 10 significant bits would be off by a hundred times the limit, float32 by less."""
    q = rand(rng, 1, 1, 64, 128)
    k = torch.cat([q + 1e-3 * rand(rng, 1, 1, 64, 128), -q], 2)
    same_scores(ops.chunk_scores(q * 8, k), reference.chunk_scores(q * 8, k))


def test_infinite_product_stays_infinite(run):
    q = torch.full((1, 1, 1, 64), 1e30)
    scores = run.chunk_scores(q, torch.cat([q, -q, q * 0], 2))
    assert scores.flatten().tolist() == [torch.inf, -torch.inf, 0.0]
