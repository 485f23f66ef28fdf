"""Every stage by itself, in pipeline order, on a CPU or a GPU: milliseconds and GFLOP/s or GB/s.

    python bench/bench_stages.py [--device cuda] [--stages select_keys,decode] [--length 131072]

Each stage is held against dhsa_ext.reference on a small shape first; a wrong one is not timed. Rates count the least
work that the answer needs: each input read once and each output written once for a stage that moves data, multiply-adds
twice for one that computes.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

import dhsa_ext
from answers import TOLERANCE
from dhsa_ext import ops, reference
from dhsa_ext.predictor import HIDDEN, BoundaryPredictor, PredictorConfig
from inputs import Inputs, sizes
from lists import attention_flops, density, kept_pairs, show_histogram
from shapes import CPU, GPU, TINY, Shape
from timing import Contestant, Failure, Report, Timing, load, measure, timed

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
Q_STRIDE, ROWS, REFINE = 16, "mean", 4  # of the accurate mode
PREDICTOR_HEADS, WINDOW = 8, 4  # of the learned boundaries


@dataclass
class Stage:
    """One op on one pipeline's tensors: the call, its reference, and the least work that its answer needs."""

    call: Callable[[], Any]
    oracle: Callable[[], Any]
    flops: float = 0.0
    inputs: tuple[Tensor, ...] = ()  # read once; empty where flops are the measure
    exact: bool = False  # integers, bit for bit
    pairs: float | None = None  # kept query-key pairs of one head, for the densities


