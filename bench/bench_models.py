"""Time to first token and peak memory of whole models: DHSA against every dense implementation that is there.

    python bench/bench_models.py --device cuda --models llama-3.1-8b --lengths 8192 32768 131072
    python bench/bench_models.py --device cuda --models gemma-2-2b --memory-limit 24GB --pieces 8192 --append
    python bench/bench_models.py --device cpu --models gemma-3-270m --lengths 2048 4096 8192

Models have real shapes and random weights (model_shapes.py); what they say is not looked at. What is looked at first,
for every contestant: its last logits against attention in float32, DHSA with a budget that holds every key
(model_answers.py). A contestant that answers wrong is not timed.

One row per model, length and contestant: time to first token (a prefill of random tokens, the logits of its last one),
split into attention (of it the choice of keys, by itself on one layer's inputs) and the rest; decode tokens/s; peak
memory above the weights. --decode fixed also times the decode as one fixed step (model_decode.py), a CUDA graph or
compiled, in a last round of its own, since that makes torch.compile start afresh, and counts launches per token before
and after. Contestants take turns, round after round; median and spread
of the rounds. The file is written after every turn. One that runs out of memory gets a row that says so, and longer
prompts of it are left out.
"""

from __future__ import annotations

import argparse
import gc
import json
import re
import resource
import statistics
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.utils import is_flash_attn_2_available

import model_decode
import timing
from dhsa_ext import DHSAConfig, hf
from dhsa_ext.meter import PeakMemory
from dhsa_ext.selection import choose_keys
from model_answers import relative_errors
from model_plot import draw_file
from model_shapes import MODELS, build, global_layers, weights_mib

NAME = "dhsa_bench"  # what stands before an implementation to time it
NEW_TOKENS = 16
DEVICES = ("cpu", "cuda")


@dataclass(frozen=True)
class Contestant:
    name: str
    implementation: str  # of transformers, or "dhsa"
    config: DHSAConfig | None = None
    kernel: SDPBackend | None = None  # of sdpa: the first that is tried; None: torch's choice


@dataclass
class Pass:
    """One prefill and a few new tokens; memory is the prefill's peak above what was there before it."""

    first_token_s: float
    attention_s: float
    tokens_per_s: float
    peak_mib: float
    launches: int | None = None  # of one token
    fixed: model_decode.Decode | str | None = None  # the decode as a fixed step, or why there is none


class Metered:
    """An attention function with a clock around it, registered as NAME.

    keep: the inputs of the last global layer of a prompt stay in `layer`, which costs their memory.
    """

    def __init__(self, contestant: Contestant, device: str, keep: bool = False) -> None:
        self.device, self.keep, self.spans, self.layer = device, keep, [], None
        self.implementation, self.kernel = contestant.implementation, contestant.kernel
        AttentionInterface.register(NAME, self)
        dhsa = self.implementation == "dhsa"
        AttentionMaskInterface.register(NAME, hf.dhsa_mask if dhsa else AttentionMaskInterface()[self.implementation])

    def __call__(self, module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **kwargs: Any) -> Any:
        begin = self._now()
        result = self._attend(module, q, k, v, mask, **kwargs)
        self.spans.append((begin, self._now()))
        if self.keep and kwargs.get("sliding_window") is None and q.shape[2] > 1:
            self.layer = (q, k, kwargs.get("scaling"), kwargs.get("softcap") or 0.0)
        return result

    def _attend(self, module: Any, *arguments: Any, **kwargs: Any) -> Any:
        if self.implementation == "dhsa":
            return hf.dhsa_attention(module, *arguments, **kwargs)
        if self.implementation == "eager":  # transformers keeps it beside each model, not in the interface
            return sys.modules[type(module).__module__].eager_attention_forward(module, *arguments, **kwargs)
        rest = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
        first = sdpa_kernel([self.kernel, *rest], set_priority=True) if self.kernel is not None else nullcontext()
        with first:
            return AttentionInterface()[self.implementation](module, *arguments, **kwargs)

    def _now(self) -> Any:
        if self.device == "cpu":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self) -> float:
        """Spent inside since the last question."""
        if self.device == "cuda":
            torch.cuda.synchronize()
            total = sum(begin.elapsed_time(end) for begin, end in self.spans) / 1e3
        else:
            total = sum(end - begin for begin, end in self.spans)
        self.spans = []
        return total


