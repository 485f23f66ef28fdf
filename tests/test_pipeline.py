"""sparse_prefill: every stage in one call, against the reference's stages put together block by block."""

import pytest
import torch
import torch.nn.functional as F
from cases import BY_NAME, DTYPES, Case, attention_options, choice_options, chunks, heads_last, on, params, qkv
from compare import same_attention
from pipeline import comparable, whole

import dhsa_ext
from dhsa_ext import reference

MODES = {
    "paper": dict(score="dot", pool="sqrt", refine=0),
    "mean_pool": dict(score="dot", pool="mean", refine=0),
    "sum_pool": dict(score="dot", pool="sum", refine=0),
    "dot_refined": dict(score="dot", pool="mean", refine=2),
    "mass": dict(score="mass", refine=0),
    "accurate": dict(score="mass", refine=4),
    "accurate_by_means": dict(score="mass", refine=4, q_stride=12, rows="mean"),
}


def options(case: Case) -> dict:
    return dict(q_block=case.q_block, select_heads=case.S, **choice_options(case)) | attention_options(case)


def compare_with_stages(ops, case, rng, dtype, mode, strict=False):
    def draw():
        q, k, v = qkv(case, rng, dtype, heads_last)
        offsets, counts = chunks(rng, case.B, case.k_len)
        return (q, k, v, offsets, counts), *whole(q, k, v, offsets, counts, case, strict=strict, **mode)

    (q, k, v, offsets, counts), want, clear = comparable(draw)
    got = ops.sparse_prefill(
        q, k, v, case.budget, strict=strict, offsets=offsets, num_chunks=counts, **mode, **options(case)
    )
    same_attention(got, want, dtype, clear)


@pytest.mark.parametrize("mode", ["paper", "accurate", "accurate_by_means"])
@pytest.mark.parametrize("case", params())
def test_shapes_with_given_chunks(ops, rng, case, mode):
    dtype = DTYPES[len(case.name) % 3]
    compare_with_stages(ops, on(ops, case), rng, dtype, MODES[mode])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("strict", [False, True], ids=["lookahead", "strict"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["plain", "chunked_prefill", "softcap_and_window"])
def test_modes_with_given_chunks(ops, rng, name, mode, strict, dtype):
    compare_with_stages(ops, on(ops, BY_NAME[name]), rng, dtype, MODES[mode], strict)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["plain", "batch_of_three", "chunked_prefill", "more_queries_than_keys", "one_token"])
