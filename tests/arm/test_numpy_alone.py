"""The NumPy module where there is no torch, against float64 NumPy: what run_arm_python.sh runs on a Cortex-A72.

torch's own wheel for ARM64 ends there in an illegal instruction as it is imported, so that nothing here may need it.
"""

import numpy as np
import pytest

dhsa = pytest.importorskip("dhsa_ext.numpy", reason="the NumPy module was not built")

HEADS, KV_HEADS, LENGTH, HEAD_DIM = 4, 2, 150, 40
# Error of an output row over its norm, and of lse: SPEC, "How backends are compared".
BOUNDS = {"float32": (1e-5, 1e-4), "float16": (2e-3, 1e-2), "bfloat16": (1e-2, 2e-2)}
types = pytest.mark.parametrize("dtype", BOUNDS)


def stored(x, dtype):
    """X as the module takes it, and the numbers that it then holds."""
    if dtype != "bfloat16":
        x = x.astype(dtype)
        return x, x.astype(np.float64)
    bits = (x.astype(np.float32).view(np.uint32) + 0x8000 >> 16).astype(np.uint16)
    return bits, numbers(bits)


def named(dtype):
    """The argument that says so where an array's own type cannot."""
    return {"dtype": dtype} if dtype == "bfloat16" else {}


def numbers(x):
    """Of an answer; bfloat16 comes as its bits."""
    return (x.astype(np.uint32) << 16).view(np.float32).astype(np.float64) if x.dtype == np.uint16 else x


def problem(dtype, queries):
    rng = np.random.default_rng(queries)
    draws = (
        rng.standard_normal((1, h, n, HEAD_DIM)) for h, n in ((HEADS, queries), (KV_HEADS, LENGTH), (KV_HEADS, LENGTH))
    )
    return zip(*(stored(x, dtype) for x in draws), strict=True)


def attend(q, k, v, kept):
    """Out and lse over kept[h, i, j], causal, in float64."""
    k, v = (np.repeat(x, HEADS // KV_HEADS, axis=1)[0] for x in (k, v))
    position = np.arange(q.shape[2])[:, None] + LENGTH - q.shape[2]
    logits = np.where(kept & (np.arange(LENGTH) <= position), q[0] @ k.transpose(0, 2, 1) / np.sqrt(HEAD_DIM), -np.inf)
    lse = np.logaddexp.reduce(logits, axis=-1)
    return np.exp(logits - lse[..., None]) @ v, lse


def assert_close(answer, expected, dtype):
    (out, lse), (want, want_lse) = answer, expected
    error = np.linalg.norm(numbers(out)[0] - want, axis=-1) / np.linalg.norm(want, axis=-1)
    assert error.max() < BOUNDS[dtype][0]
    assert np.abs(lse[0] - want_lse).max() < BOUNDS[dtype][1]


@types
@pytest.mark.parametrize("queries", [1, 37])
def test_attention_over_runs(dtype, queries):
    arrays, exact = problem(dtype, queries)
    ends = np.array([[0, 3], [5, 30], [64, 97], [110, LENGTH]], np.int32)
    runs = np.stack([ends, ends - [[0, 1]]]).astype(np.int32).reshape(1, KV_HEADS, 1, 4, 2)
    kept = np.zeros((HEADS, queries, LENGTH), bool)
    for h in range(HEADS):
        for begin, end in runs[0, h * KV_HEADS // HEADS, 0]:
            kept[h, :, begin:end] = True
    counts = np.full((1, KV_HEADS, 1), 4, np.int32)
    answer = dhsa.sparse_attention(*arrays, runs, counts, q_block=queries, return_lse=True, **named(dtype))
    assert_close(answer, attend(*exact, kept), dtype)


@types
def test_prefill_that_keeps_everything_is_dense(dtype):
    arrays, exact = problem(dtype, LENGTH)
    answer = dhsa.sparse_prefill(*arrays, LENGTH, return_lse=True, **named(dtype))
    assert_close(answer, attend(*exact, np.ones((HEADS, LENGTH, LENGTH), bool)), dtype)


@types
def test_decode_that_keeps_everything_is_dense(dtype):
    (q, k, v), exact = problem(dtype, 3)
    offsets, num_chunks = dhsa.select_boundaries(dhsa.boundary_scores(k, **named(dtype)), max_chunks=9)
    pooled = dhsa.chunk_pool(k, offsets, num_chunks, KV_HEADS, **named(dtype))
    answer = dhsa.sparse_decode(q, k, v, pooled, offsets, num_chunks, LENGTH, return_lse=True, **named(dtype))
    assert_close(answer, attend(*exact, np.ones((HEADS, 3, LENGTH), bool)), dtype)


@types
@pytest.mark.parametrize("score", ["dot", "mass"])
def test_any_number_of_threads_gives_the_same_bits(dtype, score):
    arrays, _ = problem(dtype, LENGTH)
    choice = dict(score=score, refine=2 * (score == "mass"), sink=4, local=8, q_block=16, **named(dtype))
    one, three = (dhsa.sparse_prefill(*arrays, 48, threads=n, **choice) for n in (1, 3))
    assert one.tobytes() == three.tobytes()
