"""The learned boundary predictor, its labels by brute force, and its training on a tiny random model."""

from __future__ import annotations

import csv
import itertools
import json
import math

import pytest
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

pytest.importorskip("psutil", reason="pip install 'dhsa_ext[demo]'")
pytest.importorskip("tqdm", reason="pip install 'dhsa_ext[demo]'")

from dhsa_ext import evaluate_model, hf, models, train_boundaries
from dhsa_ext.config import DHSAConfig
from dhsa_ext.meter import LayerInputs
from dhsa_ext.predictor import BoundaryPredictor, PredictorConfig
from dhsa_ext.train_boundaries import attention_around, focal_bce, labelled_cuts, soft_labels

TEXT = "\n\n".join(f"Paragraph {i} says nothing of note.\nIt goes on." for i in range(60))


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Characters:
    """A tokenizer of one token a character."""

    def encode(self, text: str) -> list[int]:
        return [min(ord(c), 127) for c in text]

    def decode(self, ids: list[int]) -> str:
        return "".join(map(chr, ids))


def tiny(head_dim=16, layers=3):
    torch.manual_seed(0)
    kinds = ["full_attention", "sliding_attention", "full_attention"][:layers]
    config = Gemma3TextConfig(
        vocab_size=128, hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2,
        head_dim=head_dim, num_hidden_layers=layers, sliding_window=32, layer_types=kinds,
    )  # fmt: skip
    model = Gemma3ForCausalLM(config).eval().requires_grad_(False)
    hf.register()
    return models.LoadedModel("tiny", model, Characters(), [2])


def predictor(gated=True, **changes):
    torch.manual_seed(1)
    made = BoundaryPredictor(PredictorConfig(2, 16, gated=gated, **changes))
    for weight in made.parameters():  # biases too, and no weight at its default
        weight.data.add_(torch.randn_like(weight) * 0.1)
    return made.eval().requires_grad_(False)


# ---- the module


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("window, num_heads, length", [(4, 8, 50), (2, 4, 50), (4, 8, 8), (4, 8, 7), (3, 1, 0)])
def test_the_op_computes_the_module(gated, window, num_heads, length):
    made = predictor(gated, window=window, num_heads=num_heads)
    k = torch.randn(2, 2, length, 16)
    expected = made(k)
    assert expected.shape == (2, length) and bool(expected.isfinite().sum() == 2 * max(0, length - 2 * window + 1))
    torch.testing.assert_close(made.logits(k), expected, rtol=1e-4, atol=1e-4)


def test_gradients_reach_every_weight():
    made = predictor().requires_grad_(True)
    out = made(torch.randn(1, 2, 30, 16))
    out[out.isfinite()].sum().backward()
    silent = [name for name, weight in made.named_parameters() if weight.grad is None or not weight.grad.any()]
    # Both halves' gates are softmaxes over their own tokens: a common bias cancels.
    assert silent in ([], ["gate.bias"])


def test_chunks_are_cut_at_the_best_logits():
    k = torch.randn(1, 2, 100, 16)
    offsets, num_chunks = predictor().cut_chunks(k, DHSAConfig(chunk_size=10, nms_radius=3))
    logits = predictor().logits(k)[0]
    cuts = offsets[0, 1 : num_chunks[0]].tolist()
    assert int(num_chunks) > 2 and int(logits.argmax()) in cuts
    assert min(b - a for a, b in itertools.pairwise(cuts)) > 3


def test_heads_that_do_not_divide_the_width():
    with pytest.raises(ValueError, match="num_heads: expected a divisor of the keys' width 32, got 5"):
        predictor(num_heads=5)


# ---- files


def test_a_saved_predictor_comes_back(tmp_path):
    made = predictor(layers=(0, 2), model="some")
    made.save(tmp_path / "p.safetensors")
    again = BoundaryPredictor.load(tmp_path / "p.safetensors")
    assert again.config == made.config
    k = torch.randn(1, 2, 30, 16)
    assert torch.equal(again(k), made(k))


def test_a_mismatched_model_is_refused(tmp_path):
    from safetensors.torch import save_file

    path = tmp_path / "p.safetensors"
    predictor().save(path)
    BoundaryPredictor.load(path, tiny().model)
    with pytest.raises(ValueError, match=r"expected a model with 2 KV heads of dimension 16.*got 2 of 8"):
        BoundaryPredictor.load(path, tiny(head_dim=8).model)
    predictor(model="gemma3_text, 3 layers, width 32").save(path)
    BoundaryPredictor.load(path, tiny().model)
    with pytest.raises(ValueError, match=r"expected the model that it was trained on \(gemma3_text, 3.*got .* 1 l"):
        BoundaryPredictor.load(path, tiny(layers=1).model)
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="expected a file of format 'dhsa_ext boundary predictor 1', got None"):
        BoundaryPredictor.load(path)


# ---- labels and loss


@pytest.mark.parametrize("rows", [7, 16, 1000])
def test_labels_are_those_of_the_whole_attention_matrix(rows):
    torch.manual_seed(2)
    q, k = torch.randn(1, 4, 40, 16) * 2, torch.randn(1, 2, 40, 16)
    logits = q @ k.repeat_interleave(2, 1).mT * 0.3
    future = torch.ones(40, 40, dtype=torch.bool).triu(1)
    mean = (9 * torch.tanh(logits / 9)).masked_fill(future, -math.inf).softmax(-1)[0].mean(0)
    past, after = attention_around(LayerInputs(q, k, k, 0.3, 9.0), 3, rows)
    for t in labelled_cuts(40, 3).tolist():
        seen = mean[t + 3 :]
        assert float(past[t]) == pytest.approx(float(seen[:, t - 3 : t].sum()), abs=1e-5)
        assert float(after[t]) == pytest.approx(float(seen[:, t : t + 3].sum()), abs=1e-5)
    assert not past[:3].any() and not past[37:].any()