def contestants(budget: int, device: str, pieces: int = 0) -> list[Contestant]:
    """All that can run on the device; with pieces, DHSA's segments are those of the pieces.

    "dhsa nowhere" is dense on the global layers, by sdpa or soft-capped by sparse_attention, and keeps the band kernel
    of the others: what the choice of keys gains is its distance to the presets.
    """
    dense = [Contestant("eager", "eager"), Contestant("sdpa", "sdpa")]
    if device == "cuda":
        dense.append(Contestant("sdpa cudnn", "sdpa", kernel=SDPBackend.CUDNN_ATTENTION))
    dense.append(Contestant("flex_attention", "flex_attention"))
    if is_flash_attn_2_available():
        dense.append(Contestant("flash_attention_2", "flash_attention_2"))
    ours = [
        Contestant(f"dhsa {preset}", "dhsa", DHSAConfig(preset, budget=budget, segment=pieces))
        for preset in ("paper", "accurate")
    ]
    return [*dense, Contestant("dhsa nowhere", "dhsa", DHSAConfig(layers=())), *ours]


def prefill(model: Any, ids: Tensor, cache: DynamicCache, pieces: int) -> Tensor:
    """Logits of the last token, the prompt as a whole or in pieces."""
    logits = torch.empty(0)
    for part in ids.split(pieces or ids.shape[1], dim=1):
        logits = model(part, past_key_values=cache, logits_to_keep=1).logits
    return logits


def one_pass(
    model: Any, ids: Tensor, contestant: Contestant, meter: Metered, pieces: int, new_tokens: int, fixed: bool
) -> Pass:
    device = ids.device.type
    model.set_attn_implementation(NAME)
    cache = DynamicCache(config=model.config)
    memory = PeakMemory() if device == "cpu" else _GpuPeak()
    with memory:
        _settle(device)
        begin = time.perf_counter()
        logits = prefill(model, ids, cache, pieces)
        _settle(device)
        first = time.perf_counter() - begin
    attention = meter.seconds()
    token = logits[:, -1:].argmax(-1)
    begin = time.perf_counter()
    for _ in range(new_tokens):
        token = model(token, past_key_values=cache, logits_to_keep=1).logits[:, -1:].argmax(-1)
    _settle(device)
    rate = new_tokens / (time.perf_counter() - begin)
    result = Pass(first, attention, rate, memory.mib)
    if fixed:
        try:
            result.launches = model_decode.launches(lambda: model(token, past_key_values=cache), device)
            parts = model_decode.small_parts_compiled(model) if device == "cuda" else nullcontext()
            with parts:
                step = model_decode.fixed_step(model, cache, contestant, device, new_tokens + model_decode.SPARE)
                result.fixed = model_decode.measure(step, token, new_tokens)
        except Exception as error:
            result.fixed = why(error)
    meter.seconds()
    return result


class _GpuPeak:
    mib = 0.0

    def __enter__(self) -> _GpuPeak:
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        self._before = torch.cuda.memory_allocated()
        return self

    def __exit__(self, *_: object) -> None:
        self.mib = (torch.cuda.max_memory_allocated() - self._before) / 2**20


