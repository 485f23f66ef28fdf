"""sparse_prefill and its attention on one GPU, against dense and block-sparse attention, in one interleaved run.

    python bench/bench_prefill.py --device cuda [--rows 128k,8k] [--plot]
    python bench/bench_prefill.py --device cpu --tiny        every row and contestant in miniature, to try the bench

A row is one shape (bench/shapes.py) and everybody timed on it; rows run in the order of ROWS, the headline first, and
each is in the JSON as soon as it is measured. TFLOP/s count 4·D·H·Σ_i min(keys of query i, budget) for whoever keeps a
budget, and the whole causal triangle for dense attention. The figures that are aimed at are TARGETS, for one H100.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import dhsa_ext
import peers
import plot
import timing
from answers import AGREE, check_rows, exact_rows
from inputs import Inputs, sizes
from lists import (
    attention_flops,
    budget_pairs,
    causal_pairs,
    chosen_lists,
    density,
    histogram,
    kept_pairs,
    show_histogram,
)
from shapes import GPU, GPU_BUDGETS, GPU_DECODE, GPU_LENGTHS, Shape, paper_twin
from timing import Contestant, Failure, Report, Timing, measure, timed

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
OURS, PEERS = ("whole", "attention A", "attention B", "attention C"), ("sdpa flash", "sdpa cudnn")


@dataclass(frozen=True)
class Target:
    """A figure that a contestant of a row must reach, and one to aim at."""

    row: str
    contestant: str
    figure: str  # a inputs of the row's JSON
    must: float
    aim: float | None
    more: bool = True  # whether more is better

    def verdict(self, value: float) -> str:
        def met(bar: float) -> str:
            return "met" if (value >= bar if self.more else value <= bar) else "MISSED"

        aim = "" if self.aim is None else f", aim {self.aim:g}: {met(self.aim)}"
        where = f"{self.row:13} {self.contestant:20} {self.figure:13}"
        return f"{where} {value:9.3f}   must {self.must:g}: {met(self.must)}{aim}"


TARGETS = (
    Target("128k", "attention A", "tflops", 490, 540),
    Target("128k", "attention B", "tflops", 560, 600),
    Target("128k", "attention C", "tflops", 450, 510),
    Target("128k", "whole", "ms", 9.6, 8.2, more=False),
    Target("128k", "whole", "x_sdpa flash", 45, None),
    Target("128k", "whole tail 64", "times_whole", 1.08, None, more=False),
    Target("32k", "whole", "ms", 2.4, 2.1, more=False),
    Target("8k", "whole", "ms", 0.72, 0.55, more=False),
    Target("32k", "whole", "router_share", 0.12, 0.10, more=False),
    Target("128k", "whole", "router_share", 0.12, 0.08, more=False),
    Target("128k-kv64", "whole", "ms", 11, 9, more=False),
    Target("128k", "attention B sm80", "tflops", 265, 310),
    Target("32k-d256", "attention A", "tflops", 380, 480),
    Target("32k-d64", "attention A", "tflops", 350, 420),
    Target("32k-full", "whole", "x_sdpa cudnn", 0.75, 0.9),
    Target("128k", "whole", "extra_mib", 32, 16, more=False),
    Target("128k-kv64", "whole", "extra_mib", 96, 72, more=False),
    Target("128k-accurate-q64", "whole", "router_ms", 7.0, 4.5, more=False),
    Target("128k-accurate-q64", "paper, twice the keys", "times_whole", 0.8, 1.0),
    Target("128k-accurate", "paper, twice the keys", "times_whole", 0.8, 1.0),
    Target("32k-accurate-q64", "whole", "router_ms", 1.8, 1.2, more=False),
    Target("decode", "sparse_decode S=1", "us", 30, 20, more=False),
    Target("decode", "sparse_decode S=Hkv", "us", 45, 28, more=False),
)
# Peers that take long to build or install, as measured before on one H100 80GB with the same 128-key blocks: ms.
QUOTED = {
    "8k": {"flash-attn-4 blocks": 0.72},
    "32k": {"flash-attn-4 blocks": 2.01, "MIT block-sparse-attention": 4.72},
    "128k": {"flash-attn-4 blocks": 8.22, "MIT block-sparse-attention": 16.5},
}


# --- one row ----------------------------------------------------------------------------------------------------------


def forced(kernel: str, call: Callable[[], Any]) -> Callable[[], Any]:
    """The same call on the kernel family that is named; the library reads the variable at each launch."""

    def run() -> Any:
        os.environ["DHSA_FORCE_CUDA_KERNEL"] = kernel
        try:
            return call()
        finally:
            del os.environ["DHSA_FORCE_CUDA_KERNEL"]

    return run


def contestant(name: str, inputs: Inputs) -> Contestant:
    """The contestants of prefill rows by name."""
    q, k, v, shape = inputs.q, inputs.k, inputs.v, inputs.shape

    def whole(tail: int = 0) -> Callable[[], Any]:
        options = shape.but(dense_tail=tail).prefill_options()
        return lambda: dhsa_ext.sparse_prefill(q, k, v, shape.budget, return_lse=True, **options)

    def attention(kind: str) -> Callable[[], Any]:
        lists = inputs.lists(kind)
        return lambda: dhsa_ext.sparse_attention(
            q, k, v, *lists, shape.q_block, softcap=shape.softcap, return_lse=True
        )  # fmt: skip

    if name == "whole":
        return Contestant(name, whole, inputs.checker("A", AGREE), memory=True)
    if name == "whole tail 64":
        return Contestant(name, lambda: whole(64), inputs.checker("tail", AGREE), memory=True)
    if name == "paper, twice the keys":
        twin = paper_twin(shape)
        options = twin.prefill_options()
        return Contestant(
            name, lambda: lambda: dhsa_ext.sparse_prefill(q, k, v, twin.budget, return_lse=True, **options),
            Inputs.of(inputs, twin).checker("A", AGREE),
        )  # fmt: skip
    if name == "attention B sm80":
        return Contestant(name, lambda: forced("sm80", attention("B")), inputs.checker("B"))
    if name.startswith("attention "):
        kind = name.removeprefix("attention ")
        return Contestant(name, lambda: attention(kind), inputs.checker(kind), memory=kind == "A")
    if name.startswith("sdpa "):
        # SDPA has no softcap: on such a shape it is timed, and checked, without one.
        return Contestant(
            name, lambda: peers.sdpa(q, k, v, name.removeprefix("sdpa ")),
            inputs.checker("all", shape=shape.but(softcap=0.0)), memory=True,
        )  # fmt: skip
    if name == "flex blocks":
        return Contestant(name, lambda: peers.flex_blocks(q, k, v, shape), inputs.checker("B"), memory=True)
    if name == "flash-attn-4 blocks":
        return Contestant(name, lambda: peers.flash_attention_4(q, k, v, shape), inputs.checker("B"))
    if name == "flash-attn-4 dense":
        return Contestant(name, lambda: peers.flash_attention_4(q, k, v, None), inputs.checker("all"))
    raise ValueError(f"no contestant is called {name!r}")


def prefill_row(row: str, shape: Shape, names: Sequence[str], run: Run) -> None:
    """Measure one shape and report it."""
    inputs = Inputs(shape, run.device, run.dtype)
    results = measure([contestant(name, inputs) for name in names if name not in run.without], run.device, run.seconds)
    if timing.device_lost(run.device):
        run.lost(row, results)
    exact = {f"attention {kind}": kept_pairs(inputs.lists(kind), shape) for kind in inputs.made}
    found = {}
    for name, result in results.items():
        dense = name.startswith("sdpa") or name.endswith("dense")
        pairs = causal_pairs(shape) if dense else budget_pairs(shape)
        found[name] = {"row": row, "contestant": name, **sizes(shape), **timed(result)} | density(shape, pairs)
        if isinstance(result, Failure):
            continue
        found[name]["tflops"] = round(attention_flops(pairs, shape) / result.ms / 1e9, 1)
        if name in exact:
            found[name]["tflops_exact"] = round(attention_flops(exact[name], shape) / result.ms / 1e9, 1)
        kind = name.removeprefix("attention ")
        if name != kind and kind in inputs.made:
            found[name]["histogram"] = histogram(inputs.lists(kind))
        for other, time in results.items():
            if other.startswith("sdpa") and other != name and isinstance(time, Timing):
                found[name][f"x_{other}"] = round(time.ms / result.ms, 3)
    ours, alone = results.get("whole"), results.get("attention A")
    if isinstance(ours, Timing) and isinstance(alone, Timing):
        found["whole"]["router_share"] = round(1 - alone.ms / ours.ms, 4)
        found["whole"]["router_ms"] = round(ours.ms - alone.ms, 4)
    for name in ("whole tail 64", "paper, twice the keys"):
        other_whole = results.get(name)
        if isinstance(ours, Timing) and isinstance(other_whole, Timing):
            found[name].pop("tflops")  # the budget's work is not what it did: blocks of the tail keep more, too
            found[name]["times_whole"] = round(other_whole.ms / ours.ms, 4)
    notes = [show_histogram(kind, lists) for kind, lists in inputs.made.items() if kind in "ABC"]
    run.report(row, shape, {name: found[name] for name in names if name in found}, notes)


def decode_row(row: str, run: Run) -> None:
    """One query over a long cache, 50 calls a graph: one cache again and again, and eight (as many layers) in turn."""
    one, per_kv = (run.sized(shape) for shape in GPU_DECODE.values())
    inputs = Inputs(one, run.device, run.dtype)
    q, k, v = inputs.q, inputs.k, inputs.v
    caches = [(k, v)] + [(torch.randn_like(k), torch.randn_like(v)) for _ in range(0 if run.tiny else 7)]

    def sparse(shape: Shape, over: Sequence[tuple[Tensor, Tensor]]) -> Callable[[], Any]:
        chunks = [dhsa_ext.select_boundaries(dhsa_ext.boundary_scores(k), shape.max_chunks) for k, _ in over]
        pooled = [dhsa_ext.chunk_pool(k, *c, shape.select_heads) for (k, _), c in zip(over, chunks, strict=True)]
        options: dict[str, Any] = dict(sink=shape.sink, local=shape.local, min_chunk=shape.nms_radius + 1)
        turn = 0

        def call() -> Any:
            nonlocal turn
            i, turn = turn % len(over), turn + 1
            return dhsa_ext.sparse_decode(
                q, *over[i], pooled[i], *chunks[i], shape.budget, return_lse=True, **options
            )  # fmt: skip

        return call

    def dense(backend: str) -> Callable[[], Any]:
        return peers.sdpa(q, k, v, backend)

    def right(shape: Shape) -> Callable[[Any], None]:
        def check(answer: Any) -> None:
            exact = exact_rows(q, k, v, chosen_lists(q, k, shape), shape, inputs.rows)
            check_rows(answer, exact, inputs.rows, run.dtype)

        return check

    calls = 2 if run.tiny else 50
    contestants = [
        Contestant("sparse_decode S=1", lambda: sparse(one, caches[:1]), right(one), calls),
        Contestant("sparse_decode S=Hkv", lambda: sparse(per_kv, caches[:1]), right(per_kv), calls),
        Contestant("sparse_decode S=1 of 8 caches", lambda: sparse(one, caches), right(one), calls),
        Contestant("sparse_decode S=Hkv of 8 caches", lambda: sparse(per_kv, caches), right(per_kv), calls),
        Contestant("sdpa flash", lambda: dense("flash"), inputs.checker("all"), calls),
        Contestant("sdpa cudnn", lambda: dense("cudnn"), inputs.checker("all"), calls),
    ]
    results = measure([c for c in contestants if c.name not in run.without], run.device, run.seconds)
    if timing.device_lost(run.device):
        run.lost(row, results)
    found = {}
    for name in (c.name for c in contestants if c.name in results):
        result = results[name]
        found[name] = {"row": row, "contestant": name, **sizes(one), **timed(result)}
        if isinstance(result, Timing):
            keys = one.seqlen_k if name.startswith("sdpa") else one.budget
            read = 2 * keys * one.heads_kv * one.head_dim * q.element_size()
            found[name] |= {"us": round(result.ms * 1e3, 2), "gb_per_s": round(read / result.ms / 1e6, 1)}
    run.report(row, one, found, [])


def curve_row(row: str, run: Run) -> None:
    """The whole against dense attention over length at a fixed budget, or over budget at a fixed length."""
    base = run.sized(GPU["32k"])
    if row == "lengths":
        shapes = [base.but(seqlen_k=length) for length in ([640, 1280] if run.tiny else GPU_LENGTHS)]
    else:
        shapes = [base.but(budget=budget) for budget in ([512, 1024] if run.tiny else GPU_BUDGETS)]
    for shape in shapes:
        names: tuple[str, ...] = ("whole", "attention A", *PEERS)
        if row == "budgets" and shape is not shapes[0]:
            names = ("whole", "attention A", "sdpa cudnn")  # dense time does not change with the budget
        prefill_row(row, shape, names, run)


def ceilings_row(row: str, run: Run) -> None:
    """What the GPU itself does in this run: a square product and a copy, to read the other figures against."""
    n, size = (256, 2**16) if run.tiny else (8192, 2**30)
    a, b = (torch.randn(n, n, device=run.device, dtype=run.dtype) for _ in range(2))
    x, y = (torch.empty(size, device=run.device, dtype=torch.uint8) for _ in range(2))
    results = measure(
        [Contestant("product", lambda: lambda: a @ b), Contestant("copy", lambda: lambda: y.copy_(x))],
        run.device, run.seconds,
    )  # fmt: skip
    print(f"\n[{row}] product of {n} x {n}, copy of {size / 2**20:g} MiB (read and write counted)")
    for name, work, unit in (("product", 2 * n**3 / 1e9, "tflops"), ("copy", 2 * size / 1e6, "gb_per_s")):
        result = results[name]
        cells = {"row": row, "contestant": name, **timed(result)}
        if isinstance(result, Timing):
            cells |= {unit: round(work / result.ms, 1)}
            print(f"  {name:30} {result.ms:9.3f} ms, {cells[unit]} {'TFLOP/s' if unit == 'tflops' else 'GB/s'}")
        run.results.add(cells)


# --- all rows ---------------------------------------------------------------------------------------------------------

_BLOCKS = ("attention B", "flex blocks", "flash-attn-4 blocks")
PREFILL_ROWS: dict[str, tuple[str, tuple[str, ...]]] = {  # row: shape, contestants; the headline first
    "128k": ("128k", (*OURS, "whole tail 64", "attention B sm80", *PEERS)),
    "32k": ("32k", (*OURS, "attention B sm80", *PEERS)),
    "8k": ("8k", (*OURS, *PEERS)),
    "128k-kv64": ("128k-kv64", ("whole", "attention A")),
    "32k-d256": ("32k-d256", ("whole", "attention A", *PEERS)),
    "32k-d64": ("32k-d64", ("whole", "attention A", "attention B", *PEERS)),
    **{
        label: (label, ("whole", "attention A", "paper, twice the keys"))
        for label in ("128k-accurate", "128k-accurate-q64", "32k-accurate", "32k-accurate-q64", "8k-accurate")
    },
    "32k-full": ("32k-full", ("whole", "attention A", "attention dense", *PEERS)),
    # FlexAttention and flash-attn-4 compile for each length, some 10 to 30 seconds.
    "blocks-8k": ("8k", _BLOCKS),
    "blocks-32k": ("32k", (*_BLOCKS, "flash-attn-4 dense")),
    "blocks-128k": ("128k", _BLOCKS),
}
CURVE_ROWS = ("lengths", "budgets")
ROWS = ("ceilings", *list(PREFILL_ROWS)[:4], "decode", *list(PREFILL_ROWS)[4:], *CURVE_ROWS)


class Run:
    """What the command line asked for, and the report that rows go to."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.device, self.tiny = arguments.device, arguments.tiny
        self.dtype = DTYPES[arguments.dtype]
        self.seconds = 0.02 if self.tiny else arguments.seconds
        self.rows: list[str] = arguments.rows.split(",") if arguments.rows else list(ROWS)
        self.without: list[str] = [name for name in arguments.without.split(",") if name]
        name = "prefill-tiny" if self.tiny else "prefill"
        self.results = Report(name, self.device, arguments.output, arguments.append)

    def sized(self, shape: Shape) -> Shape:
        """The shape, in miniature where --tiny was given."""
        if not self.tiny:
            return shape
        length, heads_kv = 1280, shape.heads_kv // 4
        return shape.but(
            seqlen_k=length, budget=min(512, shape.budget) if shape.budget < shape.seqlen_k else length,
            heads=shape.heads // 4, heads_kv=heads_kv, select_heads=min(shape.select_heads, heads_kv),
        )  # fmt: skip

    def row(self, row: str) -> None:
        if row in PREFILL_ROWS:
            shape, names = PREFILL_ROWS[row]
            prefill_row(row, self.sized(GPU[shape]), names, self)
        elif row == "decode":
            decode_row(row, self)
        elif row == "ceilings":
            ceilings_row(row, self)
        elif row in CURVE_ROWS:
            curve_row(row, self)
        else:
            raise ValueError(f"no row is called {row!r}; the rows are {', '.join(ROWS)}")

    def report(self, row: str, shape: Shape, found: dict[str, dict[str, Any]], notes: list[str]) -> None:
        print(f"\n[{row}] {shape}\n  {shape.why}")
        for note in notes:
            print(f"  {note}")
        for name, cells in found.items():
            self.results.add(cells)
            print(f"  {name:30} {show(cells)}", flush=True)
        if self.tiny:
            return  # what follows is about the real sizes
        for name, ms in QUOTED.get(row, {}).items():
            ours = found.get("whole", {}).get("ms")
            print(f"  {name:30} {ms:9.3f} ms quoted, attention alone" + (f", {ms / ours:.2f} x whole" if ours else ""))
        for line in verdicts(found.values()):
            print(f"  {line}", flush=True)

    def lost(self, row: str, results: dict[str, Timing | Failure]) -> None:
        """An error has ended the GPU for this process: start again at this row, without who did it."""
        guilty = {name: result for name, result in results.items() if isinstance(result, Failure)}
        for name, failure in guilty.items():
            self.results.add({"row": row, "contestant": name, "failed": failure.why})
            print(f"  {row}: {name} lost the GPU: {failure.why}", flush=True)
        rest = self.rows[self.rows.index(row) + (0 if guilty else 1) :]
        if not rest:
            sys.exit(1)
        again = dict(vars(self.arguments), rows=",".join(rest), append=True, output=str(self.results.path))
        again["without"] = ",".join([*self.without, *guilty])
        options = [f"--{name}" if value is True else f"--{name}={value}" for name, value in again.items() if value]
        os.execv(sys.executable, [sys.executable, sys.argv[0], *options])


