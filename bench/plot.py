"""Cost curves of a result file: time over length at a fixed budget, and over density at a fixed length.

    python bench/plot.py bench/results/FILE.json [...]

writes FILE.png beside it, and prints where the sparse whole begins to win. Curves are the rows "lengths" and "budgets".
"""

from __future__ import annotations

import itertools
import json
import math
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Rows = list[dict[str, Any]]
AXES = {  # row: x in the result, its name, how a reader sees it
    "lengths": ("seqlen_k", "keys", "length"),
    "budgets": ("budget", "keys kept", "budget"),
}


def curve(rows: Rows, row: str, contestant: str) -> list[tuple[float, float]]:
    """(x, ms), rising in x, the latest measurement of each x."""
    x = AXES[row][0]
    found = {r[x]: r["ms"] for r in rows if r["row"] == row and r["contestant"] == contestant and "ms" in r}
    return sorted(found.items())


def crossing(ours: list[tuple[float, float]], theirs: list[tuple[float, float]]) -> float | None:
    """The x where ours / theirs is 1, straight in the logarithms between the two points around it; None: nowhere."""
    other = dict(theirs)
    points = [(math.log(x), math.log(ms / other[x])) for x, ms in ours if x in other]
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        if y0 == 0 or y0 * y1 < 0:
            return math.exp(x0 + (x1 - x0) * y0 / (y0 - y1))
    return None


def break_even(rows: Rows, ours: str, theirs: str) -> list[str]:
    """For each curve, where `ours` begins to win over `theirs`, in one line."""
    lines = []
    for row, (_, _, name) in AXES.items():
        mine, other = curve(rows, row, ours), curve(rows, row, theirs)
        shared = sorted({x for x, _ in mine} & {x for x, _ in other})
        if not shared:
            continue
        at = crossing(mine, other)
        area = "" if row == "lengths" else " " + _density(rows, at, max(r["seqlen_k"] for r in rows if r["row"] == row))
        if at is not None:
            lines.append(f"break-even {name} of {ours} against {theirs}: {at:.0f} keys{area}")
        else:
            wins = dict(mine)[shared[0]] < dict(other)[shared[0]]
            verdict = "wins" if wins else "loses"
            lines.append(f"{ours} {verdict} against {theirs} at every {name} timed, {shared[0]} to {shared[-1]} keys")
    return lines


def _density(rows: Rows, budget: float | None, length: int) -> str:
    if budget is None:
        return ""
    pairs = budget * (budget + 1) / 2 + (length - budget) * budget
    return f"of {length}, {budget / length:.1%} of the keys, {pairs / (length * (length + 1) / 2):.1%} of the area"


def draw_file(path: Path) -> str:
    """Write the picture beside the JSON file; returns the line to print."""
    data = json.loads(path.read_text())
    drawn = [row for row in AXES if any(r["row"] == row and "ms" in r for r in data["rows"])]
    if not drawn:
        return f"{path.name}: no curves to draw; measure the rows {' and '.join(AXES)}"
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        return f"no matplotlib here: python bench/plot.py {path.name} draws the curves on a machine that has it"
    figure, panels = pyplot.subplots(1, len(drawn), figsize=(6.5 * len(drawn), 4.5), squeeze=False)
    for panel, row in zip(panels[0], drawn, strict=True):
        _panel(panel, data["rows"], row)
    about = data["machine"]
    figure.suptitle(f"{about.get('gpu') or about['cpu']}, torch {about['torch']}, commit {data['commit']}", fontsize=9)
    figure.tight_layout()
    picture = path.with_suffix(".png")
    figure.savefig(picture, dpi=110)
    pyplot.close(figure)
    return f"curves: {picture.name}, beside {path.name}"


def _panel(panel: Any, rows: Rows, row: str) -> None:
    x, label, _ = AXES[row]
    mine = [r for r in rows if r["row"] == row and "ms" in r]
    for name in _once(r["contestant"] for r in mine):
        points = curve(rows, row, name)
        dashes = "--" if name.startswith(("sdpa", "flex", "gather")) else "-"
        panel.loglog(*zip(*points, strict=True), dashes, marker="o", markersize=3, label=name)
    fixed = "budget" if x == "seqlen_k" else "seqlen_k"
    panel.set(xlabel=f"{label} ({fixed.replace('seqlen_k', 'of')} {mine[0][fixed]})", ylabel="ms")
    panel.grid(True, which="both", alpha=0.3)
    panel.legend(fontsize=8)


def _once(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))


def main() -> None:
    if len(sys.argv) < 2:
        raise SystemExit("usage: python bench/plot.py FILE.json [...]")
    for name in sys.argv[1:]:
        path = Path(name)
        rows = json.loads(path.read_text())["rows"]
        for theirs in ("sdpa", "sdpa flash", "sdpa cudnn"):
            for line in break_even(rows, "whole", theirs):
                print(line)
        print(draw_file(path))


if __name__ == "__main__":
    main()
