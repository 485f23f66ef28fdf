"""bench/bench_models.py on tiny models: dense contestants and both presets, what is checked, and what it refuses."""

from __future__ import annotations

import copy
import json
import sys

import pytest
import torch
from transformers import DynamicCache

import bench_models
import model_answers
import model_decode
import model_plot
from dhsa_ext import hf
from model_shapes import MODELS, build

CONTESTANTS = ("eager", "sdpa", "dhsa nowhere", "dhsa paper", "dhsa accurate")


def run(monkeypatch, tmp_path, *arguments, contestants=CONTESTANTS):
    output = tmp_path / "models.json"
    monkeypatch.setattr(
        sys, "argv",
        ["bench_models.py", "--device", "cpu", "--budget", "384", "--repeats", "1", "--new-tokens", "2", "--output",
         str(output), *arguments, "--contestants", *contestants],
    )  # fmt: skip
    bench_models.main()
    return json.loads(output.read_text())


def test_rows_of_every_contestant(monkeypatch, tmp_path, capsys):
    rows = {r["contestant"]: r for r in run(monkeypatch, tmp_path, "--models", "tiny", "--lengths", "500")["rows"]}
    assert tuple(rows) == CONTESTANTS
    for row in rows.values():
        assert row["seqlen_k"] == 500 and 0 < row["attention_ms"] < row["ms"] and row["tokens_per_s"] > 0
        assert row["attention_ms"] + row["rest_ms"] == pytest.approx(row["ms"], rel=1e-2)
    assert [name for name, row in rows.items() if "choice_ms" in row] == ["dhsa paper", "dhsa accurate"]
    assert "dhsa accurate" in capsys.readouterr().out


def test_decode_as_a_fixed_step(monkeypatch, tmp_path):
    arguments = ("--models", "tiny", "--lengths", "500", "--decode", "fixed")
    for row in run(monkeypatch, tmp_path, *arguments, contestants=["sdpa", "dhsa accurate"])["rows"]:
        assert row["fixed_tokens_per_s"] > 0 and row["fixed_launches"] < row["launches"]


def test_a_pinned_step_is_the_next_token(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda call, **_: call)
    with torch.no_grad():
        for name, own in (("tiny", "sdpa"), ("tiny-gemma-2", "eager")):
            model = build(name, "cpu", torch.float32)
            model.set_attn_implementation(own)
            ids = torch.randint(2, 128, (1, 301))
            cache = DynamicCache(config=model.config)
            model(ids[:, :300], past_key_values=cache)
            expected = model(ids[:, 300:], past_key_values=copy.deepcopy(cache)).logits
            step = model_decode.PinnedStep(model, cache, own, "cpu")
            got = [step(ids[:, 300:]).clone() for _ in range(2)]
            torch.testing.assert_close(got, [expected, expected], rtol=1e-4, atol=1e-4)


def test_pieces_are_appended_and_drawn(monkeypatch, tmp_path):
    run(monkeypatch, tmp_path, "--models", "tiny", "--lengths", "500", contestants=["sdpa"])
    arguments = ("--models", "tiny-gemma-2", "--lengths", "600", "--pieces", "256", "--append")
    data = run(monkeypatch, tmp_path, *arguments, contestants=["eager", "dhsa accurate"])
    assert [(r["row"], r.get("pieces")) for r in data["rows"]] == [
        ("tiny", None), ("tiny-gemma-2", 256), ("tiny-gemma-2", 256),
    ]  # fmt: skip
    assert set(data["models"]) == {"tiny", "tiny-gemma-2"} and len(data["earlier_runs"]) == 1
    model_plot.draw_file(tmp_path / "models.json")
    assert (tmp_path / "models.png").exists()


def test_sdpa_is_not_timed_where_logits_are_soft_capped(monkeypatch, tmp_path):
    arguments = ("--models", "tiny-gemma-2", "--lengths", "300", "400")
    rows = run(monkeypatch, tmp_path, *arguments, contestants=["eager", "sdpa"])["rows"]
    assert [(r["contestant"], r.get("failed")) for r in rows] == [
        ("eager", None), ("sdpa", "wrong: sdpa has no soft cap"), ("eager", None),
    ]  # fmt: skip


