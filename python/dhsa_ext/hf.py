"""DHSA in Hugging Face transformers: an attention function and its mask function, registered under one name.

    import dhsa_ext.hf
    dhsa_ext.hf.register(DHSAConfig(preset="accurate", budget=1024))
    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="dhsa")
    with torch.no_grad():
        model.generate(...)

Global layers run DHSA; layers with a sliding window keep every key of it, on the same kernel where that is faster
(DHSAConfig(band_kernel=...)). A prompt (T == S) and a piece of one
(1 < T < S) run sparse_prefill; a new token (T == 1) runs dense attention, or sparse_decode over a ChunkIndex that is
kept per layer and rebuilt whenever the cache is not the one it was built from. A long prompt in pieces keeps the
activations of one piece: model.generate(..., prefill_chunk_size=4096) under DHSAConfig(segment=4096), which cuts the
pieces as one prefill would. Letters as in the SPEC, with T = Lq new tokens and S = Lk cached ones, T included. Of a
padded batch, each row is sliced to its real tokens. An offloaded cache needs a transformers that orders its copies:
5.24 does; 5.17 fetches a layer's keys into memory that is still read, and SDPA's answers are wrong with it too.

Forward only: call the model under torch.no_grad(). Packed sequences, custom 4-D masks, static caches and bidirectional
(image) tokens raise NotImplementedError: no mask is ever ignored.
"""

from __future__ import annotations

import inspect
import logging
import weakref
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
import transformers
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask

from . import ops
from .chunk_index import ChunkIndex
from .config import DHSAConfig
from .selection import cut_chunks

logger = logging.getLogger(__name__)

CUDA_HEAD_DIMS = (64, 96, 128, 256)  # of the CUDA kernels

_default = DHSAConfig()


def register(config: DHSAConfig | None = None, name: str = "dhsa") -> None:
    """Make attn_implementation=`name` known to transformers; `config` is the default of models not configured."""
    global _default
    if "q_length" not in inspect.signature(sdpa_mask).parameters:
        raise ImportError(f"dhsa_ext.hf: transformers: expected 5.4 or newer, got {transformers.__version__}")
    _default = config or DHSAConfig()
    _models.clear()
    _layers.clear()
    AttentionInterface.register(name, dhsa_attention)
    AttentionMaskInterface.register(name, dhsa_mask)


def configure(model: torch.nn.Module, config: DHSAConfig) -> None:
    """Give one model its own settings, and forget what was kept of its caches."""
    state = _ModelState(config)
    for module in model.modules():
        if hasattr(module, "layer_idx"):
            _layers[module] = _LayerState(state)
            if getattr(module, "config", None) is not None:
                _remember(module.config, state)


# ---- state kept per model


_Boundaries: TypeAlias = "tuple[Tensor, Tensor] | None"  # offsets and num_chunks


@dataclass
class _ModelState:
    config: DHSAConfig
    first_layer: int | None = None  # the DHSA layer that runs first in a forward pass
    epoch: int = 0  # grows when the cache turns out to be another one: every layer's index is stale then
    shared: list[_Boundaries] = field(default_factory=list)  # the first layer's, by group of rows
    signature: list[Tensor] = field(default_factory=list)  # a few channels of the first layer's keys, by group of rows
    said: set[str] = field(default_factory=set)
    rising: tuple[Tensor, int] | None = None  # positions found to rise, with their version: looked at by one layer only

    def say_once(self, message: str) -> None:
        if message not in self.said:
            self.said.add(message)
            logger.warning(message)


@dataclass
class _LayerState:
    model: _ModelState
    epoch: int = -1
    indices: list[ChunkIndex] = field(default_factory=list)  # by group of rows


_layers: weakref.WeakKeyDictionary[torch.nn.Module, _LayerState] = weakref.WeakKeyDictionary()
_models: dict[int, _ModelState] = {}  # by the id of the model's config object, all that a mask function is given


def _state_of(module: torch.nn.Module) -> _LayerState:
    if module not in _layers:
        _layers[module] = _LayerState(_model_state(module.config))
    return _layers[module]


def _model_state(config: Any) -> _ModelState:
    if id(config) not in _models:
        _remember(config, _ModelState(_default))
    return _models[id(config)]


def _remember(config: Any, state: _ModelState) -> None:
    if id(config) not in _models:
        weakref.finalize(config, _models.pop, id(config), None)
    _models[id(config)] = state


