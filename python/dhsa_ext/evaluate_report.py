"""What the evaluation writes: tables, CSV, the run's command, seed and versions as JSON, curves and heatmaps."""

from __future__ import annotations

import csv
import json
import math
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch

from . import __version__
from .backend import backend

Row: TypeAlias = Mapping[str, Any]


def environment(model: str, seed: int, argv: Sequence[str]) -> dict[str, Any]:
    """What one needs to have the figures again: command, seed, versions, machine."""
    import transformers

    here = Path(__file__).parent
    commit = subprocess.run(
        ["git", "-C", str(here), "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    words = [Path(word).name if Path(word).is_absolute() else word for word in argv]  # data by name, wherever it lay
    return {
        "command": shlex.join(["python", "-m", "dhsa_ext.evaluate", *words]),
        "model": model,
        "seed": seed,
        "dhsa_ext": __version__,
        "commit": commit or "unknown",
        "backend": backend.name,
        "isa": backend.info("isa_active") or "none",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}, {_cpu_name()}, {os.cpu_count()} CPUs",
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "threads": torch.get_num_threads(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or "unknown CPU"
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown CPU")


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """The mean and its standard error (NaN of a single value)."""
    mean = sum(values) / len(values)
    if len(values) < 2:
        return mean, math.nan
    return mean, math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1) / len(values))


def summarise(rows: Iterable[Row], by: Sequence[str], unit: str, values: Sequence[str]) -> list[dict[str, Any]]:
    """Mean ± standard error of `values` over the different `unit`s (prompts), for each combination of `by`.

    Several rows of one unit (its layers) are averaged first: they are no independent samples.
    """
    groups: dict[tuple[Any, ...], dict[Any, list[Row]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in by), {}).setdefault(row[unit], []).append(row)
    summary = []
    for key, units in groups.items():
        line = dict(zip(by, key, strict=True)) | {"n": len(units)}
        for value in values:
            means = [sum(float(row[value]) for row in unit_rows) / len(unit_rows) for unit_rows in units.values()]
            line[value], line[f"{value}_se"] = mean_and_error(means)
        summary.append(line)
    return summary


def add_gap_closed(summary: Sequence[dict[str, Any]]) -> None:
    """gap_closed: how far a choice's recall goes from the paper's to the oracle's under the same settings."""
    same = ("length", "heads", "q_block", "budget")
    bounds: dict[tuple[Any, ...], dict[str, float]] = {}
    for row in summary:
        if row["boundaries"] in ("", "training-free"):
            bounds.setdefault(tuple(row[name] for name in same), {})[row["policy"]] = row["recall"]
    for row in summary:
        at = bounds.get(tuple(row[name] for name in same), {})
        gap = at.get("oracle", math.nan) - at.get("paper", math.nan)
        row["gap_closed"] = (row["recall"] - at["paper"]) / gap if gap > 0 else ""


def table(rows: Sequence[Row], columns: Sequence[str]) -> str:
    """Aligned columns; "x" stands beside its standard error where a row has "x_se"."""

    def cell(row: Row, column: str) -> str:
        value = row.get(column, "")
        if not isinstance(value, float):
            return str(value)
        spread = row.get(f"{column}_se", math.nan)
        return f"{value:.3f}" if math.isnan(spread) else f"{value:.3f} ± {spread:.3f}"

    cells = [list(columns)] + [[cell(row, column) for column in columns] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(f"{c:>{w}}" for c, w in zip(line, widths, strict=True)).rstrip() for line in cells)


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({k: f"{v:.5g}" if isinstance(v, float) else v for k, v in row.items()})


def write_environment(path: Path, facts: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError:
        print("note: no matplotlib here (pip install matplotlib): no picture is drawn", file=sys.stderr)
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


_STYLES = {"oracle": ("black", "--"), "accurate": ("#2a9d8f", "-"), "paper": ("#e76f51", "-"),
           "coverage": ("#8ab17d", "-"), "sliding_window": ("#999999", "-"), "a_shape": ("#bbbbbb", "-"),
           "block_sparse": ("#e9c46a", "-")}  # fmt: skip


def draw_curves(path: Path, summary: Sequence[Row], title: str) -> bool:
    """Recall and output error against the keys kept, a column for each number of selection heads and each q_block."""
    pyplot = _pyplot()
    if pyplot is None:
        return False
    panels = sorted({(row["heads"], row["q_block"]) for row in summary})
    figure, axes = pyplot.subplots(
        2, len(panels), figsize=(4.6 * len(panels), 7), squeeze=False, sharex=True, sharey="row", layout="constrained"
    )
    for column, panel in enumerate(panels):
        inside = [row for row in summary if (row["heads"], row["q_block"]) == panel]
        for name in dict.fromkeys((row["policy"], row["boundaries"]) for row in inside):
            curve = [row for row in inside if (row["policy"], row["boundaries"]) == name]
            points = sorted((row["keys"], row["recall"], row["error"]) for row in curve)
            color, style = _STYLES.get(name[0], (None, "-"))
            label = name[0] if name[1] in ("", "training-free") else f"{name[0]}, {Path(name[1]).stem} chunks"
            for axis, value in zip(axes[:, column], (1, 2), strict=True):
                xs, ys = [p[0] for p in points], [p[value] for p in points]
                shade = color if label == name[0] else None
                axis.plot(xs, ys, style, marker="o", markersize=3, label=label, color=shade)
        axes[0, column].set_title(f"lists per {panel[0]} head{'s' if panel[0] == 'one' else ''}, q_block {panel[1]}")
        axes[1, column].set_xlabel("keys kept by a list")
        axes[1, column].set_xscale("log", base=2)
    axes[0, 0].set_ylabel("attention-mass recall")
    axes[1, 0].set_ylabel("relative error of the output")
    axes[0, 0].legend(fontsize=8)
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return True


_CELL = ("policy", "budget", "rows", "length", "depth")


def draw_heatmaps(path: Path, rows: Sequence[Row], title: str) -> bool:
    """Needles found, depth against length, one map for each choice."""
    pyplot = _pyplot()
    if pyplot is None:
        return False
    names = list(dict.fromkeys(tuple(row[key] for key in _CELL[:3]) for row in rows))
    lengths, depths = sorted({row["length"] for row in rows}), sorted({row["depth"] for row in rows})
    figure, axes = pyplot.subplots(
        1, len(names), figsize=(1.2 + 1.9 * len(names), 3.6), squeeze=False, sharey=True, layout="constrained"
    )
    for axis, name in zip(axes[0], names, strict=True):
        found = torch.full((len(depths), len(lengths)), math.nan)
        for i, depth in enumerate(depths):
            for j, length in enumerate(lengths):
                cell = (*name, length, depth)
                here = [float(row["found"]) for row in rows if tuple(row[key] for key in _CELL) == cell]
                if here:
                    found[i, j] = sum(here) / len(here)
                    axis.text(j, i, f"{sum(here):g}/{len(here)}", ha="center", va="center", fontsize=7)
        image = axis.imshow(found, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
        axis.set_xticks(range(len(lengths)), [str(length) for length in lengths], fontsize=7)
        axis.set_yticks(range(len(depths)), [f"{depth:g}" for depth in depths], fontsize=7)
        axis.set_title(f"{name[0]}\n{name[1]} keys, rows: {name[2]}", fontsize=8)
        axis.set_xlabel("context, tokens", fontsize=8)
    axes[0, 0].set_ylabel("depth of the needle", fontsize=8)
    figure.colorbar(image, ax=axes[0, -1], label="found")
    figure.suptitle(title, fontsize=9)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return True
