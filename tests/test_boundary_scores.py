"""Stage 1: 1 - cosine between the mean keys before and after each token."""

import brute
import pytest
import torch
from cases import DTYPES, heads_last, rand
from compare import same_scores
from hypothesis import given
from hypothesis import strategies as st

from dhsa_ext import reference


@given(
    batch=st.integers(1, 2), heads=st.integers(1, 3), k_len=st.integers(0, 24), window=st.integers(1, 6), data=st.data()
)
def test_any_shape_equals_brute_force(run, batch, heads, k_len, window, data):
    dim = data.draw(st.sampled_from(run.head_dims[:2]))
    rng = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
    k = rand(rng, batch, heads, k_len, dim)
    same_scores(run.boundary_scores(k, window), brute.boundary_scores(k.double().numpy(), window))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k_len", [0, 1, 3, 7, 8, 9, 257, 1500])
def test_lengths_around_two_windows(ops, rng, k_len, dtype):
    k = rand(rng, 2, 2, k_len, 64, dtype=dtype)
    same_scores(ops.boundary_scores(k, 4), reference.boundary_scores(k.double(), 4))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("heads", "dim", "window"), [(1, 256, 1), (4, 128, 4), (8, 64, 16), (3, 96, 33), (2, 64, 200)])
def test_strided_heads_last(ops, rng, heads, dim, window, dtype):
    k = heads_last(rng, 2, heads, 300, dim, dtype)
    same_scores(ops.boundary_scores(k, window), reference.boundary_scores(k.double(), window))


@pytest.mark.parametrize("window", [1, 4, 9])
def test_tokens_without_two_whole_windows_get_minus_infinity(run, rng, window):
    scores = run.boundary_scores(rand(rng, 1, 1, 40, 64), window)[0]
    inside = torch.arange(40)
    inside = (inside >= window) & (inside <= 40 - window)
    assert torch.equal(scores > -torch.inf, inside)


def test_long_sequence_keeps_its_precision_at_the_end(ops, rng):
    """A running sum over thousands of tokens would drift: the last scores are as exact as the first."""
    k = rand(rng, 1, 1, 6000, 64) + 20.0  # a large common part leaves small differences
    got, want = ops.boundary_scores(k, 4), reference.boundary_scores(k.double(), 4)
    same_scores(got, want)
    assert torch.allclose(got[:, -100:-4].double(), want[:, -100:-4].double(), atol=5e-6)


def test_constant_keys_score_zero(run):
    scores = run.boundary_scores(torch.ones(1, 2, 30, 64), 4)[0, 4:27]
    assert scores.abs().max() < 1e-5


def test_zero_keys_score_one(run):
    """0 / max(0, 1e-6) = 0: no division by zero."""
    assert (run.boundary_scores(torch.zeros(1, 2, 30, 64), 4)[0, 4:27] == 1).all()


def test_orthogonal_content_scores_one_at_the_cut(run):
    first, then = torch.eye(64)[:2]
    k = torch.cat([first.expand(15, 64), then.expand(15, 64)])[None, None]
    scores = run.boundary_scores(k, 4)[0]
    assert scores.argmax() == 15 and abs(scores[15] - 1) < 1e-5
    assert abs(scores[14] - (1 - 1 / 10**0.5)) < 1e-5  # the right half is (1, 3) / 4: its cosine with (1, 0)


def test_reversed_content_scores_two(run, rng):
    direction = rand(rng, 64)
    k = torch.cat([direction.expand(15, 64), -direction.expand(15, 64)])[None, None]
    assert abs(run.boundary_scores(k, 4)[0, 15] - 2) < 1e-5