@dataclass
class Pipeline:
    """Tensors between the stages of one shape, each from the ops themselves."""

    inputs: Inputs
    shape: Shape = field(init=False)

    def __post_init__(self) -> None:
        shape = self.shape = self.inputs.shape
        q, k = self.inputs.q, self.inputs.k
        self.boundary_scores = dhsa_ext.boundary_scores(k)
        self.chunks = dhsa_ext.select_boundaries(self.boundary_scores, shape.max_chunks, shape.nms_radius)
        self.q_pooled = dhsa_ext.query_pool(q, shape.select_heads, shape.q_block)
        self.k_pooled = dhsa_ext.chunk_pool(k, *self.chunks, shape.select_heads)
        self.scores = dhsa_ext.chunk_scores(self.q_pooled, self.k_pooled)
        self.lists = self.inputs.lists("A")

    def stage(self, name: str) -> Stage:
        """The stage on these tensors; its reference gets the very same ones."""
        shape, q, k, v = self.shape, self.inputs.q, self.inputs.k, self.inputs.v
        keys, blocks = shape.seqlen_k, self.q_pooled.shape[2]
        lists, head_dim = shape.batch * shape.select_heads * blocks, shape.head_dim
        forced = dict(sink=min(shape.sink, keys), local=min(shape.local, keys))
        rows = shape.batch * shape.heads * blocks * -(-shape.q_block // Q_STRIDE)

        def both(*args: Any, **options: Any) -> tuple[Callable[[], Any], Callable[[], Any]]:
            return partial(getattr(torch.ops.dhsa, name), *args, **options), partial(
                getattr(reference, name), *args, **options
            )

        if name == "boundary_scores":
            return Stage(*both(k), inputs=(k,))
        if name == "boundary_logits":
            # A token: q, k, v and v through the output projection; a cut: its window's rows and the first layer.
            width, span = shape.heads_kv * head_dim, 2 * WINDOW
            work = 4 * width**2 + span * span * PREDICTOR_HEADS * width + (4 * width + 1) * HIDDEN
            call = both(k, *predictor_weights(width, k.device), PREDICTOR_HEADS, WINDOW)
            return Stage(*call, flops=2.0 * shape.batch * keys * work)
        if name == "select_boundaries":
            scores = self.boundary_scores
            return Stage(*both(scores, shape.max_chunks, shape.nms_radius), inputs=(scores,), exact=True)
        if name == "chunk_pool":
            return Stage(*both(k, *self.chunks, shape.select_heads), inputs=(k,))
        if name == "query_pool":
            return Stage(*both(q, shape.select_heads, shape.q_block), inputs=(q,))
        if name == "chunk_scores":
            return Stage(*both(self.q_pooled, self.k_pooled), flops=2.0 * lists * self.k_pooled.shape[2] * head_dim)
        if name == "token_scores":
            return Stage(*both(self.scores, *self.chunks, keys), inputs=(self.scores,))
        if name == "select_keys":
            call = both(
                self.scores, *self.chunks, shape.queries, keys, shape.q_block, shape.budget,
                **forced, min_chunk=shape.nms_radius + 1,
            )  # fmt: skip
            return Stage(*call, inputs=(self.scores,), exact=True)
        if name == "chunk_mass":
            # A row weighs the chunks that begin at or before its block's end: half of the square, as for causal keys.
            work = rows * head_dim * self.chunks[1].float().mean().item()
            return Stage(*both(q, self._means(), *self.chunks, keys, shape.q_block, Q_STRIDE, rows=ROWS), flops=work)
        if name == "refine_keys":
            mass = dhsa_ext.chunk_mass(q, self._means(), *self.chunks, keys, shape.q_block, Q_STRIDE, rows=ROWS)
            call = both(
                q, k, *mass, *self.chunks, shape.q_block, shape.budget, REFINE, **forced, q_stride=Q_STRIDE,
                rows=ROWS
            )  # fmt: skip
            unforced = max(0, shape.budget - forced["sink"] - forced["local"] - shape.q_block + 1)
            looked_at = sum(min(REFINE * unforced, end) for end in range(shape.q_block, keys + 1, shape.q_block))
            return Stage(*call, flops=2.0 * rows / blocks * head_dim * looked_at)
        if name == "sparse_attention":
            pairs = kept_pairs(self.lists, shape)
            call = both(q, k, v, *self.lists, shape.q_block, softcap=shape.softcap)
            return Stage(*call, flops=attention_flops(pairs, shape), pairs=pairs)
        if name == "sparse_decode":
            one = q[:, :, -1:]
            call = both(one, k, v, self.k_pooled, *self.chunks, shape.budget, **forced, min_chunk=shape.nms_radius + 1)
            read = k[:, :, : shape.budget]
            return Stage(*call, inputs=(read, read, self.k_pooled))
        raise ValueError(f"no stage is called {name!r}")

    def _means(self) -> Tensor:
        return dhsa_ext.chunk_pool(self.inputs.k, *self.chunks, self.shape.select_heads, "mean")


STAGES = tuple(op for op in ops.OPS if op != "sparse_prefill")


def predictor_weights(width: int, device: torch.device) -> list[Tensor]:
    """Weights of boundary_logits as a new BoundaryPredictor draws them, its schema's order."""
    predictor = BoundaryPredictor(PredictorConfig(1, width, PREDICTOR_HEADS, WINDOW)).requires_grad_(False).to(device)
    weights = predictor.state_dict()
    names = ("attention.in_proj_weight", "attention.in_proj_bias", "attention.out_proj.weight",
             "attention.out_proj.bias", "norm.weight", "norm.bias", "gate.weight", "gate.bias",
             "fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias")  # fmt: skip
    return [weights[name] for name in names]


def agrees(name: str, got: Any, want: Any, exact: bool, dtype: torch.dtype) -> None:
    """Raise AssertionError where an answer is not the reference's, within the package's tolerances."""
    got, want = (x if isinstance(x, tuple) else (x,) for x in (got, want))
    if name in ("sparse_attention", "sparse_decode"):
        error = float((got[0].double() - want[0].double()).norm() / want[0].double().norm().clamp_min(1e-30))
        assert error <= TOLERANCE[dtype], f"{name}: relative error {error:.1e} over {TOLERANCE[dtype]:.0e}"
        return
    if name == "refine_keys":  # scores that differ by rounding may swap keys at the cut-off
        g, w = (kept_marks(*x) for x in (got, want))
        assert (g != w.to(g.device)).sum() <= w.sum() / 1000, f"{name}: other keys than the reference's"
        return
    for g, w in zip(got, want, strict=True):
        if exact:
            assert torch.equal(g, w.to(g.device)), f"{name}: the integers are not the reference's"
        else:
            torch.testing.assert_close(g.double(), w.double().to(g.device), rtol=1e-4, atol=1e-4)


def kept_marks(runs: Tensor, num_runs: Tensor) -> Tensor:
    """Bool [lists, keys]: which keys each list keeps."""
    length = int(runs.max()) + 1
    steps = torch.zeros(num_runs.numel(), length + 1, dtype=torch.int32, device=runs.device)
    for edge, step in ((0, 1), (1, -1)):  # entries past the count are 0 and cancel at key 0
        steps.scatter_add_(1, runs.flatten(0, -3)[..., edge].long(), torch.full_like(runs.flatten(0, -3)[..., 0], step))
    return steps.cumsum(1)[:, :-1] > 0


def timed_stages(names: list[str], large: Inputs, small: Inputs, seconds: float) -> dict[str, tuple[Stage, Any]]:
    """Each stage checked on the small inputs, and timed on the large ones, all in turn."""
    pipeline, check_pipeline = Pipeline(large), Pipeline(small)
    stages = {name: pipeline.stage(name) for name in names}

    def contestant(name: str) -> Contestant:
        def make() -> Callable[[], Any]:
            checked = check_pipeline.stage(name)
            agrees(name, checked.call(), checked.oracle(), checked.exact, large.dtype)
            return stages[name].call

        return Contestant(name, make, memory=True)

    with torch.inference_mode():
        results = measure([contestant(name) for name in names], large.device, seconds)
    return {name: (stages[name], results[name]) for name in names if name in results}


def figures(stage: Stage, result: Timing | Failure, shape: Shape) -> dict[str, Any]:
    """A result with its rate, and for attention its densities."""
    cells = timed(result)
    if isinstance(result, Failure):
        return cells
    if stage.flops:
        cells["gflops"] = round(stage.flops / result.ms / 1e6, 2)
    else:
        outputs = stage.call()
        moved = sum(x.nbytes for x in (*stage.inputs, *(outputs if isinstance(outputs, tuple) else (outputs,))))
        cells["gb_per_s"] = round(moved / result.ms / 1e6, 2)
    if stage.pairs is not None:
        cells |= {key: round(value, 4) for key, value in density(shape, stage.pairs).items()}
    return cells


def show(cells: dict[str, Any]) -> str:
    if "failed" in cells:
        return f"failed: {cells['failed']}"
    rate = f"{cells['gflops']:9.1f} GFLOP/s" if "gflops" in cells else f"{cells['gb_per_s']:9.1f} GB/s   "
    parts = [f"{cells['ms']:10.4f} ms [{cells['low']:.4f}, {cells['high']:.4f}] {rate}"]
    if "density_area" in cells:
        parts.append(f"keys {cells['density_keys']:.1%}, area {cells['density_area']:.1%}")
    parts.append(f"extra {cells['extra_mib']:.2f} MiB")
    return ", ".join(parts)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--stages", default=",".join(STAGES), help=f"comma separated; all: {','.join(STAGES)}")
    parser.add_argument("--length", type=int, help="keys and queries (default: 4096 on a CPU, 131072 on a GPU)")
    parser.add_argument("--select-heads", type=int, default=1, help="S: 1, the KV heads or the query heads")
    parser.add_argument("--dtype", choices=tuple(DTYPES), help="default: fp32 on a CPU, bf16 on a GPU")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument("--seconds", type=float, default=0.3, help="of timing for each stage")
    parser.add_argument("--tiny", action="store_true", help="a small shape, its times worth nothing")
    parser.add_argument("--output", help="the JSON file (default: bench/results/stages-<machine>.json)")
    parser.add_argument("--append", action="store_true", help="keep the rows that the JSON file has")
    chosen = parser.parse_args()
    if unknown := set(chosen.stages.split(",")) - set(STAGES):
        parser.error(f"--stages: no stage is called {', '.join(sorted(unknown))}; the stages are {', '.join(STAGES)}")
    if chosen.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no GPU")
    return chosen


def main() -> None:
    chosen = arguments()
    on_gpu = chosen.device == "cuda"
    if chosen.threads:
        torch.set_num_threads(chosen.threads)
    dtype = chosen.dtype or ("bf16" if on_gpu else "fp32")
    shape = GPU["128k"] if on_gpu else CPU["prefill-8k"].but(seqlen_k=4096)
    if chosen.tiny:
        shape = shape.but(seqlen_k=1280, budget=512, heads=4, heads_kv=4)
    shape = shape.but(seqlen_k=chosen.length or shape.seqlen_k, select_heads=chosen.select_heads)
    q_block = 64 if on_gpu else TINY.q_block
    small = TINY.but(q_block=q_block, heads=4 * shape.select_heads, heads_kv=2 * shape.select_heads,
                     head_dim=shape.head_dim, select_heads=shape.select_heads)  # fmt: skip
    report = Report("stages-tiny" if chosen.tiny else "stages", chosen.device, chosen.output, chosen.append)
    where = "the GPU" if on_gpu else f"{torch.get_num_threads()} threads"
    print(f"{report.head()}\n{shape}, {dtype}, {where}")
    names = chosen.stages.split(",")
    if dhsa_ext.backend.backend.name != "native":
        names = []
        print("  the native library is not built: the float64 reference is not timed")
    seconds = 0.02 if chosen.tiny else chosen.seconds
    large = Inputs(shape, chosen.device, DTYPES[dtype])
    found = timed_stages(names, large, Inputs(small, chosen.device, DTYPES[dtype]), seconds)
    print(f"  {show_histogram('A', large.lists('A'))}")
    for name, (stage, result) in found.items():
        cells = figures(stage, result, shape)
        threads = {} if on_gpu else {"threads": torch.get_num_threads()}
        report.add({"row": "stages", "contestant": name, "dtype": dtype, **threads, **sizes(shape), **cells})
        print(f"  {name:18} {show(cells)}", flush=True)
    print(f"load {load()}; results: {report.where()}")


if __name__ == "__main__":
    main()
