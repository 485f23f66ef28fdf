"""sparse_decode: a few new queries over a cache whose chunks are known, each its own block."""

import pytest
import torch
import torch.nn.functional as F
from cases import DTYPES, Case, chunks, heads_last, params, qkv, rand
from compare import same_attention
from pipeline import comparable, whole

from dhsa_ext import reference

BASE = dict(Lk=300, q_block=1, budget=60, sink=4, local=16)
CACHES = (
    Case("one_query", "the usual step", Lq=1, **BASE),
    Case("one_list_for_all", "S = 1", Lq=1, S=1, **BASE),
    Case("list_per_query_head", "S = H", Lq=1, S=4, **BASE),
    Case("five_queries", "speculative decoding", Lq=5, **BASE),
    Case("sixteen_queries", "as many as are taken", Lq=16, **BASE),
    Case("no_query", "Lq = 0", Lq=0, **BASE),
    Case("batch_of_three", "rows with chunks of their own", Lq=2, B=3, **BASE),
    Case("head_dim_128", "the common one", Lq=1, D=128, **BASE),
    Case("head_dim_256", "Gemma's", Lq=2, D=256, softcap=20.0, **BASE),
    Case("head_dim_96", "no power of two", Lq=1, D=96, **BASE),
    Case("head_dim_40", "vector tails", Lq=1, D=40, **BASE),
    Case("group_of_eight", "24 rows share a list", Lq=3, H=16, Hkv=2, **BASE),
    Case("mqa", "one KV head", Lq=1, Hkv=1, S=1, **BASE),
    Case("window", "a sliding window", Lq=4, window=50, **BASE),
    Case("softcap", "squeezed logits", Lq=4, softcap=3.0, scale=0.5, **BASE),
    Case("long_cache", "a cache that is split over keys", Lq=2, **(BASE | dict(Lk=3000, budget=400))),
    Case("budget_at_bound", "nothing to choose", Lq=2, **(BASE | dict(budget=20))),
    Case("first_token", "a cache of one key", Lq=1, **(BASE | dict(Lk=1))),
)
CACHE = pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in CACHES])
MODES = {
    "dot": dict(score="dot", refine=0),
    "dot_refined": dict(score="dot", refine=3),
    "mass": dict(score="mass", refine=0),
    "accurate": dict(score="mass", refine=4),
}


def decode(runner, case, q, k, v, offsets, counts, mode, **more):
    pooled = reference.chunk_pool(k, offsets, counts, case.S, "mean" if mode["score"] == "mass" else "sqrt")
    options = dict(sink=case.sink, local=case.local, scale=case.scale, softcap=case.softcap, window=case.window, **mode)
    return runner.sparse_decode(q, k, v, pooled, offsets, counts, case.budget, **options | more)


@pytest.mark.parametrize("mode", MODES)
@CACHE
def test_caches_against_the_stages(ops, rng, case, mode):
    if ops.name == "cuda" and case.D == 40:
        pytest.skip("CUDA takes head_dim 64, 96, 128, 256")
    dtype = DTYPES[len(case.name + mode) % 3]

    def draw():
        q, k, v = qkv(case, rng, dtype, heads_last)
        offsets, counts = chunks(rng, case.B, case.k_len, covered=case.k_len - case.k_len // 10)
        return (q, k, v, offsets, counts), *whole(q, k, v, offsets, counts, case, q_stride=1, **MODES[mode])

    inputs, want, clear = comparable(draw)
    same_attention(decode(ops, case, *inputs, MODES[mode]), want, dtype, clear)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_several_queries_equal_one_by_one(ops, rng, mode, dtype):
    case = Case("steps", "", Lq=7, **BASE)
    q, k, v = qkv(case, rng, dtype)
    offsets, counts = chunks(rng, 1, 300, covered=290)
    together = decode(ops, case, q, k, v, offsets, counts, MODES[mode])
    for i in range(7):
        length = 300 - 7 + i + 1
        one = decode(ops, case, q[:, :, i : i + 1], k[:, :, :length], v[:, :, :length], offsets, counts, MODES[mode])
        same_attention(one, tuple(x[:, :, i : i + 1] for x in together), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_budget_over_the_length_equals_dense_sdpa(ops, rng, mode, dtype):
    case = Case("dense", "", Lq=3, **(BASE | dict(budget=300)))
    q, k, v = qkv(case, rng, dtype)
    out, _ = decode(ops, case, q, k, v, *chunks(rng, 1, 300), MODES[mode])
    mask = torch.ones(3, 300, dtype=torch.bool).tril(297)
    want = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), attn_mask=mask, enable_gqa=True)
    limit = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
    assert (out.double() - want).norm() / want.norm() <= limit


def test_open_tail_is_always_kept(run, rng):
    """Chunks end at 100 of 130 keys: with one value everywhere else, only a kept tail moves the output."""
    case = Case("tail", "", Lq=1, H=1, Hkv=1, S=1, **(BASE | dict(Lk=130, budget=20)))
    q, k, v = qkv(case, rng)
    offsets, counts = chunks(rng, 1, 130, covered=100)
    before = decode(run, case, q, k, v, offsets, counts, MODES["dot"])[0]
    for j in (100, 113):
        moved = v.clone()
        moved[0, 0, j] += 10
        assert not torch.allclose(decode(run, case, q, k, moved, offsets, counts, MODES["dot"])[0], before, atol=1e-3)


