"""Stage 6: which keys a block keeps, as canonical run lists, bit for bit."""

import brute
import pytest
import torch
from cases import BY_NAME, Case, choice_options, chunks, on, params, rand
from compare import canonical, keys_of, same_integers
from hypothesis import given
from hypothesis import strategies as st

from dhsa_ext import reference

SCORE = st.one_of(
    st.integers(-2, 2).map(float),
    st.sampled_from([-0.0, float("nan"), float("inf"), float("-inf"), 1e-40]),
    st.floats(-3, 3, width=32),
)


def bound(q_len, q_block, sink, local):
    return sink + local + min(q_block, q_len) - 1


@given(data=st.data())
def test_any_scores_equal_brute_force(run, data):
    q_len, k_len = data.draw(st.integers(0, 24)), data.draw(st.integers(0, 40))
    q_block = data.draw(st.sampled_from(run.q_blocks))
    sink, local = data.draw(st.integers(0, 6)), data.draw(st.integers(0, 6))
    least = max(0, bound(q_len, q_block, sink, local))
    budget = data.draw(st.one_of(st.sampled_from([least, least + 1]), st.integers(least, least + 30)))
    options = dict(
        sink=sink,
        local=local,
        window=data.draw(st.one_of(st.none(), st.integers(1, 50))),
        dense_tail=data.draw(st.sampled_from([0, 0, 1, 5, 100])),
        min_chunk=data.draw(st.sampled_from([1, 1, 3, 50])),
    )
    capacity, lists = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 2))
    rng = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
    offsets, counts = chunks(rng, 1, k_len, capacity, covered=data.draw(st.integers(0, k_len)))
    size = lists * -(-q_len // q_block) * capacity
    values = data.draw(st.lists(SCORE, min_size=size, max_size=size))
    scores = torch.tensor(values, dtype=torch.float32).view(1, lists, -(-q_len // q_block), capacity)
    args = (q_len, k_len, q_block, budget)
    want = brute.select_keys(scores.numpy(), offsets.numpy(), counts.numpy(), *args, **options)
    got = run.select_keys(scores, offsets, counts, *args, **options)
    same_integers(got, want)


@pytest.mark.parametrize("case", params(lambda case: case.k_len > 0))
@pytest.mark.parametrize("ties", ["distinct", "two_values", "all_tied"])
def test_shapes(ops, rng, case, ties):
    on(ops, case)
    offsets, counts = chunks(rng, case.B, case.k_len)
    scores = rand(rng, case.B, case.S, case.blocks, offsets.shape[1] - 1)
    scores = {"distinct": scores, "two_values": scores.sign(), "all_tied": scores * 0}[ties]
    args = (scores, offsets, counts, case.Lq, case.k_len, case.q_block, case.budget)
    got = ops.select_keys(*args, **choice_options(case))
    same_integers(got, reference.select_keys(*args, **choice_options(case)))
    canonical(*got, case.k_len)


LONG = Case("long", "thousands of chunks a block: many radix passes", Lq=256, Lk=9000, B=2, q_block=128, budget=1500)


@pytest.mark.parametrize("pattern", ["random", "rising", "falling", "constant", "two_values", "tiny_differences"])
def test_long_rows(ops, rng, pattern):
    offsets, counts = chunks(rng, LONG.B, LONG.k_len, 2000)
    shape = (LONG.B, LONG.S, LONG.blocks, 2000)
    ramp = torch.arange(2000.0).expand(shape)
    scores = {
        "random": rand(rng, *shape),
        "rising": ramp,
        "falling": -ramp,
        "constant": torch.ones(shape),
        "two_values": rand(rng, *shape).sign(),
        "tiny_differences": 1 + rand(rng, *shape) * 3e-7,
    }[pattern].contiguous()
    args = (scores, offsets, counts, LONG.Lq, LONG.k_len, LONG.q_block, LONG.budget)
    got = ops.select_keys(*args, sink=128, local=128)
    same_integers(got, reference.select_keys(*args, sink=128, local=128))


@pytest.mark.parametrize("more", [0, 1, 2, 15])
def test_budget_at_its_bound_keeps_the_forced_keys_and_so_many_more(run, rng, more):
    offsets, counts = chunks(rng, 1, 200)
    scores = rand(rng, 1, 1, 1, offsets.shape[1] - 1)
    least = bound(16, 16, 5, 7)
    runs, n = run.select_keys(scores, offsets, counts, 16, 200, 16, least + more, sink=5, local=7)
    kept = keys_of(runs[0, 0, 0], n[0, 0, 0])
    assert len(kept) == least + more
    assert set(range(5)) <= kept and set(range(200 - 16 - 7 + 1, 200)) <= kept


def test_last_chunk_is_cut_at_its_end(run):
    """Chunks [0,10) [10,20) [20,30), the second best: of 12 keys beside the 10 forced ones, 2 come from the third."""
    offsets, counts = torch.tensor([[0, 10, 20, 30]], dtype=torch.int32), torch.tensor([3], dtype=torch.int32)
    scores = torch.tensor([1.0, 3.0, 2.0]).view(1, 1, 1, 3)
    runs, n = run.select_keys(scores, offsets, counts, 1, 40, 16, 12 + 10, sink=0, local=1)
    assert keys_of(runs[0, 0, 0], n[0, 0, 0]) == set(range(10, 22)) | set(range(30, 40))


def test_chunk_partly_forced_costs_only_what_it_adds(run):
    """Sink 6 already holds the best chunk's first keys: the budget of 6 + 1 + 4 buys its other 4."""
    offsets, counts = torch.tensor([[0, 10, 30]], dtype=torch.int32), torch.tensor([2], dtype=torch.int32)
    scores = torch.tensor([2.0, 1.0]).view(1, 1, 1, 2)
    runs, n = run.select_keys(scores, offsets, counts, 1, 30, 16, 11, sink=6, local=1)
    assert runs[0, 0, 0, : n[0, 0, 0]].tolist() == [[0, 10], [29, 30]]


def test_minus_infinity_and_nan_come_last_but_are_kept(run):
    offsets = torch.tensor([[0, 10, 20, 30]], dtype=torch.int32)
    counts = torch.tensor([3], dtype=torch.int32)
    scores = torch.tensor([float("nan"), 0.0, -torch.inf]).view(1, 1, 1, 3)
    runs, n = run.select_keys(scores, offsets, counts, 1, 30, 16, 16, sink=0, local=1)
    assert runs[0, 0, 0, : n[0, 0, 0]].tolist() == [[0, 5], [10, 20], [29, 30]]


def test_keys_of_no_chunk_are_forced_beyond_the_budget(run):
    """An open tail of 20 keys under a budget of 5: all 20 stay, none of the rest comes."""
    offsets, counts = torch.tensor([[0, 10, 10]], dtype=torch.int32), torch.tensor([1], dtype=torch.int32)
    runs, n = run.select_keys(torch.ones(1, 1, 1, 2), offsets, counts, 1, 30, 16, 5, sink=0, local=1)
    assert runs[0, 0, 0, : n[0, 0, 0]].tolist() == [[10, 30]]


@pytest.mark.parametrize("case", [BY_NAME["dense_tail"], BY_NAME["dense_tail_window"]], ids=lambda case: case.name)
def test_dense_tail_is_one_run(run, rng, case):
    offsets, counts = chunks(rng, 1, case.k_len)
    scores = rand(rng, 1, case.S, case.blocks, offsets.shape[1] - 1)
    args = (scores, offsets, counts, case.Lq, case.k_len, case.q_block, case.budget)
    runs, n = run.select_keys(*args, **choice_options(case))
    for block in range(case.blocks):
        last = min(case.Lq, (block + 1) * case.q_block) - 1
        first_key = 0 if case.window is None else max(0, block * case.q_block - case.window + 1)
        if last >= case.Lq - case.dense_tail:
            assert n[0, 0, block] == 1 and runs[0, 0, block, 0].tolist() == [first_key, last + 1]
        elif last + 1 - first_key > case.budget:
            assert len(keys_of(runs[0, 0, block], n[0, 0, block])) == case.budget


def test_queries_before_the_first_key_keep_nothing(run):
    offsets, counts = torch.tensor([[0, 10]], dtype=torch.int32), torch.tensor([1], dtype=torch.int32)
    _, n = run.select_keys(torch.zeros(1, 1, 4, 1), offsets, counts, 64, 10, 16, 40, sink=2, local=4)
    assert n.flatten().tolist() == [0, 0, 0, 1]


def test_broken_promise_keeps_the_first_runs_and_the_last(run):
    """Every second key its own chunk and min_chunk 100: 4 entries for some 20 runs."""
    offsets = torch.arange(41, dtype=torch.int32)[None]
    scores = (torch.arange(40) % 2).float().view(1, 1, 1, 40)
    args = (scores, offsets, torch.tensor([40], dtype=torch.int32), 1, 40, 16, 20)
    runs, n = run.select_keys(*args, sink=0, local=1, min_chunk=100)
    assert runs.shape[3] == 4 and n.item() == 4
    assert runs[0, 0, 0].tolist() == [[1, 2], [3, 4], [5, 6], [39, 40]]


def test_run_capacity_comes_from_the_arguments(run):
    offsets, counts = torch.tensor([[0] + [300] * 60], dtype=torch.int32), torch.tensor([1], dtype=torch.int32)
    for budget, min_chunk, capacity in ((100, 1, 63), (100, 9, 12 + 3), (100, 101, 1 + 3)):
        runs, _ = run.select_keys(torch.zeros(1, 1, 1, 60), offsets, counts, 1, 300, 16, budget, min_chunk=min_chunk)
        assert runs.shape == (1, 1, 1, capacity, 2)


@given(seed=st.integers(0, 10**6))
def test_malformed_offsets_never_read_outside(run, seed):
    rng = torch.Generator().manual_seed(seed)
    offsets = torch.randint(-60, 90, (2, 9), generator=rng).int()
    offsets[1] = torch.randint(-(2**31), 2**31 - 1, (9,), generator=rng).int()
    counts = torch.randint(-20, 60, (2,), generator=rng).int()
    scores = torch.randn(2, 1, 3, 8, generator=rng)
    runs, n = run.select_keys(scores, offsets, counts, 48, 50, 16, 30, sink=3, local=4)
    assert runs.shape == (2, 1, 3, 11, 2) and ((n >= 0) & (n <= 11)).all()
