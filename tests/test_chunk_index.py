"""ChunkIndex: cuts of the open tail against the rule written out, independence of how extend is split, errors."""

from __future__ import annotations

import math

import pytest
import torch

from dhsa_ext import ops
from dhsa_ext.chunk_index import ChunkIndex


def topical_keys(batch: int, heads: int, length: int, dim: int, seed: int, mean_topic: int = 14) -> torch.Tensor:
    """Keys whose direction changes every few tokens, so that the detector has something to find."""
    g = torch.Generator().manual_seed(seed)
    topic = (torch.rand(batch, length, generator=g) < 1 / mean_topic).cumsum(1)
    directions = torch.randn(batch, heads, length + 1, dim, generator=g)
    index = topic[:, None, :, None].expand(batch, heads, length, dim)
    return directions.gather(2, index) + 0.3 * torch.randn(batch, heads, length, dim, generator=g)


def expected_tail_cuts(k: torch.Tensor, prefix: int, nms_radius: int, window: int, chunk_size: int) -> list[int]:
    """The cuts after `prefix` of one row k [1, Hkv, L, D], by the rule of the SPEC."""
    scores = ops.boundary_scores(k, window)[0]
    prefill_scores = ops.boundary_scores(k[:, :, :prefix], window)
    offsets, num_chunks = ops.select_boundaries(prefill_scores, max(1, prefix // chunk_size), nms_radius)
    accepted = prefill_scores[0, offsets[0, 1 : int(num_chunks[0])].long()]
    bar = accepted.min().item() if accepted.numel() else math.inf
    cuts, start = [], prefix
    for t in range(prefix, k.shape[2] - window + 1):
        cut = t - start > nms_radius and scores[t].item() > bar
        if cut or t - start == 64:
            cuts.append(t)
            start = t
    return cuts


def state(index: ChunkIndex) -> list[torch.Tensor]:
    width = int(index.num_chunks.max())
    return [index.num_chunks, index.offsets[:, : width + 1], index.sums[:, :, :width], index.pooled[:, :, :width]]


@pytest.mark.parametrize("prefix", [0, 1, 7, 40, 150])
@pytest.mark.parametrize("nms_radius, window", [(8, 4), (0, 1), (3, 6), (63, 4)])
def test_tail_is_cut_by_the_rule(prefix, nms_radius, window):
    k = topical_keys(2, 2, prefix + 260, 8, seed=prefix)
    index = ChunkIndex(2, "mean", nms_radius=nms_radius, boundary_window=window)
    index.prefill(k[:, :, :prefix])
    prefill_chunks = index.num_chunks.tolist()
    index.extend(k[:, :, prefix:])
    for row in range(2):
        cuts = expected_tail_cuts(k[row : row + 1], prefix, nms_radius, window, 16)
        count = int(index.num_chunks[row])
        assert index.offsets[row, prefill_chunks[row] : count + 1].tolist() == [prefix, *cuts]
        assert set(index.offsets[row, count:].tolist()) == {([prefix, *cuts])[-1]}


@pytest.mark.parametrize("heads, scale", [(1, "sqrt"), (2, "mean"), (4, "sum")])
def test_vectors_are_those_of_chunk_pool(heads, scale):
    k = topical_keys(2, 2, 300, 8, seed=5)
    index = ChunkIndex(heads, scale)
    index.prefill(k[:, :, :120])
    index.extend(k[:, :, 120:])
    for got, how in ((index.pooled, scale), (index.sums, "sum")):
        expected = ops.chunk_pool(k, index.offsets, index.num_chunks, heads, how)
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)  # one float32 rounding of the same sum


@pytest.mark.parametrize("seed", range(4))
def test_result_does_not_depend_on_the_split(seed):
    k = topical_keys(2, 1, 400, 8, seed=seed).to(torch.bfloat16 if seed % 2 else torch.float32)
    g = torch.Generator().manual_seed(seed)
    whole = ChunkIndex(1)
    whole.prefill(k[:, :, :100])
    whole.extend(k[:, :, 100:])
    pieces = ChunkIndex(1)
    pieces.prefill(k[:, :, :100])
    at = 100
    while at < 400:
        n = int(torch.randint(0, 3 if seed < 2 else 90, (1,), generator=g))
        pieces.extend(k[:, :, at : at + n])
        at = min(400, at + n)
    assert pieces.length == whole.length == 400
    for a, b in zip(state(whole), state(pieces), strict=True):
        assert torch.equal(a, b)


def test_constant_keys_close_at_64_tokens():
    k = torch.ones(1, 1, 300, 8)
    index = ChunkIndex(1)
    index.prefill(k[:, :, :10])  # one chunk: nothing was accepted, so the bar is +inf
    index.extend(k[:, :, 10:])
    assert index.offsets[0, : int(index.num_chunks[0]) + 1].tolist() == [0, 10, 74, 138, 202, 266]


def test_a_cut_waits_for_its_window():
    k = topical_keys(1, 1, 400, 8, seed=1)
    index = ChunkIndex(1)
    index.prefill(k[:, :, :200])
    for t in range(200, 400):
        before = int(index.num_chunks[0])
        index.extend(k[:, :, t : t + 1])
        if int(index.num_chunks[0]) > before:
            assert int(index.offsets[0, int(index.num_chunks[0])]) == t - 3  # key t is cut + window - 1
    assert int(index.num_chunks[0]) > 12


def test_open_tail_is_never_longer_than_its_bound():
    k = topical_keys(3, 1, 500, 8, seed=2, mean_topic=60)
    index = ChunkIndex(1)
    index.prefill(k[:, :, :64])
    for t in range(64, 500):
        index.extend(k[:, :, t : t + 1])
        tails = index.offsets.gather(1, index.num_chunks[:, None].long())
        assert int(index.length - tails.min()) <= 63 + 4


def test_given_boundaries_replace_the_cuts():
    k = topical_keys(1, 1, 120, 8, seed=3)
    offsets = torch.tensor([[0, 30, 90, 120, 120]], dtype=torch.int32)
    index = ChunkIndex(1)
    index.prefill(k, offsets, torch.tensor([3], dtype=torch.int32))
    assert torch.equal(index.offsets, offsets)
    index.extend(topical_keys(1, 1, 100, 8, seed=4))
    assert int(index.num_chunks[0]) > 3 and int(index.offsets[0, 3]) == 120


def test_segments_cut_a_prefix_as_they_cut_the_whole():
    k = topical_keys(2, 2, 200, 8, seed=3)
    whole, part = ChunkIndex(2, segment=64), ChunkIndex(2, segment=64)
    whole.prefill(k)
    part.prefill(k[:, :, :128])
    for row in range(2):
        cuts = whole.offsets[row, : int(whole.num_chunks[row]) + 1].tolist()
        assert {64, 128, 192, 200} <= set(cuts)
        assert part.offsets[row, : int(part.num_chunks[row]) + 1].tolist() == [cut for cut in cuts if cut <= 128]


def test_a_forced_cut_lowers_no_bar():
    """Constant keys have no accepted cut but at segments, so the tail is cut at its bound alone."""
    k = torch.ones(1, 1, 300, 8)
    index = ChunkIndex(1, segment=50, threshold=0.5)
    index.prefill(k[:, :, :100])
    index.extend(k[:, :, 100:])
    assert index.offsets[0, : int(index.num_chunks[0]) + 1].tolist() == [0, 50, 100, 164, 228, 292]


def test_prefill_starts_anew():
    k = topical_keys(1, 1, 200, 8, seed=6)
    used, fresh = ChunkIndex(1), ChunkIndex(1)
    used.prefill(topical_keys(2, 1, 90, 8, seed=7))
    used.extend(topical_keys(2, 1, 90, 8, seed=8))
    for index in (used, fresh):
        index.prefill(k[:, :, :100])
        index.extend(k[:, :, 100:])
    for a, b in zip(state(used), state(fresh), strict=True):
        assert torch.equal(a, b)


def test_decode_over_an_index_with_the_whole_budget_is_dense():
    k, v, q = topical_keys(2, 2, 150, 8, seed=9), torch.randn(2, 2, 150, 8), torch.randn(2, 4, 1, 8)
    index = ChunkIndex(2, "mean")
    index.prefill(k[:, :, :90])
    index.extend(k[:, :, 90:])
    out = ops.sparse_decode(q, k, v, index.pooled, index.offsets, index.num_chunks, 150, score="mass", refine=2)
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    torch.testing.assert_close(out, dense, rtol=1e-5, atol=1e-5)


def test_errors_name_the_argument():
    index = ChunkIndex(1)
    with pytest.raises(RuntimeError, match="expected a prefill before it"):
        index.extend(torch.zeros(1, 1, 1, 8))
    index.prefill(torch.zeros(1, 1, 20, 8))
    with pytest.raises(ValueError, match=r"k_new: expected \[1, 1, n, 8\], got \[2, 1, 1, 8\]"):
        index.extend(torch.zeros(2, 1, 1, 8))
    with pytest.raises(ValueError, match="both or neither"):
        index.prefill(torch.zeros(1, 1, 20, 8), torch.zeros(1, 2, dtype=torch.int32))
    with pytest.raises(NotImplementedError, match="prefill again"):
        index.crop(3)
    with pytest.raises(NotImplementedError, match="prefill again"):
        index.reorder(torch.tensor([0]))
    with pytest.raises(ValueError, match="nms_radius: expected 0 to 63, got 64"):
        ChunkIndex(1, nms_radius=64)
    with pytest.raises(ValueError, match="scale"):
        ChunkIndex(1, "max")
