"""Instructions that each stage executes on ARM64, counted under qemu and held to insn_budget.json within 3 %.

    python tests/arm/insn_budget.py [--record] [--filter sparse_attention] [--profile]

Counts of instructions are not times: they know no latency, no cache and no second issue port. They are the same on
every run, so that a regression of the ARM kernels shows on a machine without one. --record writes the file anew (with
--filter, those rows only); --profile prints which functions a case's instructions are in. Needs cmake, ninja,
aarch64-linux-gnu-g++ and qemu-aarch64 (Debian: qemu-user; the static one loads no plugin).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
HERE = Path(__file__).resolve().parent
BUDGET = HERE / "insn_budget.json"
MARGIN = 0.03
WHAT = "Instructions counted under qemu-aarch64, as a unit of work needs them. These are not times."
# Raspberry Pi 4; Raspberry Pi 5; all that there is. An ISA is counted on the first model that has it.
MODELS = ("cortex-a72", "cortex-a76", "max")
# Of the ISAs that add to plain NEON, the cases whose kernels are their own; those of another type repeat neon's rows.
OWN_CASES = {"neon": "", "neonfhm": "/float16", "neonbf16": "/bfloat16"}
CXX = os.environ.get("ARM_CXX", "aarch64-linux-gnu-g++")

Row = dict[str, Any]


def output(*command: str | Path, **environment: str) -> str:
    return subprocess.run(
        command, cwd=ROOT, env=os.environ | environment, check=True, stdout=subprocess.PIPE, text=True
    ).stdout  # fmt: skip


def build(folder: Path, plugin: str) -> tuple[Path, Path]:
    """The program of the cases, static, and a plugin for it."""
    output("cmake", "--preset", "aarch64", "-B", folder, f"-DCMAKE_CXX_COMPILER={CXX}")
    output("cmake", "--build", folder, "--target", "dhsa_core", "-j", os.environ.get("JOBS", "2"))
    program = folder / "cases"
    flags = ("-std=c++17", "-O2", "-Wall", "-Wextra", "-static", "-Icsrc")
    output(CXX, *flags, HERE / "cases.cpp", folder / "libdhsa_core.a", "-o", program)
    flags = ("-O2", "-Wall", "-Wextra", "-shared", "-fPIC", "-fvisibility=hidden")
    library = (folder / plugin).with_suffix(".so")
    output(os.environ.get("CC", "gcc"), *flags, HERE / plugin, "-o", library)
    return program, library


def count(program: Path, plugin: Path, pattern: str, profile: bool) -> list[Row]:
    """A row for each ISA and case, two emulators at a time."""
    models: dict[str, str] = {}
    for model in MODELS:
        for isa in output("qemu-aarch64", "-cpu", model, program, "--isas").split():
            models.setdefault(isa, model)
    models.pop("scalar")  # not for speed

    def run(isa: str) -> list[str]:
        counts = plugin.with_suffix(f".{isa}.txt")
        option = f"{plugin},out={counts}" + (",profile=on" if profile else "")
        return output(
            "qemu-aarch64", "-cpu", models[isa], "-plugin", option, program, pattern, OWN_CASES[isa], DHSA_FORCE_ISA=isa
        ).splitlines()  # fmt: skip

    rows: list[Row] = []
    with ThreadPoolExecutor(2) as threads:
        for isa, cases in zip(models, threads.map(run, models), strict=True):
            lines = plugin.with_suffix(f".{isa}.txt").read_text().splitlines()
            regions = [i for i, line in enumerate(lines) if not line.startswith(" ")]
            for case, begin, end in zip(cases, regions, [*regions[1:], len(lines)], strict=True):
                name, unit, units, *_ = case.split("\t")
                per_unit = round(int(lines[begin]) / int(units), 4)
                rows.append({"isa": isa, "cpu": models[isa], "case": name, "per": unit, "instructions": per_unit})
                if profile:
                    print(f"{isa} {name}: {per_unit} per {unit}; by function:")
                    print("\n".join(lines[begin + 1 : min(end, begin + 13)]))
    return rows


def compiler() -> str:
    return output(CXX, "--version").splitlines()[0]


def record(rows: list[Row], kept: list[Row]) -> None:
    fresh = {(row["isa"], row["case"]) for row in rows}
    rows = [row for row in kept if (row["isa"], row["case"]) not in fresh] + rows
    head = {"what": WHAT, "command": "python tests/arm/insn_budget.py --record", "compiler": compiler()}
    lines = ",\n".join("  " + json.dumps(row) for row in rows)
    BUDGET.write_text(json.dumps(head, indent=1)[:-2] + f',\n "rows": [\n{lines}\n ]\n}}\n')


def check(rows: list[Row], budget: Row, whole: bool) -> int:
    """Prints every row beside its budget; the number of rows that are over it, or in one of the two only."""
    allowed = {(row["isa"], row["case"]): row for row in budget["rows"]}
    failed = lower = 0
    print(f"{WHAT}\n{'isa':10} {'case':48} {'instructions':>12} {'budget':>9}")
    for row in rows:
        got, limit = row["instructions"], allowed.pop((row["isa"], row["case"]), {}).get("instructions")
        verdict = f"{100 * (got / limit - 1):+6.1f} %" if limit else "  has no budget: --record"
        over = limit is None or got > limit * (1 + MARGIN)
        failed += over
        lower += limit is not None and got < limit * (1 - MARGIN)
        mark = "  OVER" if over and limit else ""
        print(f"{row['isa']:10} {row['case']:48} {got:12.4f} {limit or 0:9.4f} {verdict}{mark}  per {row['per']}")
    for isa, case in allowed if whole else ():
        print(f"{isa:10} {case:48} is in the budget and was not counted: --record")
        failed += 1
    if lower:
        print(f"{lower} rows are more than {MARGIN:.0%} below their budget: --record makes that the new one")
    if budget["compiler"] != compiler():
        print(f"budget recorded with {budget['compiler']}, counted with {compiler()}")
    return failed


def main() -> None:
    parser = argparse.ArgumentParser(description=WHAT)
    parser.add_argument("--record", action="store_true", help="make the counts the new budget")
    parser.add_argument("--filter", default="", help="part of a case's name")
    parser.add_argument("--profile", action="store_true", help="print the functions that the instructions are in")
    parser.add_argument("--build", type=Path, default=ROOT / "build" / "aarch64", help="folder of the cross build")
    arguments = parser.parse_args()
    rows = count(*build(arguments.build.resolve(), "insn_count.c"), arguments.filter, arguments.profile)
    if not rows:
        sys.exit(f"no case has {arguments.filter!r} in its name")
    budget = json.loads(BUDGET.read_text()) if BUDGET.exists() else {"rows": []}
    if arguments.record:
        record(rows, budget["rows"] if arguments.filter else [])
        budget = json.loads(BUDGET.read_text())
    failed = check(rows, budget, not arguments.filter)
    print(f"instruction budget: {len(rows)} rows, {failed} failed")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
