"""DecodeStep: one new token as a fixed sequence of device work, to be captured in a CUDA graph or compiled.

    cache = DynamicCache(config=model.config)
    logits = model(ids, past_key_values=cache, logits_to_keep=1).logits          # the prompt, as ever
    step = DecodeStep(model, cache, max_new_tokens=256, mode="graph")            # takes the cache over
    for _ in range(256):
        logits = step(logits[:, -1:].argmax(-1))                                 # [B, 1] to [B, 1, V]

Keys and values move to buffers of a fixed length N, filled up to a position that lives on the device; so do the chunks
of every global layer. Nothing here waits for the device, and no shape changes from token to token.

A new token keeps what sparse_decode keeps (decode "sparse"); how many keys the buffers hold is its cache_seqlens. A cut
is decided as in ChunkIndex.extend, for all layers together after the last of them, and counts from the next token on.

Rows of a batch have one length and no padding. decode "dense" keeps every key by one run; sliding windows are rings.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import AttentionInterface, DynamicCache

from . import hf, ops
from .chunk_index import ChunkIndex
from .config import MAX_OPEN_CHUNK, DHSAConfig

NAME = "dhsa_decode_step"  # no mask is registered under it: transformers then makes none
MODES = ("eager", "compile", "graph")
_running: list[weakref.ref[DecodeStep]] = []


def _attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, scaling: float | None = None,
    softcap: float | None = None, sliding_window: int | None = None, **_: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    step = _running[0]()
    assert step is not None
    out = step.attend(module.layer_idx, query, key, value, scaling, softcap or 0.0)
    return out.transpose(1, 2).contiguous(), None


def write_token(buffer: Tensor, slot: Tensor, key: Tensor, value: Tensor) -> None:
    """One token's key and value [B, Hkv, 1, D] into a buffer of both [2, B, Hkv, N, D] at slot, int64 [1]."""
    buffer.index_copy_(3, slot, torch.stack([key, value]))


