"""Time to first token and peak memory of whole models: DHSA against every dense implementation that is there.

    python bench/bench_models.py --device cuda --models llama-3.1-8b gemma-2-2b --lengths 8192 32768 131072
    python bench/bench_models.py --device cpu --models gemma-3-270m --lengths 2048 4096 8192
    python bench/bench_models.py --device cuda --memory-limit 24GB

Models have the real shapes and random weights, made from their configurations: nothing is downloaded, and what they
say is not looked at (random weights spread attention evenly: times do not depend on it, choices of keys do). What is
looked at first: with a budget that holds every key, the last logits are those of the model's own attention.

One row per model, length and contestant: time to first token (a prefill of random tokens, the logits of its last one),
of it the seconds inside attention layers and, of one layer's inputs, the choice of keys by itself; decode tokens/s;
peak memory above the weights. Contestants take turns, round after round; median and spread of the rounds. One that runs
out of memory gets a row that says so, and longer prompts of it are left out.
"""

from __future__ import annotations

import argparse
import gc
import re
import resource
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM, DynamicCache
from transformers.utils import is_flash_attn_2_available

import timing
from dhsa_ext import DHSAConfig, hf
from dhsa_ext.meter import PeakMemory
from dhsa_ext.selection import choose_keys

# The published configurations, as far as time and memory depend on them.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma-3-270m": (
        "Gemma3TextConfig",
        dict(
            vocab_size=262144, hidden_size=640, intermediate_size=2048, num_hidden_layers=18, num_attention_heads=4,
            num_key_value_heads=1, head_dim=256, sliding_window=512, query_pre_attn_scalar=256,
            layer_types=(["sliding_attention"] * 5 + ["full_attention"]) * 3, max_position_embeddings=32768,
        ),
    ),
    "gemma-3-1b": (
        "Gemma3TextConfig",
        dict(
            vocab_size=262144, hidden_size=1152, intermediate_size=6912, num_hidden_layers=26, num_attention_heads=4,
            num_key_value_heads=1, head_dim=256, sliding_window=512, query_pre_attn_scalar=256,
            layer_types=((["sliding_attention"] * 5 + ["full_attention"]) * 5)[:26], max_position_embeddings=131072,
        ),
    ),
    "gemma-2-2b": (
        "Gemma2Config",
        dict(
            vocab_size=256000, hidden_size=2304, intermediate_size=9216, num_hidden_layers=26, num_attention_heads=8,
            num_key_value_heads=4, head_dim=256, sliding_window=4096, query_pre_attn_scalar=256,
            attn_logit_softcapping=50.0, final_logit_softcapping=30.0, max_position_embeddings=131072,
        ),
    ),
    "qwen-2.5-7b": (
        "Qwen2Config",
        dict(
            vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
            num_key_value_heads=4, max_position_embeddings=131072,
        ),
    ),
    "llama-3.1-8b": (
        "LlamaConfig",
        dict(
            vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
            num_key_value_heads=8, max_position_embeddings=131072,
        ),
    ),
    "tiny": (
        "LlamaConfig",
        dict(
            vocab_size=128, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=64, max_position_embeddings=4096,
        ),
    ),
}  # fmt: skip
DENSE = ("eager", "sdpa", "flex_attention", "flash_attention_2")
NAME = "dhsa_bench"  # what stands before an implementation to time it
NEW_TOKENS = 16


@dataclass(frozen=True)
class Contestant:
    name: str
    implementation: str  # of transformers, or "dhsa"
    config: DHSAConfig | None = None


@dataclass
class Pass:
    """One prefill and a few new tokens; memory is the prefill's peak above what was there before it."""

    first_token_s: float
    attention_s: float
    tokens_per_s: float
    peak_mib: float


class Metered:
    """An attention function with a clock around it, registered as NAME."""

    def __init__(self, implementation: str, device: str) -> None:
        self.device, self.spans, self.layer = device, [], None
        self.function = hf.dhsa_attention if implementation == "dhsa" else _attention_of(implementation)
        self.implementation = implementation
        AttentionInterface.register(NAME, self)
        masks = AttentionMaskInterface()
        AttentionMaskInterface.register(NAME, hf.dhsa_mask if implementation == "dhsa" else masks[implementation])

    def __call__(self, module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **kwargs: Any) -> Any:
        begin = self._now()
        result = self.function(module, q, k, v, mask, **kwargs)
        self.spans.append((begin, self._now()))
        if kwargs.get("sliding_window") is None and q.shape[2] > 1:
            self.layer = (q, k, kwargs.get("scaling"), kwargs.get("softcap") or 0.0)
        return result

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