def _settle(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def choice_seconds(meter: Metered, config: DHSAConfig, device: str) -> float | None:
    """The stages before attention, on the inputs of the last global layer; None where attention was dense."""
    q, k, scale, softcap = meter.layer
    if k.shape[2] < config.dense_below or config.layers == ():
        return None
    times = []
    for _ in range(3):
        _settle(device)
        begin = time.perf_counter()
        choose_keys(q, k, config, scale=scale, softcap=softcap)
        _settle(device)
        times.append(time.perf_counter() - begin)
    return min(times)


def out_of_memory(error: BaseException) -> bool:
    said = str(error).lower()
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(
        words in said for words in ("can't allocate memory", "out of memory", "status_alloc_failed")
    )


def why(error: Exception) -> str:
    return "out of memory" if out_of_memory(error) else timing.Failure.of(error).why


@dataclass
class Runs:
    passes: list[Pass] = field(default_factory=list)
    fixed: Pass | None = None  # of the last round, for its decode alone
    choice_s: float | None = None
    failure: str | None = None


class Bench:
    """One model's rows: `entrants` take turns at each length, and the report is written after every turn."""

    def __init__(self, name: str, arguments: argparse.Namespace, report: timing.Report, deadline: float) -> None:
        self.name, self.device, self.arguments = name, arguments.device, arguments
        self.report, self.deadline = report, deadline
        self.model = build(name, self.device, torch.float32 if self.device == "cpu" else torch.bfloat16)
        self.about = {"weights_mib": weights_mib(self.model), "global_layers": global_layers(self.model)}
        wanted = arguments.contestants
        self.entrants = [
            c for c in contestants(arguments.budget, self.device, arguments.pieces) if not wanted or c.name in wanted
        ]

    def check(self) -> dict[str, Runs]:
        """Contestants whose answer is wrong, or that fail; they are entrants no more."""
        bound, errors = relative_errors(self.model, self.entrants, self.device, Metered, NAME)
        self.about["check"] = {"bound": bound, **errors}
        wrong = {}
        for name, error in errors.items():
            if isinstance(error, str):
                wrong[name] = Runs(failure=error)
            elif not error <= bound:
                wrong[name] = Runs(failure=f"wrong: a relative error of {error:.2g}, more than {bound:.2g}")
        return wrong

    def time_length(self, length: int, wrong: dict[str, Runs]) -> dict[str, Runs]:
        ids = torch.randint(2, self.model.config.vocab_size, (1, length), device=self.device)
        runs = {c.name: Runs(failure=wrong[c.name].failure if c.name in wrong else None) for c in self.entrants}
        before = list(self.report.data["rows"])
        fixed_rounds = int(self.arguments.decode == "fixed")
        for round_ in range(self.arguments.repeats + 1 + fixed_rounds):  # the first one warms up, and is not counted
            for contestant in self.entrants:
                run = runs[contestant.name]
                if run.failure is None and time.monotonic() < self.deadline:
                    self._turn(contestant, ids, run, warm_up=round_ == 0, fixed=round_ > self.arguments.repeats)
                    rows = [self.row(c, length, runs[c.name]) for c in self.entrants]
                    self.report.data["rows"] = before + rows
                    self.report.write()
        return runs

    def _turn(self, contestant: Contestant, ids: Tensor, run: Runs, warm_up: bool, fixed: bool) -> None:
        arguments = self.arguments
        try:
            if contestant.config is not None:
                hf.register(contestant.config)
            meter = Metered(contestant, self.device, keep=warm_up and contestant.config is not None)
            tokens = 2 if warm_up else arguments.new_tokens
            result = one_pass(self.model, ids, contestant, meter, arguments.pieces, tokens, fixed)
            if fixed:
                run.fixed = result
            elif not warm_up:
                run.passes.append(result)
            elif contestant.config is not None and meter.layer is not None:
                run.choice_s = choice_seconds(meter, contestant.config, self.device)
        except Exception as error:
            run.failure = why(error)
            if timing.device_lost(self.device):
                raise SystemExit(f"{contestant.name}: {run.failure}; the GPU is lost to this process") from error
        hf.register()  # lets go of caches and indices that the last pass left in its layers
        for name in (NAME, model_decode.PINNED):
            AttentionInterface.register(name, hf.dhsa_attention)
        gc.collect()

    def row(self, contestant: Contestant, length: int, run: Runs) -> dict[str, Any]:
        row: dict[str, Any] = {"row": self.name, "contestant": contestant.name, "seqlen_k": length}
        if self.arguments.pieces:
            row["pieces"] = self.arguments.pieces
        if self.arguments.memory_limit:
            row["memory_limit"] = self.arguments.memory_limit
        if contestant.config is not None and contestant.config.layers is None:
            row["budget"] = contestant.config.budget
        if run.failure is not None or not run.passes:
            return row | {"failed": run.failure or "not run: the time was up"}
        firsts = [p.first_token_s for p in run.passes]
        first, attention = statistics.median(firsts), statistics.median(p.attention_s for p in run.passes)
        row |= {
            "ms": first * 1e3, "low": min(firsts) * 1e3, "high": max(firsts) * 1e3, "rounds": len(firsts),
            "attention_ms": attention * 1e3, "rest_ms": (first - attention) * 1e3,
            "tokens_per_s": statistics.median(p.tokens_per_s for p in run.passes),
            "peak_mib": max(p.peak_mib for p in run.passes),
        }  # fmt: skip
        if run.fixed is not None:
            decode = run.fixed.fixed
            if isinstance(decode, model_decode.Decode):
                row |= {"fixed_tokens_per_s": decode.tokens_per_s, "fixed_launches": decode.launches}
            else:
                row["fixed_failed"] = decode
            if run.fixed.launches is not None:
                row["launches"] = run.fixed.launches
        if run.choice_s is not None:
            calls = -(-length // (self.arguments.pieces or length))
            row["choice_ms"] = run.choice_s * 1e3 * self.about["global_layers"] * calls
        return {key: float(f"{v:.4g}") if isinstance(v, float) else v for key, v in row.items()}


HEAD = (
    f"{'model':<13} {'tokens':>7}  {'contestant':<18} {'first s':>8} {'ratio':>6}  {'attend s':>8} {'choice s':>8} "
    f"{'tokens/s':>8} {'peak MiB':>9}  fixed step\n"
    "ratio: to the fastest dense contestant of that length that answers right; attend s holds the choice; peak MiB is "
    "above the weights"
)


def shown(row: dict[str, Any], fastest: float | None) -> str:
    head = f"{row['row']:<13} {row['seqlen_k']:>7}  {row['contestant']:<18}"
    if "failed" in row:
        return f"{head} {row['failed']}"
    choice = f"{row['choice_ms'] / 1e3:8.3f}" if "choice_ms" in row else "       –"
    ratio = f"{fastest / row['ms']:5.2f}x" if fastest else "     –"
    return (
        f"{head} {row['ms'] / 1e3:8.3f} {ratio}  {row['attention_ms'] / 1e3:8.3f} {choice} {row['tokens_per_s']:8.1f} "
        f"{row['peak_mib']:9.0f}  {_fixed(row)}"
    )


def _fixed(row: dict[str, Any]) -> str:
    if "fixed_tokens_per_s" not in row:
        return str(row.get("fixed_failed", ""))
    return f"{row['fixed_tokens_per_s']:.1f} tokens/s, launches {row['launches']} -> {row['fixed_launches']}"


def limit_memory(text: str, device: str) -> None:
    match = re.fullmatch(r"([0-9.]+)\s*(GB|GiB|MB|MiB)", text)
    if match is None:
        raise SystemExit(f"--memory-limit: expected a size such as 24GB, got {text!r}")
    size = float(match[1]) * {"GB": 1e9, "GiB": 2**30, "MB": 1e6, "MiB": 2**20}[match[2]]
    if device == "cuda":
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, size / total))
    else:
        resource.setrlimit(resource.RLIMIT_DATA, (int(size), int(size)))