class DecodeStep:
    """Decoding with fixed shapes, after a prefill through `cache`, whose layers are emptied.

    config      of the decode: None for the model's own (hf.configure, hf.register)
    mode        "eager", "compile" (torch.compile) or "graph" (a CUDA graph, captured at the first token)
    """

    def __init__(
        self, model: Any, cache: DynamicCache, config: DHSAConfig | None = None, *,
        max_new_tokens: int = 256, mode: Literal["eager", "compile", "graph"] = "graph",
    ) -> None:  # fmt: skip
        if mode not in MODES:
            raise ValueError(f"dhsa_ext.DecodeStep: mode: expected one of {', '.join(MODES)}, got {mode!r}")
        if type(cache) is not DynamicCache or not cache.get_seq_length():
            raise ValueError(
                "dhsa_ext.DecodeStep: cache: expected a DynamicCache that holds a prompt, got "
                f"{type(cache).__name__} of {cache.get_seq_length()} tokens"
            )
        self.model, self.mode = model, mode
        self.length, self.capacity = cache.get_seq_length(), cache.get_seq_length() + max_new_tokens
        modules = {m.layer_idx: m for m in model.modules() if hasattr(m, "layer_idx") and hasattr(m, "k_proj")}
        self.config = config or hf._state_of(modules[0]).model.config
        device = cache.layers[0].keys.device
        self.windows = [getattr(modules[i], "sliding_window", None) for i in range(len(modules))]
        self.position = torch.full((1,), self.length, dtype=torch.int64, device=device)  # of the new token
        self._device_length = torch.full((1,), self.length + 1, dtype=torch.int32, device=device)
        dense = self.config.decode == "dense" or self.length < self.config.dense_below
        self.sparse = [
            i
            for i, window in enumerate(self.windows)
            if not dense and window is None and (self.config.layers is None or i in self.config.layers)
        ]
        if self.sparse:
            self._check_length()
        self._fill_buffers(cache)
        if self.sparse:
            self._stack_indices([self._index_of(modules[i], self.buffers[i][0]) for i in self.sparse])
        self._ids = torch.zeros(self.buffers[0].shape[1], 1, dtype=torch.int64, device=device)
        self._compiled = torch.compile(self._forward, dynamic=False) if mode == "compile" else None
        self._graph: torch.cuda.CUDAGraph | None = None

    # ---- what the model calls

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """As a Cache: write the new token's key and value [B, Hkv, 1, D], give the layer's buffers."""
        window = self.windows[layer_idx]
        buffer = self.buffers[layer_idx]
        slot = self.position if window is None else self.position % buffer.shape[3]
        write_token(buffer, slot, key, value)
        return buffer[0], buffer[1]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float | None, softcap: float) -> Tensor:
        if layer in self.sparse:
            i = self.sparse.index(layer)
            return ops.sparse_decode(
                q, k, v, self.pooled[i], self.offsets[i], self.num_chunks[i],
                **self.config.decode_args(self.capacity), scale=scale, softcap=softcap,
                cache_seqlens=self._cache_seqlens,
            )  # fmt: skip
        # One run over all that was written.
        end = self._device_length.clamp(max=k.shape[2])
        runs = torch.cat([torch.zeros_like(end), end]).expand(k.shape[0], 1, 1, 1, 2).contiguous()
        num_runs = torch.ones_like(runs[..., 0, 0])
        return ops.sparse_attention(q, k, v, runs, num_runs, 1, scale=scale, softcap=softcap)

    # ---- one token

    def __call__(self, token: Tensor) -> Tensor:
        """Logits [B, 1, V] after the token [B, 1]; in mode "graph" they are overwritten by the next call."""
        if self.length == self.capacity:
            raise RuntimeError(
                f"dhsa_ext.DecodeStep: token: expected at most the max_new_tokens asked for, got one past the "
                f"{self.capacity} tokens that the buffers hold"
            )
        self._ids.copy_(token)
        run: Callable[[], Tensor] = self._compiled or self._forward
        if self.mode == "graph":
            if self._graph is None:
                self._capture()
            assert self._graph is not None
            self._graph.replay()
            logits = self._logits
        else:
            with torch.no_grad(), self._registered():
                logits = run()
        self.length += 1
        return logits

    def _forward(self) -> Tensor:
        if self.sparse:
            self._cache_seqlens = self._device_length.expand(self._ids.shape[0]).contiguous()
        logits = self.model(
            self._ids, position_ids=self.position.expand(self._ids.shape[0], 1), past_key_values=self, use_cache=True
        ).logits  # fmt: skip
        if self.sparse:
            self._decide_cuts()
        self.position += 1
        self._device_length += 1
        return logits

    def _decide_cuts(self) -> None:
        """ChunkIndex.extend by one key, for all rows of all sparse layers at once."""
        window, most = self.config.boundary_window, MAX_OPEN_CHUNK
        n = self._device_length
        recent = self._rows_at((n + self._ago).clamp_(min=0)[None])
        score = ops.boundary_scores(recent, window)[:, window].view_as(self.starts)
        t = (n - window).expand_as(self.starts)
        open_length = t - self.starts
        cut = ((open_length > self.config.nms_radius) & (score > self.bars)) | (open_length == most)

        chunk = self._rows_at((self.starts.view(-1, 1) + self._within).clamp_(max=self.capacity - 1))
        self._ends[:, 1] = open_length.view(-1).clamp(0, most)
        pooled = ops.chunk_pool(chunk, self._ends, self._one_chunk, self.pooled.shape[2], self._scale)
        # Where nothing is cut, the column past the last chunk is written, which nobody reads.
        column = (self._first_columns + self.num_chunks.view(-1, 1)).flatten()
        self._flat_pooled.index_copy_(0, column, pooled.flatten(0, 2))
        torch.where(cut, t, self.starts, out=self.starts)
        self.num_chunks += cut
        past = self._columns >= self.num_chunks[..., None]
        torch.where(past, self.starts[..., None], self.offsets, out=self.offsets)

    def _rows_at(self, positions: Tensor) -> Tensor:
        """Keys [L B, Hkv, n, D] of the sparse layers at positions [L B or 1, n], in one launch.

        Whole rows of eight-byte words: torch gathers along an inner dimension of over 2^31 elements in several.
        """
        stacked = self._stacked
        rows = (self._first_rows + positions[:, None]).flatten()
        words = stacked.view(torch.int64).flatten(0, 4).index_select(0, rows)
        return words.view(stacked.dtype).view(*self._first_rows.shape[:2], -1, stacked.shape[5])

    # ---- capture

    def _capture(self) -> None:
        if not torch.cuda.is_available():
            raise RuntimeError('dhsa_ext.DecodeStep: mode: expected "eager" or "compile" without a GPU, got "graph"')
        state = [self.position, self._device_length]
        state += [self.offsets, self.num_chunks, self.starts] if self.sparse else []
        before = [x.clone() for x in state]
        with torch.no_grad(), self._registered():
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):  # lazy libraries initialise themselves outside the graph
                self._forward()
            torch.cuda.current_stream().wait_stream(side)
            for x, y in zip(state, before, strict=True):
                x.copy_(y)
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                self._logits = self._forward()

    def _registered(self) -> _Registered:
        return _Registered(self)

    # ---- state

    def _check_length(self) -> None:
        least = 2 * self.config.boundary_window  # the tokens around a cut
        if self.length < least:
            raise ValueError(f"dhsa_ext.DecodeStep: cache: expected {least} tokens or more, got {self.length}")

    def _fill_buffers(self, cache: DynamicCache) -> None:
        """Each layer's keys and values into its buffer, one layer after the other: two copies of one exist at most.

        Sparse layers share one tensor [L, 2, B, Hkv, N, D].
        """
        kept = [min(window or self.capacity, self.capacity) for window in self.windows]
        shapes = [(2, *old.keys.shape[:2], n, old.keys.shape[3]) for old, n in zip(cache.layers, kept, strict=True)]
        some = cache.layers[0].keys
        if self.sparse:
            self._stacked = some.new_zeros(len(self.sparse), *shapes[self.sparse[0]])
        self.buffers: list[Tensor] = []
        for i, (old, n) in enumerate(zip(cache.layers, kept, strict=True)):
            buffer = self._stacked[self.sparse.index(i)] if i in self.sparse else some.new_zeros(shapes[i])
            held = min(old.keys.shape[2], n)
            slots = torch.arange(self.length - held, self.length, device=some.device) % n
            for to, x in zip(buffer, (old.keys, old.values), strict=True):
                to.index_copy_(2, slots, x[:, :, x.shape[2] - held :])
            self.buffers.append(buffer)
            old.keys = old.values = old.keys.new_empty(0)

    def _index_of(self, module: Any, keys: Tensor) -> ChunkIndex:
        """The layer's index as its prefill left it, or a new one."""
        state, config = hf._state_of(module), self.config
        if state.model.config == config and len(state.indices) == 1 and state.indices[0].length == self.length:
            return state.indices[0]
        text = self.model.config.get_text_config()
        index = hf.new_index(config, text.num_attention_heads, keys.shape[1])
        index.prefill(keys[:, :, : self.length])
        return index

    def _stack_indices(self, indices: list[ChunkIndex]) -> None:
        """[L, B, ...] tensors with room for every chunk that the new tokens can make."""
        config = self.config
        new = (self.capacity - self.length) // (config.nms_radius + 1) + 2
        room = max(int(x.num_chunks.max()) for x in indices) + new

        def padded(x: Tensor, dim: int, size: int) -> Tensor:
            x = x.narrow(dim, 0, min(size, x.shape[dim]))
            shape = list(x.shape)
            shape[dim] = size - x.shape[dim]
            filler = x.narrow(dim, x.shape[dim] - 1, 1).expand(shape)
            return torch.cat([x, filler], dim)

        self.starts = torch.stack([x.tail_starts for x in indices]).int()
        self.num_chunks = torch.stack([x.num_chunks for x in indices])
        self.offsets = torch.stack([padded(x.offsets, 1, room + 1) for x in indices])
        self.pooled = torch.stack([padded(x.pooled, 2, room) for x in indices])
        self.bars = torch.stack([x.bars for x in indices])
        self._scale = indices[0].scale

        # What _decide_cuts reads and never changes, and the ends of the one chunk that it pools.
        device, lists = self.starts.device, self.starts.numel()
        first_rows = torch.arange(0, self._stacked[..., 0].numel(), self.capacity, device=device)
        self._first_rows = first_rows.view(self._stacked.shape[:4])[:, 0].reshape(lists, -1, 1)
        self._ago = torch.arange(-2 * config.boundary_window, 0, device=device)
        self._within = torch.arange(MAX_OPEN_CHUNK, device=device)
        self._columns = torch.arange(self.offsets.shape[2], device=device)
        # Written as itself: for a view made in the step torch.compile copies all of it.
        self._flat_pooled = self.pooled.flatten(0, 3)
        self._first_columns = torch.arange(0, self.pooled[..., 0].numel(), room, device=device).view(lists, -1)
        self._ends = torch.zeros(lists, 2, dtype=torch.int32, device=device)
        self._one_chunk = torch.ones(lists, dtype=torch.int32, device=device)


class _Registered:
    """The model's attention is the step's while this is entered."""

    def __init__(self, step: DecodeStep) -> None:
        self.step = step

    def __enter__(self) -> None:
        AttentionInterface.register(NAME, _attend)
        self.before = self.step.model.config._attn_implementation
        self.step.model.set_attn_implementation(NAME)
        _running[:] = [weakref.ref(self.step)]

    def __exit__(self, *_: object) -> None:
        _running.clear()
        self.step.model.set_attn_implementation(self.before)
