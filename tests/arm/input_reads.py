"""How often each stage reads its inputs on ARM64: bytes that a model of a cache fetches under qemu, over their bytes.

    python tests/arm/input_reads.py [--filter sparse_attention] [--kib 512]

The model (cache_fills.c) is one cache of --kib, 64-byte lines, 16 ways, that every load and store passes through; if
nothing is said, the second level of a Cortex-A76. It tells no times, and prefetches are not seen. Blocks of the
attention follow --kib, as on a machine that has such a cache. Without --filter the least that each stage can do is
checked: the router's read each input once (the keys, which boundary_scores and chunk_pool read, twice altogether), the
attention a listed row of K or V once for all heads that share it. Needs what insn_budget.py needs.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from insn_budget import ROOT, build, output

ISA, CPU = "neon", "cortex-a72"
ONCE = 1.02  # parts of boundary_scores overlap by its window
MOST = {  # reads of an input: of all of it, of one query in eight, of 1024 keys of 4096
    "boundary_scores/float32": {"k": ONCE},
    "select_boundaries": {"scores": ONCE},
    "chunk_pool/float32": {"k": ONCE},
    "query_pool/float32": {"q": ONCE},
    "chunk_scores": {"q_pooled": ONCE, "k_pooled": ONCE},
    "token_scores": {"chunk_scores": ONCE},
    "select_keys": {"chunk_scores": ONCE},
    "chunk_mass/float32": {"q": ONCE / 8, "k_mean": ONCE},
    "sparse_attention/64_queries/float32": {"q": ONCE, "k": ONCE / 4, "v": ONCE / 4},
    "sparse_attention/one_query/float32": {"q": ONCE, "k": ONCE / 4, "v": ONCE / 4},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--filter", default="", help="part of a case's name; these are not checked")
    parser.add_argument("--kib", type=int, default=512, help="size of the cache")
    parser.add_argument("--build", type=Path, default=ROOT / "build" / "aarch64", help="folder of the cross build")
    arguments = parser.parse_args()
    program, plugin = build(arguments.build.resolve(), "cache_fills.c")
    fetched = plugin.with_suffix(".txt")
    rows = failed = 0
    print(f"Bytes fetched by a model of a {arguments.kib} KiB cache over bytes of the input, {ISA}. No times.")
    for part, most in {arguments.filter: {}}.items() if arguments.filter else MOST.items():
        cases = output(
            "qemu-aarch64", "-cpu", CPU, "-plugin", f"{plugin},out={fetched},kib={arguments.kib}",
            program, "--cache", str(arguments.kib), part, DHSA_FORCE_ISA=ISA,
        ).splitlines()  # fmt: skip
        for case, line in zip(cases, fetched.read_text().splitlines(), strict=True):
            name, _, _, *inputs = case.split("\t")
            total, *counts = (int(number) for number in line.split())
            shown, over = [], False
            for text, count in zip(inputs, counts, strict=True):
                which, size = text.split("=")
                reads = count / int(size)
                over |= reads > most.get(which, reads)
                shown.append(f"{which} {reads:.3f}")
            rows, failed = rows + 1, failed + over
            verdict = f"  OVER {most}" if over else ""
            print(f"{name:48} {', '.join(shown)}; in all {total / 2**20:.2f} MiB{verdict}", flush=True)
    print(f"reads budget: {rows} rows, {failed} failed")
    sys.exit(failed > 0 or rows == 0)


if __name__ == "__main__":
    main()
