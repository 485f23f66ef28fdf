"""Decode as one fixed step: replayed from a CUDA graph, or compiled on a CPU; and what it launches per token.

DHSA decodes through dhsa_ext's DecodeStep, always sparsely. Dense attention gets the best that a graph of it can be:
its step stands still at one length, so that its own kernel reads exactly that many keys without a mask (PinnedStep).
On a GPU both have the norms, MLPs and rotary embedding of the model and the write to the cache compiled, DHSA its cuts
(small_parts_compiled): unfused, those are most of the 47 launches a layer, and take as long as the attention.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers import AttentionInterface, DynamicCache

from dhsa_ext import decode_step
from dhsa_ext.decode_step import DecodeStep

PINNED = "dhsa_bench_pinned"  # no mask is registered under it: transformers then makes none
LAUNCHES = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx", "cudaGraphLaunch",
            "cudaMemcpyAsync", "cudaMemsetAsync")  # fmt: skip


@dataclass
class Decode:
    """Tokens a second, and what one token launched: driver calls on a GPU, top-level operators on a CPU."""

    tokens_per_s: float
    launches: int


class PinnedStep:
    """The step after `cache`, again and again: the new token's key always goes to the same, last slot."""

    def __init__(self, model: Any, cache: DynamicCache, implementation: str, device: str) -> None:
        eager = implementation == "eager" or getattr(model.config, "attn_logit_softcapping", None)
        self.model, self.implementation = model, "eager" if eager else "sdpa"
        self.buffers = [self._with_slot(layer) for layer in cache.layers]
        self.ids = torch.zeros(1, 1, dtype=torch.int64, device=device)
        self.position = torch.full((1, 1), self.length(cache), dtype=torch.int64, device=device)
        AttentionInterface.register(PINNED, self._attend)
        model.set_attn_implementation(PINNED)
        self.run: Callable[[], Tensor] = self._forward
        if device == "cuda":
            self.run = self._captured()
        else:
            self.run = torch.compile(self._forward, dynamic=False)

    def length(self, _: DynamicCache) -> int:
        return max(x.shape[3] for x in self.buffers) - 1

    @staticmethod
    def _with_slot(layer: Any) -> Tensor:
        """[2, B, Hkv, Lk + 1, D], the layer's own tensors let go."""
        both = layer.keys.new_zeros(2, *layer.keys.shape[:2], layer.keys.shape[2] + 1, layer.keys.shape[3])
        both[0, :, :, :-1], both[1, :, :, :-1] = layer.keys, layer.values
        layer.keys = layer.values = layer.keys.new_empty(0)
        return both

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        buffer = self.buffers[layer_idx]
        write_last(buffer, key, value)
        return buffer[0], buffer[1]

    def _attend(self, module: Any, *arguments: Any, **kwargs: Any) -> Any:
        if self.implementation == "eager":
            return sys.modules[type(module).__module__].eager_attention_forward(module, *arguments, **kwargs)
        return AttentionInterface()["sdpa"](module, *arguments, **kwargs)

    def _forward(self) -> Tensor:
        return self.model(self.ids, position_ids=self.position, past_key_values=self, use_cache=True).logits

    def _captured(self) -> Callable[[], Tensor]:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self._forward()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = self._forward()

        def replay() -> Tensor:
            graph.replay()
            return logits

        return replay

    def __call__(self, token: Tensor) -> Tensor:
        self.ids.copy_(token)
        return self.run()


def write_last(buffer: Tensor, key: Tensor, value: Tensor) -> None:
    buffer[:, :, :, -1:] = torch.stack([key, value])


@contextmanager
def small_parts_compiled(model: Any) -> Iterator[None]:
    """Norms, MLPs, rotary embedding, cache writes and cuts by torch.compile; undone on leaving."""
    parts = [m for m in model.modules() if type(m).__name__.endswith(("RMSNorm", "MLP"))]
    here, model_file = sys.modules[__name__], sys.modules[type(model).__module__]
    functions = [(model_file, "apply_rotary_pos_emb"), (decode_step, "write_token"), (here, "write_last"),
                 (decode_step.DecodeStep, "_decide_cuts")]  # fmt: skip
    plain = [getattr(module, name) for module, name in functions]
    for part in parts:
        part.compile(dynamic=False)
    for (module, name), function in zip(functions, plain, strict=True):
        setattr(module, name, torch.compile(function, dynamic=False))
    try:
        yield
    finally:
        for (module, name), function in zip(functions, plain, strict=True):
            setattr(module, name, function)
        for part in parts:
            part._compiled_call_impl = None


def fixed_step(
    model: Any, cache: DynamicCache, contestant: Any, device: str, tokens: int
) -> Callable[[Tensor], Tensor]:
    """One token in, its logits out; the cache must not be used again. On a GPU under small_parts_compiled."""
    torch._dynamo.reset()  # each step is compiled by itself; after 8 of them torch would go on without compiling
    if contestant.config is None or contestant.config.layers == ():
        return PinnedStep(model, cache, contestant.implementation, device)
    mode: Any = "graph" if device == "cuda" else "compile"
    return DecodeStep(model, cache, replace(contestant.config, decode="sparse"), max_new_tokens=tokens, mode=mode)


def measure(step: Callable[[Tensor], Tensor], token: Tensor, tokens: int) -> Decode:
    """Rate over `tokens` greedy tokens after two that capture or compile; then one more under the profiler."""
    device = token.device.type
    for _ in range(2):
        token = step(token)[:, -1:].argmax(-1)
    _settle(device)
    begin = time.perf_counter()
    for _ in range(tokens):
        token = step(token)[:, -1:].argmax(-1)
    _settle(device)
    rate = tokens / (time.perf_counter() - begin)
    return Decode(rate, launches(lambda: step(token), device))


SPARE = 4  # tokens that `measure` takes beside those it times


def launches(call: Callable[[], object], device: str) -> int:
    """What one call launches."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]
    with profile(activities=activities) as trace:
        call()
        _settle(device)
    if device == "cuda":
        return sum(event.count for event in trace.key_averages() if event.key in LAUNCHES)
    return sum(event.cpu_parent is None and not event.name.startswith("[") for event in trace.events())


def _settle(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
