"""When two answers are the same: the specification's tolerances and where they come from.

Attention, relative in the norm. The output is rounded to q's type once (unit roundoff u: 6e-8 in float32, 4.9e-4 in
float16, 3.9e-3 in bfloat16), and on tensor cores the probabilities once more; both errors are random, so the relative
norm of their sum is about sqrt(2 / 3) u: 4e-4 and 3.2e-3. The limits 2e-3 and 1e-2 leave three to five times that;
float32's 1e-5 leaves room for sums of a thousand terms and a polynomial exp.
lse is a float32 sum of exps of float32 logits: absolute, 1e-4 covers logits of a hundred (u * 100 = 6e-6) and the exp.
Half types get 1e-2 and 2e-2, since a backend may sum probabilities as rounded.
Scores and pooled vectors are float32 sums of at most a few thousand products: 1e-4 + 1e-4 |ref| is some hundred times
their rounding, and less than half what a plain TF32 product would lose.
"""

from __future__ import annotations

import itertools

import numpy as np
import torch

from dhsa_ext import reference

ATTENTION = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
LSE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 2e-2}
NEAR_CUT = 1e-4  # times the block's largest score: keys this close to the cut-off may go either way


def as_tensor(x) -> torch.Tensor:
    return torch.from_numpy(np.asarray(x)) if not isinstance(x, torch.Tensor) else x


def same_scores(got, want, what="scores"):
    """|x - ref| <= 1e-4 + 1e-4 |ref|, infinities in the same places."""
    got, want = as_tensor(got), as_tensor(want)
    assert got.dtype == torch.float32, f"{what}: float32 expected, got {got.dtype}"
    assert got.shape == want.shape, f"{what}: shape {tuple(got.shape)}, expected {tuple(want.shape)}"
    torch.testing.assert_close(got.double(), want.double(), rtol=1e-4, atol=1e-4, msg=lambda m: f"{what}: {m}")


def same_integers(got, want):
    """Bit for bit: types, shapes, padding."""
    assert len(got) == len(want)
    for g, w in zip(got, want, strict=True):
        w = as_tensor(w)
        assert g.dtype == w.dtype == torch.int32 and g.shape == w.shape, (
            f"{g.dtype} {g.shape} against {w.dtype} {w.shape}"
        )
        differ = (g != w).nonzero()
        assert len(differ) == 0, f"{len(differ)} entries differ, first at {differ[0].tolist()}:\n{g}\n{w}"


def relative_error(got, want) -> float:
    want = want.double()
    return float((got.double() - want).norm() / want.norm().clamp_min(1e-30))


def same_attention(got, want, dtype, rows=None):
    """(out, lse) against (out, lse), on the rows [B, H, Lq] that a mask names or on all."""
    (out, lse), (want_out, want_lse) = got, (as_tensor(w) for w in want)
    assert out.dtype == dtype and lse.dtype == torch.float32
    assert out.shape == want_out.shape and lse.shape == want_lse.shape
    rows = torch.ones_like(lse, dtype=torch.bool) if rows is None else rows.expand_as(lse)
    out, want_out, lse, want_lse = out[rows], want_out[rows], lse[rows].double(), want_lse[rows].double()
    empty = want_lse == -torch.inf
    assert torch.equal(lse == -torch.inf, empty), "lse: -inf in other rows than the reference"
    assert (out[empty] == 0).all(), "out: a row without a key must be 0"
    error = relative_error(out, want_out)
    assert error <= ATTENTION[dtype], f"out: relative error {error:.2e} over {ATTENTION[dtype]:.0e}"
    if (~empty).any():
        worst = float((lse[~empty] - want_lse[~empty]).abs().max())
        assert worst <= LSE[dtype], f"lse: off by {worst:.2e}, over {LSE[dtype]:.0e}"


def keys_of(runs, count) -> set[int]:
    return {j for start, end in runs[: int(count)].tolist() for j in range(start, end)}


def canonical(runs, num_runs, k_len):
    """Rising, disjoint, merged, inside [0, Lk), zeros after the count."""
    for where in np.ndindex(*num_runs.shape):
        count = int(num_runs[where])
        assert 0 <= count <= runs.shape[-2]
        assert (runs[where][count:] == 0).all(), "entries after num_runs must be 0"
        edges = runs[where][:count].flatten().tolist()
        assert all(a < b for a, b in itertools.pairwise(edges)), f"not rising, disjoint and merged: {edges}"
        assert not edges or (edges[0] >= 0 and edges[-1] <= k_len)


def settled(scores: torch.Tensor, kept: set[int], candidates: set[int], size: float | None = None) -> bool:
    """Whether no key outside the cut-off chunk scores within NEAR_CUT of it: then every backend keeps the same keys.

    scores [Lk] are token scores of one block (chunks show as equal scores), kept and candidates unforced keys.
    """
    rest = candidates - kept
    if not kept or not rest:
        return True
    cut = min(float(scores[j]) for j in kept)
    near = NEAR_CUT * max(abs(float(scores[j])) for j in candidates) if size is None else size
    return all(float(scores[j]) == cut or abs(float(scores[j]) - cut) > near for j in candidates)


def token_share(q, k, row_lse, first, last, *, q_stride, rows, scale, softcap):
    """[Lk] float64 of one block and one list: the mean over its rows and heads of min(1, exp(s - row_lse)).

    q [heads, Lq, D] and row_lse [heads, rows] of the heads that share the list, k [heads, Lk, D] what each one reads.
    """
    known = reference.block_rows(q, first, last, q_stride, rows).double()
    logits = scale * known @ k.double().mT
    logits = softcap * torch.tanh(logits / softcap) if softcap else logits
    return (logits - row_lse[:, : known.shape[1], None].double()).exp().clamp(max=1).mean((0, 1))
