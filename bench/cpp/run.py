"""Build dhsa_bench, run it on every ISA of the machine, print it, and write bench/results/cpp_stages-<machine>.json.

    python bench/cpp/run.py [--isas avx2] [--filter sparse_attention] [--passes 3] [--seconds 0.1] [--output FILE]

Needs cmake, ninja and Google Benchmark (apt-get install libbenchmark-dev); no torch. Times are milliseconds of one call
on one thread: `ms` by the clock, `cpu_ms` of the process, which a busy machine disturbs less and which rates count by.
ISAs and stages take turns, pass after pass, and a row is its pass with the least processor time.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
BENCH = ROOT / "build" / "release" / "bench" / "cpp" / "dhsa_bench"


def build() -> None:
    subprocess.run(("cmake", "--preset", "release"), cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    subprocess.run(("cmake", "--build", "build/release", "--target", "dhsa_bench"), cwd=ROOT, check=True)


def bench(isa: str | None, pattern: str, seconds: float) -> dict[str, Any]:
    """Google Benchmark's own report of one run."""
    options = (f"--benchmark_filter={pattern}", f"--benchmark_min_time={seconds}", "--benchmark_format=json")
    environment = os.environ | ({} if isa is None else {"DHSA_FORCE_ISA": isa})
    done = subprocess.run((BENCH, *options), env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout)


def row(isa: str, run: dict[str, Any]) -> dict[str, Any]:
    rate = {f"g{unit.lower()}": run[key] / 1e9 for unit, key in (("flops", "FLOP/s"), ("bytes", "B/s")) if key in run}
    times = {"ms": run["real_time"], "cpu_ms": run["cpu_time"]} | rate
    return {"stage": run["name"], "isa": isa, "calls": run["iterations"]} | {
        key: float(f"{value:.4g}") for key, value in times.items()
    }


def cpu_model() -> str:
    names = re.findall(r"^(?:model name|Model)\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return names[0].strip() if names else platform.machine()


def commit() -> str:
    """The commit, "+" where the core or its bench differ from it."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ("git", *arguments), cwd=ROOT, check=True, capture_output=True, text=True
        ).stdout.strip()  # fmt: skip

    changed = git("status", "--porcelain", "--", "csrc/core", "csrc/cpu", "bench/cpp", "CMakeLists.txt")
    return git("rev-parse", "--short=10", "HEAD") + ("+" if changed else "")


def main() -> None:
    parser = argparse.ArgumentParser(description="C++ microbenchmarks of each stage")
    parser.add_argument("--isas", help="comma separated; all that the machine has if not given")
    parser.add_argument("--filter", default=".", help="regular expression over stage/type/kv_heads")
    parser.add_argument("--passes", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=0.1, help="least time of each row in a pass")
    parser.add_argument("--output", type=Path, help="result file")
    arguments = parser.parse_args()
    build()
    isas = arguments.isas or bench(None, "select_boundaries", 0.001)["context"]["isas_detected"]
    load, built = os.getloadavg(), commit()
    best: dict[tuple[str, str], dict[str, Any]] = {}
    for _ in range(arguments.passes):
        for isa in isas.split(","):
            for run in bench(isa, arguments.filter, arguments.seconds)["benchmarks"]:
                kept = best.setdefault((isa, run["name"]), row(isa, run))
                if run["cpu_time"] < kept["cpu_ms"]:
                    best[isa, run["name"]] = row(isa, run)
    rows = list(best.values())
    for kept in rows:
        rate = " ".join(f"{kept[key]:8.2f} {key}" for key in ("gflops", "gbytes") if key in kept)
        print(f"{kept['isa']:8} {kept['stage']:48} {kept['ms']:9.4g} ms {kept['cpu_ms']:9.4g} cpu ms {rate}")
    name = re.sub(r"[^a-z0-9]+", "-", cpu_model().lower()).strip("-")
    output = arguments.output or ROOT / "bench" / "results" / f"cpp_stages-{name}.json"
    report = {
        "bench": "cpp_stages",
        "machine": {"cpu": cpu_model(), "cores": os.cpu_count(), "system": platform.system()},
        "commit": built,
        "command": " ".join(
            ["python", "bench/cpp/run.py", *(Path(x).name if x[0] == "/" else x for x in sys.argv[1:])]
        ),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "load_before": " ".join(f"{value:.2f}" for value in load),
        "rows": rows,
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
