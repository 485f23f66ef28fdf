"""python -m dhsa_ext.demo: a real model looks for a fact hidden in a long real text, densely and with DHSA.

Prints for each: the answer and whether it is right, time to first token, time inside attention, tokens/s, peak memory
and the keys attended; says from which context DHSA pays on this machine; and writes a picture of the choice.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import DynamicCache

from . import __version__, hf, models, needle, picture
from .backend import backend
from .config import PRESETS, DHSAConfig
from .meter import AttentionMeter, LayerInputs, PeakMemory, measure_crossing
from .selection import Selection, choose_keys

DENSE = DHSAConfig(layers=())
MAX_NEW_TOKENS = 12


@dataclass
class Run:
    """One way of attending over one prompt."""

    name: str
    answer: str
    right: bool
    first_token_s: float
    global_s: float  # prompt, inside attention of the layers without a sliding window
    local_s: float  # prompt, inside attention of the layers with one
    tokens_per_s: float
    peak_mib: float
    layers: list[LayerInputs]  # what the global layers read
    selections: list[Selection] = field(default_factory=list)  # what they kept


@torch.no_grad()
def run_prompt(loaded: models.LoadedModel, prompt: needle.Needle, name: str, config: DHSAConfig) -> Run:
    """Greedy answer of the model under one config."""
    model = loaded.model
    hf.configure(model, config)
    ids = torch.tensor([prompt.ids], device=model.device)
    layers = model.config.get_text_config().num_hidden_layers
    model(ids[:, :64], logits_to_keep=1)  # allocations and threads of a first call are nobody's time to first token
    cache = DynamicCache(config=model.config)
    with PeakMemory() as memory:
        with (
            tqdm(
                total=layers, desc=f"{name}: prompt of {ids.shape[1]} tokens", unit="layer", leave=False, disable=None
            ) as bar,
            AttentionMeter(bar.update) as meter,
        ):
            begin = time.perf_counter()
            logits = model(ids, past_key_values=cache, logits_to_keep=1).logits
            tokens = [int(logits[0, -1].argmax())]
            first_token_s = time.perf_counter() - begin
        begin = time.perf_counter()
        for _ in tqdm(range(MAX_NEW_TOKENS - 1), desc=f"{name}: answer", unit="token", leave=False, disable=None):
            step = torch.tensor([tokens[-1:]], device=model.device)
            tokens.append(int(model(step, past_key_values=cache, logits_to_keep=1).logits[0, -1].argmax()))
        decode_s = time.perf_counter() - begin
    text = loaded.tokenizer.decode(tokens)
    run = Run(
        name, text, prompt.is_right(text), first_token_s, meter.global_s, meter.local_s,
        (MAX_NEW_TOKENS - 1) / decode_s, memory.mib, meter.global_layers,
    )  # fmt: skip
    if config != DENSE:
        run.selections = [choose_keys(x.q, x.k, config, scale=x.scale, softcap=x.softcap) for x in run.layers]
    return run


def report(prompt: needle.Needle, runs: Sequence[Run], configs: Sequence[DHSAConfig]) -> str:
    """The runs side by side."""
    length = len(prompt.ids)

    def keys(run: Run) -> str:
        if not run.selections:
            return f"{length} (100.0%)"
        mean = sum(s.keys_per_block() for s in run.selections) / len(run.selections)
        return f"{mean:.0f} ({mean / length:.1%})"

    def area(run: Run) -> str:
        return (
            f"{sum(s.causal_share() for s in run.selections) / len(run.selections):.1%}" if run.selections else "100.0%"
        )

    def decode(config: DHSAConfig) -> str:
        if config == DENSE or config.decode == "dense":
            return "every key"
        return f"{min(config.budget, length)} keys"

    count = len(runs[0].layers)
    rows = [
        ("", [run.name for run in runs]),
        ("answer", [_shorten(run.answer) for run in runs]),
        ("right", ["yes" if run.right else "NO" for run in runs]),
        ("time to first token", [f"{run.first_token_s:.2f} s" for run in runs]),
        (f"  in attention, {count} global layers", [f"{run.global_s:.2f} s" for run in runs]),
        ("  in attention, local layers", [f"{run.local_s:.2f} s" for run in runs]),
        ("new tokens a second", [f"{run.tokens_per_s:.1f}" for run in runs]),
        ("peak memory above the model", [f"{run.peak_mib:.0f} MiB" for run in runs]),
        ("keys kept by a query block (mean)", [keys(run) for run in runs]),
        ("share of the causal area", [area(run) for run in runs]),
        ("a new token attends to", [decode(config) for config in configs]),
    ]
    width = max(len(label) for label, _ in rows)
    columns = [max(len(cells[i]) for _, cells in rows) for i in range(len(runs))]
    return "\n".join(
        f"{label:{width}}  " + "  ".join(f"{cell:>{n}}" for cell, n in zip(cells, columns, strict=True))
        for label, cells in rows
    )


def _shorten(text: str) -> str:
    text = " ".join(text.split())
    return repr(text if len(text) <= 20 else text[:19] + "…")


def crossing_report(name: str, dense: Run, config: DHSAConfig, layers: int) -> str:
    """From which context DHSA is faster on this machine, by timing one global layer's own queries, keys and values."""
    other = len(dense.layers)
    share = dense.global_s / dense.first_token_s
    head = f"{name}, budget {config.budget}: "
    crossing = measure_crossing(dense.layers[0], config)
    if crossing is None:
        return (
            f"{head}no estimate (the context is shorter than the budget, or the logits are soft-capped); global "
            f"attention is {share:.0%} of the dense time to first token"
        )
    times = ", ".join(
        f"{n} tokens: dense {a * 1e3:.0f} ms, DHSA {b * 1e3:.0f} ms"
        for n, a, b in zip(crossing.lengths, crossing.dense_s, crossing.dhsa_s, strict=True)
    )
    context, measured = crossing.where()
    if context is None:
        verdict = "by extrapolation DHSA does not win here at any --context up to a million"
    elif measured:
        already = "already wins" if context == crossing.lengths[0] else "wins"
        verdict = f"DHSA {already} at --context {context}, as measured"
    else:
        verdict = f"DHSA wins from about --context {context}, by extrapolating these two points"
    return (
        f"{head}{verdict}. One global layer at {times}. {other} of {layers} layers are global: their attention is "
        f"{share:.0%} of the dense time to first token, the most that DHSA can save at this context"
    )