def arguments_of(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=DEVICES, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--models", nargs="+", choices=tuple(MODELS), default=["gemma-3-270m"])
    parser.add_argument("--lengths", nargs="+", type=int, default=[2048, 4096, 8192], help="tokens of the prompt")
    parser.add_argument("--budget", type=int, default=2048, help="keys that a query block keeps")
    parser.add_argument("--contestants", nargs="+", default=[], help="names; default: all that can run here")
    parser.add_argument("--repeats", type=int, default=3, help="timed rounds, after one that warms up")
    parser.add_argument("--new-tokens", type=int, default=NEW_TOKENS, help="tokens of the decode rate")
    parser.add_argument("--decode", choices=("plain", "fixed"), default="plain", help="fixed: as a fixed step as well")
    parser.add_argument("--pieces", type=int, default=0, help="prefill in pieces of so many tokens; 0: in one")
    parser.add_argument("--memory-limit", help="cap of this process, as 24GB; GPU: of torch's allocator")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="after these, no further turn begins")
    parser.add_argument("--append", action="store_true", help="add rows to the file of an earlier run")
    parser.add_argument("--plot", action="store_true", help="draw the file's curves when done")
    parser.add_argument("--output", help="JSON file; default: bench/results/models-<machine>.json")
    arguments = parser.parse_args(argv)
    known = [c.name for c in contestants(4096, arguments.device)]
    for name in arguments.contestants:
        if name not in known:
            parser.error(f"--contestants: expected some of {', '.join(map(repr, known))}, got {name!r}")
    return arguments


@torch.no_grad()
def main() -> None:
    arguments = arguments_of()
    deadline = time.monotonic() + 60 * arguments.minutes
    if arguments.memory_limit:
        limit_memory(arguments.memory_limit, arguments.device)
    report = timing.Report("models", arguments.device, arguments.output, append=arguments.append)
    report.data["machine"]["transformers"] = transformers.__version__
    report.data["models"] = {}
    if arguments.append and report.path.exists():
        report.data["models"] = json.loads(report.path.read_text()).get("models", {})
    print(report.head(), HEAD, sep="\n", flush=True)
    for name in arguments.models:
        begin = time.monotonic()
        bench = Bench(name, arguments, report, deadline)
        wrong = bench.check()
        report.data["models"][name] = bench.about
        print(f"{name}: made and checked in {time.monotonic() - begin:.1f} s; {bench.about}", flush=True)
        for length in sorted(arguments.lengths):
            runs = bench.time_length(length, wrong)
            rows = [bench.row(c, length, runs[c.name]) for c in bench.entrants]
            dense = [r["ms"] for r in rows if not r["contestant"].startswith("dhsa") and "ms" in r]
            print("\n".join(shown(row, min(dense, default=None)) for row in rows), flush=True)
            bench.entrants = [c for c in bench.entrants if runs[c.name].failure is None]
        del bench
        gc.collect()
        if arguments.device == "cuda":
            torch.cuda.empty_cache()
    report.write()
    print(f"results: {report.where()}")
    if arguments.plot:
        print(draw_file(report.path))


if __name__ == "__main__":
    main()
