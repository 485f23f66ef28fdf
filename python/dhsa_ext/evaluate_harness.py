"""python -m dhsa_ext.evaluate_harness [--preset P] [--budget N] …: lm-evaluation-harness on a model with DHSA.

Everything that is not named here goes to lm_eval (pip install lm-eval accelerate) as it stands:

    python -m dhsa_ext.evaluate_harness --preset accurate --budget 1024 run --model hf
        --model_args pretrained=DIRECTORY --tasks TASK --include_path FOLDER --batch_size 1      (all in one line)

The model attends by hf.dhsa_attention, as any user's does; --preset dense is the same model without DHSA.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from . import hf
from .config import PRESETS, DHSAConfig

NAME = "dhsa"


def harness_arguments(argv: Sequence[str]) -> tuple[DHSAConfig, list[str]]:
    """The settings, and lm_eval's own arguments with the attention written into --model_args."""
    parser = argparse.ArgumentParser(
        prog="python -m dhsa_ext.evaluate_harness", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--preset", choices=[*PRESETS, "dense"], default="accurate")
    parser.add_argument("--budget", type=int, default=1024, help="keys that a block of queries keeps (default 1024)")
    parser.add_argument("--model_args", required=True, help="lm_eval's: pretrained=NAME,…")
    own, rest = parser.parse_known_args(argv)
    config = DHSAConfig(layers=()) if own.preset == "dense" else DHSAConfig(own.preset, own.budget)
    return config, [*rest, "--model_args", f"{own.model_args},attn_implementation={NAME}"]


def main(argv: Sequence[str] | None = None) -> int:
    config, rest = harness_arguments(sys.argv[1:] if argv is None else argv)
    try:
        harness = importlib.import_module("lm_eval.__main__")
    except ImportError:
        print("error: lm_eval is not installed: pip install lm-eval accelerate", file=sys.stderr)
        return 1
    hf.register(config, NAME)
    sys.argv = ["lm_eval", *rest]
    harness.cli_evaluate()
    return 0


if __name__ == "__main__":
    sys.exit(main())
