"""Time and answers in one table: Gemma 3 270M asked for facts hidden in long texts, dense and under both presets.

    python bench/bench_answers.py --needles needles_dev.json --lengths 2048 --budget 512

Each case is one prompt, the context and its question, as a user sends it: prefill, then as many greedy tokens as the
answer has. The paper preset keeps every key for the prompt's last 64 tokens and decodes densely, the accurate one
chooses keys for every row and for every new token. Contestants take turns on each case; dense is the model's own SDPA,
and "dhsa nowhere" (layers=(), sliding windows on the band kernel) shows what the windows alone gain.

Per length and contestant: time to first token (median), right answers, answers equal to dense's token by token, and how
far the first answer's logits are from dense's: |x - dense| / |dense| over the vocabulary, median and largest.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

import timing
from dhsa_ext import DHSAConfig, hf, models
from dhsa_ext.evaluate_tasks import read_needles


@dataclass(frozen=True)
class Contestant:
    name: str
    implementation: str
    config: DHSAConfig | None = None


@dataclass
class Answer:
    first_token_s: float
    tokens: list[int]
    logits: Tensor  # [V], of the first answer token


def contestants(budget: int) -> list[Contestant]:
    return [
        Contestant("dense sdpa", "sdpa"),
        Contestant("dhsa nowhere", "dhsa", DHSAConfig(layers=())),
        *(Contestant(f"dhsa {p}", "dhsa", DHSAConfig(p, budget=budget)) for p in ("paper", "accurate")),
    ]


def answer(model: Any, ids: Tensor, count: int, contestant: Contestant) -> Answer:
    """`count` greedy tokens after ids [1, T]."""
    if contestant.config is not None:
        hf.configure(model, contestant.config)
    model.set_attn_implementation(contestant.implementation)
    cache = DynamicCache(config=model.config)
    begin = time.perf_counter()
    logits = model(ids, past_key_values=cache, logits_to_keep=1).logits[0, -1]
    first = time.perf_counter() - begin
    tokens = [int(logits.argmax())]
    while len(tokens) < count:
        step = torch.tensor([tokens[-1:]], device=ids.device)
        tokens.append(int(model(step, past_key_values=cache).logits[0, -1].argmax()))
    return Answer(first, tokens, logits.float())


def summary(cases: list[dict[str, Any]], name: str) -> dict[str, Any]:
    mine = [case["answers"][name] for case in cases]
    row = {
        "ms": statistics.median(a["ms"] for a in mine), "asked": len(mine), "right": sum(a["right"] for a in mine),
        "same_as_dense": sum(a["same_as_dense"] for a in mine),
        "logit_difference": statistics.median(a["logit_difference"] for a in mine),
        "largest_logit_difference": max(a["logit_difference"] for a in mine),
    }  # fmt: skip
    return {key: float(f"{v:.4g}") if isinstance(v, float) else v for key, v in row.items()}


@torch.no_grad()
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--needles", type=Path, required=True, help="a grid of needles, as for dhsa_ext.evaluate")
    parser.add_argument("--model", help="a directory or a hub repository; default: the demo's Gemma 3 270M")
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048])
    parser.add_argument("--skip", nargs="+", default=["passkey"], help="forms left out (default: passkey)")
    parser.add_argument("--budget", type=int, default=512, help="keys that a query block keeps")
    parser.add_argument("--cases", type=int, default=0, help="at most so many of each length; 0: all")
    parser.add_argument("--output", help="JSON file; default: bench/results/answers-<machine>.json")
    arguments = parser.parse_args(argv)
    loaded = models.load(arguments.model)
    hf.register()
    report = timing.Report("answers", "cpu", arguments.output)
    report.data |= {"model": loaded.name, "budget": arguments.budget, "cases": []}
    print(report.head(), f"{loaded.name}, budget {arguments.budget}", sep="\n")
    entrants = contestants(arguments.budget)
    for length in arguments.lengths:
        cases: list[dict[str, Any]] = []
        for prompt in read_needles(arguments.needles):
            for question in prompt.questions if prompt.length == length else ():
                if question.form in arguments.skip or (arguments.cases and len(cases) == arguments.cases):
                    continue
                ids = loaded.bos + loaded.tokenizer.encode(prompt.context) + loaded.tokenizer.encode(question.text)
                wanted = loaded.tokenizer.encode(question.answers[0])
                if not cases:
                    for contestant in entrants:  # the first prompt warms up
                        answer(loaded.model, torch.tensor([ids]), 2, contestant)
                got = {c.name: answer(loaded.model, torch.tensor([ids]), len(wanted), c) for c in entrants}
                dense = got[entrants[0].name]
                case: dict[str, Any] = {
                    "length": length, "tokens": len(ids), "form": question.form, "depth": question.depth,
                    "wanted": question.answers[0], "answers": {},
                }  # fmt: skip
                for name, one in got.items():
                    difference = (one.logits - dense.logits).norm() / dense.logits.norm()
                    case["answers"][name] = {
                        "ms": one.first_token_s * 1e3, "text": loaded.tokenizer.decode(one.tokens),
                        "right": one.tokens == wanted, "same_as_dense": one.tokens == dense.tokens,
                        "logit_difference": float(f"{difference.item():.3g}"),
                    }  # fmt: skip
                cases.append(case)
                done = [case for case in report.data["cases"] if case["length"] != length]
                report.data["cases"] = done + cases
                report.write()
        for contestant in entrants if cases else ():
            row = {"row": "answers", "seqlen_k": length, "contestant": contestant.name} | summary(
                cases, contestant.name
            )
            report.add(row)
            print(
                f"{length:>6} {contestant.name:<19} {row['ms']:8.0f} ms  right {row['right']:>2} of {row['asked']:>2}  "
                f"same as dense {row['same_as_dense']:>2}  logits off by {row['logit_difference']:.2e}, at most "
                f"{row['largest_logit_difference']:.2e}",
                flush=True,
            )
    print(f"results: {report.where()}")


if __name__ == "__main__":
    main()
