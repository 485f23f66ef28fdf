"""Stage 2: greedy non-maximum suppression, bit for bit."""

import itertools

import brute
import numpy as np
import pytest
import torch
from compare import same_integers
from hypothesis import given
from hypothesis import strategies as st

from dhsa_ext import reference

SCORE = st.one_of(
    st.integers(-2, 3).map(float),  # many ties
    st.sampled_from([0.0, -0.0, float("nan"), float("inf"), float("-inf"), 0.1, 1e-40, -1e-40]),
    st.floats(-4, 4, width=32),
)


@given(
    rows=st.integers(0, 40).flatmap(
        lambda n: st.lists(st.lists(SCORE, min_size=n, max_size=n), min_size=1, max_size=2)
    ),
    max_chunks=st.integers(1, 9),
    radius=st.integers(0, 5),
    threshold=st.sampled_from([None, 0.0, 0.1, -1.0, float("inf"), float("-inf")]),
    segment=st.integers(0, 17),
)
def test_any_scores_equal_the_greedy_loop(run, rows, max_chunks, radius, threshold, segment):
    scores = torch.tensor(rows, dtype=torch.float32)
    want = brute.select_boundaries(scores.numpy(), max_chunks, radius, threshold, segment)
    same_integers(run.select_boundaries(scores, max_chunks, radius, threshold, segment), want)


def _patterns(n, rng):
    ramp = torch.arange(n, dtype=torch.float32)
    sawtooth = (ramp % 37) - (ramp % 5)
    noisy = torch.randn(n, generator=rng)
    return {
        "constant": torch.zeros(n),
        "rising_ramp": ramp,
        "falling_ramp": -ramp,
        "sawtooth": sawtooth,
        "random": noisy,
        "random_with_ties": (noisy * 2).round(),
        "all_nan": torch.full((n,), float("nan")),
        "all_infinite": torch.full((n,), float("inf")),
        "one_candidate": torch.where(ramp == n // 2, 1.0, -torch.inf),
    }


@pytest.mark.parametrize("pattern", sorted(_patterns(4, torch.Generator())))
@pytest.mark.parametrize("length", [1, 9, 10, 63, 64, 65, 1000, 4097])
@pytest.mark.parametrize(
    ("max_chunks", "radius", "segment"), [(1, 8, 0), (40, 8, 0), (5000, 8, 0), (64, 0, 0), (9, 3, 128), (16, 8, 256)]
)
def test_ramps_constants_and_ties(ops, rng, pattern, length, max_chunks, radius, segment):
    scores = _patterns(length, rng)[pattern][None]
    want = reference.select_boundaries(scores, max_chunks, radius, None, segment)
    same_integers(ops.select_boundaries(scores, max_chunks, radius, None, segment), want)


@pytest.mark.parametrize("length", [0, 1, 7, 8, 9])
def test_short_row_is_one_chunk(run, length):
    offsets, count = run.select_boundaries(torch.zeros(2, length), 5, 8)
    assert offsets.shape == (2, 6) and count.tolist() == [min(length, 1)] * 2
    assert offsets.tolist() == [[0] + [length] * 5] * 2


def test_negative_zero_ties_with_zero(run):
    """If -0 ranked below 0, token 12 would win over token 10."""
    scores = torch.full((1, 24), -5.0)
    scores[0, 10], scores[0, 12] = -0.0, 0.0
    offsets, _ = run.select_boundaries(scores, 2, 4, None, 0)
    assert offsets.tolist() == [[0, 10, 24]]


def test_threshold_is_compared_as_float32(run):
    """0.1 as float32 is above 0.1 as float64: a score of float32(0.1) is <= the threshold 0.1 and no candidate."""
    scores = torch.full((1, 30), 0.1)
    assert run.select_boundaries(scores, 4, 2, 0.1, 0)[1].tolist() == [1]
    above = torch.nextafter(scores, torch.tensor(1.0))
    assert run.select_boundaries(above, 4, 2, 0.1, 0)[1].tolist() == [4]


def test_plus_infinity_is_a_score_like_any_other(run):
    scores = torch.zeros(1, 40)
    scores[0, 20] = torch.inf
    assert run.select_boundaries(scores, 2, 3)[0].tolist() == [[0, 20, 40]]


@given(data=st.data(), radius=st.integers(0, 6), max_chunks=st.integers(1, 12))
def test_no_chunk_is_shorter_than_the_radius_but_at_a_forced_cut(run, data, radius, max_chunks):
    length, segment = data.draw(st.integers(1, 80)), data.draw(st.sampled_from([0, 20, 31]))
    scores = torch.tensor([data.draw(st.lists(SCORE, min_size=length, max_size=length))])
    offsets, count = run.select_boundaries(scores, max_chunks, radius, None, segment)
    cuts = offsets[0, : count[0] + 1].tolist()
    assert cuts[0] == 0 and cuts[-1] == length and cuts == sorted(set(cuts))
    forced = {0, length} | set(range(0, length, segment or length))
    for begin, end in itertools.pairwise(cuts):
        assert end - begin > radius or {begin, end} <= forced


@pytest.mark.parametrize("pieces", [[32], [32, 64], [96, 32]])
def test_prefill_in_whole_segments_agrees_with_one_prefill(run, rng, pieces):
    scores = torch.randn(1, 32 * 5 + 11, generator=rng)
    whole, count = run.select_boundaries(scores, 4, 3, None, 32)
    whole = whole[0, : count[0] + 1].tolist()
    done = 0
    for piece in pieces:
        done += piece
        part, n = run.select_boundaries(scores[:, :done].contiguous(), 4, 3, None, 32)
        assert part[0, : n[0] + 1].tolist() == [cut for cut in whole if cut <= done]


def test_rows_of_a_batch_do_not_mix(run, rng):
    scores = torch.randn(4, 300, generator=rng)
    offsets, counts = run.select_boundaries(scores, 30, 4)
    for b in range(4):
        one, count = run.select_boundaries(scores[b : b + 1], 30, 4)
        assert torch.equal(one[0], offsets[b]) and count[0] == counts[b]


def test_capacity_of_the_last_segment_is_its_share():
    assert brute.select_boundaries(np.zeros((1, 25)), 8, 0, None, 10)[0].shape == (1, 8 + 8 + 4 + 1)
    assert reference.select_boundaries(torch.zeros(1, 25), 8, 0, None, 10)[0].shape == (1, 21)
    assert reference.select_boundaries(torch.zeros(1, 21), 4, 0, None, 10)[0].shape == (1, 4 + 4 + 1 + 1)