def show(cells: dict[str, Any]) -> str:
    """One contestant's figures in one line."""
    if "failed" in cells:
        return f"failed: {cells['failed']}"
    parts = [f"{cells['ms']:9.3f} ms [{cells['low']:.3f}, {cells['high']:.3f}]"]
    if "tflops" in cells:
        parts.append(f"{cells['tflops']:6.1f} TFLOP/s")
    if "gb_per_s" in cells:
        parts.append(f"{cells['us']:.1f} us, {cells['gb_per_s']:.0f} GB/s of K and V")
    parts += [f"{value:.2f} x {key.removeprefix('x_')}" for key, value in cells.items() if key.startswith("x_")]
    if "router_share" in cells:
        parts.append(f"router {cells['router_share']:.1%}, {cells['router_ms']:.3f} ms")
    if "times_whole" in cells:
        parts.append(f"{cells['times_whole']:.3f} times whole")
    if "extra_mib" in cells:
        parts.append(f"extra {cells['extra_mib']:.1f} MiB")
    if not cells["how"].startswith("CUDA graph"):
        parts.append(cells["how"])
    return ", ".join(parts)


def verdicts(rows: Any) -> list[str]:
    """A line for each target that these rows have a figure for."""
    found = {(cells["row"], cells["contestant"]): cells for cells in rows}
    return [
        target.verdict(found[key][target.figure])
        for target in TARGETS
        if target.figure in found.get(key := (target.row, target.contestant), {})
    ]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="every row in miniature, its times worth nothing")
    parser.add_argument("--rows", help=f"comma separated, in this order; all: {','.join(ROWS)}")
    parser.add_argument("--without", default="", help="contestants to leave out, comma separated")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bf16")
    parser.add_argument("--seconds", type=float, default=0.3, help="of timing for each contestant of a row")
    parser.add_argument("--output", help="the JSON file (default: bench/results/prefill-<GPU>.json)")
    parser.add_argument("--append", action="store_true", help="keep the rows that the JSON file has")
    parser.add_argument("--plot", action="store_true", help="draw the curves beside the JSON file (needs matplotlib)")
    chosen = parser.parse_args()
    if chosen.device == "cpu" and not chosen.tiny:
        parser.error("--device cpu needs --tiny; bench_cpu.py is the bench for a CPU")
    if chosen.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no GPU; --device cpu --tiny tries the bench without one")
    if unknown := set((chosen.rows or "").split(",")) - {*ROWS, ""}:
        parser.error(f"--rows: no row is called {', '.join(sorted(unknown))}; the rows are {', '.join(ROWS)}")
    return chosen


def main() -> None:
    chosen = arguments()
    run = Run(chosen)
    print(run.results.head())
    if chosen.tiny:
        print("In miniature: every code path, and times that say nothing about the real sizes.")
    elif "H100" not in torch.cuda.get_device_name():
        print("The targets are for one H100; this is another GPU.")
    for row in run.rows:
        try:
            run.row(row)
        except Exception as error:
            run.results.add({"row": row, "contestant": "-", "failed": Failure.of(error).why})
            print(f"\n{row}: failed: {Failure.of(error).why}", flush=True)
            if timing.device_lost(run.device):
                run.lost(row, {})
        if run.device == "cuda":
            torch.cuda.empty_cache()
    rows = run.results.data["rows"]
    if not chosen.tiny:
        print("\ntargets")
        print("\n".join(verdicts(rows)) or "none of these rows has one")
    for line in plot.break_even(rows, "whole", "sdpa cudnn" if chosen.device == "cuda" else "sdpa flash"):
        print(line)
    if chosen.plot:
        print(plot.draw_file(run.results.path))
    print(f"results: {run.results.where()}")


if __name__ == "__main__":
    main()