def test_out_of_memory_is_a_row_and_ends_a_contestant(monkeypatch, tmp_path):
    attend = bench_models.Metered._attend

    def dies(self, module, q, *rest, **kwargs):
        if self.implementation == "eager" and q.shape[2] == 500:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 64 GiB")
        return attend(self, module, q, *rest, **kwargs)

    monkeypatch.setattr(bench_models.Metered, "_attend", dies)
    arguments = ("--models", "tiny", "--lengths", "300", "500", "600")
    rows = run(monkeypatch, tmp_path, *arguments, contestants=["eager", "sdpa"])["rows"]
    assert [(r["seqlen_k"], r["contestant"], r.get("failed")) for r in rows] == [
        (300, "eager", None), (300, "sdpa", None), (500, "eager", "out of memory"), (500, "sdpa", None),
        (600, "sdpa", None),
    ]  # fmt: skip


def test_a_run_that_ends_early_leaves_its_rows(monkeypatch, tmp_path):
    turn = bench_models.Bench._turn
    turns = []

    def ends(self, contestant, ids, run, **round_):
        turns.append(contestant.name)
        if len(turns) == 4:  # the second contestant's first timed turn
            raise KeyboardInterrupt
        turn(self, contestant, ids, run, **round_)

    monkeypatch.setattr(bench_models.Bench, "_turn", ends)
    with pytest.raises(KeyboardInterrupt):
        run(monkeypatch, tmp_path, "--models", "tiny", "--lengths", "300", contestants=["eager", "sdpa"])
    rows = json.loads((tmp_path / "models.json").read_text())["rows"]
    assert "ms" in rows[0] and rows[1]["failed"].startswith("not run")


def test_no_turn_begins_after_the_time_is_up(monkeypatch, tmp_path):
    rows = run(monkeypatch, tmp_path, "--models", "tiny", "--lengths", "300", "--minutes", "0")["rows"]
    assert all(r["failed"] == "not run: the time was up" for r in rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["tiny", "tiny-gemma-2"])
def test_the_check_tells_right_from_wrong(name, dtype, monkeypatch):
    hf.register()
    with torch.no_grad():
        model = build(name, "cpu", dtype)
        entrants = [c for c in bench_models.contestants(384, "cpu") if c.name in CONTESTANTS]
        arguments = (model, entrants, "cpu", bench_models.Metered, bench_models.NAME)
        bound, errors = model_answers.relative_errors(*arguments)
        assert errors["dhsa accurate"] <= bound and errors["dhsa paper"] <= bound
        attend = hf.ops.sparse_prefill
        monkeypatch.setattr(hf.ops, "sparse_prefill", lambda q, k, v, **o: attend(q, k, v, **{**o, "budget": 130}))
        settings = dict(q_block=32, min_length=0, budget=512)
        monkeypatch.setattr(model_answers, "DHSAConfig", lambda preset, **_: hf.DHSAConfig("accurate", **settings))
        _, errors = model_answers.relative_errors(*arguments)
        assert errors["dhsa accurate"] > bound


def test_weights_are_made_on_the_device():
    """No parameter or buffer of an 8B model passes through the host: on "meta" none has memory at all."""
    for name in MODELS:
        model = build(name, "meta", torch.bfloat16)
        assert {x.device.type for x in (*model.parameters(), *model.buffers())} == {"meta"}


def test_a_memory_limit_without_a_unit_is_refused(monkeypatch, tmp_path):
    with pytest.raises(SystemExit, match="--memory-limit: expected a size such as 24GB, got '24'"):
        run(monkeypatch, tmp_path, "--models", "tiny", "--memory-limit", "24")


def test_an_unknown_contestant_is_refused(monkeypatch, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run(monkeypatch, tmp_path, contestants=["dhsa"])
    assert "--contestants: expected some of 'eager', 'sdpa'" in capsys.readouterr().err


def test_out_of_memory_is_told_from_other_errors():
    assert bench_models.out_of_memory(MemoryError())
    assert bench_models.out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"))
    assert not bench_models.out_of_memory(RuntimeError("expected q of 4 dimensions"))
