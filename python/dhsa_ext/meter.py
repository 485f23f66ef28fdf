"""What the demo measures: time inside attention, resident memory, and the context from which DHSA is faster."""

from __future__ import annotations

import ctypes
import gc
import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface

from . import hf, ops
from .config import DHSAConfig


@dataclass(frozen=True)
class LayerInputs:
    """What one layer's attention read: q [B, H, T, D], k and v [B, Hkv, S, D]."""

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float | None
    softcap: float


class AttentionMeter:
    """Stands before dhsa_attention under a name of its own: times it and keeps what the global layers of a prompt read.

    `on_layer` is called after each layer.
    """

    NAME = "dhsa_metered"

    def __init__(self, on_layer: Callable[[], object] = lambda: None) -> None:
        self.global_s = self.local_s = 0.0  # layers without a sliding window, and with one
        self.global_layers: list[LayerInputs] = []
        self.on_layer = on_layer

    def __enter__(self) -> AttentionMeter:
        AttentionInterface.register(self.NAME, self)
        AttentionMaskInterface.register(self.NAME, hf.dhsa_mask)
        return self

    def __exit__(self, *_: object) -> None:
        AttentionInterface.register(self.NAME, hf.dhsa_attention)

    def __call__(self, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> Any:
        begin = time.perf_counter()
        result = hf.dhsa_attention(module, query, key, value, mask, **kwargs)
        spent = time.perf_counter() - begin
        if kwargs.get("sliding_window") is None:
            self.global_s += spent
            self.global_layers.append(
                LayerInputs(query, key, value, kwargs.get("scaling"), kwargs.get("softcap") or 0.0)
            )
        else:
            self.local_s += spent
        self.on_layer()
        return result


class PeakMemory:
    """Resident memory of this process while the block runs, sampled every 5 ms, above that at its start.

    Memory that was freed before but that malloc still holds is handed back first where malloc can (glibc); else the
    block could use it without a trace.
    """

    def __enter__(self) -> PeakMemory:
        import psutil

        gc.collect()
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
        self._process = psutil.Process()
        self._start = self._peak = self._process.memory_info().rss
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def _sample(self) -> None:
        while not self._stop.wait(0.005):
            self._peak = max(self._peak, self._process.memory_info().rss)

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    @property
    def mib(self) -> float:
        return (self._peak - self._start) / 2**20


@dataclass(frozen=True)
class Crossing:
    """Seconds of one global layer's attention, dense and with DHSA, at rising lengths."""

    lengths: list[int]
    dense_s: list[float]
    dhsa_s: list[float]

    def where(self) -> tuple[int | None, bool]:
        """The context from which DHSA is faster (None: none up to a million tokens), and whether it was measured.

        Past the longest length, both are taken to grow as the power of the length that their last two times show.
        """
        for length, dense, dhsa in zip(self.lengths, self.dense_s, self.dhsa_s, strict=True):
            if dhsa < dense:
                return length, True
        step = math.log(self.lengths[-1] / self.lengths[-2])
        dense_power = math.log(self.dense_s[-1] / self.dense_s[-2]) / step
        dhsa_power = math.log(self.dhsa_s[-1] / self.dhsa_s[-2]) / step
        if dense_power <= dhsa_power:
            return None, False
        factor = (self.dhsa_s[-1] / self.dense_s[-1]) ** (1 / (dense_power - dhsa_power))
        length = self.lengths[-1] * factor
        return (round(length), False) if length <= 1e6 else (None, False)


@torch.no_grad()
def measure_crossing(layer: LayerInputs, config: DHSAConfig) -> Crossing | None:
    """Time one layer at twice and four times the budget, or a half and all of its prompt where that is longer.

    A prompt too short for that is repeated. Dense attention is torch's. None where the prompt would have to be repeated
    more than four times, or where logits are soft-capped, which torch's attention does not know.
    """
    total = layer.q.shape[2]
    longest = max(total, 4 * config.budget)
    if layer.softcap or longest > 4 * total:
        return None
    crossing = Crossing([longest // 2, longest], [], [])
    repeats = -(-longest // total)
    for n in crossing.lengths:
        q, k, v = (x.repeat(1, 1, repeats, 1)[:, :, :n] for x in (layer.q, layer.k, layer.v))
        arguments = config.prefill_args(q.shape[1], k.shape[1], n)

        def dense(q: Tensor = q, k: Tensor = k, v: Tensor = v) -> Tensor:
            return torch.nn.functional.scaled_dot_product_attention(
                q, k, v, is_causal=True, scale=layer.scale, enable_gqa=True
            )

        def dhsa(q: Tensor = q, k: Tensor = k, v: Tensor = v, arguments: dict[str, Any] = arguments) -> Tensor:
            return ops.sparse_prefill(q, k, v, **arguments, scale=layer.scale)

        crossing.dense_s.append(_seconds(dense))
        crossing.dhsa_s.append(_seconds(dhsa))
    return crossing


def _seconds(call: Callable[[], object]) -> float:
    """The better of two calls."""
    times = []
    for _ in range(2):
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return min(times)