# ---- the mask


def dhsa_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Any = causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    config: Any = None,
    **kwargs: Any,
) -> Tensor | None:
    """What the attention function must know beyond causality. transformers calls it once per kind of layer.

    Global layers: None, or bool [B, S], True at real tokens. Layers with a sliding window: None or bool [B, 1, S] where
    the kernel runs the band, else what transformers gives its own sdpa attention (None or bool [B, 1, T, S]).
    """
    if isinstance(q_offset, Tensor) or kv_offset + kv_length != q_offset + q_length:
        raise _refusal(
            f"static caches: expected a DynamicCache, whose keys end with the new tokens, got {kv_length} keys from "
            f"position {kv_offset} for {q_length} tokens from {q_offset}"
        )
    if attention_mask is not None and attention_mask.shape[-1] != kv_offset + kv_length:
        raise _refusal(
            f"attention_mask: expected one entry for each of {kv_offset + kv_length} past and new tokens, "
            f"got {attention_mask.shape[-1]}"
        )
    allow_skip = kwargs.get("allow_is_causal_skip", True)
    if local_size is None:
        if mask_function is not causal_mask_function:
            raise _refusal(
                "masks: expected causal attention over one sequence per row, got a mask function of another kind "
                "(packed sequences, bidirectional or image tokens, or a custom overlay)"
            )
        return None if attention_mask is None or bool(attention_mask.all()) else attention_mask
    if not allow_skip or kwargs.get("use_vmap") or local_size != getattr(config, "sliding_window", None):
        raise _refusal(
            "masks: expected a plain sliding window on the local layers, got one with an overlay "
            "(packed sequences, image tokens or chunked attention)"
        )
    past_window = q_length > 1 and kv_length > local_size  # sdpa would need a mask, and would read all that it hides
    if getattr(config, "attn_logit_softcapping", None) or (past_window and _model_state(config).config.band_kernel):
        if attention_mask is None or bool(attention_mask.all()):
            return None
        return attention_mask[:, None, kv_offset:]
    return sdpa_mask(
        batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask,
        local_size=local_size, **kwargs,
    )  # fmt: skip


# ---- the attention


def dhsa_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of one layer: query [B, H, T, D], key and value [B, Hkv, S, D] to [B, T, H, D]; no weights."""
    _refuse_unsupported(module, query, key, value, dropout, kwargs)
    logits = _Logits(scaling, softcap or 0.0)
    if sliding_window is not None:
        return _local_attention(module, query, key, value, attention_mask, logits, sliding_window), None
    if attention_mask is not None and attention_mask.ndim != 2:
        raise _refusal(
            f"attention_mask: expected a padding mask [batch, tokens] on global layers, got a custom mask of shape "
            f"{list(attention_mask.shape)}"
        )
    real = attention_mask
    layer = _state_of(module)
    _refuse_packed(layer.model, kwargs.get("position_ids"), real, query.shape[2])
    if _is_dense(layer.model, module.layer_idx, query.shape[2], key.shape[2]):
        return _dense(module, query, key, value, real, logits), None

    groups = _groups(real, query.shape[0], query.shape[2], key.shape[2])
    boundaries = _update_chunks(layer, module.layer_idx, query, key, groups)
    attend = _decode if query.shape[2] == 1 else _prefill
    if real is None:
        out = attend(layer, query, key, value, 0, boundaries, logits)
    else:
        out = torch.zeros_like(query)
        for g, group in enumerate(groups):
            if group.num_queries:
                q, k, v = group.queries_of(query), group.keys_of(key), group.keys_of(value)
                group.write_queries(out, attend(layer, q, k, v, g, boundaries, logits))
            if group.trailing_pads:
                # Queries past a row's last real token see all its real keys, as under a causal mask: generate() reads
                # the last of them when the prompts were padded on the right.
                rows, pads = group.batch, slice(query.shape[2] - group.trailing_pads, query.shape[2])
                out[rows, :, pads] = _masked_dense(query[rows, :, pads], key[rows], value[rows], real[rows], logits)
    return out.transpose(1, 2).contiguous(), None


def _is_dense(model: _ModelState, layer_idx: int, seqlen_q: int, seqlen_k: int) -> bool:
    config = model.config
    if config.layers is not None and layer_idx not in config.layers:
        return True
    if seqlen_k < config.dense_below:
        model.say_once(f"dhsa: attention is dense below {config.dense_below} keys (min_length)")
        return True
    return seqlen_q == 1 and config.decode == "dense"


def _prefill(
    layer: _LayerState, q: Tensor, k: Tensor, v: Tensor, g: int, boundaries: list[_Boundaries], logits: _Logits
) -> Tensor:
    """DHSA of the g-th group's prompt, or of a piece of it."""
    arguments = layer.model.config.prefill_args(q.shape[1], k.shape[1], k.shape[2])
    given = boundaries[g]
    if given is not None:
        arguments["offsets"], arguments["num_chunks"] = given
    return ops.sparse_prefill(q, k, v, **arguments, scale=logits.scale, softcap=logits.softcap)


