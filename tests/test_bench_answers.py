"""bench/bench_answers.py on a tiny model: times and answers of every contestant, as data."""

from __future__ import annotations

import json

import pytest
import torch
from test_hf import build

import bench_answers
from dhsa_ext import models


class Letters:
    """One token a character."""

    def encode(self, text):
        return [2 + ord(c) % 90 for c in text]

    def decode(self, ids):
        return " ".join(map(str, ids))


@pytest.fixture
def grid(tmp_path):
    case = {"depth": 0.5, "form": "city", "question": "Where is it?", "answer": " 12345"}
    path = tmp_path / "grid.json"
    path.write_text(json.dumps([{"length": 500, "context": "somewhere " * 45, "cases": [case, case]}]))
    return path


@pytest.mark.parametrize("budget", [512, 400])
def test_answers_of_every_contestant(grid, budget, tmp_path, monkeypatch):
    with torch.no_grad():
        model, _ = build("gemma3")
    monkeypatch.setattr(models, "load", lambda name: models.LoadedModel("tiny", model, Letters(), [1]))
    output = tmp_path / "answers.json"
    arguments = ["--needles", str(grid), "--lengths", "500", "--budget", str(budget), "--output", str(output)]
    bench_answers.main(arguments)
    data = json.loads(output.read_text())
    rows = {row["contestant"]: row for row in data["rows"]}
    assert list(rows) == ["dense sdpa", "dhsa nowhere", "dhsa paper", "dhsa accurate"]
    assert len(data["cases"]) == 2 and data["cases"][0]["tokens"] == 463
    for name, row in rows.items():
        assert row["asked"] == 2 and row["ms"] > 0
        if budget >= 463 or name in ("dense sdpa", "dhsa nowhere"):
            assert row["same_as_dense"] == 2 and row["largest_logit_difference"] < 1e-4
    if budget < 463:  # other keys are left out, so other logits
        assert rows["dhsa accurate"]["logit_difference"] > 1e-6
