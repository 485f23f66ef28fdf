"""The evaluation: its readers and scores by hand, its measurements against dense attention on a tiny random model."""

from __future__ import annotations

import csv
import json
import math
import os
import sys
import warnings
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

pytest.importorskip("psutil", reason="pip install 'dhsa_ext[demo]'")
pytest.importorskip("tqdm", reason="pip install 'dhsa_ext[demo]'")

from dhsa_ext import evaluate, evaluate_harness, evaluate_model, evaluate_report, evaluate_tasks, hf, models, policies
from dhsa_ext.config import DHSAConfig
from dhsa_ext.evaluate_model import Asker, Choice, ChoiceMeter, PolicyAttention
from dhsa_ext.evaluate_tasks import Question
from dhsa_ext.meter import LayerInputs

pytestmark = pytest.mark.filterwarnings("ignore:dhsa_ext.policies.oracle")
TEXT = "\n\n".join(f"Paragraph {i} says nothing of note.\nIt goes on." for i in range(400))


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


@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=128, hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2,
        head_dim=16, num_hidden_layers=3, sliding_window=32, eos_token_id=1,
        layer_types=["full_attention", "sliding_attention", "full_attention"],
    )  # fmt: skip
    model = Gemma3ForCausalLM(config)
    for weight in model.parameters():
        weight.data.mul_(3)  # attention that prefers something
    hf.register()
    return models.LoadedModel("tiny", model.eval().requires_grad_(False), Characters(), [2])


def choice(name="accurate", **changes):
    settings = dict(budget=64, q_block=16, sink=4, local=8, q_stride=4, decode="dense", min_length=0)
    return Choice(name, policies.POLICIES[name], DHSAConfig(**{**settings, **changes}))


# ---- scores


def test_f1_is_that_of_squad():
    assert evaluate_tasks.f1("The Eiffel tower, Paris.", ["Eiffel Tower"]) == pytest.approx(2 * 2 / (3 + 2))
    assert evaluate_tasks.f1("a cat", ["dog", "the cat"]) == 1 and evaluate_tasks.f1("", ["dog"]) == 0


def test_rouge_l_counts_the_longest_common_subsequence():
    assert evaluate_tasks.rouge_l("the cat sat on mats", ["the big cat sat down"]) == pytest.approx(2 * 3 / 10)
    assert evaluate_tasks.rouge_l("b a", ["a b"]) == pytest.approx(0.5) and evaluate_tasks.rouge_l("x", ["a b"]) == 0


def test_matches_are_those_of_ruler():
    assert evaluate_tasks.match_all("It is 12 and 34.", ["12", "34", "56"]) == pytest.approx(2 / 3)
    assert evaluate_tasks.match_any("it is PARIS", ["Rome", "Paris"]) == 1
    assert evaluate_tasks.exact(" 123 or so", ["123"]) == 1 and evaluate_tasks.exact("it is 123", ["123"]) == 0


# ---- readers


def write_lines(path, *records):
    path.write_text("\n".join(map(json.dumps, records)) + "\n", encoding="utf-8")
    return path


def test_needle_grids_as_json_and_as_lines(tmp_path):
    case = {"form": "city", "depth": 0.3, "question": "Q", "answer": " A"}
    grid = tmp_path / "grid.json"
    grid.write_text(json.dumps([{"length": 1024, "p": 0, "context": "text", "cases": [case, case]}]))
    (prompt,) = evaluate_tasks.read_needles(grid)
    assert prompt.length == 1024 and prompt.questions[1] == Question("Q", (" A",), "city", 0.3)
    lines = write_lines(tmp_path / "flat.jsonl", {"context": "text", "input": "Q", "answers": ["A", "B"]})
    (prompt,) = evaluate_tasks.read_needles(lines)
    assert prompt.questions[0].answers == ("A", "B") and math.isnan(prompt.questions[0].depth)
    with pytest.raises(ValueError, match="expected a field answer or answers, got"):
        evaluate_tasks.read_needles(write_lines(tmp_path / "bad.jsonl", {"context": "text", "input": "Q"}))


def test_longbench_lines(tmp_path):
    qa = {"input": "Who?", "context": "text", "answers": ["me"], "dataset": "hotpotqa", "_id": "x"}
    report = {"input": "", "context": "text", "answers": ["long"], "dataset": "gov_report", "_id": "y"}
    first, second = evaluate_tasks.read_longbench(write_lines(tmp_path / "any.jsonl", qa, report))
    assert first.name == "hotpotqa/x" and first.questions[0].metric == "f1" and "Who?" in first.questions[0].text
    assert second.questions[0].metric == "rouge_l" and second.questions[0].max_new_tokens == 512


