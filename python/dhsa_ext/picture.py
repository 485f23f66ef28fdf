"""The demo's picture: chunk boundaries along the text, and the keys that each query block kept."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from .selection import Selection


def draw(path: Path, selections: Mapping[str, Selection], fact: tuple[int, int] | None, subtitle: str) -> None:
    """Write a PNG with one column per selection, all of one prompt; `fact` is a hidden fact's span of tokens."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.colors import ListedColormap

    columns = len(selections)
    figure, axes = plt.subplots(
        2, columns, figsize=(7 * columns, 7.6), height_ratios=[1, 8], sharex="col", squeeze=False, layout="constrained"
    )
    figure.suptitle(f"Dynamic hierarchical sparse attention · {subtitle}", fontsize=11)
    for column, (name, selection) in enumerate(selections.items()):
        strip, matrix = axes[:, column]
        length, blocks = selection.seqlen_k, selection.num_runs.shape[2]
        count = int(selection.num_chunks[0])
        strip.vlines(selection.offsets[0, : count + 1].tolist(), 0, 1, color="#264653", linewidth=0.4)
        if fact is not None:
            strip.axvspan(*fact, color="#e76f51", alpha=0.8, linewidth=0)
            matrix.axvline(sum(fact) / 2, color="#e76f51", linewidth=0.8, linestyle=":")
        strip.set_yticks([])
        strip.set_title(f"{name}: {count} chunks, {selection.causal_share():.1%} of the causal area kept", fontsize=10)

        # 0 the future, 1 the past, 2 kept; columns thinned to what a screen shows, a pixel kept if one of its keys is.
        last = selection.seqlen_k - selection.seqlen_q + (torch.arange(blocks) + 1) * selection.q_block
        past = torch.arange(length) < last.clamp(max=length)[:, None]
        state = past.float() + (selection.kept() > 0)
        step = -(-length // 2048)
        state = torch.nn.functional.max_pool1d(state[None], step, ceil_mode=True)[0]
        colors = ListedColormap(["white", "#dfe7ea", "#2a9d8f"])
        matrix.imshow(
            state, aspect="auto", cmap=colors, vmin=0, vmax=2, interpolation="nearest", extent=(0, length, blocks, 0)
        )
        matrix.set_xlabel("key (token of the prompt)" + ("" if fact is None else "; the hidden fact in orange"))
        matrix.set_ylabel(f"block of {selection.q_block} queries")
    figure.savefig(path, dpi=110)
    plt.close(figure)
