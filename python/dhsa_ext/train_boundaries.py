"""python -m dhsa_ext.train_boundaries: train a boundary predictor for a causal language model, from its own attention.

The model is frozen. Each text is read once by its dense attention; from the attention of its global layers come the
labels, streamed by rows, and a step of focal BCE is made for each layer's keys. What is written into --out:

    predictor.safetensors   the weights, with their configuration
    state.pt                what a later run with --resume goes on from
    metrics.csv             after each document: loss, and on held-out documents loss, rank correlation, top-quota hits;
                            peak_mib, the most memory so far: torch's on a GPU, else the process's
"""

from __future__ import annotations

import argparse
import csv
import math
import random
import resource
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from . import hf, models, needle
from .evaluate_model import for_each_global_layer, global_layers
from .meter import LayerInputs
from .policies import attention_weights
from .predictor import BoundaryPredictor, PredictorConfig, key_shape, model_name, tokens_of

# ---- labels


def attention_around(layer: LayerInputs, window: int, rows: int = 256) -> tuple[Tensor, Tensor]:
    """past, future float32 [Lk]: for each cut t the total attention mass, averaged over heads, that queries from
    t + window on give to the `window` tokens before t, and to the `window` tokens from t on.

    Streamed from the last rows to the first: of the weights only heads x rows x Lk are in memory at a time. 0 where a
    window does not fit or no query is left.
    """
    length = layer.k.shape[2]
    past, future = torch.zeros(2, length, device=layer.k.device)
    below = torch.zeros(length, device=layer.k.device)  # each key's mass from the rows after those at hand
    for begin in reversed(range(0, length, rows)):
        end = min(begin + rows, length)
        weights = torch.zeros(end - begin, length, device=layer.k.device)
        for head in range(layer.q.shape[1]):  # one at a time: rows x Lk
            kv_head = head * layer.k.shape[1] // layer.q.shape[1]
            q, k = layer.q[:, head : head + 1, begin:end], layer.k[:, kv_head : kv_head + 1, :end]
            weights[:, :end] += attention_weights(q, k, layer.scale, layer.softcap, begin)[0, 0]
        weights /= layer.q.shape[1]
        from_row = weights.flip(0).cumsum(0).flip(0) + below  # [rows, Lk]: mass from each row on
        sums = torch.nn.functional.pad(from_row.double().cumsum(1), (1, 0))  # of keys before j, from each row on
        cuts = torch.arange(max(window, begin - window), min(length - window + 1, end - window), device=below.device)
        if len(cuts):
            row = cuts + window - begin
            middle = sums[row, cuts]
            past[cuts] = (middle - sums[row, cuts - window]).float()
            future[cuts] = (sums[row, cuts + window] - middle).float()
        below = from_row[0]
    return past, future


def soft_labels(past: Tensor, future: Tensor) -> Tensor:
    """sigmoid(4 ln ratio): 1/2 where the attention before and after a cut is the same, near 1 where it shifts."""
    ratio = (torch.maximum(past, future) + 1e-6) / (torch.minimum(past, future) + 1e-6)
    return torch.sigmoid(4 * ratio.log())


def labelled_cuts(length: int, window: int, device: Any = None) -> Tensor:
    """The cuts with two whole windows and at least one query that judges them."""
    return torch.arange(window, length - window, device=device)


def focal_bce(logits: Tensor, labels: Tensor, gamma: float = 2.0, positive_weight: float = 1.0) -> Tensor:
    """Mean of |label - p|^gamma times the binary cross-entropy, positive parts weighted.

    For labels 0 and 1 it is the focal loss; for soft labels it is least at p = label.
    """
    positive = -positive_weight * labels * torch.nn.functional.logsigmoid(logits)
    negative = -(1 - labels) * torch.nn.functional.logsigmoid(-logits)
    return ((labels - logits.sigmoid()).abs() ** gamma * (positive + negative)).mean()


# ---- what is trained on