def test_ruler_lines_split_into_context_and_question(tmp_path):
    (tmp_path / "niah_single_1").mkdir()
    record = {"index": 7, "input": "Find it.\nlong text\nWhat is it?\nIt is", "outputs": ["42"], "length": 4096}
    path = write_lines(tmp_path / "niah_single_1" / "validation.jsonl", {**record, "answer_prefix": ": "})
    (prompt,) = evaluate_tasks.read_ruler(path)
    assert prompt.name == "niah_single_1/7" and prompt.length == 4096
    assert prompt.context == "Find it.\nlong text\n" and prompt.questions[0].text == "What is it?\nIt is: "
    one_line = {"input": " ".join(map(str, range(100))), "outputs": ["1", "2"]}
    (prompt,) = evaluate_tasks.read_ruler(write_lines(tmp_path / "qa_1.jsonl", one_line))
    assert prompt.context + prompt.questions[0].text == one_line["input"]
    assert len(prompt.questions[0].text.split()) == 64 and prompt.questions[0].metric == "match_any"


def test_long_contexts_keep_both_ends():
    prompt = evaluate_tasks.Prompt("p", "abcdefgh")
    assert evaluate_tasks.context_ids(prompt, Characters(), [2], 5) == [2, ord("a"), ord("f"), ord("g"), ord("h")]
    assert len(evaluate_tasks.context_ids(prompt, Characters(), [2], 9)) == 9


def test_texts_and_needles_are_cut_to_length():
    pieces = evaluate_tasks.text_prompts(TEXT, Characters(), [2], 500, 3, seed=1)
    assert [len(p.ids) for p in pieces] == [500] * 3 and len({p.ids for p in pieces}) == 3
    with pytest.raises(ValueError, match="expected at least 90000 tokens"):
        evaluate_tasks.text_prompts(TEXT, Characters(), [2], 90_000, 1, seed=1)
    grid = evaluate_tasks.make_needles(TEXT, Characters(), [2], [400, 600], [0.2, 0.8], seed=3)
    for prompt in grid:
        (question,) = prompt.questions
        text = Characters().decode(list(prompt.ids))
        assert len(prompt.ids) + len(question.text) == prompt.length
        assert text.index(question.answers[0].strip()) / prompt.length == pytest.approx(question.depth, abs=0.25)


def test_dev_set_of_needles_where_it_is_there():
    folder = os.environ.get("DHSA_DATA")
    if not folder:
        pytest.skip("DHSA_DATA is not set: the folder of needles_dev.json, which is not part of the repository")
    prompts = evaluate_tasks.read_needles(Path(folder) / "needles_dev.json")
    assert len(prompts) == 18 and sum(len(p.questions) for p in prompts) == 72


# ---- policies by name


def test_policies_are_read_from_words():
    q = k = torch.randn(1, 1, 64, 8)
    config = choice().config
    runs, _ = evaluate_model.parse_policy("block_sparse:block=8")(q, k, config)
    assert runs.shape[3] == 8 + 3
    assert evaluate_model.parse_policy("coverage:share=0.5").keywords == {"share": 0.5}
    accurate = evaluate_model.parse_policy("accurate:rows=sample,q_stride=8,refine=4")
    assert accurate.keywords == {"rows": "sample", "q_stride": 8, "refine": 4}
    for bad in ("nothing", "coverage:nothing=1", "paper:chunks=3"):
        with pytest.raises(ValueError, match=r"dhsa_ext.evaluate: policies: .*expected"):
            evaluate_model.parse_policy(bad)
    with pytest.raises(ValueError, match="boundaries: expected training-free, fixed or a predictor's file, got 'x'"):
        evaluate_model.parse_boundaries("x")


# ---- the choice of keys


def test_recall_and_error_are_those_of_dense_attention():
    torch.manual_seed(1)
    q, k, v = torch.randn(1, 4, 96, 16) * 2, torch.randn(1, 2, 96, 16), torch.randn(1, 2, 96, 16)
    one = choice("sliding_window")
    got = ChoiceMeter(LayerInputs(q, k, v, None, 0.0), [96]).measure(one)
    future = torch.ones(16, 96, dtype=torch.bool).triu(81)
    kk, vv = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    mass = (q[:, :, 80:] @ kk.mT / 4).masked_fill(future, -math.inf).softmax(-1)
    kept = mass.clone()
    kept[..., 4:36] = 0  # 64 keys: 4 sinks and the nearest 60
    assert got.keys == 64 and got.recall == pytest.approx(float(kept.sum(-1).mean()), rel=1e-4)
    difference = kept / kept.sum(-1, keepdim=True) @ vv - mass @ vv
    assert got.error == pytest.approx(float(difference.norm() / (mass @ vv).norm()), rel=1e-3)