def test_soft_labels_rise_with_the_shift():
    labels = soft_labels(torch.tensor([1.0, 1.0, 2.0, 0.0]), torch.tensor([1.0, 2.0, 1.0, 0.0]))
    assert labels.tolist() == pytest.approx([0.5, 16 / 17, 16 / 17, 0.5], abs=1e-4)


def test_focal_bce():
    logits, hard = torch.tensor([0.3, -1.2]), torch.tensor([1.0, 0.0])
    p = logits.sigmoid()
    focal = (-3.0 * (1 - p[0]) ** 2 * p[0].log() - p[1] ** 2 * (1 - p[1]).log()) / 2
    assert float(focal_bce(logits, hard, positive_weight=3.0)) == pytest.approx(float(focal), rel=1e-5)
    soft = torch.tensor([0.8])
    assert float(focal_bce(soft.logit(), soft)) == pytest.approx(0, abs=1e-9)


def test_metrics_of_a_perfect_and_a_reversed_order():
    labels = torch.arange(64.0)
    assert train_boundaries.rank_correlation(labels, labels) == pytest.approx(1)
    assert train_boundaries.rank_correlation(-labels, labels) == pytest.approx(-1)
    assert train_boundaries.top_hits(labels, labels) == 1 and train_boundaries.top_hits(-labels, labels) == 0


# ---- training


def run(out, *options, monkeypatch, text):
    monkeypatch.setattr(models, "load", lambda name: tiny())
    fixed = ["--model", "tiny", "--text", str(text), "--length", "300", "--held-out", "1", "--epochs", "2"]
    return train_boundaries.main([*fixed, "--batch", "64", "--num-heads", "4", "--out", str(out), *options])


def test_training_resumes_where_it_stopped(tmp_path, monkeypatch, capsys):
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run(whole, "--documents", "4", monkeypatch=monkeypatch, text=text) == 0
    assert run(parts, "--documents", "2", monkeypatch=monkeypatch, text=text) == 0
    assert run(parts, "--documents", "4", "--resume", monkeypatch=monkeypatch, text=text) == 0
    metrics = [list(csv.DictReader((out / "metrics.csv").open())) for out in (whole, parts)]
    assert all(float(row.pop("peak_mib")) > 1 for rows in metrics for row in rows)
    assert metrics[0] == metrics[1] and [row["documents"] for row in metrics[0]] == ["1", "2", "3"]
    assert {"loss", "val_loss", "rank_correlation", "top_hits"} <= set(metrics[0][0])
    made = [BoundaryPredictor.load(out / "predictor.safetensors", tiny().model) for out in (whole, parts)]
    assert made[0].config.layers == (0, 2)
    for a, b in zip(*(m.state_dict().values() for m in made), strict=True):
        torch.testing.assert_close(a, b)
    assert run(parts, "--documents", "4", "--resume", "--lr", "1", monkeypatch=monkeypatch, text=text) == 1
    assert "--resume: lr: expected 0.0003, as in the run that parts holds, got 1.0" in capsys.readouterr().err
    chunker = evaluate_model.parse_boundaries(str(whole / "predictor.safetensors"), tiny().model)
    assert chunker(torch.randn(1, 2, 90, 16), DHSAConfig())[1].tolist()[0] > 1


def test_training_lowers_the_loss(tmp_path):
    """The labels of one document can be learned: a text with a marked token where the attention shifts."""
    torch.manual_seed(3)
    x = torch.randn(400, 32)
    shift = torch.arange(400) % 20 == 0
    x[shift] += 3
    cuts = labelled_cuts(400, 4)
    labels = torch.where(shift[cuts], 0.95, 0.5)
    made = BoundaryPredictor(PredictorConfig(2, 16, num_heads=4))
    options = dict(lr=3e-3, weight_decay=0.0, seed=0, epochs=15, batch=128, positive_weight=1.0)
    trainer = train_boundaries.Trainer(made, type("Arguments", (), options)())
    before = train_boundaries.validate(made, [(x, cuts, labels)], 1.0)
    trainer.learn((x, cuts, labels))
    after = train_boundaries.validate(made, [(x, cuts, labels)], 1.0)
    assert after["val_loss"] < before["val_loss"] / 3 and after["top_hits"] > 0.75


def test_mistakes_are_one_sentence(tmp_path, monkeypatch, capsys):
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    for options in (["--layers", "1"], ["--held-out", "99"], ["--num-heads", "5"]):
        assert run(tmp_path / "out", *options, monkeypatch=monkeypatch, text=text) == 1
        assert capsys.readouterr().err.strip().splitlines()[-1].startswith("error: dhsa_ext")


def test_headers_are_json(tmp_path):
    from safetensors import safe_open

    predictor().save(tmp_path / "p.safetensors")
    with safe_open(tmp_path / "p.safetensors", "pt") as file:
        assert json.loads(file.metadata()["config"])["window"] == 4
