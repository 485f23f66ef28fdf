"""sparse_prefill and its attention on a CPU, against dense SDPA, gather + SDPA and FlexAttention, interleaved.

    python bench/bench_cpu.py [--rows gathered,decode] [--plot]
    python bench/bench_cpu.py --tiny                         every row and contestant in miniature

A row is one shape (bench/shapes.py) in one type on one number of threads. "gather + sdpa" is index_select of the same
keys and SDPA on them; "flex" is FlexAttention, compiled, whose blocks of 128 keys are masked down to the same keys.
GFLOP/s count the kept pairs for whoever keeps a budget, the causal triangle for dense attention. Ratios are given
twice: by the wall clock, and by processor time, which other work on the machine disturbs less.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

import dhsa_ext
import peers
import plot
from answers import AGREE
from inputs import Inputs, sizes
from lists import attention_flops, causal_pairs, density, kept_pairs, show_histogram
from shapes import CPU, CPU_BUDGETS, CPU_LENGTHS, Shape
from timing import Contestant, Failure, Report, Timing, load, measure, timed

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
DENSE, GATHER = "sdpa", "gather + sdpa"


@dataclass(frozen=True)
class Row:
    """One table of the bench: who runs on which shape, with how many threads."""

    shape: str
    names: tuple[str, ...]
    threads: int
    dtypes: tuple[str, ...] = ("fp32",)


ROWS = {
    "gathered": Row("gathered", ("attention chunks", GATHER, DENSE, "flex"), 1, ("fp32", "bf16", "fp16")),
    "decode": Row("decode", ("attention chunks", "sparse_decode", GATHER, DENSE), 1, ("fp32", "bf16", "fp16")),
    "prefill-2k": Row("prefill-2k", ("whole", "attention A", GATHER, DENSE), 2, ("fp32", "bf16", "fp16")),
    "prefill-8k": Row("prefill-8k", ("whole", "attention A", "whole kv", GATHER, "flex", DENSE), 2),
    "prefill-8k-half": Row("prefill-8k", ("whole", "attention A", GATHER, DENSE), 2, ("bf16", "fp16")),
    "prefill-32k": Row("prefill-32k", ("whole", "attention A", "whole kv", GATHER, DENSE), 2),
    "lengths": Row("prefill-2k", ("whole", "attention A", DENSE), 2),
    "budgets": Row("prefill-8k", ("whole", "attention A", DENSE), 2),
}


@dataclass(frozen=True)
class Target:
    """A ratio that a contestant of a row must reach on x86 with AVX-512, and one to aim at."""

    row: str
    dtype: str
    contestant: str
    against: str
    must: float
    aim: float


TARGETS = (
    Target("gathered", "fp32", "attention chunks", GATHER, 1.6, 1.85),
    Target("gathered", "bf16", "attention chunks", GATHER, 2.5, 3.0),
    Target("gathered", "fp16", "attention chunks", GATHER, 3.0, 3.6),
    Target("decode", "fp32", "attention chunks", GATHER, 6.0, 7.0),
    Target("decode", "bf16", "attention chunks", GATHER, 10.0, 13.0),
    Target("prefill-8k", "fp32", "whole", DENSE, 4.0, 5.5),
    Target("prefill-32k", "fp32", "whole", DENSE, 8.0, 11.0),
)
MEMORY = {"whole": (0.05, 0.02), "whole kv": (0.10, 0.08)}  # extra memory at 32K as a share of K and V: must, aim


def contestant(name: str, inputs: Inputs) -> Contestant:
    q, k, v, shape = inputs.q, inputs.k, inputs.v, inputs.shape
    kind = "chunks" if shape.queries < shape.seqlen_k else "A"

    def whole(shape: Shape) -> Callable[[], Any]:
        options = shape.prefill_options()
        return lambda: dhsa_ext.sparse_prefill(q, k, v, shape.budget, return_lse=True, **options)

    def attention() -> Callable[[], Any]:
        lists = inputs.lists(kind)
        return lambda: dhsa_ext.sparse_attention(q, k, v, *lists, shape.q_block, return_lse=True)

    def decode() -> Callable[[], Any]:
        chunks = dhsa_ext.select_boundaries(dhsa_ext.boundary_scores(k), shape.max_chunks)
        pooled = dhsa_ext.chunk_pool(k, *chunks, shape.select_heads)
        options: dict[str, Any] = dict(sink=shape.sink, local=shape.local, min_chunk=shape.nms_radius + 1)
        return lambda: dhsa_ext.sparse_decode(q, k, v, pooled, *chunks, shape.budget, return_lse=True, **options)

    if name == "whole":
        return Contestant(name, lambda: whole(shape), inputs.checker("A", AGREE), memory=True)
    if name == "whole kv":  # one list per KV head; its keys are other ones, so only its own parts can check it
        per_kv = Inputs.of(inputs, shape.but(select_heads=shape.heads_kv))
        return Contestant(name, lambda: whole(per_kv.shape), per_kv.checker("A", AGREE), memory=True)
    if name.startswith("attention "):
        return Contestant(name, attention, inputs.checker(kind), memory=True)
    if name == "sparse_decode":
        return Contestant(name, decode, inputs.checker("A"))
    if name == GATHER:
        return Contestant(name, lambda: peers.gathered_sdpa(q, k, v, inputs.lists(kind), shape), inputs.checker(kind))
    if name == "flex":
        return Contestant(name, lambda: peers.flex_lists(q, k, v, inputs.lists(kind), shape), inputs.checker(kind))
    if name == DENSE:
        return Contestant(name, lambda: peers.sdpa(q, k, v), inputs.checker("all"))
    raise ValueError(f"no contestant is called {name!r}")


def run_row(label: str, row: Row, shape: Shape, dtype: str, chosen: argparse.Namespace, report: Report) -> None:
    """Measure one shape in one type, print it, and put it into the report."""
    threads = min(row.threads, torch.get_num_threads()) if chosen.threads is None else chosen.threads
    before, number = load(), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        inputs = Inputs(shape, "cpu", DTYPES[dtype])
        names = [name for name in row.names if name not in chosen.without.split(",")]
        results = measure([contestant(name, inputs) for name in names], "cpu", chosen.seconds)
    finally:
        torch.set_num_threads(number)
    kept = {kind: kept_pairs(lists, shape) for kind, lists in inputs.made.items()}
    print(f"\n[{label}] {shape}, {dtype}, {threads} threads, load {before} to {load()}\n  {shape.why}")
    for kind, lists in inputs.made.items():
        print(f"  {show_histogram(kind, lists)}")
    found = {}
    for name in names:
        cells = figures(name, results, inputs, next(iter(kept.values()), 0.0))
        found[name] = {
            "row": label, "contestant": name, "dtype": dtype, "threads": threads, "load": before,
            **sizes(shape), **cells,
        }  # fmt: skip
        report.add(found[name])
        print(f"  {name:18} {show(cells)}", flush=True)
    if not chosen.tiny:
        print("".join(f"  {line}\n" for line in verdicts(label, dtype, found)), end="")


def figures(name: str, results: dict[str, Timing | Failure], inputs: Inputs, kept: float) -> dict[str, Any]:
    """One contestant's result with what follows from it: rate, density, ratios, memory as a share of K and V."""
    result, shape = results[name], inputs.shape
    cells = timed(result)
    if isinstance(result, Failure):
        return cells
    pairs = causal_pairs(shape) if name == DENSE else kept
    cells["gflops"] = round(attention_flops(pairs, shape) / result.ms / 1e6, 2)
    cells |= {key: round(value, 4) for key, value in density(shape, pairs).items()}
    if shape.queries == 1:
        keys = shape.seqlen_k if name == DENSE else shape.budget
        read = 2 * keys * shape.heads_kv * shape.head_dim * inputs.k.element_size()
        cells["gb_per_s"] = round(read / result.ms / 1e6, 2)
    if result.extra_mib is not None:
        cells["extra_share"] = round(result.extra_mib * 2**20 / (inputs.k.nbytes + inputs.v.nbytes), 4)
    for other in (GATHER, "flex", DENSE):
        peer = results.get(other)
        if other != name and isinstance(peer, Timing):
            cells[f"x_{other}"] = round(peer.ms / result.ms, 3)
            if peer.cpu_ms and result.cpu_ms:
                cells[f"cpu_x_{other}"] = round(peer.cpu_ms / result.cpu_ms, 3)
    return cells