def test_cache_without_a_chunk_is_all_tail(run, rng):
    case = Case("no_chunk", "", Lq=2, **(BASE | dict(Lk=40, budget=25)))
    q, k, v = qkv(case, rng)
    offsets, counts = torch.zeros(1, 6, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    out, _ = decode(run, case, q, k, v, offsets, counts, MODES["dot"])
    mask = torch.ones(2, 40, dtype=torch.bool).tril(38)
    want = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    assert torch.allclose(out, want, atol=1e-5)


@pytest.mark.parametrize("mode", ["dot", "mass"])
def test_unused_chunk_columns_are_ignored(ops, rng, mode):
    """A ChunkIndex hands over columns with room to grow: what stands there must not matter."""
    case = Case("room", "", Lq=2, **BASE)
    q, k, v = qkv(case, rng)
    offsets, counts = chunks(rng, 1, 300)
    want = decode(ops, case, q, k, v, offsets, counts, MODES[mode])
    wide = torch.cat([offsets, torch.full((1, 40), 300, dtype=torch.int32)], 1)
    pooled = reference.chunk_pool(k, wide, counts, 2, "mean" if mode == "mass" else "sqrt")
    pooled[:, :, int(counts[0]) :] = float("nan")
    got = ops.sparse_decode(q, k, v, pooled, wide, counts, 60, sink=4, local=16, **MODES[mode])
    same_attention(got, want, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cache_view_longer_than_its_tokens(ops, rng, dtype):
    """K and v are the first 300 rows of a larger buffer, as a static cache hands them over."""
    case = Case("view", "", Lq=1, **BASE)
    q, k, v = qkv(case, rng, dtype)
    room_k, room_v = (rand(rng, 1, 2, 512, 64, dtype=dtype) for _ in range(2))
    room_k[:, :, :300], room_v[:, :, :300] = k, v
    offsets, counts = chunks(rng, 1, 300)
    one = decode(ops, case, q, k, v, offsets, counts, MODES["dot"])
    two = decode(ops, case, q, room_k[:, :, :300], room_v[:, :, :300], offsets, counts, MODES["dot"])
    assert torch.equal(one[0], two[0]) and torch.equal(one[1], two[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("more", [{}, dict(window=90), dict(softcap=4.0, S=1)], ids=["plain", "window", "softcap"])
def test_cache_seqlens_equal_caches_of_those_lengths(ops, rng, mode, dtype, more):
    """Rows of 0, 2, 130 and 300 of 300 keys, two new queries: what lies past them, NaN here, is not read."""
    case = Case("ragged", "", Lq=2, **(BASE | dict(B=4) | more))
    q, k, v = qkv(case, rng, dtype)
    held = torch.tensor([0, 2, 130, 300], dtype=torch.int32)
    offsets, counts = chunks(rng, 4, 300, covered=290)
    offsets = torch.minimum(offsets, held[:, None])
    pooled = reference.chunk_pool(k, offsets, counts, case.S, "mean" if MODES[mode]["score"] == "mass" else "sqrt")
    for b, n in enumerate(held.tolist()):
        k[b, :, n:], v[b, :, n:] = float("nan"), float("nan")
    options = dict(sink=4, local=16, window=case.window, softcap=case.softcap, **MODES[mode])
    out, lse = ops.sparse_decode(q, k, v, pooled, offsets, counts, 60, cache_seqlens=held, **options)
    for b, n in enumerate(held.tolist()):
        row = slice(b, b + 1)
        cache = (k[row, :, :n], v[row, :, :n], pooled[row], offsets[row], counts[row])
        same_attention((out[row], lse[row]), ops.sparse_decode(q[row], *cache, 60, **options), dtype)


@pytest.mark.parametrize("held, meant", [(-5, 0), (2**31 - 1, 300)])
def test_cache_seqlens_out_of_range_are_clamped(run, rng, held, meant):
    case = Case("clamped", "", Lq=1, **BASE)
    q, k, v = qkv(case, rng)
    given = chunks(rng, 1, 300)
    one, two = (
        decode(run, case, q, k, v, *given, MODES["accurate"], cache_seqlens=torch.tensor([n], dtype=torch.int32))
        for n in (held, meant)
    )
    assert torch.equal(one[0], two[0]) and torch.equal(one[1], two[1])


def test_decode_equals_prefill_with_blocks_of_one(ops, rng):
    if ops.name == "cuda":
        pytest.skip("CUDA takes q_block 1 in decode only")
    case = Case("both", "", Lq=6, **BASE)
    q, k, v = qkv(case, rng)
    offsets, counts = chunks(rng, 1, 300)
    given = dict(offsets=offsets, num_chunks=counts, sink=4, local=16)
    prefill = ops.sparse_prefill(q, k, v, 60, q_block=1, **given)
    same_attention(decode(ops, case, q, k, v, offsets, counts, MODES["dot"]), prefill, torch.float32)


def test_every_case_has_its_reason():
    assert all(case.values[0].reason for case in params())