def documents(texts: Sequence[str], tokenizer: models.Tokenizer, bos: list[int], length: int) -> list[list[int]]:
    """The texts in pieces of at most `length` tokens; pieces of less than an eighth of that are dropped."""
    pieces = []
    for text in texts:
        ids = tokenizer.encode(text)
        room = length - len(bos)
        pieces += [bos + ids[i : i + room] for i in range(0, len(ids), room)]
    return [piece for piece in pieces if len(piece) >= max(64, length // 8)]


# A document's example of one layer: the keys of its tokens [Lk, Hkv * D], the cuts, and their labels.
Example = tuple[Tensor, Tensor, Tensor]


def for_each_example(
    loaded: models.LoadedModel, ids: Sequence[int], config: PredictorConfig, use: Callable[[Example], object]
) -> None:
    """Call `use` with the example of each of config.layers while the model runs: one layer is in memory at a time."""

    def on_layer(index: int, inputs: LayerInputs) -> None:
        if index in config.layers:
            cuts = labelled_cuts(len(ids), config.window, inputs.k.device)
            use((tokens_of(inputs.k)[0], cuts, soft_labels(*attention_around(inputs, config.window))[cuts]))

    for_each_global_layer(loaded, ids, on_layer)


# ---- metrics


def rank_correlation(a: Tensor, b: Tensor) -> float:
    """Spearman's, ties in the order of their position."""
    ranks = torch.stack([x.argsort(stable=True).argsort() for x in (a, b)]).double()
    return float(torch.corrcoef(ranks)[0, 1]) if len(a) > 1 else math.nan


def top_hits(logits: Tensor, labels: Tensor, chunk_size: int = 16) -> float:
    """The share of the best 1/chunk_size cuts by label that are among as many best by logit."""
    count = max(1, len(logits) // chunk_size)
    best = set(labels.topk(count).indices.tolist())
    return len(best & set(logits.topk(count).indices.tolist())) / count


@torch.no_grad()
def validate(predictor: BoundaryPredictor, held_out: Sequence[Example], positive_weight: float) -> dict[str, float]:
    """The metrics of the held-out examples, averaged."""
    predictor.eval()
    sums = dict.fromkeys(("val_loss", "rank_correlation", "top_hits"), 0.0)
    for x, cuts, labels in held_out:
        logits = torch.cat([predictor.at(x, part) for part in cuts.split(4096)])
        sums["val_loss"] += focal_bce(logits, labels, positive_weight=positive_weight).item()
        sums["rank_correlation"] += rank_correlation(logits, labels)
        sums["top_hits"] += top_hits(logits, labels)
    predictor.train()
    return {name: value / max(1, len(held_out)) for name, value in sums.items()}


def peak_mib(device: torch.device) -> float:
    """The most memory so far: what torch allocated on a GPU, or what was resident of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB; bytes on macOS
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


# ---- training


class Trainer:
    """A predictor, its optimiser, and how far they have come; all that is random follows from the seed and that."""

    def __init__(self, predictor: BoundaryPredictor, arguments: argparse.Namespace) -> None:
        self.predictor, self.arguments = predictor, arguments
        self.optimizer = torch.optim.AdamW(predictor.parameters(), lr=arguments.lr, weight_decay=arguments.weight_decay)
        self.documents_done = 0

    @torch.enable_grad()
    def learn(self, example: Example) -> float:
        """Several passes over one example's cuts in random batches. Returns the mean loss of the first pass."""
        x, cuts, labels = example
        generator = torch.Generator().manual_seed(self.arguments.seed * 1_000_003 + self.documents_done)
        first = []
        for epoch in range(self.arguments.epochs):
            for batch in torch.randperm(len(cuts), generator=generator).to(x.device).split(self.arguments.batch):
                loss = focal_bce(
                    self.predictor.at(x, cuts[batch]), labels[batch], positive_weight=self.arguments.positive_weight
                )
                self.optimizer.zero_grad(set_to_none=True)
                loss.backward()
                torch.nn.utils.clip_grad_norm_(self.predictor.parameters(), 1.0)
                self.optimizer.step()
                if epoch == 0:
                    first.append(loss.item())
        return sum(first) / len(first)

    def learn_document(self, loaded: models.LoadedModel, ids: Sequence[int]) -> float:
        """Learn from each layer's example. Returns the mean loss."""
        losses: list[float] = []
        for_each_example(loaded, ids, self.predictor.config, lambda example: losses.append(self.learn(example)))
        self.documents_done += 1
        return sum(losses) / len(losses)

    def save(self, out: Path) -> None:
        self.predictor.save(out / "predictor.safetensors")
        state = {
            "documents_done": self.documents_done,
            "optimizer": self.optimizer.state_dict(),
            "config": asdict(self.predictor.config),
            "recipe": recipe(self.arguments),
        }
        torch.save(state, out / "state.pt.partial")
        (out / "state.pt.partial").replace(out / "state.pt")

    def resume(self, out: Path) -> None:
        state = torch.load(out / "state.pt", weights_only=True)
        for what, mine in (("config", asdict(self.predictor.config)), ("recipe", recipe(self.arguments))):
            differing = [name for name in mine if state[what].get(name) != mine[name]]
            if differing:
                name = differing[0]
                raise ValueError(
                    f"dhsa_ext.train_boundaries: --resume: {name}: expected {state[what].get(name)!r}, as in the run "
                    f"that {out.name} holds, got {mine[name]!r}"
                )
        self.predictor.load_state_dict(BoundaryPredictor.load(out / "predictor.safetensors").state_dict())
        self.optimizer.load_state_dict(state["optimizer"])
        self.documents_done = state["documents_done"]


def recipe(arguments: argparse.Namespace) -> dict[str, Any]:
    """What a resumed run must share with the one it goes on from."""
    names = ("length", "epochs", "batch", "lr", "weight_decay", "positive_weight", "held_out", "seed")
    return {name: getattr(arguments, name) for name in names}


def train(loaded: models.LoadedModel, texts: Sequence[str], arguments: argparse.Namespace) -> dict[str, float]:
    """Train on the texts' pieces, in an order that the seed gives; the first are held out. Returns the last metrics."""
    model, out = loaded.model, arguments.out
    kv_heads, head_dim = key_shape(model)
    layers = tuple(global_layers(model)) if arguments.layers is None else tuple(arguments.layers)
    if not set(layers) <= set(global_layers(model)):
        raise ValueError(
            f"dhsa_ext.train_boundaries: layers: expected some of {global_layers(model)}, got {list(layers)}"
        )
    config = PredictorConfig(
        kv_heads, head_dim, arguments.num_heads, arguments.window, not arguments.mean_pool, model_name(model), layers
    )
    torch.manual_seed(arguments.seed)
    trainer = Trainer(BoundaryPredictor(config).to(model.device), arguments)
    pieces = documents(texts, loaded.tokenizer, loaded.bos, arguments.length)
    random.Random(arguments.seed).shuffle(pieces)
    if len(pieces) <= arguments.held_out:
        raise ValueError(
            f"dhsa_ext.train_boundaries: texts: expected more than the {arguments.held_out} held-out documents of "
            f"{arguments.length} tokens, got {len(pieces)}"
        )
    held_out, pieces = pieces[: arguments.held_out], pieces[arguments.held_out : arguments.documents]
    out.mkdir(parents=True, exist_ok=True)
    if arguments.resume and (out / "state.pt").exists():
        trainer.resume(out)
    hf.register()
    hidden: list[Example] = []
    for ids in held_out:
        for_each_example(loaded, ids, config, hidden.append)
    metrics: dict[str, float] = {}
    metrics_file = out / "metrics.csv"
    write_header = trainer.documents_done == 0 or not metrics_file.exists()
    with (
        metrics_file.open("w" if write_header else "a", newline="", encoding="utf-8") as file,
        tqdm(total=len(pieces), initial=trainer.documents_done, unit="document", disable=None) as bar,
    ):
        writer = csv.writer(file, lineterminator="\n")
        for ids in pieces[trainer.documents_done :]:
            loss = trainer.learn_document(loaded, ids)
            metrics = {"documents": trainer.documents_done, "tokens": len(ids), "loss": loss}
            metrics |= validate(trainer.predictor, hidden, arguments.positive_weight)
            metrics["peak_mib"] = peak_mib(model.device)
            if write_header:
                writer.writerow(metrics)
                write_header = False
            writer.writerow(f"{value:.5g}" for value in metrics.values())
            file.flush()
            trainer.save(out)
            bar.update()
            bar.set_postfix({"loss": metrics["loss"], "top_hits": metrics["top_hits"]})
    return metrics


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m dhsa_ext.train_boundaries", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--model", help=f"any causal LM: a directory or a hub repository (default {models.PACKAGE})")
    parser.add_argument("--device", default="cpu", help="where the model runs (default cpu)")
    parser.add_argument("--text", type=Path, nargs="+", help="text files (default: Python's own documentation)")
    parser.add_argument("--length", type=int, default=4096, help="tokens of a document (default 4096)")
    parser.add_argument("--documents", type=int, help="at most so many, the held-out ones included (default: all)")
    parser.add_argument("--held-out", type=int, default=2, help="documents for the metrics (default 2)")
    parser.add_argument("--layers", type=int, nargs="+", help="whose keys are learned (default: every global layer)")
    parser.add_argument("--window", type=int, default=4, help="tokens on each side of a cut (default 4)")
    parser.add_argument("--num-heads", type=int, default=8, help="of the predictor's self-attention (default 8)")
    parser.add_argument("--mean-pool", action="store_true", help="pool a half by its mean, not by a learned gate")
    parser.add_argument("--epochs", type=int, default=4, help="passes over a document's cuts (default 4)")
    parser.add_argument("--batch", type=int, default=512, help="cuts a step (default 512)")
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--weight-decay", type=float, default=0.01)
    parser.add_argument("--positive-weight", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true", help="go on from what --out holds")
    parser.add_argument("--out", type=Path, default=Path("boundaries"), help="a directory (default boundaries)")
    arguments = parser.parse_args(argv)
    try:
        if arguments.model is None:
            print(models.terms(), file=sys.stderr)
        loaded = models.load(arguments.model)
        loaded.model.to(arguments.device)
        texts = [needle.read_text(path) for path in arguments.text or [None]]
        metrics = train(loaded, texts, arguments)
    except (ValueError, RuntimeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print("  ".join(f"{name} {value:.4g}" for name, value in metrics.items()) or "nothing left to train on")
    print(f"written: {arguments.out}/predictor.safetensors metrics.csv state.pt")
    return 0


if __name__ == "__main__":
    sys.exit(main())