def show(cells: dict[str, Any]) -> str:
    """One contestant's figures in one line."""
    if "failed" in cells:
        return f"failed: {cells['failed']}"
    parts = [f"{cells['ms']:10.3f} ms [{cells['low']:.3f}, {cells['high']:.3f}], cpu {cells['cpu_ms']:.3f}"]
    parts.append(f"{cells['gflops']:6.1f} GFLOP/s")
    if "gb_per_s" in cells:
        parts.append(f"{cells['gb_per_s']:.1f} GB/s")
    parts.append(f"keys {cells['density_keys']:.1%}, area {cells['density_area']:.1%}")
    for key, value in cells.items():
        if key.startswith("x_"):
            parts.append(f"{value:.2f} (cpu {cells.get('cpu_' + key, float('nan')):.2f}) x {key.removeprefix('x_')}")
    if "extra_mib" in cells:
        parts.append(f"extra {cells['extra_mib']:.2f} MiB = {cells['extra_share']:.1%} of K+V")
    return ", ".join(parts)


def verdicts(label: str, dtype: str, found: dict[str, dict[str, Any]]) -> list[str]:
    """A line for each target that these results have a figure for."""

    def met(value: float, bar: float, more: bool) -> str:
        return "met" if (value >= bar if more else value <= bar) else "MISSED"

    lines = []
    for target in TARGETS:
        ratio = found.get(target.contestant, {}).get(f"x_{target.against}")
        if (target.row, target.dtype) == (label, dtype) and ratio is not None:
            lines.append(
                f"{target.contestant} against {target.against}: {ratio:.2f} x, must {target.must:g}: "
                f"{met(ratio, target.must, True)}, aim {target.aim:g}: {met(ratio, target.aim, True)}"
            )
    if label == "prefill-32k":
        for name, (must, aim) in MEMORY.items():
            share = found.get(name, {}).get("extra_share")
            if share is not None:
                lines.append(
                    f"{name}: extra memory {share:.1%} of K+V, must {must:.0%}: {met(share, must, False)}, "
                    f"aim {aim:.0%}: {met(share, aim, False)}"
                )
    return lines