def _attention_of(implementation: str) -> Callable[..., Any]:
    if implementation != "eager":
        return AttentionInterface()[implementation]

    def eager(layer: Any, *arguments: Any, **kwargs: Any) -> Any:
        # transformers keeps eager attention beside each model, not in the interface.
        return sys.modules[type(layer).__module__].eager_attention_forward(layer, *arguments, **kwargs)

    return eager


def build(name: str, device: str, dtype: torch.dtype) -> Any:
    """The model with random weights: float32 on a CPU, else as asked."""
    kind, sizes = MODELS[name]
    special = dict(pad_token_id=0, bos_token_id=1, eos_token_id=None)
    config = getattr(transformers, kind)(**sizes, **special)
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device), transformers.initialization.no_init_weights():
            model = AutoModelForCausalLM.from_config(config)
            model.tie_weights()
    finally:
        torch.set_default_dtype(before)
    for label, parameter in model.named_parameters():  # no_init_weights leaves there whatever the memory held
        if parameter.ndim > 1:
            parameter.data.normal_(0.0, 0.02)
        else:  # Gemma's norms multiply by 1 + weight
            parameter.data.fill_(float("norm" in label and "Gemma" not in kind))
    return model.eval()


def contestants(budget: int, names: list[str]) -> list[Contestant]:
    dense = [Contestant(name, name) for name in DENSE if "flash" not in name or is_flash_attn_2_available()]
    ours = [Contestant(f"dhsa {preset}", "dhsa", DHSAConfig(preset, budget=budget)) for preset in ("paper", "accurate")]
    return [c for c in (*dense, *ours) if not names or c.name in names]


def one_pass(model: Any, ids: Tensor, meter: Metered, new_tokens: int) -> Pass:
    device = ids.device.type
    cache = DynamicCache(config=model.config)
    _settle(device)
    memory = PeakMemory() if device == "cpu" else _GpuPeak()
    with memory:
        begin = time.perf_counter()
        logits = model(ids, past_key_values=cache, logits_to_keep=1).logits
        _settle(device)
        first = time.perf_counter() - begin
    attention = meter.seconds()
    token = logits[:, -1:].argmax(-1)
    begin = time.perf_counter()
    for _ in range(new_tokens):
        token = model(token, past_key_values=cache, logits_to_keep=1).logits[:, -1:].argmax(-1)
    _settle(device)
    rate = new_tokens / (time.perf_counter() - begin)
    meter.seconds()
    return Pass(first, attention, rate, memory.mib)


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


def choice_seconds(meter: Metered, config: DHSAConfig, device: str) -> float:
    """The stages before attention, on the inputs of the last global layer."""
    q, k, scale, softcap = meter.layer
    times = []
    for _ in range(3):
        _settle(device)
        begin = time.perf_counter()
        choose_keys(q, k, config, scale=scale, softcap=softcap)
        _settle(device)
        times.append(time.perf_counter() - begin)
    return min(times)


def check_answer(model: Any, device: str) -> None:
    """With a budget that holds every key, DHSA's last logits are those of the model's own attention.

    What rounding alone does to random weights is measured, not guessed: the same attention, the prompt in two pieces.
    """
    ids = torch.randint(2, model.config.vocab_size, (1, 256), device=device)
    model.set_attn_implementation("eager" if getattr(model.config, "attn_logit_softcapping", None) else "sdpa")
    expected = model(ids, logits_to_keep=1).logits.float()
    cache = DynamicCache(config=model.config)
    model(ids[:, :100], past_key_values=cache, logits_to_keep=1)
    in_pieces = model(ids[:, 100:], past_key_values=cache, logits_to_keep=1).logits.float()
    hf.register(DHSAConfig("accurate", budget=512, min_length=0))
    model.set_attn_implementation("dhsa")
    got = model(ids, logits_to_keep=1).logits.float()
    error, noise = (((x - expected).norm() / expected.norm()).item() for x in (got, in_pieces))
    bound = max(1e-4, 3 * noise)
    if not error <= bound:
        raise AssertionError(
            f"full budget: expected the dense logits within {bound:.2g}, three times what the order of their sums "
            f"changes, got a relative error of {error:.2g}"
        )


def out_of_memory(error: BaseException) -> bool:
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)


@dataclass
class Runs:
    passes: list[Pass] = field(default_factory=list)
    choice_s: float | None = None
    failure: str | None = None


