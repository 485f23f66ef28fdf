"""The policies: what each keeps, against a few lines of brute force, and what all of them promise."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dhsa_ext import ops, policies
from dhsa_ext.config import DHSAConfig
from dhsa_ext.policies import POLICIES

pytestmark = pytest.mark.filterwarnings("ignore:dhsa_ext.policies.oracle")
EXACT_BUDGET = ("paper", "accurate", "block_sparse", "sliding_window", "a_shape", "oracle")


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def small(**changes):
    settings = dict(budget=40, q_block=16, sink=3, local=8, q_stride=4, nms_radius=2, decode="dense", chunk_size=6)
    return DHSAConfig(**{**settings, **changes})


def inputs(seed, q_len=90, k_len=None, heads=4, kv_heads=2, dim=16, batch=1, sharp=2.0):
    rng = torch.Generator().manual_seed(seed)
    k_len = q_len if k_len is None else k_len
    q = torch.randn(batch, heads, q_len, dim, generator=rng) * sharp
    return q, *(torch.randn(batch, kv_heads, k_len, dim, generator=rng) for _ in range(2))


def kept_sets(runs, num_runs):
    """[b][s][j] -> the set of keys, and that the list is canonical: rising, disjoint, merged, zeros after it."""
    lists = []
    for b, s, j in torch.cartesian_prod(*(torch.arange(n) for n in num_runs.shape)).tolist():
        n, row, keys = int(num_runs[b, s, j]), runs[b, s, j].tolist(), set()
        assert all(end > begin for begin, end in row[:n]) and not any(map(any, row[n:]))
        assert all(row[i][1] < row[i + 1][0] for i in range(n - 1))
        for begin, end in row[:n]:
            keys |= set(range(begin, end))
        lists.append(((b, s, j), keys))
    return lists


def true_mass(q, k, scale=None, softcap=0.0):
    """Attention weights [B, H, Lq, Lk] of the whole call."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    logits = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    logits = softcap * torch.tanh(logits / softcap) if softcap else logits
    future = torch.ones(logits.shape[-2:], dtype=torch.bool).triu(1 + k.shape[2] - q.shape[2])
    return logits.masked_fill(future, -torch.inf).softmax(-1)


