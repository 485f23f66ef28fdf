"""Multiply-adds a cycle of the ARM64 product tiles, by llvm-mca's models, held to tile_budget.json within 3 %.

    python tests/arm/tile_budget.py [--record]

llvm-mca schedules a tile's loop on a model of the core: no cache, no memory, no other thread. What it gives is not a
time, and not measured. Each tile is taken from the objects that each g++ makes, and its function must move no vector
register to or from the stack. --record writes the file anew. Needs cmake, ninja, llvm-mca-19 and aarch64 cross
compilers (Debian: llvm-19 g++-aarch64-linux-gnu g++-11-aarch64-linux-gnu); ARM_CXXS, LLVM_MCA and OBJDUMP name others.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
BUDGET = Path(__file__).resolve().parent / "tile_budget.json"
MARGIN = 0.03
GOAL = 1.9  # of the two vector pipes that both cores have
WHAT = "Multiply-add instructions a cycle of a tile's loop, by llvm-mca's model of the core. These are not times."
CXXS = os.environ.get("ARM_CXXS", "aarch64-linux-gnu-g++-11 aarch64-linux-gnu-g++-12").split()
MCA = os.environ.get("LLVM_MCA", "llvm-mca-19")
OBJDUMP = os.environ.get("OBJDUMP", "aarch64-linux-gnu-objdump")
# ISA folder, tile, its multiply-add, and the cores that have it: a Neoverse N1 is a Cortex-A76, an N2 has bfmmla.
TILES = (
    ("neon", "gemm_tile_12x8", "fmla", ("neoverse-n1", "neoverse-n2")),
    ("neon", "gemm_tile_8x8", "fmla", ("neoverse-n1", "neoverse-n2")),
    ("neonbf16", "gemm_tile_bfmmla_8x8", "bfmmla", ("neoverse-n2",)),
)

Row = dict[str, Any]


def output(*command: str | Path, text: str | None = None) -> str:
    return subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True, input=text).stdout


def build(cxx: str) -> Path:
    """The folder of the ISA objects that cxx makes, with the flags that CMake gives them."""
    folder = ROOT / "build" / f"tiles-{Path(cxx).name}"
    output("cmake", "--preset", "aarch64", "-B", folder, f"-DCMAKE_CXX_COMPILER={cxx}", "-DDHSA_BUILD_TESTS=OFF")
    objects = folder / "CMakeFiles" / "dhsa_core.dir" / "csrc" / "cpu"
    targets = (str((objects / isa / "kernels.cpp.o").relative_to(folder)) for isa in dict.fromkeys(t[0] for t in TILES))
    output("cmake", "--build", folder, "-j", os.environ.get("JOBS", "2"), "--target", *targets)
    return objects


def function(obj: Path, name: str) -> list[tuple[int, str]]:
    """Address and text of each instruction of the function whose name has `name` in it."""
    body: list[tuple[int, str]] = []
    inside = False
    for line in output(OBJDUMP, "-d", "--no-show-raw-insn", obj).splitlines():
        if re.match(r"[0-9a-f]+ <", line):
            inside = re.search(rf"\d{name}E", line) is not None
        elif inside and (insn := re.match(r"\s*([0-9a-f]+):\t(.*)", line)):
            body.append((int(insn[1], 16), re.sub(r"\s*(//.*|<.*>.*)$", "", insn[2]).replace("\t", " ")))
    if not body:
        raise SystemExit(f"{obj}: expected a function {name}, found none: was it inlined?")
    return body


def loop(body: list[tuple[int, str]]) -> list[str]:
    """The instructions from the target of the only backward branch to it, the branch to a label before them."""
    branches = [(at, branch) for at, text in body if (branch := re.match(r"(b\.\w+|cbnz .*,) ([0-9a-f]+)$", text))]
    [(end, branch)] = [(at, branch) for at, branch in branches if int(branch[2], 16) < at]
    begin = int(branch[2], 16)
    return ["loop:", *(text for at, text in body if begin <= at < end), f"{branch[1]} loop"]


def stack_traffic(body: list[tuple[int, str]], of_loop: list[str]) -> list[str]:
    """Vector registers that move to or from the stack: anywhere but for the halves d8 to d15, whose saving the calling
    convention asks for, and in the loop whatever it is.
    """
    vectors = [text for _, text in body if re.search(r"\b(q\d+|v\d+\.\w+)\b.*\[(sp|x29)\b", text)]
    return vectors + [text for text in of_loop if re.search(r"\b(sp|x29)\b", text) and text not in vectors]


def multiply_adds_a_cycle(instructions: list[str], mnemonic: str, cpu: str) -> float:
    text = "\n".join(instructions) + "\n"
    report = json.loads(output(MCA, "--json", "-mtriple=aarch64", f"-mcpu={cpu}", "-iterations=100", text=text))
    summary = report["CodeRegions"][0]["SummaryView"]
    products = sum(insn.startswith(f"{mnemonic} ") for insn in instructions)
    return round(products * summary["Iterations"] / summary["TotalCycles"], 3)


def version(command: str) -> str:
    return output(command, "--version").strip().splitlines()[0]


def measure() -> tuple[list[Row], int]:
    rows: list[Row] = []
    spills = 0
    for cxx in CXXS:
        objects = build(cxx)
        for isa, name, mnemonic, cpus in TILES:
            body = function(objects / isa / "kernels.cpp.o", name)
            instructions = loop(body)
            for text in stack_traffic(body, instructions):
                print(f"{Path(cxx).name}: {isa} {name} keeps a vector register on the stack: {text}")
                spills += 1
            for cpu in cpus:
                rate = multiply_adds_a_cycle(instructions, mnemonic, cpu)
                rows.append({"tile": f"{isa} {name}", "cpu": cpu, "compiler": Path(cxx).name, "per_cycle": rate})
    return rows, spills


def key(row: Row) -> tuple[str, ...]:
    return row["tile"], row["cpu"], row["compiler"]


def check(rows: list[Row], budget: list[Row]) -> int:
    """Prints every row beside its budget; the number of rows that are below it, or in one of the two only."""
    compilers = {row["compiler"] for row in rows}
    allowed = {key(row): row["per_cycle"] for row in budget if row["compiler"] in compilers}
    failed = 0
    print(f"{WHAT}\n{'tile':32} {'core':12} {'compiler':26} {'a cycle':>8} {'budget':>7}   goal {GOAL} of 2")
    for row in rows:
        limit = allowed.pop(key(row), None)
        low = limit is None or row["per_cycle"] < limit * (1 - MARGIN)
        failed += low
        verdict = "has no budget: --record" if limit is None else "BELOW ITS BUDGET" if low else ""
        print(
            f"{row['tile']:32} {row['cpu']:12} {row['compiler']:26} {row['per_cycle']:8.3f} {limit or 0:7.3f} {verdict}"
        )
    for missing in allowed:
        print(f"{' '.join(missing)} is in the budget and was not found: --record")
    return failed + len(allowed)


def main() -> None:
    parser = argparse.ArgumentParser(description=WHAT)
    parser.add_argument("--record", action="store_true", help="make the figures the new budget")
    arguments = parser.parse_args()
    rows, spills = measure()
    if arguments.record:
        head = {
            "what": WHAT,
            "command": "python tests/arm/tile_budget.py --record",
            "compilers": [version(cxx) for cxx in CXXS],
            "model": version(MCA),
        }
        lines = ",\n".join("  " + json.dumps(row) for row in rows)
        BUDGET.write_text(json.dumps(head, indent=1)[:-2] + f',\n "rows": [\n{lines}\n ]\n}}\n')
    budget = json.loads(BUDGET.read_text())
    failed = check(rows, budget["rows"])
    if budget["model"] != version(MCA):
        print(f"budget recorded with {budget['model']}, modelled with {version(MCA)}")
    print(f"tile budget: {len(rows)} rows, {failed} failed; vector registers on the stack: {spills}")
    sys.exit(failed + spills > 0)


if __name__ == "__main__":
    main()
