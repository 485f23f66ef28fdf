"""python -m dhsa_ext.evaluate: how well a model's global layers choose their keys, and what that costs.

    recall       attention-mass recall and output error of each policy, by layer, budget, heads and query block
    needles      facts hidden in long texts, by exact match; the question's rows sparse or dense
    tasks        LongBench and RULER files, by their own scores
    perplexity   of the last tokens of long documents
    speed        time to the first token and peak memory
    cost         milliseconds of one global layer: choosing the keys, and attending to them
    picture      the chunks and the kept keys of one prompt

Each writes into --out NAME.csv, NAME_summary.csv (means and standard errors over prompts, as in the table), NAME.json
(command, seed, versions, machine) and, where there is one to draw, NAME.png.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from . import evaluate_model as measure
from . import evaluate_report as report
from . import evaluate_tasks as tasks
from . import hf, models, needle
from .config import DHSAConfig
from .evaluate_model import Choice
from .evaluate_tasks import Prompt

# A choice without a budget of its own: measured once.
DENSE_LABEL = "dense"


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = _parser()
    arguments = parser.parse_args(argv)
    warnings.showwarning = lambda message, *_: tqdm.write(f"note: {message}", file=sys.stderr)
    try:
        if arguments.model is None:
            print(models.terms(), file=sys.stderr)
        torch.manual_seed(arguments.seed)
        loaded = models.load(arguments.model)
        loaded.model.to(arguments.device)
        choices = choices_of(arguments, loaded)
        hf.register()
        prompts = prompts_of(arguments, loaded)
        rows, columns = arguments.run(loaded, prompts, choices, arguments)
    except (ValueError, RuntimeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    facts = report.environment(loaded.name, arguments.seed, argv)
    facts["prompts"] = len(prompts)
    arguments.out.mkdir(parents=True, exist_ok=True)
    base = arguments.out / (arguments.name or arguments.what)
    report.write_csv(base.with_suffix(".csv"), rows)
    report.write_environment(base.with_suffix(".json"), facts)
    summary = report.summarise(rows, [c for c in columns if c not in arguments.values], "prompt", arguments.values)
    if arguments.what == "recall":
        report.add_gap_closed(summary)
        columns.append("gap_closed")
    print(report.table(summary, [*columns, "n"]))
    report.write_csv(base.with_name(f"{base.name}_summary.csv"), summary)
    title = f"{loaded.name}, {len(prompts)} prompts"
    written = [base.with_suffix(".csv"), base.with_name(f"{base.name}_summary.csv"), base.with_suffix(".json")]
    if arguments.draw is not None and arguments.draw(
        base.with_suffix(".png"), summary if arguments.what == "recall" else rows, title
    ):
        written.append(base.with_suffix(".png"))
    print("written:", *written)
    return 0


def choices_of(arguments: argparse.Namespace, loaded: models.LoadedModel) -> list[Choice]:
    """Every policy at every budget, number of selection heads, query block and source of chunks."""
    choices = []
    chunkers = {source: measure.parse_boundaries(source, loaded.model) for source in arguments.boundaries}
    for text, source in itertools.product(arguments.policies, arguments.boundaries):
        policy, chunker = measure.parse_policy(text), chunkers[source]
        for heads, q_block, budget in itertools.product(arguments.heads, arguments.q_block, arguments.budgets):
            config = DHSAConfig(
                budget=budget, select_heads=heads, q_block=q_block, sink=arguments.sink, local=arguments.local,
                q_stride=arguments.q_stride, decode="dense", min_length=0,
            )  # fmt: skip
            choice = Choice(text, policy, config, source, chunker)
            if choice.takes_chunks or source == arguments.boundaries[0]:
                choices.append(choice)
    return choices


def prompts_of(arguments: argparse.Namespace, loaded: models.LoadedModel) -> list[Prompt]:
    """What is measured on: files of prompts, of one of the given lengths where they say one, or pieces of a text."""
    prompts: list[Prompt] = []
    for reader, paths in (
        (tasks.read_needles, arguments.needles), (tasks.read_longbench, arguments.longbench),
        (tasks.read_ruler, arguments.ruler),
    ):  # fmt: skip
        for path in paths:
            read = reader(path)
            if arguments.lengths:
                read = [p for p in read if p.length in (0, *arguments.lengths)]
            prompts += read if arguments.prompts is None else _first_of_each_length(read, arguments.prompts)
    if prompts:
        return prompts
    if arguments.what == "tasks":
        raise ValueError("dhsa_ext.evaluate: tasks: expected --longbench or --ruler files, got none")
    text = "\n\n".join(needle.read_text(path) for path in arguments.text or [None])
    lengths, tokenizer, bos = arguments.lengths or [4096], loaded.tokenizer, loaded.bos
    if arguments.what == "needles":
        return tasks.make_needles(text, tokenizer, bos, lengths, arguments.depths, arguments.seed)
    count = arguments.prompts or 1
    return [p for n in lengths for p in tasks.text_prompts(text, tokenizer, bos, n, count, arguments.seed)]


def _first_of_each_length(prompts: Sequence[Prompt], count: int) -> list[Prompt]:
    seen: dict[int, int] = {}
    kept = []
    for prompt in prompts:
        seen[prompt.length] = seen.get(prompt.length, 0) + 1
        if seen[prompt.length] <= count:
            kept.append(prompt)
    return kept


# ---- the measurements: rows for the CSV, and the columns of the table

Result = tuple[list[dict[str, Any]], list[str]]


def run_recall(
    loaded: models.LoadedModel, prompts: Sequence[Prompt], choices: Sequence[Choice], arguments: argparse.Namespace
) -> Result:
    rows = []
    for prompt in _bar(prompts, "prompt"):
        ids = _ids(prompt, loaded, arguments)
        length = prompt.length or len(ids)
        for index, layer in measure.capture(loaded, ids).items():
            ends = measure.block_positions(len(ids), max(arguments.q_block), arguments.blocks)
            if not ends:
                raise ValueError(f"dhsa_ext.evaluate: {prompt.name}: expected two query blocks, got {len(ids)} tokens")
            meter = measure.ChoiceMeter(layer, ends)
            for choice in _bar(choices, f"layer {index}"):
                quality = meter.measure(choice)
                rows.append(
                    {"prompt": prompt.name, "length": length, "tokens": len(ids), "layer": index, **choice.columns(),
                     "blocks": len(ends), "keys": quality.keys, "recall": quality.recall, "error": quality.error}
                )  # fmt: skip
    by = ["length", "policy", "boundaries", "heads", "q_block", "budget"]
    return rows, [*by, "keys", "recall", "error"]


def run_needles(
    loaded: models.LoadedModel, prompts: Sequence[Prompt], choices: Sequence[Choice], arguments: argparse.Namespace
) -> Result:
    rows: list[dict[str, Any]] = []

    def ask(asker: measure.Asker, prompt: Prompt, choice: Choice, rows_sparse: str) -> None:
        for question in prompt.questions:
            if question.form in arguments.skip:
                continue
            found = asker.forced(question, rows_sparse in ("all", "question"), choice)
            rows.append(
                {"prompt": prompt.name, "length": prompt.length, "form": question.form, "depth": question.depth,
                 **choice.columns(), "rows": rows_sparse, "found": int(found)}
            )  # fmt: skip

    for prompt in _bar(prompts, "prompt"):
        ids = _ids(prompt, loaded, arguments)
        dense = measure.Asker(loaded, ids, None, False)
        for choice in _bar(_with_dense(choices), "choice"):
            if choice.label == DENSE_LABEL:
                ask(dense, prompt, choice, "none")
                continue
            if "question" in arguments.rows:
                ask(dense, prompt, choice, "question")
            if {"all", "context"} & set(arguments.rows):
                sparse = measure.Asker(loaded, ids, choice, True)
                for which in ("all", "context"):
                    if which in arguments.rows:
                        ask(sparse, prompt, choice, which)
    if not rows:
        raise ValueError("dhsa_ext.evaluate: needles: expected questions, got none")
    for row in rows:  # each case is a sample
        row["prompt"] = f"{row['prompt']}/{row['form']}/{row['depth']}"
    return rows, ["length", "policy", "boundaries", "heads", "q_block", "budget", "rows", "found"]


def run_tasks(
    loaded: models.LoadedModel, prompts: Sequence[Prompt], choices: Sequence[Choice], arguments: argparse.Namespace
) -> Result:
    rows = []
    for prompt in _bar(prompts, "prompt"):
        ids = _ids(prompt, loaded, arguments)
        for choice, which in itertools.product(_with_dense(choices), arguments.rows):
            if choice.label == DENSE_LABEL and which != arguments.rows[0]:
                continue
            asker = measure.Asker(loaded, ids, choice, which in ("all", "context"))
            for question in prompt.questions:
                answer = asker.generated(question, which in ("all", "question"))
                rows.append(
                    {"prompt": prompt.name, "task": question.form, "tokens": len(ids), **choice.columns(),
                     "rows": which if choice.label != DENSE_LABEL else "none", "metric": question.metric,
                     "score": measure.score_answer(question, answer), "answer": answer}
                )  # fmt: skip
    return rows, ["task", "metric", "policy", "boundaries", "heads", "q_block", "budget", "rows", "score"]


def run_perplexity(
    loaded: models.LoadedModel, prompts: Sequence[Prompt], choices: Sequence[Choice], arguments: argparse.Namespace
) -> Result:
    rows = []
    for prompt in _bar(prompts, "prompt"):
        ids = _ids(prompt, loaded, arguments)
        for choice in _bar(_with_dense(choices), "choice"):
            value = measure.tail_perplexity(loaded, ids, choice, arguments.tail)
            rows.append({"prompt": prompt.name, "length": prompt.length or len(ids), "tail": arguments.tail,
                         **choice.columns(), "perplexity": value})  # fmt: skip
    return rows, ["length", "policy", "boundaries", "heads", "q_block", "budget", "perplexity"]


def run_speed(
    loaded: models.LoadedModel, prompts: Sequence[Prompt], choices: Sequence[Choice], arguments: argparse.Namespace
) -> Result:
    rows = []
    for prompt in _bar(prompts, "prompt"):
        ids = _ids(prompt, loaded, arguments)
        for choice in _bar(_with_dense(choices), "choice"):
            speed = measure.first_token(loaded, ids, choice, arguments.repeats)
            rows.append({"prompt": prompt.name, "length": prompt.length or len(ids), **choice.columns(),
                         "first_token_s": speed.first_token_s, "peak_mib": speed.peak_mib})  # fmt: skip
    return rows, ["length", "policy", "boundaries", "heads", "q_block", "budget", "first_token_s", "peak_mib"]


def run_cost(
    loaded: models.LoadedModel, prompts: Sequence[Prompt], choices: Sequence[Choice], arguments: argparse.Namespace
) -> Result:
    rows = []
    for prompt in _bar(prompts, "prompt"):
        ids = _ids(prompt, loaded, arguments)
        index, layer = list(measure.capture(loaded, ids).items())[arguments.layer]
        for choice in _bar(_with_dense(choices), "choice"):
            cost = measure.layer_cost(choice, layer, arguments.repeats)
            rows.append(
                {"prompt": prompt.name, "length": prompt.length or len(ids), "layer": index, **choice.columns(),
                 "choice_ms": cost.choice_ms, "attention_ms": cost.attention_ms,
                 "total_ms": cost.choice_ms + cost.attention_ms}
            )  # fmt: skip
    by = ["length", "policy", "boundaries", "heads", "q_block", "budget"]
    return rows, [*by, "choice_ms", "attention_ms", "total_ms"]


def run_picture(
    loaded: models.LoadedModel, prompts: Sequence[Prompt], choices: Sequence[Choice], arguments: argparse.Namespace
) -> Result:
    from . import picture

    ids = _ids(prompts[0], loaded, arguments)
    index, layer = list(measure.capture(loaded, ids).items())[arguments.layer]
    selections = {f"{c.label}, {c.config.budget} keys": measure.selection_of(c, layer) for c in choices}
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / f"{arguments.name or arguments.what}.png"
    picture.draw(path, selections, None, f"{loaded.name}, layer {index}, {len(ids)} tokens")
    print("written:", path)
    rows: list[dict[str, Any]] = []
    for choice, one in zip(choices, selections.values(), strict=True):
        share, sizes = one.causal_share(), (one.runs[..., 1] - one.runs[..., 0])[one.runs[..., 1] > 0].float()
        rows.append({"prompt": prompts[0].name, "length": len(ids), "layer": index, **choice.columns(),
                     "chunks": float(one.num_chunks[0]), "keys": one.keys_per_block(), "causal_share": share,
                     "mean_run": sizes.mean().item()})  # fmt: skip
    by = ["length", "policy", "boundaries", "heads", "q_block", "budget"]
    return rows, [*by, "chunks", "keys", "causal_share", "mean_run"]


def _ids(prompt: Prompt, loaded: models.LoadedModel, arguments: argparse.Namespace) -> list[int]:
    return tasks.context_ids(prompt, loaded.tokenizer, loaded.bos, arguments.max_length)


def _with_dense(choices: Sequence[Choice]) -> list[Choice]:
    """The choices, after dense attention once."""
    dense = Choice(DENSE_LABEL, measure.parse_policy("dense"), choices[0].config)
    return [dense, *(choice for choice in choices if choice.label != DENSE_LABEL)]


def _bar(items: Sequence[Any], what: str) -> Any:
    return tqdm(items, desc=what, leave=False, disable=None)


# ---- the command line


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m dhsa_ext.evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="what", required=True)

    def command(name: str, run: Callable[..., Result], values: list[str], draw: Any = None) -> argparse.ArgumentParser:
        sub = commands.add_parser(name)
        sub.set_defaults(run=run, values=values, draw=draw)
        sub.add_argument("--model", help=f"any causal LM: a directory or a hub repository (default {models.PACKAGE})")
        sub.add_argument("--device", default="cpu", help="where the model runs (default cpu)")
        sub.add_argument("--needles", type=Path, nargs="+", default=[], help="needle grids, JSON or JSON lines")
        sub.add_argument("--longbench", type=Path, nargs="+", default=[], help="LongBench's *.jsonl")
        sub.add_argument("--ruler", type=Path, nargs="+", default=[], help="RULER's *.jsonl")
        sub.add_argument("--text", type=Path, nargs="+", help="plain text (default: Python's own documentation)")
        sub.add_argument("--lengths", type=int, nargs="+", help="tokens: pieces of a text, or which prompts of a file")
        sub.add_argument("--prompts", type=int, help="at most so many of each length (default: all, or 1 of a text)")
        sub.add_argument("--max-length", type=int, help="longer contexts keep their first and last half of this")
        sub.add_argument(
            "--policies", nargs="+", default=["paper", "accurate", "oracle"], metavar="NAME[:OPTION=VALUE]"
        )
        sub.add_argument("--budgets", type=int, nargs="+", default=[1024])
        sub.add_argument("--heads", nargs="+", default=["kv"], choices=["one", "kv", "query"], help="lists: one per")
        sub.add_argument("--q-block", type=int, nargs="+", default=[64])
        sub.add_argument(
            "--q-stride", type=int, help="queries of a block that a row stands for (default: 8; if long, half a block)"
        )
        sub.add_argument("--sink", type=int, default=16)
        sub.add_argument("--local", type=int, default=64)
        sub.add_argument(
            "--boundaries", nargs="+", default=["training-free"], help="training-free, fixed, or a predictor's file"
        )
        sub.add_argument("--seed", type=int, default=0)
        sub.add_argument("--out", type=Path, default=Path("evaluation"), help="a directory (default evaluation)")
        sub.add_argument("--name", help="of the files written (default: the command's)")
        return sub

    recall = command("recall", run_recall, ["keys", "recall", "error"], report.draw_curves)
    recall.add_argument("--blocks", type=int, default=8, help="query blocks measured, in each prompt's second half")
    needles = command("needles", run_needles, ["found"], report.draw_heatmaps)
    needles.add_argument("--depths", type=float, nargs="+", default=[0.1, 0.3, 0.5, 0.7, 0.9])
    needles.add_argument("--skip", nargs="+", default=[], help="forms of a needle file to leave out")
    answers = command("tasks", run_tasks, ["score"])
    for sub in (needles, answers):
        sub.add_argument(
            "--rows", nargs="+", default=["all"], choices=measure.ROWS, help="which are sparse (context: the paper's)"
        )
    perplexity = command("perplexity", run_perplexity, ["perplexity"])
    perplexity.add_argument("--tail", type=int, default=256, help="tokens at the end that count")
    speed = command("speed", run_speed, ["first_token_s", "peak_mib"])
    cost = command("cost", run_cost, ["choice_ms", "attention_ms", "total_ms"])
    for sub in (speed, cost):
        sub.add_argument("--repeats", type=int, default=2, help="the best time of so many")
    drawn = command("picture", run_picture, ["chunks", "keys", "causal_share", "mean_run"])
    for sub in (cost, drawn):
        sub.add_argument("--layer", type=int, default=-1, help="which of the global layers (default: the last)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