def time_length(model: Any, entrants: list[Contestant], length: int, device: str, arguments: Any) -> dict[str, Runs]:
    ids = torch.randint(2, model.config.vocab_size, (1, length), device=device)
    runs = {c.name: Runs() for c in entrants}
    for round_ in range(arguments.rounds + 1):  # the first one warms up, and is not counted
        for contestant in entrants:
            run = runs[contestant.name]
            if run.failure is not None:
                continue
            try:
                if contestant.config is not None:
                    hf.register(contestant.config)
                meter = Metered(contestant.implementation, device)
                model.set_attn_implementation(NAME)
                result = one_pass(model, ids, meter, arguments.new_tokens if round_ else 2)
                if round_:
                    run.passes.append(result)
                elif contestant.config is not None and meter.layer is not None:
                    run.choice_s = choice_seconds(meter, contestant.config, device)
            except Exception as error:
                run.failure = "out of memory" if out_of_memory(error) else timing.Failure.of(error).why
            gc.collect()
    return runs


def row_of(model_name: str, contestant: Contestant, length: int, run: Runs, global_layers: int) -> dict[str, Any]:
    row: dict[str, Any] = {"row": model_name, "contestant": contestant.name, "seqlen_k": length}
    if contestant.config is not None:
        row["budget"] = contestant.config.budget
    if run.failure is not None or not run.passes:
        return row | {"failed": run.failure or "not run"}
    firsts = [p.first_token_s for p in run.passes]
    row |= {
        "ms": statistics.median(firsts) * 1e3, "low": min(firsts) * 1e3, "high": max(firsts) * 1e3,
        "rounds": len(firsts), "attention_ms": statistics.median(p.attention_s for p in run.passes) * 1e3,
        "tokens_per_s": statistics.median(p.tokens_per_s for p in run.passes),
        "peak_mib": max(p.peak_mib for p in run.passes),
    }  # fmt: skip
    if run.choice_s is not None:
        row["choice_ms"] = run.choice_s * 1e3 * global_layers
    return {key: float(f"{v:.4g}") if isinstance(v, float) else v for key, v in row.items()}


def shown(row: dict[str, Any], fastest: float | None) -> str:
    head = f"{row['row']:<13} {row['seqlen_k']:>7}  {row['contestant']:<18}"
    if "failed" in row:
        return f"{head} {row['failed']}"
    choice = f"{row['choice_ms'] / 1e3:7.2f}" if "choice_ms" in row else "      –"
    ratio = f"{fastest / row['ms']:5.2f}x" if fastest else "     –"
    return (
        f"{head} {row['ms'] / 1e3:8.2f} {ratio}  {row['attention_ms'] / 1e3:8.2f} {choice}  {row['tokens_per_s']:8.1f} "
        f"{row['peak_mib']:9.0f}"
    )


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


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--models", nargs="+", choices=tuple(MODELS), default=["gemma-3-270m"])
    parser.add_argument("--lengths", nargs="+", type=int, default=[2048, 4096, 8192], help="tokens of the prompt")
    parser.add_argument("--budget", type=int, default=2048, help="keys that a query block keeps")
    parser.add_argument("--contestants", nargs="+", default=[], help="names; default: all that can run here")
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds, after one that warms up")
    parser.add_argument("--new-tokens", type=int, default=NEW_TOKENS, help="tokens of the decode rate")
    parser.add_argument("--memory-limit", help="cap of this process, as 24GB; GPU: of torch's allocator")
    parser.add_argument("--output", help="JSON file; default: bench/results/models-<machine>.json")
    arguments = parser.parse_args()

    if arguments.memory_limit:
        limit_memory(arguments.memory_limit, arguments.device)
    dtype = torch.float32 if arguments.device == "cpu" else torch.bfloat16
    report = timing.Report("models", arguments.device, arguments.output)
    report.data["machine"]["transformers"] = transformers.__version__
    report.data["memory_limit"] = arguments.memory_limit
    print(report.head())
    print(
        f"{'model':<13} {'tokens':>7}  {'contestant':<18} {'first s':>8} {'ratio':>6}  {'attend s':>8} "
        f"{'choice s':>7}  {'tokens/s':>8} {'peak MiB':>9}"
    )
    print("ratio: to the fastest dense contestant of the same length that answers; attend s holds the choice")
    for name in arguments.models:
        model = build(name, arguments.device, dtype)
        check_answer(model, arguments.device)
        types = getattr(model.config, "layer_types", None) or ["full_attention"] * model.config.num_hidden_layers
        entrants = contestants(arguments.budget, arguments.contestants)
        for length in sorted(arguments.lengths):
            runs = time_length(model, entrants, length, arguments.device, arguments)
            rows = [row_of(name, c, length, runs[c.name], types.count("full_attention")) for c in entrants]
            dense = [r["ms"] for r in rows if r["contestant"] in DENSE and "ms" in r]
            for row in rows:
                report.add(row)
                print(shown(row, min(dense, default=None)), flush=True)
            entrants = [c for c in entrants if runs[c.name].failure is None]
        del model
    print(f"results: {report.path.name}")


if __name__ == "__main__":
    main()