@pytest.mark.parametrize(
    "cuts",
    [
        {},
        dict(max_chunks=200, nms_radius=0),
        dict(max_chunks=3, boundary_window=1),
        dict(threshold=0.9),
        dict(segment=64),
        dict(segment=50, max_chunks=7, nms_radius=3),
    ],
    ids=str,
)
def test_own_boundaries_are_those_of_the_stages(ops, rng, name, cuts, dtype):
    case = on(ops, BY_NAME[name])
    q, k, v = qkv(case, rng, dtype)
    stage = {"nms_radius": 8, "threshold": None, "segment": 0} | cuts
    window = stage.pop("boundary_window", 4)
    most = stage.pop("max_chunks", max(1, (stage["segment"] or case.k_len) // 16))
    scores = ops.boundary_scores(k, window)
    offsets, counts = ops.select_boundaries(scores, most, stage["nms_radius"], stage["threshold"], stage["segment"])
    given = ops.sparse_prefill(q, k, v, case.budget, offsets=offsets, num_chunks=counts, **options(case))
    own = ops.sparse_prefill(q, k, v, case.budget, **cuts, **options(case))
    same_attention(own, given, dtype)


def dense(q, k, v, window=None):
    q_len, k_len = q.shape[2], k.shape[2]
    mask = torch.ones(q_len, k_len, dtype=torch.bool).tril(k_len - q_len)
    if window is not None:
        mask &= ~torch.ones(q_len, k_len, dtype=torch.bool).tril(k_len - q_len - window)
    return F.scaled_dot_product_attention(
        q.double(), k.double(), v.double(), attn_mask=mask, enable_gqa=q.shape[1] != k.shape[1]
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", ["paper", "accurate"])
@pytest.mark.parametrize(("q_len", "k_len", "budget"), [(150, 150, 150), (40, 170, 171), (1, 90, 10_000)])
@pytest.mark.parametrize("window", [None, 33])
def test_budget_over_the_length_equals_dense_sdpa(ops, rng, q_len, k_len, budget, window, mode, dtype):
    case = Case("dense", "", Lq=q_len, Lk=k_len, q_block=32)
    q, k, v = qkv(case, rng, dtype, heads_last)
    out, lse = ops.sparse_prefill(q, k, v, budget, q_block=32, window=window, **MODES[mode])
    want_lse = reference.sparse_prefill(q.double(), k.double(), v.double(), budget, q_block=32, window=window)[1]
    same_attention((out, lse), (dense(q, k, v, window), want_lse), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dense_tail_rows_equal_dense_sdpa(ops, rng, dtype):
    case = BY_NAME["dense_tail"]
    q, k, v = qkv(case, rng, dtype)
    out, _ = ops.sparse_prefill(q, k, v, case.budget, **options(case))
    got, want = out[:, :, -40:].double(), dense(q, k, v)[:, :, -40:]
    assert (got - want).norm() / want.norm() < {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
    early = (out[:, :, :100].double() - dense(q, k, v)[:, :, :100]).norm()
    assert early > 1e-3, "the rows before the tail are dense too: the budget does nothing"


@pytest.mark.parametrize("mode", ["paper", "accurate"])
@pytest.mark.parametrize("j", [0, 31, 32, 77, 149])
def test_changing_token_j_changes_no_earlier_output_when_all_is_kept(ops, rng, j, mode):
    case = Case("causal", "", Lq=150)
    q, k, v = qkv(case, rng)
    before = ops.sparse_prefill(q, k, v, 150, q_block=32, **MODES[mode])
    for x in (q, k, v):
        x[:, :, j] = 3.0
    after = ops.sparse_prefill(q, k, v, 150, q_block=32, **MODES[mode])
    assert torch.allclose(before[0][:, :, :j], after[0][:, :, :j], rtol=0, atol=1e-6)
    assert torch.allclose(before[1][:, :, :j], after[1][:, :, :j], rtol=0, atol=1e-5)
    assert not torch.equal(before[0][:, :, j:], after[0][:, :, j:])


@pytest.mark.parametrize("mode", ["paper", "mass", "accurate", "accurate_by_means"])
@pytest.mark.parametrize("j", [64, 100, 131])
def test_strict_choice_ignores_tokens_after_the_block(run, rng, j, mode):
    """Given chunks, strict: a token after a block's last changes neither what the block keeps nor its output."""
    case = Case("strict", "", Lq=192)
    q, k, v = qkv(case, rng)
    offsets, counts = chunks(rng, 1, 192)
    choose = dict(offsets=offsets, num_chunks=counts, q_block=32, sink=4, local=16, strict=True, **MODES[mode])
    before = run.sparse_prefill(q, k, v, 60, **choose)[0]
    for x in (q, k, v):
        x[:, :, j] = 5.0
    after = run.sparse_prefill(q, k, v, 60, **choose)[0]
    block = j // 32 * 32
    assert torch.allclose(before[:, :, :block], after[:, :, :block], rtol=0, atol=1e-6)


def test_lookahead_is_what_strict_takes_away(run):
    """Chunk [8, 40) over the end of block 16 ... 31 has a key at 33 that no query wants: only strict keeps 8 ... 15."""
    q, k, v = (torch.zeros(1, 1, 48, 64) for _ in range(3))
    q[..., 0] = 1.0
    k[0, 0, :8, 0], k[0, 0, 8:32, 0], k[0, 0, 33, 0] = 0.5, 1.0, -100.0
    v[0, 0, :, 0] = torch.arange(48.0)
    offsets, counts = torch.tensor([[0, 8, 40, 48]], dtype=torch.int32), torch.tensor([3], dtype=torch.int32)
    choose = dict(offsets=offsets, num_chunks=counts, q_block=16, sink=0, local=1, pool="mean")
    for strict, kept in ((True, [[8, 32], [0, 0]]), (False, [[0, 8], [16, 32]])):
        lists = torch.tensor(kept, dtype=torch.int32).expand(1, 1, 3, 2, 2).contiguous()
        want = run.sparse_attention(q, k, v, lists, torch.full((1, 1, 3), 2, dtype=torch.int32), 16)[0][0, 0, 16:32]
        got = run.sparse_prefill(q, k, v, 24, strict=strict, **choose)[0][0, 0, 16:32]
        assert torch.allclose(got, want, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", ["paper", "accurate", "accurate_by_means"])
def test_chunked_prefill_in_whole_segments_equals_one_prefill(ops, rng, mode, dtype):
    case = Case("pieces", "", Lq=320)
    q, k, v = qkv(case, rng, dtype)
    choose = dict(segment=64, max_chunks=6, nms_radius=4, q_block=32, sink=4, local=16, **MODES[mode])
    one = ops.sparse_prefill(q, k, v, 80, **choose)
    for begin, end in ((0, 128), (128, 192), (192, 320)):
        piece = ops.sparse_prefill(q[:, :, begin:end], k[:, :, :end], v[:, :, :end], 80, **choose)
        same_attention(piece, (one[0][:, :, begin:end], one[1][:, :, begin:end]), dtype)


def test_shared_chunks_need_no_second_detector(ops, rng):
    """Chunks of one layer given to another with other keys: the other's own detector is not asked."""
    case = Case("shared", "", Lq=200)
    q, k, v = qkv(case, rng)
    offsets, counts = ops.select_boundaries(ops.boundary_scores(k), 12)
    other = k.flip(2).contiguous()
    choose = dict(q_block=32, sink=4, local=16)
    given = ops.sparse_prefill(q, other, v, 60, offsets=offsets, num_chunks=counts, **choose)[0]
    want, clear = whole(q, other, v, offsets, counts, Case("shared", "", Lq=200, budget=60))
    same_attention((given, want[1].float()), want, torch.float32, clear)
    own = ops.sparse_prefill(q, other, v, 60, max_chunks=12, **choose)[0]
    assert not torch.allclose(own, given, atol=1e-3)


def test_defaults_are_the_documented_ones(ops, rng):
    """max_chunks Lk // 16, heads Hkv, q_block 64, score dot, pool sqrt, sink 16, local 64, radius 8, window 4."""
    q, k, v = qkv(Case("defaults", "", Lq=300), rng)
    spelled = ops.sparse_prefill(
        q, k, v, 160, max_chunks=18, q_block=64, select_heads=2, score="dot", pool="sqrt", refine=0, q_stride=8,
        rows="sample", sink=16, local=64, dense_tail=0, boundary_window=4, nms_radius=8, segment=0, strict=False,
        softcap=0.0,
    )  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip(ops.sparse_prefill(q, k, v, 160), spelled, strict=True))
    segmented = ops.sparse_prefill(q, k, v, 160, segment=128)
    spelled = ops.sparse_prefill(q, k, v, 160, segment=128, max_chunks=8)
    assert torch.equal(segmented[0], spelled[0])


def test_sink_and_local_over_the_length_are_clamped(ops, rng):
    q, k, v = qkv(Case("short", "", Lq=20), rng)
    out, _ = ops.sparse_prefill(q, k, v, 20 + 20 + 19, sink=500, local=900)
    assert (out.double() - dense(q, k, v)).norm() < 1e-4


def test_mass_ignores_pool(ops, rng):
    q, k, v = qkv(Case("mass", "", Lq=200), rng)
    one, two = (ops.sparse_prefill(q, k, v, 150, score="mass", pool=pool)[0] for pool in ("sqrt", "sum"))
    assert torch.equal(one, two)


def test_python_function_returns_out_or_both(rng):
    q, k, v = qkv(Case("plain", "", Lq=100), rng)
    out = dhsa_ext.sparse_prefill(q, k, v, 150)
    both = dhsa_ext.sparse_prefill(q, k, v, 150, return_lse=True)
    assert isinstance(out, torch.Tensor) and torch.equal(out, both[0]) and both[1].shape == (1, 4, 100)


def test_rows_of_a_batch_do_not_mix(ops, rng):
    case = Case("batch", "", B=3, Lq=130)
    q, k, v = qkv(case, rng)
    out, lse = ops.sparse_prefill(q, k, v, 100, q_block=32, sink=4, local=16)
    for b in range(3):
        one = ops.sparse_prefill(q[b : b + 1], k[b : b + 1], v[b : b + 1], 100, q_block=32, sink=4, local=16)
        assert torch.allclose(one[0][0], out[b], atol=1e-6) and torch.allclose(one[1][0], lse[b], atol=1e-5)


def test_poison_in_values_never_kept_changes_nothing(ops, rng):
    """A window of 40 over 200 tokens: the values of the first 100 are out of the last 60 queries' reach."""
    case = Case("poison", "", Lq=60, Lk=200)
    q, k, v = qkv(case, rng)
    offsets, counts = chunks(rng, 1, 200)
    choose = dict(q_block=16, sink=4, local=8, window=40, offsets=offsets, num_chunks=counts)
    clean = ops.sparse_prefill(q, k, v, 60, **choose)[0]
    v[:, :, :100] = float("nan")
    assert torch.equal(clean, ops.sparse_prefill(q, k, v, 60, **choose)[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_long_prefill_of_many_blocks(ops, rng, dtype):
    """2000 tokens at 12 % of the keys: enough blocks for slabs and threads, and for a chance of every off-by-one."""
    case = Case("long", "", Lq=2000, H=2, Hkv=1, S=1, q_block=128, budget=250, sink=16, local=64)
    compare_with_stages(ops, case, rng, dtype, MODES["paper"])
