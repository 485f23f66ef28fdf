"""The benches' own logic: what they count as work, the lists they make, who is said to win, and the data they write.

The figures of a bench are worth what its counting is worth, so every count is held against loops over pairs.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import answers
import bench_cpu
import bench_prefill
import bench_stages
import lists
import peers
import plot
import shapes
import timing
from dhsa_ext import reference
from inputs import Inputs

BENCH = Path(bench_cpu.__file__).parent
SMALL = shapes.TINY.but(seqlen_k=300, budget=120, q_block=32, sink=8, local=8, heads=2, heads_kv=1, head_dim=16)
RAGGED = SMALL.but(seqlen_q=45)


def kept(runs, count):
    return [j for start, end in runs[: int(count)].tolist() for j in range(start, end)]


def rows_of(shape):
    """Yield (block, position) of each query."""
    for i in range(shape.queries):
        yield i // shape.q_block, shape.seqlen_k - shape.queries + i


@pytest.mark.parametrize("shape", [SMALL, RAGGED, SMALL.but(budget=300), SMALL.but(seqlen_q=1, q_block=1)])
def test_pairs_are_those_of_a_loop_over_queries_and_keys(shape):
    assert lists.causal_pairs(shape) == sum(p + 1 for _, p in rows_of(shape))
    assert lists.budget_pairs(shape) == sum(min(p + 1, shape.budget) for _, p in rows_of(shape))
    for made in (lists.whole_lists(shape), lists.single_key_lists(shape)):
        runs, counts = made
        looped = sum(sum(j <= p for j in kept(runs[0, 0, block], counts[0, 0, block])) for block, p in rows_of(shape))
        assert lists.kept_pairs(made, shape) == looped
    assert lists.kept_pairs(lists.whole_lists(shape), shape) == lists.causal_pairs(shape)


def test_flops_of_one_head_pair_and_query_head():
    assert lists.attention_flops(1, SMALL) == 4 * 16 * 2  # two products, two heads, a multiply and an add


def test_both_densities_of_a_sixteenth_of_the_keys():
    shape = shapes.Shape("", "", 131072, 8192)
    found = lists.density(shape, lists.budget_pairs(shape))
    assert found["density_keys"] == 0.0625
    assert found["density_area"] == pytest.approx(0.121, abs=5e-4)  # nearly twice as much of the work
    assert lists.density(shape, lists.causal_pairs(shape)) == {"density_keys": 1.0, "density_area": 1.0}


def test_lists_b_keep_the_first_the_diagonal_and_a_budget_of_blocks():
    shape = shapes.Shape("", "", 2100, 512, q_block=64)
    runs, counts = lists.aligned_lists(shape)
    for block, end in enumerate(lists.block_ends(shape)):
        keys = kept(runs[0, 0, block], counts[0, 0, block])
        blocks = sorted({j // 128 for j in keys})
        assert keys == [j for i in blocks for j in range(128 * i, min(128 * (i + 1), end))]  # whole aligned blocks
        assert len(blocks) == min(4, (end - 1) // 128 + 1) and blocks[0] == 0 and blocks[-1] == (end - 1) // 128
        listed = runs[0, 0, block, : int(counts[0, 0, block])].tolist()
        assert all(a[1] < b[0] for a, b in itertools.pairwise(listed))  # neighbours are merged


def test_lists_c_keep_single_keys_wherever_twice_the_budget_fits():
    runs, counts = lists.single_key_lists(SMALL)
    for block, end in enumerate(lists.block_ends(SMALL)):
        keys = kept(runs[0, 0, block], counts[0, 0, block])
        assert keys == sorted(set(keys)) and len(keys) == min(SMALL.budget, end) and keys[-1] < end
        if end >= 2 * SMALL.budget:
            assert int(counts[0, 0, block]) == len(keys)


def test_scattered_lists_need_no_mask():
    shape = shapes.CPU["gathered"]
    runs, counts = lists.scattered_lists(shape)
    keys = kept(runs[0, 0, 0], counts[0, 0, 0])
    assert len(keys) == len(set(keys)) == shape.budget and max(keys) < shape.seqlen_k - shape.queries
    assert lists.kept_pairs((runs, counts), shape) == shape.queries * shape.budget


def test_histogram_of_a_list_written_by_hand():
    runs = torch.tensor([[[0, 1], [2, 12], [20, 220], [0, 0]]], dtype=torch.int32)[None, None]
    found = lists.histogram((runs, torch.tensor([[[3]]], dtype=torch.int32)))
    shares = {"1": 1 / 211, "2-7": 0, "8-15": 10 / 211, "16-31": 0, "128+": 200 / 211}
    assert {name: found[name] for name in shares} == pytest.approx(shares, abs=1e-4)
    assert found["mean"] == round(211 / 3, 2) and found["runs_per_list"] == 3


@pytest.mark.parametrize("select_heads", [1, 2, 4])
def test_exact_rows_are_the_references_answer(select_heads):
    shape = SMALL.but(heads=4, heads_kv=2, select_heads=select_heads, softcap=5.0, seqlen_q=100)
    inputs = Inputs(shape, "cpu", torch.float32)
    made = inputs.lists("A")
    out, _ = reference.sparse_attention(inputs.q, inputs.k, inputs.v, *made, shape.q_block, softcap=shape.softcap)
    rows = list(range(shape.queries))
    exact = answers.exact_rows(inputs.q, inputs.k, inputs.v, made, shape, rows)
    torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-6)
    inputs.checker("A")(out)
    out[:, :, inputs.rows[3]] += 1e-2
    with pytest.raises(AssertionError, match="1 of 16 sampled queries off"):
        inputs.checker("A")(out)


@pytest.mark.parametrize("shape", [SMALL, RAGGED])
def test_peers_on_the_same_lists_give_the_same_answer(shape):
    inputs = Inputs(shape, "cpu", torch.float32)
    q, k, v, made = inputs.q, inputs.k, inputs.v, inputs.lists("C")
    inputs.checker("C")(peers.gathered_sdpa(q, k, v, made, shape)())
    inputs.checker("all")(peers.sdpa(q, k, v)())


def test_a_contestant_that_fails_stops_nobody():
    def wrong(_answer):
        raise AssertionError("wrong answer")

    def absent():
        raise ModuleNotFoundError("No module named 'peer'\nsecond line")

    found = timing.measure(
        [
            timing.Contestant("absent", absent),
            timing.Contestant("wrong", lambda: lambda: torch.zeros(1), wrong),
            timing.Contestant("right", lambda: lambda: torch.zeros(2**18).exp(), memory=True),
        ],
        "cpu", seconds=0.01,
    )  # fmt: skip
    assert found["absent"] == timing.Failure("ModuleNotFoundError: No module named 'peer'")
    assert found["wrong"] == timing.Failure("AssertionError: wrong answer")
    right = found["right"]
    assert isinstance(right, timing.Timing) and 0 < right.low <= right.ms <= right.high and right.rounds >= 3


def test_extra_memory_sees_what_a_call_holds_beside_its_output():
    def call():
        return torch.ones(2**23).mul_(2)[: 2**10].clone()  # 32 MiB held, 4 KiB given back

    assert 31 < timing.extra_bytes(call, "cpu") / 2**20 < 34


def test_a_report_holds_machine_commit_and_command_but_no_path(tmp_path):
    report = timing.Report("test", "cpu", str(tmp_path / "rows.json"))
    report.add({"row": "a", "contestant": "b", **timing.timed(timing.Timing(1.23456789, 1.0, 1.5, 3, "how"))})
    report.add({"row": "a", "contestant": "c", **timing.timed(timing.Failure("why"))})
    data = json.loads((tmp_path / "rows.json").read_text())
    assert data["rows"] == [
        {"row": "a", "contestant": "b", "ms": 1.2346, "low": 1.0, "high": 1.5, "rounds": 3, "how": "how"},
        {"row": "a", "contestant": "c", "failed": "why"},
    ]
    assert {"cpu", "torch", "isa", "backend"} <= set(data["machine"]) and data["commit"] and data["command"]
    text = json.dumps({key: data[key] for key in ("machine", "commit", "command", "date")})
    assert str(BENCH.parent) not in text and str(tmp_path) not in text
    more = timing.Report("test", "cpu", str(tmp_path / "rows.json"), append=True)
    assert len(more.data["rows"]) == 2 and more.data["earlier_runs"][0]["command"] == data["command"]


def test_break_even_is_where_the_curves_cross():
    rows = [
        {"row": "lengths", "contestant": name, "seqlen_k": x, "budget": 4, "ms": ms}
        for name, points in {"whole": {100: 2.0, 400: 4.0}, "sdpa": {100: 1.0, 400: 16.0}}.items()
        for x, ms in points.items()
    ]
    # Ratios 2 and 1/4, straight in the logarithms: 1 lies a third of the way from 100 to 400.
    assert plot.crossing(plot.curve(rows, "lengths", "whole"), plot.curve(rows, "lengths", "sdpa")) == pytest.approx(
        100 * 4 ** (1 / 3)
    )
    assert plot.break_even(rows, "whole", "sdpa") == ["break-even length of whole against sdpa: 159 keys"]
    assert plot.break_even(rows[:3], "whole", "sdpa") == [
        "whole loses against sdpa at every length timed, 100 to 100 keys"
    ]


def test_verdicts_read_the_figure_that_the_target_names():
    rows = [
        {"row": "128k", "contestant": "whole", "ms": 9.0, "x_sdpa flash": 44.0},
        {"row": "8k", "contestant": "whole", "ms": 0.5},
        {"row": "32k", "contestant": "whole", "failed": "why"},
    ]
    found = [" ".join(line.split()) for line in bench_prefill.verdicts(rows)]
    assert found == [
        "128k whole ms 9.000 must 9.6: met, aim 8.2: MISSED",
        "128k whole x_sdpa flash 44.000 must 45: MISSED",
        "8k whole ms 0.500 must 0.72: met, aim 0.55: met",
    ]
    cells = {"attention chunks": {"x_gather + sdpa": 1.7}}
    assert bench_cpu.verdicts("gathered", "fp32", cells) == [
        "attention chunks against gather + sdpa: 1.70 x, must 1.6: met, aim 1.85: MISSED"
    ]
    assert bench_cpu.verdicts("gathered", "fp16", {}) == []


def test_who_loses_the_gpu_is_left_out_and_the_row_starts_again(monkeypatch, tmp_path):
    output = tmp_path / "rows.json"
    command = ["bench_prefill.py", "--device", "cpu", "--tiny", "--rows", "128k,8k,decode", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", command)
    started: list[list[str]] = []
    monkeypatch.setattr(os, "execv", lambda _program, words: started.append(words))
    run = bench_prefill.Run(bench_prefill.arguments())
    run.lost("8k", {"whole": timing.Timing(1, 1, 1, 3, "how"), "attention A": timing.Failure("illegal access")})
    monkeypatch.setattr(sys, "argv", started[0][1:])
    again = bench_prefill.Run(bench_prefill.arguments())
    assert again.rows == ["8k", "decode"] and again.without == ["attention A"] and again.tiny
    assert again.results.data["rows"] == [{"row": "8k", "contestant": "attention A", "failed": "illegal access"}]
    run.lost("8k", {})  # nobody known to have done it: the row is left out
    monkeypatch.setattr(sys, "argv", started[1][1:])
    assert bench_prefill.Run(bench_prefill.arguments()).rows == ["decode"]
    with pytest.raises(SystemExit):
        run.lost("decode", {})


def test_every_target_names_a_row_and_a_contestant_that_exist():
    decode = {"sparse_decode S=1", "sparse_decode S=Hkv"}
    for target in bench_prefill.TARGETS:
        names = decode if target.row == "decode" else bench_prefill.PREFILL_ROWS[target.row][1]
        assert target.contestant in names
    for target in bench_cpu.TARGETS:
        row = bench_cpu.ROWS[target.row]
        assert {target.contestant, target.against} <= set(row.names) and target.dtype in row.dtypes


def test_a_stage_that_answers_wrongly_is_not_timed():
    large = Inputs(SMALL, "cpu", torch.float32)
    one = torch.tensor([[[[[0, 2], [5, 9]]]]], dtype=torch.int32), torch.tensor([[[2]]], dtype=torch.int32)
    marks = bench_stages.kept_marks(*one)
    assert marks[0].nonzero()[:, 0].tolist() == [0, 1, 5, 6, 7, 8]
    scores = Inputs.of(large, SMALL)
    pipeline = bench_stages.Pipeline(scores)
    stage = pipeline.stage("chunk_pool")
    bench_stages.agrees("chunk_pool", stage.call(), stage.oracle(), False, torch.float32)
    with pytest.raises(AssertionError):
        bench_stages.agrees("chunk_pool", stage.call() + 1, stage.oracle(), False, torch.float32)


@pytest.mark.parametrize(
    "command",
    [
        ("bench_cpu.py", "--tiny", "--rows", "decode", "--dtypes", "fp32"),
        ("bench_prefill.py", "--device", "cpu", "--tiny", "--rows", "ceilings,8k", "--without", "attention C"),
    ],
    ids=lambda command: command[0],
)
def test_a_bench_runs_and_writes_its_rows(command, tmp_path):
    output = tmp_path / "rows.json"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    ran = subprocess.run(
        (sys.executable, BENCH / command[0], *command[1:], "--output", output),
        env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout + ran.stderr
    rows = json.loads(output.read_text())["rows"]
    names = [row["contestant"] for row in rows]
    failed = {row["contestant"]: row["failed"] for row in rows if "failed" in row}
    if command[0] == "bench_cpu.py":
        assert names == list(bench_cpu.ROWS["decode"].names) and not failed
    else:
        assert "attention B" in names and "attention C" not in names
        assert set(failed) <= {"sdpa cudnn"}  # there is no cuDNN on a CPU, and the others ran nevertheless
