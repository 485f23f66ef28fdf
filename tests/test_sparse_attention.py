"""Stage 7: softmax attention over the keys of each block's runs."""

import brute
import pytest
import torch
import torch.nn.functional as F
from cases import BY_NAME, DTYPES, Case, attention_options, heads_last, on, params, qkv, rand, runs
from compare import same_attention
from hypothesis import given
from hypothesis import strategies as st

from dhsa_ext import reference


def reference_attention(q, k, v, lists, counts, q_block, **options):
    """In float64 from the same (rounded) inputs, so that only the backend's own rounding is measured."""
    return reference.sparse_attention(q.double(), k.double(), v.double(), lists, counts, q_block, **options)


@given(data=st.data())
def test_any_shape_equals_brute_force(run, data):
    kv_heads, group = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 3))
    case = Case(
        "drawn",
        "",
        Lq=data.draw(st.integers(0, 20)),
        Lk=data.draw(st.integers(0, 30)),
        H=kv_heads * group,
        Hkv=kv_heads,
        S=data.draw(st.sampled_from([1, kv_heads, kv_heads * group])),
        D=run.head_dims[0],
        q_block=data.draw(st.sampled_from(run.q_blocks)),
        window=data.draw(st.one_of(st.none(), st.integers(1, 40))),
        softcap=data.draw(st.sampled_from([0.0, 0.5, 20.0])),
        scale=data.draw(st.sampled_from([None, 0.0, 1.0])),
    )
    rng = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
    q, k, v = qkv(case, rng)
    lists, counts = runs(case, rng)
    numbers = [x.double().numpy() for x in (q, k, v)]
    want = brute.sparse_attention(*numbers, lists.numpy(), counts.numpy(), case.q_block, **attention_options(case))
    got = run.sparse_attention(q, k, v, lists, counts, case.q_block, **attention_options(case))
    same_attention(got, want, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", params())
def test_shapes(ops, rng, case, dtype):
    on(ops, case)
    q, k, v = qkv(case, rng, dtype)
    args = (*runs(case, rng), case.q_block)
    want = reference_attention(q, k, v, *args, **attention_options(case))
    same_attention(ops.sparse_attention(q, k, v, *args, **attention_options(case)), want, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["plain", "group_of_three", "batch_of_three", "chunked_prefill", "head_dim_40"])
def test_strided_heads_last_equals_contiguous(ops, rng, name, dtype):
    case = on(ops, BY_NAME[name])
    q, k, v = qkv(case, rng, dtype, heads_last)
    args = (*runs(case, rng), case.q_block)
    out, lse = ops.sparse_attention(q, k, v, *args)
    same_attention((out, lse), reference_attention(q, k, v, *args), dtype)
    plain = ops.sparse_attention(q.contiguous(), k.contiguous(), v.contiguous(), *args)
    assert torch.equal(out, plain[0]) and torch.equal(lse, plain[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pieces", ["single_keys", "one_run", "runs_of_8", "runs_of_37", "every_second_key"])
def test_run_lengths_and_alignments(ops, rng, pieces, dtype):
    """The same 96 or so keys in shorter and longer runs that start anywhere: every loader of every kernel."""
    case = Case("runs", "", Lq=96, Lk=700, H=4, Hkv=2, S=1, D=128, q_block=32)
    q, k, v = qkv(case, rng, dtype)
    length, step = {
        "single_keys": (1, 7),
        "one_run": (96, 700),
        "runs_of_8": (8, 57),
        "runs_of_37": (37, 211),
        "every_second_key": (1, 2),
    }[pieces]
    starts = torch.arange(3, 700 - length, step)[:200]
    lists = torch.stack([starts, starts + length], -1).int().expand(1, 1, 3, -1, 2).contiguous()
    counts = torch.full((1, 1, 3), len(starts), dtype=torch.int32)
    want = reference_attention(q, k, v, lists, counts, 32)
    same_attention(ops.sparse_attention(q, k, v, lists, counts, 32), want, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lengths", [(200, 200), (70, 300), (1, 300)])
def test_every_key_in_one_run_equals_dense_sdpa(ops, rng, lengths, dtype):
    q_len, k_len = lengths
    case = Case("dense", "", Lq=q_len, Lk=k_len, H=4, Hkv=2, D=64)
    q, k, v = qkv(case, rng, dtype)
    blocks = -(-q_len // 64)
    lists = torch.tensor([0, k_len], dtype=torch.int32).expand(1, 1, blocks, 1, 2).contiguous()
    out, lse = ops.sparse_attention(q, k, v, lists, torch.ones(1, 1, blocks, dtype=torch.int32), 64)
    mask = torch.ones(q_len, k_len, dtype=torch.bool).tril(k_len - q_len)
    wide = [x.double() for x in (q, k, v)]
    want = F.scaled_dot_product_attention(*wide, attn_mask=mask, enable_gqa=True)
    logits = wide[0] @ wide[1].repeat_interleave(2, 1).mT / 8
    same_attention((out, lse), (want, logits.masked_fill(~mask, -torch.inf).logsumexp(-1)), dtype)


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "name", ["plain", "one_list_for_all", "list_per_query_head", "chunked_prefill", "head_dim_256"]
)
def test_poison_in_keys_of_no_run_changes_nothing(ops, rng, name, dtype, poison):
    """Keys around every run, and inside the tiles that a run only half fills, hold NaN or inf in both k and v."""
    case = on(ops, BY_NAME[name])
    q, k, v = qkv(case, rng, dtype)
    starts = torch.arange(5, case.k_len - 20, 23)
    lengths = 1 + torch.arange(len(starts)) % 9
    one = torch.stack([starts, starts + lengths], -1).int()
    lists = one.expand(case.B, case.S, case.blocks, -1, 2).contiguous()
    counts = torch.full((case.B, case.S, case.blocks), len(one), dtype=torch.int32)
    options = attention_options(case)
    clean = ops.sparse_attention(q, k, v, lists, counts, case.q_block, **options)
    unread = torch.ones(case.k_len, dtype=torch.bool)
    for begin, end in one.tolist():
        unread[begin:end] = False
    k[:, :, unread], v[:, :, unread] = poison, poison
    poisoned = ops.sparse_attention(q, k, v, lists, counts, case.q_block, **options)
    assert torch.equal(clean[0], poisoned[0]) and torch.equal(clean[1], poisoned[1])
    assert clean[0].isfinite().all()


def test_poison_in_another_blocks_keys_changes_nothing(ops, rng):
    """Block 0 reads keys 0 ... 9, block 1 keys 10 ... 19: NaN in the latter stays in block 1."""
    q, k, v = rand(rng, 1, 2, 32, 64), rand(rng, 1, 1, 60, 64), rand(rng, 1, 1, 60, 64)
    lists = torch.tensor([[[[[0, 10]], [[10, 20]]]]], dtype=torch.int32)
    counts = torch.ones(1, 1, 2, dtype=torch.int32)
    clean = ops.sparse_attention(q, k, v, lists, counts, 16)[0]
    k[:, :, 10:20], v[:, :, 10:20] = float("nan"), float("nan")
    poisoned = ops.sparse_attention(q, k, v, lists, counts, 16)[0]
    assert torch.equal(clean[:, :, :16], poisoned[:, :, :16]) and poisoned[:, :, 16:].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("j", [0, 17, 40, 63, 99])
def test_changing_token_j_changes_no_earlier_output(ops, rng, j, dtype):
    case = Case("causal", "", Lq=100, H=4, Hkv=2, S=2, q_block=32)
    q, k, v = qkv(case, rng, dtype)
    args = (*runs(case, rng), case.q_block)
    before = ops.sparse_attention(q, k, v, *args)
    for x in (q, k, v):
        x[:, :, j] = 3.0
    after = ops.sparse_attention(q, k, v, *args)
    assert torch.equal(before[0][:, :, :j], after[0][:, :, :j]) and torch.equal(before[1][:, :, :j], after[1][:, :, :j])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_without_a_key_are_zero_and_minus_infinity(ops, rng, dtype):
    """No run at all, a run after the row's position, an empty run, a run before the window."""
    q, k, v = (rand(rng, 1, 1, 64, 64, dtype=dtype) for _ in range(3))
    lists = torch.tensor([[0, 0], [40, 64], [20, 20], [0, 2]], dtype=torch.int32).view(1, 1, 4, 1, 2)
    counts = torch.tensor([0, 1, 1, 1], dtype=torch.int32).view(1, 1, 4)
    out, lse = ops.sparse_attention(q, k, v, lists, counts, 16, window=20)
    assert (out == 0).all() and (lse == -torch.inf).all()


def test_no_capacity_is_no_key(run, rng):
    q, k, v = (rand(rng, 1, 1, 16, 64) for _ in range(3))
    lists, counts = torch.zeros(1, 1, 1, 0, 2, dtype=torch.int32), torch.zeros(1, 1, 1, dtype=torch.int32)
    out, lse = run.sparse_attention(q, k, v, lists, counts, 16)
    assert (out == 0).all() and (lse == -torch.inf).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("scale", "softcap"), [(1e3, 0.0), (1e3, 30.0), (1e-6, 0.0), (0.0, 0.0), (-0.5, 0.0)])
def test_extreme_logits_stay_finite(ops, rng, scale, softcap, dtype):
    """Logits of thousands, of nothing, and with the sign turned: no overflow, weights still sum to one."""
    case = Case("extreme", "", Lq=64, q_block=32)
    q, k, _ = qkv(case, rng, dtype)
    ones = torch.ones_like(k)
    lists, counts = runs(case, rng)
    out, lse = ops.sparse_attention(q, k, ones, lists, counts, 32, scale=scale, softcap=softcap)
    seen = lse > -torch.inf
    assert (out[seen].double() - 1).abs().max() <= 1e-2 and (out[~seen] == 0).all() and not lse.isnan().any()


def test_head_h_reads_list_h_over_group(run, rng):
    """Four lists of one key each over 4, 2 and 1 selection heads: with one key the output is that key's value."""
    q, k = rand(rng, 1, 4, 1, 64), rand(rng, 1, 2, 30, 64)
    v = torch.arange(30.0)[None, None, :, None].expand(1, 2, 30, 64).contiguous()
    for lists in (1, 2, 4):
        starts = torch.arange(lists, dtype=torch.int32) * 5 + 3
        one = torch.stack([starts, starts + 1], -1).view(1, lists, 1, 1, 2)
        out, _ = run.sparse_attention(q, k, v, one, torch.ones(1, lists, 1, dtype=torch.int32), 16)
        assert out[0, :, 0, 0].tolist() == [float(starts[h // (4 // lists)]) for h in range(4)]


@given(seed=st.integers(0, 10**6))
def test_malformed_runs_never_read_outside(run, seed):
    """Any integers in runs and counts. v of ones: whatever is read inside gives 1 or, for a row without a key, 0."""
    rng = torch.Generator().manual_seed(seed)
    near = torch.randint(-60, 130, (1, 2, 3, 6, 2), generator=rng)
    far = torch.randint(-(2**31), 2**31 - 1, (1, 2, 3, 6, 2), generator=rng)
    lists = torch.where(torch.rand(near.shape, generator=rng) < 0.7, near, far).int()
    counts = torch.randint(-9, 20, (1, 2, 3), generator=rng).int()
    q, k = torch.randn(1, 4, 40, 64, generator=rng), torch.randn(1, 2, 70, 64, generator=rng)
    out, lse = run.sparse_attention(q, k, torch.ones_like(k), lists, counts, 16)
    empty = (lse == -torch.inf)[..., None]
    assert ((out - 1).abs() < 1e-5).logical_or(empty & (out == 0)).all()


def test_runs_are_clamped_to_the_keys(run, rng):
    """[-5, 3) and [28, 99) of 30 keys are [0, 3) and [28, 30)."""
    q, k, v = rand(rng, 1, 1, 1, 64), rand(rng, 1, 1, 30, 64), rand(rng, 1, 1, 30, 64)
    wild = torch.tensor([[-5, 3], [9, 4], [28, 99]], dtype=torch.int32).view(1, 1, 1, 3, 2)
    tame = torch.tensor([[0, 3], [28, 30], [0, 0]], dtype=torch.int32).view(1, 1, 1, 3, 2)
    one = run.sparse_attention(q, k, v, wild, torch.tensor([[[99]]], dtype=torch.int32), 16)
    two = run.sparse_attention(q, k, v, tame, torch.tensor([[[2]]], dtype=torch.int32), 16)
    assert torch.allclose(one[0], two[0], atol=1e-6) and torch.allclose(one[1], two[1], atol=1e-5)
