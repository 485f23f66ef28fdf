"""What the evaluation reads, and how answers are scored: needle grids, LongBench, RULER, plain text.

Every reader gives Prompts: a context, and the questions asked about it. A needle counts when every token of its answer
is the greedy choice; a generated answer is scored by its benchmark's own metric.
"""

from __future__ import annotations

import json
import random
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import needle
from .models import Tokenizer


@dataclass(frozen=True)
class Question:
    """What is appended to a context, and the answers that count."""

    text: str
    answers: tuple[str, ...]
    form: str = ""
    depth: float = float("nan")  # 0 at the context's beginning, 1 at its end
    metric: str = "exact"
    max_new_tokens: int = 32


@dataclass(frozen=True)
class Prompt:
    """A context of about `length` tokens (0: unknown) and its questions; `ids`, where given, are its tokens."""

    name: str
    context: str
    questions: tuple[Question, ...] = ()
    length: int = 0
    ids: tuple[int, ...] = field(default=(), repr=False)


# ---- readers


def read_needles(path: Path) -> list[Prompt]:
    """A grid of needles: [{length, context, cases: [{depth, question, answer}]}] as JSON, or flat JSON lines.

    A flat line holds context, question (or input), answer (or answers), and where known length, depth and form.
    """
    records = _records(path)
    prompts = []
    for n, record in enumerate(records):
        questions = tuple(
            Question(
                _first(path, case, "question", "input"),
                _strings(_first(path, case, "answer", "answers")),
                str(case.get("form", "")),
                float(case.get("depth", float("nan"))),
            )
            for case in record.get("cases", [record])
        )
        prompts.append(Prompt(f"{path.stem}/{n}", record["context"], questions, int(record.get("length", 0))))
    return prompts


def make_needles(
    text: str, tokenizer: Tokenizer, bos: list[int], lengths: Sequence[int], depths: Sequence[float], seed: int
) -> list[Prompt]:
    """One hidden fact for each length and depth, in pieces of `text`, of exactly these lengths."""
    prompts = []
    for length in lengths:
        for n, depth in enumerate(depths):
            hidden = needle.hide(text, tokenizer, bos, length, seed + n, depth)
            question = Question(f"\n\n{hidden.question}", (f" {hidden.answer}",), "needle", depth)
            ids = tuple(hidden.ids[: hidden.question_begin])
            prompts.append(Prompt(f"needle/{length}/{depth:g}", "", (question,), length, ids))
    return prompts


# Tokens that LongBench lets a model write, and its summaries, which it scores by ROUGE-L; the rest here by F1.
_LONGBENCH_TOKENS = {
    "narrativeqa": 128, "qasper": 128, "multifieldqa_en": 64, "hotpotqa": 32, "2wikimqa": 32, "musique": 32,
    "triviaqa": 32, "gov_report": 512, "qmsum": 512, "multi_news": 512, "samsum": 128,
}  # fmt: skip
_LONGBENCH_SUMMARIES = ("gov_report", "qmsum", "multi_news", "samsum")


def read_longbench(path: Path) -> list[Prompt]:
    """LongBench's JSON lines: context, input, answers. Summaries are scored by ROUGE-L, other data sets by F1."""
    prompts = []
    for n, record in enumerate(_records(path)):
        dataset = str(record.get("dataset") or path.stem).removesuffix("_e")
        metric = "rouge_l" if dataset in _LONGBENCH_SUMMARIES else "f1"
        ask = f"\n\n{record['input']}\n" if record["input"] else "\n\nSummary:\n"
        question = Question(
            ask, _strings(record["answers"]), dataset, metric=metric, max_new_tokens=_LONGBENCH_TOKENS.get(dataset, 64)
        )
        prompts.append(Prompt(f"{dataset}/{record.get('_id', n)}", record["context"], (question,)))
    return prompts


def read_ruler(path: Path) -> list[Prompt]:
    """RULER's JSON lines: input (the whole prompt), outputs, and where it has one answer_prefix.

    The share of the outputs that the answer holds counts; for questions with several right answers (qa), any of them.
    The last 64 words or the last two lines of the input, whichever is shorter, are taken for the question.
    """
    prompts = []
    for n, record in enumerate(_records(path)):
        task = path.parent.name if path.stem in ("validation", "test") else path.stem
        lines = record["input"].rstrip().splitlines(keepends=True)
        ask = "".join(lines[-2:]) if len(lines) > 2 else ""
        words = re.findall(r"\s*\S+", record["input"])
        if not ask or len(ask.split()) > 64:
            ask = "".join(words[-64:])
        context = record["input"].rstrip()[: -len(ask)] if ask else record["input"]
        metric = "match_any" if "qa" in task else "match_all"
        text = ask + record.get("answer_prefix", "")
        question = Question(text, _strings(record["outputs"]), task, metric=metric, max_new_tokens=128)
        prompts.append(Prompt(f"{task}/{record.get('index', n)}", context, (question,), int(record.get("length", 0))))
    return prompts


