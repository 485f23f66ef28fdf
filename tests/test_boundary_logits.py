"""The learned detector: torch's own nn modules, one window at a time, against the op."""

import pytest
import torch
from cases import DTYPES, rand
from hypothesis import given
from hypothesis import strategies as st
from torch import nn


def predictor(width, num_heads, gated, seed=0):
    torch.manual_seed(seed)
    attention = nn.MultiheadAttention(width, num_heads, batch_first=True)
    nn.init.normal_(attention.in_proj_bias, std=0.1)
    nn.init.normal_(attention.out_proj.bias, std=0.1)
    norm = nn.LayerNorm(width)
    nn.init.normal_(norm.weight, 1, 0.1)
    nn.init.normal_(norm.bias, std=0.1)
    gate = nn.Linear(width, 1) if gated else None
    return attention, norm, gate, nn.Linear(4 * width + 1, 256), nn.Linear(256, 1)


def weights(parts):
    attention, norm, gate, fc1, fc2 = parts
    tensors = [attention.in_proj_weight, attention.in_proj_bias, attention.out_proj.weight, attention.out_proj.bias]
    tensors += [norm.weight, norm.bias, gate.weight if gate else None, gate.bias if gate else None]
    tensors += [fc1.weight, fc1.bias, fc2.weight, fc2.bias]
    return [None if t is None else t.detach() for t in tensors]


@torch.no_grad()
def by_hand(k, parts, window):
    attention, norm, gate, fc1, fc2 = parts
    batch, heads, length, _dim = k.shape
    logits = torch.full((batch, length), -torch.inf)
    for b in range(batch):
        x = torch.cat([k[b, h] for h in range(heads)], -1)
        for t in range(window, length - window + 1):
            tokens = x[None, t - window : t + window]
            mixed = norm(attention(tokens, tokens, tokens, need_weights=False)[0])[0]
            sides = []
            for half in (mixed[:window], mixed[window:]):
                share = gate(half).softmax(0) if gate else torch.full((window, 1), 1 / window)
                sides.append((share * half).sum(0))
            left, right = sides
            cosine = torch.cosine_similarity(left, right, 0)[None]
            logits[b, t] = fc2(fc1(torch.cat([left, right, (left - right).abs(), left * right, cosine])).relu())
    return logits


@given(
    length=st.integers(0, 20),
    window=st.integers(1, 5),
    heads=st.integers(1, 2),
    gated=st.booleans(),
    num_heads=st.sampled_from([1, 2, 8]),
)
def test_any_shape_equals_the_modules(run, length, window, heads, gated, num_heads):
    dim = run.head_dims[0] if run.name == "cuda" else 16
    parts = predictor(heads * dim, num_heads, gated)
    k = rand(torch.Generator().manual_seed(length), 2, heads, length, dim)
    got = run.boundary_logits(k, *weights(parts), num_heads, window)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, by_hand(k, parts, window), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_key_types(run, rng, dtype):
    parts = predictor(128, 8, True)
    k = rand(rng, 1, 2, 40, 64, dtype=dtype)
    got = run.boundary_logits(k, *weights(parts), 8)
    torch.testing.assert_close(got, by_hand(k.float(), parts, 4), rtol=1e-4, atol=1e-4)


def test_long_sequence_is_worked_in_pieces(run, rng):
    """More cuts than one slab holds: the seams between slabs must not show."""
    parts = predictor(64, 8, False)
    k = rand(rng, 1, 1, 1100, 64)
    got = run.boundary_logits(k, *weights(parts), 8)
    for begin in (0, 1000, 1020):
        part = run.boundary_logits(k[:, :, begin : begin + 60], *weights(parts), 8)
        inside = slice(4, min(60, 1100 - begin) - 3)
        torch.testing.assert_close(got[:, begin:][:, inside], part[:, inside], rtol=1e-4, atol=1e-4)