def test_blocks_lie_in_the_second_half():
    assert evaluate_model.block_positions(1000, 64, 4) == [625, 750, 875, 1000]
    assert evaluate_model.block_positions(100, 64, 4) == []


def test_capture_holds_the_global_layers(tiny):
    layers = evaluate_model.capture(tiny, range(2, 92))
    assert list(layers) == [0, 2] and layers[2].q.shape == (1, 4, 90, 16) and layers[2].k.shape == (1, 2, 90, 16)


# ---- the model under a choice


IDS = [2, *Characters().encode(TEXT[:300])]


@pytest.mark.parametrize("name", ["paper", "accurate", "sliding_window", "oracle"])
def test_a_budget_of_the_length_gives_the_dense_logits(tiny, name):
    with PolicyAttention(tiny, None) as attention:
        expected = attention.forward(IDS, None, 5)
    with PolicyAttention(tiny, choice(name, budget=400)) as attention:
        torch.testing.assert_close(attention.forward(IDS, None, 5), expected, rtol=1e-4, atol=1e-3)
    with PolicyAttention(tiny, choice(name, budget=48)) as attention:
        assert not torch.allclose(attention.forward(IDS, None, 5), expected, rtol=1e-2, atol=1e-2)
        attention.sparse = False
        torch.testing.assert_close(attention.forward(IDS, None, 5), expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("sparse", [False, True])
def test_an_answer_counts_when_the_model_would_write_it(tiny, sparse):
    question = Question(" what?", ("",), max_new_tokens=4)
    asker = Asker(tiny, IDS, choice(), sparse)
    answer = asker.generated(question, sparse)
    assert answer and asker.generated(question, sparse) == answer  # the cache is as it was
    assert asker.forced(Question(" what?", (answer,)), sparse)
    assert asker.forced(Question(" what?", ("~" + answer[1:] + "x", answer)), sparse)
    wrong = answer[:-1] + ("a" if answer[-1] != "a" else "b")
    assert not asker.forced(Question(" what?", (wrong,)), sparse)


def test_perplexity_of_the_tail_is_that_of_the_model(tiny):
    with torch.no_grad():
        logits = tiny.model(torch.tensor([IDS])).logits[0, -11:-1]
    expected = torch.nn.functional.cross_entropy(logits, torch.tensor(IDS[-10:])).exp()
    assert evaluate_model.tail_perplexity(tiny, IDS, None, 10) == pytest.approx(float(expected), rel=1e-3)
    assert evaluate_model.tail_perplexity(tiny, IDS, choice(budget=400), 10) == pytest.approx(float(expected), rel=1e-3)


def test_time_and_memory_are_measured(tiny):
    speed = evaluate_model.first_token(tiny, IDS, choice())
    assert 0 < speed.first_token_s < 60 and speed.peak_mib >= 0


# ---- the report


def test_layers_are_averaged_before_prompts_are():
    rows = [dict(policy="p", prompt=prompt, recall=value) for prompt, value in (("a", 0.0), ("a", 1.0), ("b", 0.7))]
    (line,) = evaluate_report.summarise(rows, ["policy"], "prompt", ["recall"])
    assert line["n"] == 2 and line["recall"] == pytest.approx(0.6) and line["recall_se"] == pytest.approx(0.1)
    assert "0.600 ± 0.100" in evaluate_report.table([line], ["policy", "recall", "n"])
    assert math.isnan(evaluate_report.mean_and_error([1.0])[1])


def test_gap_closed_lies_between_paper_and_oracle():
    recall = {"paper": 0.5, "accurate": 0.8, "oracle": 0.9}
    same = dict(length=1, heads="kv", q_block=64, budget=256, boundaries="training-free")
    rows = [dict(policy=name, recall=value, **same) for name, value in recall.items()]
    rows.append({**rows[1], "budget": 512})
    evaluate_report.add_gap_closed(rows)
    assert [row["gap_closed"] for row in rows[:3]] == pytest.approx([0, 0.75, 1]) and rows[3]["gap_closed"] == ""


COMMANDS = {
    "recall": ["--policies", "paper", "coverage:share=0.8", "--boundaries", "training-free", "fixed", "--blocks", "2"],
    "needles": ["--rows", "all", "question", "context", "--depths", "0.2", "0.8"],
    "perplexity": ["--tail", "20"],
    "speed": ["--repeats", "1"],
    "cost": ["--repeats", "1", "--layer", "0"],
    "picture": ["--policies", "paper", "sliding_window"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_writes_its_files(tiny, command, monkeypatch, tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="pip install 'dhsa_ext[demo]'")
    monkeypatch.setattr(models, "load", lambda name: tiny)
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)  # put back afterwards
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    common = ["--model", "tiny", "--text", str(text), "--lengths", "400", "--budgets", "64", "--q-block", "16",
              "--local", "16", "--out", str(tmp_path / "out"), "--seed", "3"]  # fmt: skip
    assert evaluate.main([command, *common, *COMMANDS[command]]) == 0
    out = tmp_path / "out"
    with (out / f"{command}.csv").open() as file:
        rows = list(csv.DictReader(file))
    facts = json.loads((out / f"{command}.json").read_text())
    assert rows and facts["seed"] == 3 and facts["torch"] == torch.__version__ and command in facts["command"]
    assert (out / f"{command}.png").exists() == (command in ("recall", "needles", "picture"))
    printed = capsys.readouterr().out
    assert "paper" in printed and "written:" in printed
    if command == "recall":
        assert {row["boundaries"] for row in rows if row["policy"] == "paper"} == {"training-free", "fixed"}
        assert all(0 < float(row["recall"]) <= 1.0001 for row in rows)
    if command == "needles":
        assert {(row["policy"], row["rows"]) for row in rows} >= {("dense", "none"), ("paper", "context")}


def test_tasks_are_answered_and_scored(tiny, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(models, "load", lambda name: tiny)
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    qa = {"input": "Who?", "context": TEXT[:300], "answers": ["me"], "dataset": "hotpotqa", "_id": "x"}
    path = write_lines(tmp_path / "any.jsonl", qa)
    options = ["--model", "tiny", "--longbench", str(path), "--budgets", "64", "--q-block", "16", "--local", "16"]
    assert evaluate.main(["tasks", *options, "--max-length", "200", "--out", str(tmp_path)]) == 0
    with (tmp_path / "tasks.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["policy"] for row in rows] == ["dense", "paper", "accurate", "oracle"] and rows[0]["tokens"] == "200"


def test_mistakes_are_one_sentence(tiny, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(models, "load", lambda name: tiny)
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    for options in (["recall", "--policies", "magic"], ["recall", "--budgets", "10"], ["tasks"],
                    ["recall", "--lengths", "100", "--budgets", "200"]):  # fmt: skip
        assert evaluate.main([*options, "--model", "tiny", "--out", str(tmp_path)]) == 1
        assert capsys.readouterr().err.strip().splitlines()[-1].startswith("error: dhsa_ext")


# ---- lm-evaluation-harness


def test_the_harness_gets_its_own_arguments_and_the_attention(monkeypatch):
    seen = []
    package, entry = ModuleType("lm_eval"), ModuleType("lm_eval.__main__")
    monkeypatch.setattr(entry, "cli_evaluate", lambda: seen.extend(sys.argv), raising=False)
    monkeypatch.setitem(sys.modules, "lm_eval", package)
    monkeypatch.setitem(sys.modules, "lm_eval.__main__", entry)
    monkeypatch.setattr(sys, "argv", sys.argv)
    own = ["--preset", "paper", "--budget", "700"]
    assert evaluate_harness.main([*own, "run", "--model", "hf", "--model_args", "pretrained=x", "--tasks", "t"]) == 0
    rest = ["run", "--model", "hf", "--tasks", "t", "--model_args", "pretrained=x,attn_implementation=dhsa"]
    assert seen == ["lm_eval", *rest]
    assert hf._default == DHSAConfig("paper", budget=700)
    assert evaluate_harness.harness_arguments(["--preset", "dense", "--model_args", "pretrained=x"])[0].layers == ()
    hf.register()


def test_without_the_harness_one_sentence_says_so(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.__main__", None)
    assert evaluate_harness.main(["--model_args", "pretrained=x"]) == 1
    assert "lm_eval is not installed: pip install lm-eval" in capsys.readouterr().err