def configs_of(arguments: argparse.Namespace) -> dict[str, DHSAConfig]:
    """A config for each preset asked for, under one budget.

    Without --budget: a quarter of the context, but at least 512, which leaves the paper's preset some keys to choose
    beside the 383 that it always keeps.
    """
    presets: Any = PRESETS if arguments.preset == "both" else (arguments.preset,)
    budget = arguments.budget or max(arguments.context // 4, 512)
    return {preset: DHSAConfig(preset, budget=budget, min_length=0) for preset in presets}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m dhsa_ext.demo", description=__doc__.split("\n\n")[0])
    parser.add_argument("--context", type=int, default=4096, help="tokens of the prompt (default 4096)")
    parser.add_argument(
        "--budget", type=int, help="keys that a block of queries keeps (default: context / 4, at least 512)"
    )
    parser.add_argument("--preset", choices=[*PRESETS, "both"], default="both", help="how keys are chosen")
    parser.add_argument(
        "--seed", type=int, nargs="+", default=[0], help="one prompt each: the text, the fact, the depth"
    )
    parser.add_argument("--model", help=f"any causal LM: a directory or a hub repository (default: {models.PACKAGE})")
    parser.add_argument("--text", type=Path, help="the text to hide the fact in (default: Python's own documentation)")
    parser.add_argument("--out", type=Path, default=Path("demo.png"), help="the picture (default demo.png)")
    arguments = parser.parse_args(argv)
    try:
        configs = configs_of(arguments)
        text = needle.read_text(arguments.text)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    # What runs on the reference is said in the first line, or, beside a native library, in one sentence for each op.
    warnings.showwarning = lambda message, *_: tqdm.write(f"note: {message}", file=sys.stderr)
    if backend.name == "reference":
        warnings.filterwarnings("ignore", message="dhsa::", category=RuntimeWarning)

    print(
        f"dhsa_ext {__version__} on {platform.machine()}, {os.cpu_count()} CPUs, torch {torch.__version__} with "
        f"{torch.get_num_threads()} threads; DHSA runs on the {backend.name} backend ({backend.reason})"
    )
    try:
        if arguments.model is None:
            print(models.terms())
        print("loading the model …", flush=True)
        loaded = models.load(arguments.model)
        prompts = [needle.hide(text, loaded.tokenizer, loaded.bos, arguments.context, seed) for seed in arguments.seed]
    except (RuntimeError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    hf.register(name=AttentionMeter.NAME)
    loaded.model.set_attn_implementation(AttentionMeter.NAME)
    layers = loaded.model.config.get_text_config().num_hidden_layers
    print(loaded.name)
    all_configs = {"dense": DENSE, **{f"DHSA {preset}": config for preset, config in configs.items()}}
    right = dict.fromkeys(all_configs, 0)
    for seed, prompt in zip(arguments.seed, prompts, strict=True):
        print(
            f"\nseed {seed}: {len(prompt.ids)} tokens of {arguments.text or 'pydoc_data.topics'}; at token "
            f"{prompt.begin}: {prompt.fact!r}\nquestion: {prompt.question!r}",
            flush=True,
        )
        runs = [run_prompt(loaded, prompt, name, config) for name, config in all_configs.items()]
        print(report(prompt, runs, list(all_configs.values())), flush=True)
        for run in runs:
            right[run.name] += run.right
        if seed == arguments.seed[0]:
            first = runs
    print("\nright answers: " + ", ".join(f"{name} {n} of {len(prompts)}" for name, n in right.items()))
    if any(config.dense_tail for config in configs.values()):
        print(
            "(the paper's protocol keeps every key for the prompt's last 64 tokens, so for the question, and decodes "
            "densely: its answers say little about its choice of keys)"
        )
    print("Local layers, projections and MLPs do the same work everywhere: differences there are the machine's noise.")
    print("\nwhen does it pay?")
    for preset, config in configs.items():
        print(f"- {crossing_report(preset, first[0], config, layers)}.", flush=True)
    shown = {run.name: run.selections[0] for run in first if run.selections}
    if shown:
        span = (prompts[0].begin, prompts[0].end)
        picture.draw(arguments.out, shown, span, f"{loaded.name}, first global layer, {len(prompts[0].ids)} tokens")
        print(f"\npicture: {arguments.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