def _decode(
    layer: _LayerState, q: Tensor, k: Tensor, v: Tensor, g: int, _: list[_Boundaries], logits: _Logits
) -> Tensor:
    """DHSA of the g-th group's new token, over the chunks of its index."""
    index = layer.indices[g]
    return ops.sparse_decode(
        q, k, v, index.pooled, index.offsets, index.num_chunks,
        **layer.model.config.decode_args(k.shape[2]), scale=logits.scale, softcap=logits.softcap,
    )  # fmt: skip


@dataclass(frozen=True)
class _Logits:
    scale: float | None
    softcap: float


def _local_attention(
    module: torch.nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, logits: _Logits, window: int
) -> Tensor:
    """Attention of a layer with a sliding window: the op over the band, or transformers' own sdpa.

    The op skips what the window hides; sdpa is faster where nothing is hidden, and cannot soft-cap logits.
    """
    if logits.softcap == 0.0 and (mask is None or mask.ndim == 4):
        if mask is None and (k.shape[2] > window or 1 < q.shape[2] < k.shape[2]):  # more than sdpa's causal flag says
            return _masked_dense(q, k, v, None, logits, window).transpose(1, 2).contiguous()
        return sdpa_attention_forward(module, q, k, v, mask, scaling=logits.scale)[0]
    if mask is not None and mask.ndim != 3:
        raise _refusal(
            f"attention_mask: expected a padding mask [batch, tokens], got a custom mask of shape {list(mask.shape)}"
        )
    real = None if mask is None else mask[:, 0]
    return _masked_dense(q, k, v, real, logits, window).transpose(1, 2).contiguous()


def _dense(module: torch.nn.Module, q: Tensor, k: Tensor, v: Tensor, real: Tensor | None, logits: _Logits) -> Tensor:
    """Dense attention of a global layer: transformers' sdpa where it needs no mask and streams, else the op."""
    if logits.softcap == 0.0 and real is None and q.shape[2] in (1, k.shape[2]) and not _sdpa_makes_logits(q, k):
        return sdpa_attention_forward(module, q, k, v, None, scaling=logits.scale)[0]
    return _masked_dense(q, k, v, real, logits).transpose(1, 2).contiguous()


def _sdpa_makes_logits(q: Tensor, k: Tensor) -> bool:
    """Whether torch would make all Lq x Lk logits: on a GPU none of its streaming kernels takes float32 with GQA."""
    return (
        q.is_cuda and q.dtype == torch.float32 and q.shape[1] != k.shape[1] and q.shape[2] > 1
        and q.shape[3] in CUDA_HEAD_DIMS
    )  # fmt: skip