def shapes_of(label: str, row: Row, tiny: bool) -> list[Shape]:
    """The shapes of a row: one, or the points of a curve."""
    shape = CPU[row.shape]
    if tiny:
        length = shape.seqlen_k // 4 if shape.queries < shape.seqlen_k else 1280
        shape = shape.but(seqlen_k=length, budget=512, heads=2, heads_kv=2, head_dim=64)
    if label == "lengths":
        return [shape.but(seqlen_k=length) for length in ((768, 1280) if tiny else CPU_LENGTHS)]
    if label == "budgets":
        length = 1280 if tiny else 4096
        return [shape.but(seqlen_k=length, budget=b) for b in ((512, 1024) if tiny else CPU_BUDGETS)]
    return [shape]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tiny", action="store_true", help="every row in miniature, its times worth nothing")
    parser.add_argument("--rows", default=",".join(ROWS), help=f"comma separated, in this order; all: {','.join(ROWS)}")
    parser.add_argument("--dtypes", help="only these of a row's types: fp32,bf16,fp16")
    parser.add_argument("--without", default="", help="contestants to leave out, comma separated")
    parser.add_argument("--threads", type=int, help="instead of each row's own number")
    parser.add_argument("--seconds", type=float, default=1.0, help="of timing for each contestant of a row")
    parser.add_argument("--output", help="the JSON file (default: bench/results/cpu-<processor>.json)")
    parser.add_argument("--append", action="store_true", help="keep the rows that the JSON file has")
    parser.add_argument("--plot", action="store_true", help="draw the curves beside the JSON file (needs matplotlib)")
    chosen = parser.parse_args()
    if chosen.tiny:
        chosen.seconds = 0.02
    if unknown := set(chosen.rows.split(",")) - set(ROWS):
        parser.error(f"--rows: no row is called {', '.join(sorted(unknown))}; the rows are {', '.join(ROWS)}")
    return chosen


def keep_freed_memory() -> None:
    """Free 31 MiB: glibc takes what is as large from the heap then, and does not map it anew, page by page, each call.

    torch's gather in float32 took twice as long until some contestant had freed so much.
    """
    torch.empty(31 << 20, dtype=torch.uint8)


@torch.no_grad()
def main() -> None:
    chosen = arguments()
    keep_freed_memory()
    report = Report("cpu-tiny" if chosen.tiny else "cpu", "cpu", chosen.output, chosen.append)
    print(report.head())
    if report.data["machine"]["backend"] != "native":
        print("No native library: the float64 Python reference runs here, and its times say nothing.")
    for label in chosen.rows.split(","):
        row = ROWS[label]
        for shape in shapes_of(label, row, chosen.tiny):
            for dtype in row.dtypes:
                if chosen.dtypes and dtype not in chosen.dtypes.split(","):
                    continue
                try:
                    run_row(label, row, shape, dtype, chosen, report)
                except Exception as error:
                    report.add({"row": label, "contestant": "-", "dtype": dtype, "failed": Failure.of(error).why})
                    print(f"\n[{label}] {dtype} failed: {Failure.of(error).why}", flush=True)
    print()
    for line in plot.break_even(report.data["rows"], "whole", DENSE):
        print(line)
    if chosen.plot:
        print(plot.draw_file(report.path))
    print(f"results: {report.where()}")


if __name__ == "__main__":
    main()