@given(
    q_len=st.integers(1, 70),
    past=st.integers(0, 60),
    heads=st.sampled_from(["one", "kv", "query"]),
    budget=st.integers(26, 90),
    name=st.sampled_from(sorted(POLICIES)),
    dense_tail=st.sampled_from([0, 0, 5]),
)
def test_every_policy_keeps_its_promises(q_len, past, heads, budget, name, dense_tail):
    """Canonical lists; nothing after a block's end; the forced keys; the budget, and its tail of dense queries."""
    q, k, _ = inputs(q_len, q_len, q_len + past)
    config = small(budget=budget, select_heads=heads, dense_tail=dense_tail)
    for (_, _, j), keys in kept_sets(*POLICIES[name](q, k, config)):
        last = min((j + 1) * 16, q_len) - 1
        p0, p1 = past + j * 16, past + last
        assert keys <= set(range(p1 + 1))
        if name == "dense" or last >= q_len - dense_tail:
            assert len(keys) == p1 + 1
            continue
        assert set(range(min(3, p1 + 1))) | set(range(max(0, p0 - 8 + 1), p1 + 1)) <= keys
        assert len(keys) <= min(budget, p1 + 1)
        if name in EXACT_BUDGET:
            assert len(keys) == min(budget, p1 + 1)


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_output_is_attention_over_the_kept_keys(name):
    q, k, v = inputs(3)
    config = small()
    runs, num_runs = POLICIES[name](q, k, config, scale=0.3, softcap=9.0)
    marks = torch.zeros(1, 4, 90, 90, dtype=torch.bool)
    for (_, s, j), keys in kept_sets(runs, num_runs):
        lists = num_runs.shape[1]
        marks[0, s * 4 // lists : (s + 1) * 4 // lists, j * 16 : (j + 1) * 16, sorted(keys)] = True
    mass = true_mass(q, k, 0.3, 9.0) * marks
    expected = (mass / mass.sum(-1, keepdim=True)) @ v.repeat_interleave(2, 1)
    got = policies.attend(POLICIES[name], q, k, v, config, scale=0.3, softcap=9.0)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_a_budget_of_the_length_is_dense(name):
    q, k, v = inputs(4)
    config = small(budget=400)
    options = dict(share=1.0) if name == "coverage" else {}
    runs, num_runs = POLICIES[name](q, k, config, **options)
    expected = true_mass(q, k) @ v.repeat_interleave(2, 1)
    got = ops.sparse_attention(q, k, v, runs, num_runs, 16)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("name", ["dense", "sliding_window", "a_shape", "oracle", "block_sparse"])
def test_choice_does_not_see_past_its_block(name):
    """The first blocks' lists are those of the text cut there; block_sparse's blocks of 16 end where queries' do."""
    q, k, _ = inputs(5)
    config, options = small(), dict(block=16) if name == "block_sparse" else {}
    whole = dict(kept_sets(*POLICIES[name](q, k, config, **options)))
    part = kept_sets(*POLICIES[name](q[:, :, :48], k[:, :, :48], config, **options))
    assert all(whole[at] == keys for at, keys in part)


@pytest.mark.parametrize("heads, lists", [("one", 1), ("kv", 2), ("query", 4)])
def test_oracle_keeps_the_largest_attention(heads, lists):
    q, k, _ = inputs(6, q_len=40, k_len=100)
    mass = true_mass(q, k).unflatten(1, (lists, -1)).mean(2)
    for (_, s, j), keys in kept_sets(*policies.oracle(q, k, small(select_heads=heads))):
        rows = slice(j * 16, min((j + 1) * 16, 40))
        p0, p1 = 60 + rows.start, 60 + rows.stop - 1
        forced = {i for i in range(p1 + 1) if i < 3 or i > p0 - 8}
        rest = sorted(set(range(p1 + 1)) - forced, key=lambda i: -float(mass[0, s, rows, i].sum()))
        assert keys == forced | set(rest[: 40 - len(forced)])


def test_oracle_recalls_most_and_accurate_beats_paper():
    q, k, _ = inputs(7, q_len=256, sharp=4.0)
    mass, recall = true_mass(q, k), {}
    for name in EXACT_BUDGET:
        runs, num_runs = POLICIES[name](q, k, small(budget=64, q_stride=1, select_heads="kv"))
        lists = num_runs.shape[1]
        kept = [
            mass[0, s * 4 // lists : (s + 1) * 4 // lists, j * 16 : j * 16 + 16, sorted(keys)].sum(-1).mean()
            for (_, s, j), keys in kept_sets(runs, num_runs)
        ]
        recall[name] = float(torch.stack(kept).mean())
    assert recall["oracle"] == max(recall.values()) and recall["accurate"] > recall["paper"]


def test_positions_of_the_fixed_shapes():
    q, k, _ = inputs(8, q_len=40, k_len=200)
    config = small(budget=60)
    assert policies.sliding_window(q, k, config)[0][0, 0].tolist()[0] == [[0, 3], [119, 176]]
    assert policies.a_shape(q, k, config)[0][0, 0].tolist()[0] == [[0, 30], [146, 176]]
    assert policies.a_shape(q, k, config, first=0.99)[0][0, 0].tolist()[0] == [[0, 37], [153, 176]]  # local stays
    short = policies.sliding_window(q[:, :, :16], k[:, :, :50], config)
    assert short[0].tolist() == [[[[[0, 50], [0, 0]]]]] and short[1].tolist() == [[[1]]]


def test_block_sparse_keeps_the_best_blocks():
    q, k, _ = inputs(9, q_len=16, k_len=128, kv_heads=1)
    score = (q.mean((1, 2)) @ k.view(8, 16, 16).mean(1).T)[0]  # blocks of 16 keys
    ((_, keys),) = kept_sets(*policies.block_sparse(q, k, small(budget=58, select_heads="one"), block=16))
    forced = {*range(3), *range(105, 128)}
    best = max(range(1, 6), key=lambda c: float(score[c]))
    if score[best] > score[0]:
        assert set(range(best * 16, best * 16 + 16)) <= keys
    assert forced <= keys and len(keys) == 58


@pytest.mark.parametrize("share", [0.3, 0.7, 0.95])
@pytest.mark.parametrize("heads", ["kv", "query"])
def test_coverage_keeps_no_more_than_it_takes(share, heads):
    """Every row is read and every key a candidate, so the estimate is the true attention mass."""
    q, k, _ = inputs(10, q_len=64)
    config = small(budget=64, q_stride=1, select_heads=heads)
    lists = config.heads(4, 2)
    mass = true_mass(q, k).unflatten(1, (lists, -1)).mean(2)
    sizes = []
    for (_, s, j), keys in kept_sets(*policies.coverage(q, k, config, share=share)):
        rows, p0 = slice(j * 16, j * 16 + 16), j * 16
        per_key = mass[0, s, rows].mean(0)
        assert float(per_key[sorted(keys)].sum()) >= share - 1e-4
        free = [i for i in keys if i >= 3 and i <= p0 - 8]
        if free:
            assert float(per_key[sorted(keys)].sum() - min(per_key[i] for i in free)) < share + 1e-4
        sizes.append(len(keys))
    assert share < 0.9 or len(set(sizes)) > 2  # the budget follows the content


def test_coverage_stops_at_the_cap_and_estimates_from_few_candidates():
    q, k, _ = inputs(11, q_len=128, sharp=0.1)  # flat attention: nothing can be left out
    for (_, _, j), keys in kept_sets(*policies.coverage(q, k, small(budget=40), share=0.99, refine=1)):
        assert len(keys) == min(40, 16 * (j + 1))
    with pytest.raises(ValueError, match="share: expected more than 0 and at most 1, got 0"):
        policies.coverage(q, k, small(), share=0)


def test_accurate_takes_refine_from_its_argument_else_its_config_else_the_preset():
    q, k, _ = inputs(11, q_len=400)
    runs = {given: policies.accurate(q, k, small(), refine=given)[0] for given in (1, 16)}
    assert not torch.equal(runs[1], runs[16])
    assert torch.equal(policies.accurate(q, k, small(refine=1))[0], runs[1])
    assert torch.equal(policies.accurate(q, k, small(refine=0))[0], runs[16])


def test_accurate_takes_its_rows_from_its_arguments_else_its_config():
    q, k, _ = inputs(11, q_len=400)
    sample, mean = (policies.accurate(q, k, small(), rows=rows)[0] for rows in ("sample", "mean"))
    assert not torch.equal(sample, mean)
    assert torch.equal(policies.accurate(q, k, small(rows="sample"))[0], sample)
    assert torch.equal(policies.accurate(q, k, small())[0], mean)
    few = policies.accurate(q, k, small(), q_stride=16)[0]
    assert torch.equal(policies.accurate(q, k, small(q_stride=16))[0], few) and not torch.equal(few, mean)


def test_given_chunks_replace_the_training_free_ones():
    q, k, _ = inputs(12)
    config, chunks = small(), policies.fixed_chunks(k, 6)
    assert chunks[0][0, :3].tolist() == [0, 6, 12] and chunks[0][0, -1] == 90 and chunks[1].tolist() == [15]
    for policy in (policies.paper, policies.accurate, policies.coverage):
        runs, num_runs = policy(q, k, config, chunks=chunks)
        kept_sets(runs, num_runs)
    own = policies.paper(q, k, config, chunks=policies.cut_chunks(k, config))
    assert kept_sets(*own) == kept_sets(*policies.paper(q, k, config))


def test_no_key_and_no_query():
    for q_len, k_len in ((0, 0), (0, 40), (5, 0), (40, 20)):
        q, k, v = inputs(13, q_len, k_len)
        for name in POLICIES:
            out = policies.attend(POLICIES[name], q, k, v, small())
            assert out.shape == q.shape and bool((out[:, :, : q_len - k_len] == 0).all())


def test_a_policy_of_ones_own():
    """The one that docs/choosing-keys.md shows: chunks by their largest key norm."""

    def loudest(q, k, config, scale=None, softcap=0.0):
        chunks = policies.fixed_chunks(k, 16)
        norms = k.norm(dim=-1, keepdim=True).expand(-1, -1, -1, 8).contiguous()
        scores = ops.chunk_pool(norms, *chunks, 1, "mean")[..., 0]
        blocks = -(-q.shape[2] // config.q_block)
        return policies.select(scores[:, :, None].expand(-1, -1, blocks, -1).contiguous(), chunks, q, k, config)

    q, k, v = inputs(14)
    assert all(len(keys) <= 40 for _, keys in kept_sets(*loudest(q, k, small())))
    assert policies.attend(loudest, q, k, v, small()).shape == q.shape