def _masked_dense(
    q: Tensor, k: Tensor, v: Tensor, real: Tensor | None, logits: _Logits, window: int | None = None
) -> Tensor:
    """Dense causal attention over the real keys, streamed: sparse_attention over run lists that keep them all."""
    batch, seqlen_q, seqlen_k = q.shape[0], q.shape[2], k.shape[2]
    q_block = 1 if seqlen_q == 1 else 128
    blocks = -(-seqlen_q // q_block)
    if real is None:  # made on the device: no copy that the host waits for
        num_runs = torch.ones(batch, 1, blocks, dtype=torch.int32, device=q.device)
        runs = torch.zeros(batch, 1, blocks, 1, 2, dtype=torch.int32, device=q.device)
        runs[..., 1] = seqlen_k
    else:
        edges = torch.diff(torch.nn.functional.pad(real.to("cpu", torch.int8), (1, 1)), dim=1)
        counts = (edges == 1).sum(1, dtype=torch.int32)
        lists = torch.zeros(batch, max(1, int(counts.max())), 2, dtype=torch.int32)
        for row in range(batch):
            lists[row, : counts[row], 0] = (edges[row] == 1).nonzero()[:, 0].int()
            lists[row, : counts[row], 1] = (edges[row] == -1).nonzero()[:, 0].int()
        runs = lists[:, None, None].expand(batch, 1, blocks, -1, 2).contiguous().to(q.device)
        num_runs = counts[:, None, None].expand(batch, 1, blocks).contiguous().to(q.device)
    return ops.sparse_attention(
        q, k, v, runs, num_runs, q_block, scale=logits.scale, softcap=logits.softcap, window=window
    )


# ---- rows and padding


@dataclass(frozen=True)
class _Group:
    """Rows of the batch that share one set of real tokens: all of them, or one padded row."""

    batch: slice
    keys: slice | Tensor  # positions of the real tokens
    queries: slice | Tensor  # of those, the new ones, counted from the first new token
    num_queries: int
    trailing_pads: int  # new tokens after the last real one

    def keys_of(self, x: Tensor) -> Tensor:
        return _take(x[self.batch], self.keys)

    def queries_of(self, x: Tensor) -> Tensor:
        return _take(x[self.batch], self.queries)

    def write_queries(self, out: Tensor, part: Tensor) -> None:
        if isinstance(self.queries, slice):
            out[self.batch, :, self.queries] = part
        else:
            out[self.batch].index_copy_(2, self.queries, part)


def _take(x: Tensor, positions: slice | Tensor) -> Tensor:
    return x[:, :, positions] if isinstance(positions, slice) else x.index_select(2, positions)


def _groups(real: Tensor | None, batch: int, seqlen_q: int, seqlen_k: int) -> list[_Group]:
    if real is None:
        return [_Group(slice(0, batch), slice(0, seqlen_k), slice(0, seqlen_q), seqlen_q, 0)]
    groups = []
    for row in range(batch):
        positions = real[row].nonzero()[:, 0]
        queries = positions[positions >= seqlen_k - seqlen_q] - (seqlen_k - seqlen_q)
        last = int(queries[-1]) if len(queries) else -1
        groups.append(
            _Group(slice(row, row + 1), _as_slice(positions), _as_slice(queries), len(queries), seqlen_q - 1 - last)
        )
    return groups


def _as_slice(positions: Tensor) -> slice | Tensor:
    """Consecutive positions as a slice, whose result is a view; others as they are."""
    if len(positions) == 0:
        return slice(0, 0)
    first, last = int(positions[0]), int(positions[-1])
    return slice(first, last + 1) if last - first + 1 == len(positions) else positions


# ---- boundaries and chunk indices


def _update_chunks(
    layer: _LayerState, layer_idx: int, query: Tensor, key: Tensor, groups: list[_Group]
) -> list[_Boundaries]:
    """Bring the layer's indices up to date. Returns each group's boundaries; None: sparse_prefill cuts by itself."""
    model, config = layer.model, layer.model.config
    first = model.first_layer is None or layer_idx <= model.first_layer
    if first:
        model.first_layer = layer_idx
    if config.decode == "sparse":
        if first:
            _check_same_cache(model, key, groups)
        _update_indices(layer, query.shape[1], key, groups, first, decoding=query.shape[2] == 1)
        return [(index.offsets, index.num_chunks) for index in layer.indices]
    if not config.share_boundaries:
        return [None] * len(groups)
    if first:
        model.shared = [cut_chunks(group.keys_of(key), config) for group in groups]
    return model.shared


def _check_same_cache(model: _ModelState, key: Tensor, groups: list[_Group]) -> None:
    """Start a new epoch unless the first layer's old keys are those seen before.

    A cache that was reordered (beam search), cropped or replaced can have the length that was expected, so lengths
    alone do not tell: four channels of every key do, and cost one cache line a key in one layer.
    """
    now = [group.keys_of(key)[..., :4] for group in groups]
    past = [k.shape[2] - group.num_queries for k, group in zip(now, groups, strict=True)]
    same = [s.shape[2] for s in model.signature] == past and all(
        torch.equal(s, k[:, :, :n]) for s, k, n in zip(model.signature, now, past, strict=True)
    )
    if same:
        model.signature = [
            torch.cat([s, k[:, :, n:]], dim=2) for s, k, n in zip(model.signature, now, past, strict=True)
        ]
    else:
        model.epoch += 1
        model.signature = [k.clone() for k in now]


def new_index(config: DHSAConfig, query_heads: int, kv_heads: int) -> ChunkIndex:
    """An empty index for one layer's decode."""
    return ChunkIndex(
        config.heads(query_heads, kv_heads),
        "mean" if config.score == "mass" else config.pool,
        chunk_size=config.chunk_size,
        nms_radius=config.nms_radius,
        boundary_window=config.boundary_window,
        threshold=config.threshold,
        segment=config.segment,
    )


def _update_indices(
    layer: _LayerState, query_heads: int, key: Tensor, groups: list[_Group], first: bool, decoding: bool
) -> None:
    """Bring the layer's chunks up to the cache: extend them by the new token, or prefill anew."""
    model, config = layer.model, layer.model.config
    anew = not decoding or layer.epoch != model.epoch or len(layer.indices) != len(groups)
    if anew:
        layer.epoch = model.epoch
        layer.indices = [new_index(config, query_heads, key.shape[1]) for _ in groups]
    if first and anew:
        model.shared = [None] * len(groups)
    for g, (index, group) in enumerate(zip(layer.indices, groups, strict=True)):
        k = group.keys_of(key)
        past = k.shape[2] - (group.num_queries if decoding else 0)
        if anew or index.length != past:
            shared = model.shared[g] if config.share_boundaries and not first and g < len(model.shared) else None
            # Boundaries of another length are those of an earlier pass that did not reach this layer.
            if shared is not None and int(shared[0][0, -1]) != past:
                shared = None
            index.prefill(k[:, :, :past], *(shared or ()))
            if first and config.share_boundaries:
                model.shared[g] = (index.offsets.clone(), index.num_chunks.clone())
        if decoding:
            index.extend(k[:, :, past:])


# ---- refusals

# Arguments that transformers' decoders hand through and that change nothing here.
_HARMLESS = {
    "position_ids", "cache_position", "use_cache", "past_key_values", "num_items_in_batch", "output_hidden_states",
    "output_router_logits", "return_dict", "logits_to_keep", "token_type_ids", "mm_token_type_ids",
}  # fmt: skip


def _refusal(sentence: str) -> NotImplementedError:
    return NotImplementedError(f"dhsa_ext.hf: {sentence}; use attn_implementation='sdpa' or 'eager' for it")


def _refuse_unsupported(
    module: torch.nn.Module, q: Tensor, k: Tensor, v: Tensor, dropout: float, kwargs: dict[str, Any]
) -> None:
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        raise RuntimeError(
            "dhsa_ext.hf: query, key, value: expected tensors without gradient (DHSA is forward only: call the model "
            "under torch.no_grad()), got one that requires grad"
        )
    if dropout:
        raise _refusal(f"dropout: expected 0 (call model.eval()), got {dropout}")
    is_causal = kwargs.pop("is_causal", None)
    if is_causal is False or not getattr(module, "is_causal", True):
        raise _refusal("is_causal: expected causal attention, got bidirectional attention")
    if kwargs.get("output_attentions"):
        raise _refusal("output_attentions: expected False (no weights are formed), got True")
    for name, given in kwargs.items():
        if given is not None and given is not False and name not in _HARMLESS:
            raise _refusal(f"{name}: expected an attention without it, got a {type(given).__name__}")


def _refuse_packed(model: _ModelState, position_ids: Tensor | None, real: Tensor | None, seqlen_q: int) -> None:
    """A row whose positions do not rise holds several sequences, which only a mask could keep apart."""
    if position_ids is None or position_ids.ndim != 2 or seqlen_q < 2 or position_ids.shape[1] != seqlen_q:
        return
    if model.rising is not None and model.rising[0] is position_ids and model.rising[1] == position_ids._version:
        return
    falls = position_ids[:, 1:] <= position_ids[:, :-1]
    if real is not None:
        new = real[:, -seqlen_q:]
        falls = falls & new[:, 1:] & new[:, :-1]
    if bool(falls.any()):
        raise _refusal("position_ids: expected rising positions in each row, got packed sequences")
    model.rising = (position_ids, position_ids._version)
