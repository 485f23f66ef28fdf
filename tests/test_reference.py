"""The reference's whole calls against the brute-force stages, and when it is what runs.

Each test_<stage>.py holds the reference's stage against tests/brute.py; here are the compositions.
"""

import os
import subprocess
import sys
from pathlib import Path

import brute
import pytest
import torch
from cases import Case, chunks, qkv
from hypothesis import given
from hypothesis import strategies as st

from dhsa_ext import reference
from dhsa_ext.backend import LIBRARY

MODES = st.sampled_from([("dot", "sqrt", 0), ("dot", "mean", 2), ("mass", "sqrt", 0), ("mass", "mean", 3)])


def brute_prefill(q, k, v, case, score, pool, refine, q_stride, rows, strict, offsets, counts):
    """Stages 3 to 7 of the specification, every block as a call of its own."""
    out, lse = q * 0.0, (q * 0.0).sum(-1)
    logits = dict(scale=case.scale, softcap=case.softcap)
    choice = dict(sink=case.sink, local=case.local, window=case.window)
    for _, first, last, _, p1 in brute.blocks(case.Lq, case.k_len, case.q_block):
        block, n_rows = slice(first, last + 1), last + 1 - first
        seen_q, seen_k, seen_v = q[:, :, block], k[:, :, : p1 + 1], v[:, :, : p1 + 1]
        ends = offsets.copy(), counts.copy()
        if strict:
            for b in range(len(counts)):
                ends[0][b], ends[1][b] = brute.strict_chunks(offsets[b], counts[b], p1)
        pooled = brute.chunk_pool(k, *ends, case.S, "mean" if score == "mass" else pool)
        row_lse = None
        if score == "mass":
            scores, row_lse = brute.chunk_mass(
                seen_q, pooled, *ends, p1 + 1, n_rows, q_stride, rows=rows, window=case.window, **logits
            )
        else:
            scores = brute.chunk_scores(brute.query_pool(seen_q, case.S, n_rows, "sqrt"), pooled)
        tail = choice | dict(dense_tail=max(0, case.dense_tail - (case.Lq - 1 - last)))
        clipped = offsets.clip(max=p1 + 1)
        counts_seen = (clipped[:, 1:] > clipped[:, :-1]).sum(1)
        if refine:
            args = (seen_q, seen_k, scores, row_lse, clipped, counts_seen, n_rows, case.budget, refine)
            runs, n = brute.refine_keys(*args, q_stride=q_stride, rows=rows, **tail, **logits)
        else:
            runs, n = brute.select_keys(scores, clipped, counts_seen, n_rows, p1 + 1, n_rows, case.budget, **tail)
        out[:, :, block], lse[:, :, block] = brute.sparse_attention(
            seen_q, seen_k, seen_v, runs, n, n_rows, window=case.window, **logits
        )
    return out, lse


