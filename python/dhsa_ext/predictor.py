"""The learned boundary predictor: a small network that says where a chunk should begin, in place of boundary_scores.

    predictor = BoundaryPredictor.load("gemma.safetensors", model)   # trained by python -m dhsa_ext.train_boundaries
    offsets, num_chunks = predictor.cut_chunks(k, config)             # for choose_keys, sparse_prefill, the policies
    logits = predictor.logits(k)                                      # float32 [B, Lk], for ops.select_boundaries

For each token t it looks at the keys of the `window` tokens before t and of the `window` from t on, all KV heads
concatenated: self-attention over them, LayerNorm, each half pooled to one vector, and a two-layer network over the two,
their difference, product and cosine. Source: the paper's boundary predictor; what is fixed here is in the SPEC's terms
of `dhsa::boundary_logits`, which computes the same numbers without keeping the windows.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import ops
from .config import DHSAConfig

HIDDEN = 256
FORMAT = "dhsa_ext boundary predictor 1"


@dataclass(frozen=True)
class PredictorConfig:
    """The shape of a predictor, and the model whose keys it was trained on."""

    kv_heads: int
    head_dim: int
    num_heads: int = 8
    window: int = 4
    gated: bool = True  # pool each half by a softmax gate; else by its mean
    model: str = ""
    layers: tuple[int, ...] = ()  # whose keys it has seen

    @property
    def width(self) -> int:
        """C_in, the keys of one token."""
        return self.kv_heads * self.head_dim


class BoundaryPredictor(nn.Module):
    """k [B, Hkv, Lk, D] to logits float32 [B, Lk], -inf at tokens without two whole windows.

    ValueError where the heads of the self-attention do not divide Hkv * D.
    """

    def __init__(self, config: PredictorConfig) -> None:
        super().__init__()
        width = config.width
        if width % config.num_heads:
            raise ValueError(
                f"dhsa_ext.BoundaryPredictor: num_heads: expected a divisor of the keys' width {width}, "
                f"got {config.num_heads}"
            )
        self.config = config
        self.attention = nn.MultiheadAttention(width, config.num_heads, batch_first=True)
        self.norm = nn.LayerNorm(width, eps=1e-5)
        self.gate = nn.Linear(width, 1) if config.gated else None
        self.fc1 = nn.Linear(4 * width + 1, HIDDEN)
        self.fc2 = nn.Linear(HIDDEN, 1)

    def forward(self, k: Tensor) -> Tensor:
        """In plain PyTorch, with gradients; every window is in memory: for training, and the op's twin in tests."""
        window, length = self.config.window, k.shape[2]
        cuts = torch.arange(window, max(window, length - window + 1), device=k.device)
        logits = k.new_full((k.shape[0], length), -math.inf, dtype=torch.float32)
        if len(cuts):
            at_cuts = [self.at(row, cuts) for row in tokens_of(k)]
            logits = logits.index_copy(1, cuts, torch.stack(at_cuts))
        return logits

    def at(self, x: Tensor, cuts: Tensor) -> Tensor:
        """Logits float32 [n] of the cuts before tokens `cuts` [n] of x [Lk, Hkv * D], each with two whole windows."""
        window = self.config.window
        around = cuts[:, None] + torch.arange(-window, window, device=x.device)
        rows = x[around].to(self.fc1.weight.dtype)
        halves = self.norm(self.attention(rows, rows, rows, need_weights=False)[0]).unflatten(1, (2, window))
        share = halves.new_full((*halves.shape[:-1], 1), 1 / window)
        if self.gate is not None:
            share = self.gate(halves).softmax(2)
        left, right = (share * halves).sum(2).unbind(1)
        cosine = nn.functional.cosine_similarity(left, right, dim=-1)[:, None]
        features = torch.cat([left, right, (left - right).abs(), left * right, cosine], -1)
        return self.fc2(self.fc1(features).relu())[:, 0].float()

    @torch.no_grad()
    def logits(self, k: Tensor) -> Tensor:
        """The same by ops.boundary_logits."""
        attention, gate = self.attention, self.gate
        gate_weight, gate_bias = (None, None) if gate is None else (gate.weight, gate.bias)
        return ops.boundary_logits(
            k, attention.in_proj_weight, attention.in_proj_bias, attention.out_proj.weight, attention.out_proj.bias,
            self.norm.weight, self.norm.bias, gate_weight, gate_bias,
            self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias, self.config.num_heads, self.config.window,
        )  # fmt: skip

    def cut_chunks(self, k: Tensor, config: DHSAConfig) -> tuple[Tensor, Tensor]:
        """Chunks of k by this predictor: offsets int32 [B, C + 1], num_chunks int32 [B]."""
        return ops.select_boundaries(
            self.logits(k), config.max_chunks(k.shape[2]), config.nms_radius, config.threshold, config.segment
        )

    # ---- files

    def save(self, path: str | Path) -> None:
        """A safetensors file with the weights, and the configuration in its header."""
        from safetensors.torch import save_file

        weights = {name: weight.detach().contiguous().cpu() for name, weight in self.state_dict().items()}
        partial = Path(f"{path}.partial")
        save_file(weights, partial, {"format": FORMAT, "config": json.dumps(asdict(self.config))})
        partial.replace(path)

    @classmethod
    def load(cls, path: str | Path, model: Any = None) -> BoundaryPredictor:
        """The predictor of a file. Given a model of transformers, on its device, and ValueError where its keys have
        another shape.
        """
        from safetensors import safe_open

        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
            if header.get("format") != FORMAT:
                raise ValueError(
                    f"dhsa_ext.BoundaryPredictor.load: {Path(path).name}: expected a file of format {FORMAT!r}, "
                    f"got {header.get('format')!r}"
                )
            given = json.loads(header["config"])
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        config = PredictorConfig(**{**given, "layers": tuple(given["layers"])})
        if model is not None:
            check_model(config, model, Path(path).name)
        predictor = cls(config)
        predictor.load_state_dict(weights)
        if model is not None:
            predictor.to(model.device)
        return predictor.eval().requires_grad_(False)


def tokens_of(k: Tensor) -> Tensor:
    """K [B, Hkv, Lk, D] to [B, Lk, Hkv * D]: all heads' keys of a token, side by side."""
    return k.transpose(1, 2).flatten(2)


def key_shape(model: Any) -> tuple[int, int]:
    """KV heads and head dimension of a model of transformers."""
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    return kv_heads, getattr(config, "head_dim", None) or config.hidden_size // heads


def model_name(model: Any) -> str:
    """What a checkpoint remembers a model by: its kind and size, which do not depend on where it was loaded from."""
    config = model.config.get_text_config()
    return f"{config.model_type}, {config.num_hidden_layers} layers, width {config.hidden_size}"


def check_model(config: PredictorConfig, model: Any, name: str) -> None:
    """ValueError unless the predictor was trained on this kind of model."""
    kv_heads, head_dim = key_shape(model)
    if (kv_heads, head_dim) != (config.kv_heads, config.head_dim):
        raise ValueError(
            f"dhsa_ext.BoundaryPredictor.load: {name}: expected a model with {config.kv_heads} KV heads of dimension "
            f"{config.head_dim}, as it was trained on ({config.model}), got {kv_heads} of {head_dim}"
        )
    if config.model and config.model != model_name(model):
        raise ValueError(
            f"dhsa_ext.BoundaryPredictor.load: {name}: expected the model that it was trained on ({config.model}), "
            f"got {model_name(model)}"
        )