def text_prompts(text: str, tokenizer: Tokenizer, bos: list[int], length: int, count: int, seed: int) -> list[Prompt]:
    """`count` pieces of `text` of exactly `length` tokens, from places that `seed` picks."""
    rng = random.Random(seed)
    prompts = []
    for n in range(count):
        start = text.find("\n", rng.randrange(max(1, len(text) - 8 * length))) + 1
        ids = tokenizer.encode(text[start : start + 8 * length])
        ids = ids if len(ids) >= length - len(bos) else tokenizer.encode(text)
        if len(ids) < length - len(bos):
            raise ValueError(f"dhsa_ext.evaluate: text: expected at least {length} tokens, got {len(ids) + len(bos)}")
        prompts.append(Prompt(f"text/{length}/{n}", "", (), length, tuple(bos + ids[: length - len(bos)])))
    return prompts


def context_ids(prompt: Prompt, tokenizer: Tokenizer, bos: list[int], max_length: int | None = None) -> list[int]:
    """The context's tokens; of one that is longer than max_length, LongBench's way, its first and its last half."""
    ids = list(prompt.ids) or bos + tokenizer.encode(prompt.context)
    if max_length is None or len(ids) <= max_length:
        return ids
    return ids[: max_length // 2] + ids[len(ids) - (max_length - max_length // 2) :]


def _records(path: Path) -> list[dict[str, Any]]:
    text = path.read_text(encoding="utf-8")
    if text.lstrip().startswith("["):
        return json.loads(text)
    return [json.loads(line) for line in text.splitlines() if line.strip()]


def _first(path: Path, record: dict[str, Any], *names: str) -> Any:
    for name in names:
        if name in record:
            return record[name]
    raise ValueError(f"dhsa_ext.evaluate: {path.name}: expected a field {' or '.join(names)}, got {sorted(record)}")


def _strings(value: Any) -> tuple[str, ...]:
    return tuple(map(str, value)) if isinstance(value, list) else (str(value),)


# ---- metrics, each of an answer and the answers that count: 0 to 1


def f1(answer: str, truths: Sequence[str]) -> float:
    """The best token F1 over the truths, after SQuAD's normalisation: LongBench's score of question answering."""
    return max((_f1(_words(answer), _words(truth)) for truth in truths), default=0.0)


def rouge_l(answer: str, truths: Sequence[str]) -> float:
    """The best ROUGE-L F1 over the truths: by the longest common subsequence of their words."""
    return max((_rouge_l(answer.split(), truth.split()) for truth in truths), default=0.0)


def match_all(answer: str, truths: Sequence[str]) -> float:
    """The share of the truths that the answer holds, case ignored: RULER's score."""
    return sum(truth.lower() in answer.lower() for truth in truths) / max(1, len(truths))


def match_any(answer: str, truths: Sequence[str]) -> float:
    """1 if the answer holds one of the truths: RULER's score of question answering."""
    return float(any(truth.lower() in answer.lower() for truth in truths))


def exact(answer: str, truths: Sequence[str]) -> float:
    """1 if the answer begins with one of the truths."""
    return float(any(answer.strip().startswith(truth.strip()) for truth in truths))


METRICS: dict[str, Callable[[str, Sequence[str]], float]] = {
    "f1": f1, "rouge_l": rouge_l, "match_all": match_all, "match_any": match_any, "exact": exact,
}  # fmt: skip


def _words(text: str) -> list[str]:
    """Lower case, no punctuation, no articles."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def _f1(answer: list[str], truth: list[str]) -> float:
    return _harmonic(sum((Counter(answer) & Counter(truth)).values()), len(answer), len(truth))


def _rouge_l(answer: list[str], truth: list[str]) -> float:
    row = [0] * (len(truth) + 1)  # the longest common subsequence of the words so far and each prefix of the truth
    for word in answer:
        previous = 0
        for i, other in enumerate(truth, 1):
            previous, row[i] = row[i], previous + 1 if word == other else max(row[i], row[i - 1])
    return _harmonic(row[-1], len(answer), len(truth))


def _harmonic(common: int, given: int, expected: int) -> float:
    return 0.0 if common == 0 else 2 * common / (given + expected)
