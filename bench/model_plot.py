"""Time to first token and peak memory over length, with the marks of those that ran out of memory.

python bench/model_plot.py bench/results/FILE.json [...] writes FILE.png beside it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def draw_file(path: Path) -> str:
    """Write the picture beside the JSON file; returns the line to print."""
    data = json.loads(path.read_text())
    models = list(dict.fromkeys(r["row"] for r in data["rows"] if "ms" in r))
    if not models:
        return f"{path.name}: no curves to draw"
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        return f"no matplotlib here: python bench/model_plot.py {path.name} draws the curves on a machine that has it"
    figure, panels = pyplot.subplots(len(models), 2, figsize=(11, 4 * len(models)), squeeze=False)
    for row, model in zip(panels, models, strict=True):
        rows = [r for r in data["rows"] if r["row"] == model]
        weights = data.get("models", {}).get(model, {}).get("weights_mib", 0)
        _panel(row[0], rows, "ms", 1e-3, 0.0, "time to first token, s")
        _panel(row[1], rows, "peak_mib", 2**-10, weights, "peak memory with weights, GiB")
        row[0].set_title(model, fontsize=10)
    about = data["machine"]
    figure.suptitle(f"{about.get('gpu') or about['cpu']}, torch {about['torch']}, commit {data['commit']}", fontsize=9)
    figure.tight_layout()
    picture = path.with_suffix(".png")
    figure.savefig(picture, dpi=110)
    pyplot.close(figure)
    return f"curves: {picture.name}, beside {path.name}"


def curves(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Rows by contestant and setting, rising in length."""
    found: dict[str, list[dict[str, Any]]] = {}
    for r in sorted(rows, key=lambda r: r["seqlen_k"]):
        name = r["contestant"]
        name += f", pieces of {r['pieces']}" if r.get("pieces") else ""
        name += f", {r['memory_limit']}" if r.get("memory_limit") else ""
        found.setdefault(name, []).append(r)
    return found


def _panel(panel: Any, rows: list[dict[str, Any]], key: str, unit: float, offset: float, label: str) -> None:
    for name, points in curves(rows).items():
        timed = [(r["seqlen_k"], (r[key] + offset) * unit) for r in points if key in r]
        dead = [r["seqlen_k"] for r in points if r.get("failed") == "out of memory"]
        if not timed:
            continue
        style = "-" if name.startswith("dhsa") else "--"
        (line,) = panel.loglog(*zip(*timed, strict=True), style, marker="o", markersize=3, label=name)
        if dead:  # at the height of the last that ran
            panel.plot(dead[0], timed[-1][1], "x", color=line.get_color(), markersize=10)
            panel.annotate("out of memory", (dead[0], timed[-1][1]), fontsize=7, color=line.get_color())
    panel.set(xlabel="tokens of the prompt", ylabel=label)
    panel.grid(True, which="both", alpha=0.3)
    panel.legend(fontsize=7)


def main() -> None:
    if len(sys.argv) < 2:
        raise SystemExit("usage: python bench/model_plot.py FILE.json [...]")
    for name in sys.argv[1:]:
        print(draw_file(Path(name)))


if __name__ == "__main__":
    main()
