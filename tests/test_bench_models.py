"""bench/bench_models.py on a tiny model: every dense contestant and both presets, and what it refuses."""

from __future__ import annotations

import json
import sys

import pytest

import bench_models


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["bench_models.py", *arguments])
    bench_models.main()


def test_rows_of_every_contestant(monkeypatch, tmp_path, capsys):
    output = tmp_path / "models.json"
    run(
        monkeypatch, "--device", "cpu", "--models", "tiny", "--lengths", "500", "--budget", "384", "--rounds", "1",
        "--new-tokens", "2", "--contestants", "eager", "sdpa", "dhsa paper", "dhsa accurate", "--output", str(output),
    )  # fmt: skip
    rows = {row["contestant"]: row for row in json.loads(output.read_text())["rows"]}
    assert list(rows) == ["eager", "sdpa", "dhsa paper", "dhsa accurate"]
    for row in rows.values():
        assert row["seqlen_k"] == 500 and 0 < row["attention_ms"] < row["ms"] and row["tokens_per_s"] > 0
    assert "choice_ms" in rows["dhsa accurate"] and "choice_ms" not in rows["sdpa"]
    assert "dhsa accurate" in capsys.readouterr().out


def test_a_memory_limit_without_a_unit_is_refused(monkeypatch):
    with pytest.raises(SystemExit, match="--memory-limit: expected a size such as 24GB, got '24'"):
        run(monkeypatch, "--device", "cpu", "--models", "tiny", "--memory-limit", "24")


def test_out_of_memory_is_told_from_other_errors():
    assert bench_models.out_of_memory(MemoryError())
    assert not bench_models.out_of_memory(RuntimeError("expected q of 4 dimensions"))