@given(data=st.data(), mode=MODES, strict=st.booleans(), own=st.booleans())
def test_prefill_equals_the_brute_force_stages(data, mode, strict, own):
    q_len = data.draw(st.integers(1, 18))
    k_len = q_len + data.draw(st.integers(0, 16))
    score, pool, refine = mode
    q_block, sink, local = data.draw(st.integers(1, 9)), data.draw(st.integers(0, 3)), data.draw(st.integers(1, 4))
    case = Case(
        "drawn",
        "",
        B=data.draw(st.integers(1, 2)),
        Lq=q_len,
        Lk=k_len,
        H=4,
        Hkv=2,
        S=data.draw(st.sampled_from([1, 2, 4])),
        D=8,
        q_block=q_block,
        sink=sink,
        local=local,
        budget=sink + local + q_block + data.draw(st.integers(0, 9)),
        window=data.draw(st.sampled_from([None, None, 7])),
        softcap=data.draw(st.sampled_from([0.0, 4.0])),
        dense_tail=data.draw(st.sampled_from([0, 0, 3])),
    )
    rng = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
    q, k, v = (x.double() for x in qkv(case, rng))
    numbers = [x.numpy() for x in (q, k, v)]
    rows = data.draw(st.sampled_from(["sample", "mean"]))
    options = dict(score=score, pool=pool, refine=refine, q_stride=3, rows=rows, strict=strict)
    cut = dict(max_chunks=4, nms_radius=2, boundary_window=2)
    if own:
        scores = brute.boundary_scores(numbers[1], 2).astype("float32")
        offsets, counts = brute.select_boundaries(scores, 4, 2)
        options |= cut
    else:
        given_offsets, given_counts = chunks(rng, case.B, k_len, 4, covered=data.draw(st.integers(k_len // 2, k_len)))
        offsets, counts = given_offsets.numpy(), given_counts.numpy()
        options |= dict(offsets=given_offsets, num_chunks=given_counts)
    out, lse = reference.sparse_prefill(
        q, k, v, case.budget, q_block=q_block, select_heads=case.S, sink=sink, local=local, dense_tail=case.dense_tail,
        window=case.window, softcap=case.softcap, **options,
    )  # fmt: skip
    want = brute_prefill(*numbers, case, score, pool, refine, 3, rows, strict, offsets, counts)
    torch.testing.assert_close(out, torch.from_numpy(want[0]), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse.double(), torch.from_numpy(want[1]), rtol=1e-5, atol=1e-5)


@given(data=st.data(), mode=MODES)
def test_decode_equals_the_brute_force_stages(data, mode):
    q_len = data.draw(st.integers(1, 4))
    k_len = q_len + data.draw(st.integers(0, 30))
    score, _, refine = mode
    pool = "mean" if score == "mass" else "sqrt"
    case = Case("drawn", "", Lq=q_len, Lk=k_len, S=data.draw(st.sampled_from([1, 2, 4])), D=8, q_block=1, budget=9)
    case = Case(**(case.__dict__ | dict(sink=2, local=3, window=data.draw(st.sampled_from([None, 8])))))
    rng = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
    q, k, v = (x.double() for x in qkv(case, rng))
    offsets, counts = chunks(rng, 1, k_len, 6, covered=data.draw(st.integers(0, k_len - q_len)))
    pooled = reference.chunk_pool(k, offsets, counts, case.S, pool)
    choose = dict(score=score, refine=refine, sink=2, local=3, window=case.window)
    out, lse = reference.sparse_decode(q, k, v, pooled, offsets, counts, 9, **choose)
    numbers = [x.numpy() for x in (q, k, v)]
    want = brute_prefill(*numbers, case, score, pool, refine, 1, "sample", False, offsets.numpy(), counts.numpy())
    torch.testing.assert_close(out, torch.from_numpy(want[0]), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse.double(), torch.from_numpy(want[1]), rtol=1e-5, atol=1e-5)


def fresh(code, **env):
    """Run code in a new interpreter, where the backend is chosen anew."""
    package = str(Path(LIBRARY).parents[1])
    env = {**os.environ, "PYTHONPATH": package + os.pathsep + os.environ.get("PYTHONPATH", ""), **env}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=120)


ONE_CALL = """
import torch, dhsa_ext
k = torch.randn(1, 1, 40, 64)
for _ in range(3):
    assert torch.equal(dhsa_ext.boundary_scores(k), dhsa_ext.reference.boundary_scores(k))
"""


def test_reference_backend_runs_and_says_so_once():
    ran = fresh(ONE_CALL, DHSA_BACKEND="reference")
    assert ran.returncode == 0, ran.stderr
    assert ran.stderr.count("dhsa::boundary_scores runs on the float64 Python reference") == 1


@pytest.mark.skipif(LIBRARY.exists(), reason="the native library is built: auto and native both take it")
def test_native_backend_without_its_library_is_refused():
    ran = fresh(ONE_CALL, DHSA_BACKEND="native")
    assert ran.returncode != 0 and "DHSA_BACKEND=native" in ran.stderr


@pytest.mark.skipif(not LIBRARY.exists(), reason="the native library is not built: run pip install -e .")
def test_native_backend_says_nothing():
    ran = fresh(ONE_CALL.replace("equal", "allclose"), DHSA_BACKEND="native")
    assert ran.returncode == 0 and "reference" not in ran.stderr, ran.stderr


def test_unknown_backend_is_refused():
    ran = fresh(ONE_CALL, DHSA_BACKEND="fastest")
    assert ran.returncode != 0 and "expected auto, native or reference, got 'fastest'" in ran.stderr


@pytest.mark.skipif(not LIBRARY.exists(), reason="the native library is not built: run pip install -e .")
def test_unknown_isa_is_refused():
    ran = fresh(ONE_CALL, DHSA_BACKEND="native", DHSA_FORCE_ISA="sse1")
    assert ran.returncode != 0 and "sse1" in ran.stderr
