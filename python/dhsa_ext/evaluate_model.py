"""What the evaluation measures on a model: the choice of keys, needles, answers, perplexity, time and memory.

A Choice names a policy, where its chunks come from and its settings; PolicyAttention puts it into the model's global
layers through transformers' AttentionInterface, no model class is touched.
"""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache

from . import hf, ops, policies
from .config import DHSAConfig
from .evaluate_tasks import METRICS, Question
from .meter import AttentionMeter, LayerInputs, PeakMemory
from .models import LoadedModel
from .predictor import BoundaryPredictor
from .selection import Selection, cut_chunks

DENSE = DHSAConfig(layers=())
Chunker = Callable[[Tensor, DHSAConfig], policies.Chunks]


@dataclass(frozen=True)
class Choice:
    """A policy with its options, the source of its chunks, and the settings that it reads."""

    label: str
    policy: policies.Policy
    config: DHSAConfig
    boundaries: str = "training-free"
    chunker: Chunker = cut_chunks

    @property
    def takes_chunks(self) -> bool:
        return "chunks" in inspect.signature(self.policy).parameters

    def cut(self, k: Tensor) -> policies.Chunks | None:
        """The chunks of k [B, Hkv, Lk, D]; None for a policy without chunks of content."""
        return self.chunker(k, self.config) if self.takes_chunks else None

    def runs(
        self, layer: LayerInputs, q: Tensor, k: Tensor, chunks: policies.Chunks | None, q_block: int | None = None
    ) -> tuple[Tensor, Tensor]:
        config = self.config if q_block is None else replace(self.config, q_block=q_block)
        given = {} if chunks is None else {"chunks": chunks}
        return self.policy(q, k, config, scale=layer.scale, softcap=layer.softcap, **given)

    def columns(self) -> dict[str, Any]:
        config = self.config
        return {
            "policy": self.label, "boundaries": self.boundaries if self.takes_chunks else "", "budget": config.budget,
            "heads": config.select_heads, "q_block": config.q_block, "sink": config.sink, "local": config.local,
        }  # fmt: skip


def parse_policy(text: str) -> policies.Policy:
    """A policy's name with options of its own: "accurate", "coverage:share=0.95", "accurate:rows=sample"."""
    name, _, options = text.partition(":")
    if name not in policies.POLICIES:
        raise ValueError(f"dhsa_ext.evaluate: policies: expected some of {', '.join(policies.POLICIES)}, got {name!r}")
    policy, given = policies.POLICIES[name], dict[str, Any]()
    for option in filter(None, options.split(",")):
        key, _, value = option.partition("=")
        default = inspect.signature(policy).parameters.get(key)
        if default is None or not isinstance(default.default, int | float | str):
            raise ValueError(f"dhsa_ext.evaluate: policies: {name}: expected one of its options, got {option!r}")
        given[key] = type(default.default)(value)
    return partial(policy, **given) if given else policy


def parse_boundaries(text: str, model: Any = None) -> Chunker:
    """What cuts chunks: "training-free", "fixed" (config.chunk_size keys each), or a trained predictor's file."""
    if text == "training-free":
        return cut_chunks
    if text == "fixed":
        return lambda k, config: policies.fixed_chunks(k, config.chunk_size)
    if not Path(text).exists():
        raise ValueError(
            f"dhsa_ext.evaluate: boundaries: expected training-free, fixed or a predictor's file, got {text!r}"
        )
    return BoundaryPredictor.load(text, model).cut_chunks


# ---- a model under a choice


class PolicyAttention:
    """The attention of a model whose global layers choose keys by `choice`; None, or `sparse` False, is dense.

    One row, no padding: the evaluation's own prompts. Layers with a sliding window keep their attention.
    """

    NAME = "dhsa_policy"

    def __init__(self, loaded: LoadedModel, choice: Choice | None) -> None:
        self.loaded, self.choice = loaded, None if choice is None or choice.policy is policies.dense else choice
        self.sparse, self.q_block = True, None if choice is None else choice.config.q_block

    def __enter__(self) -> PolicyAttention:
        AttentionInterface.register(self.NAME, self)
        AttentionMaskInterface.register(self.NAME, hf.dhsa_mask)
        self.loaded.model.set_attn_implementation(self.NAME)
        hf.configure(self.loaded.model, DENSE)
        return self

    def __exit__(self, *_: object) -> None:
        AttentionInterface.register(self.NAME, hf.dhsa_attention)

    def __call__(self, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> Any:
        if kwargs.get("sliding_window") is not None or self.choice is None or not self.sparse:
            return hf.dhsa_attention(module, query, key, value, mask, **kwargs)
        if mask is not None or query.shape[0] != 1:
            raise NotImplementedError("dhsa_ext.evaluate: expected one prompt without padding, got a batch")
        layer = LayerInputs(query, key, value, kwargs.get("scaling"), kwargs.get("softcap") or 0.0)
        runs, num_runs = self.choice.runs(layer, query, key, self.choice.cut(key), self.q_block)
        q_block = self.q_block or self.choice.config.q_block
        out = ops.sparse_attention(query, key, value, runs, num_runs, q_block, scale=layer.scale, softcap=layer.softcap)
        return out.transpose(1, 2).contiguous(), None

    def forward(self, ids: Sequence[int], cache: DynamicCache | None, keep: int) -> Tensor:
        """Logits [keep, vocabulary] of the last tokens of `ids`, which follow what the cache holds."""
        model = self.loaded.model
        tokens = torch.tensor([list(ids)], device=model.device)
        past = 0 if cache is None else cache.get_seq_length()
        positions = torch.arange(past, past + len(ids), device=model.device)[None]
        with torch.no_grad():
            return model(tokens, past_key_values=cache, position_ids=positions, logits_to_keep=keep).logits[0]


# ---- the choice of keys, layer by layer


@torch.no_grad()
def for_each_global_layer(loaded: LoadedModel, ids: Sequence[int], use: Callable[[int, LayerInputs], object]) -> None:
    """Call `use` with the index and the inputs of each global layer, as a dense pass over `ids` comes to it."""
    indices = iter(global_layers(loaded.model))

    def hand_over() -> None:
        while meter.global_layers:
            use(next(indices), meter.global_layers.pop())

    with AttentionMeter(hand_over) as meter:
        loaded.model.set_attn_implementation(AttentionMeter.NAME)
        hf.configure(loaded.model, DENSE)
        loaded.model(torch.tensor([list(ids)], device=loaded.model.device), use_cache=False, logits_to_keep=1)


def capture(loaded: LoadedModel, ids: Sequence[int]) -> dict[int, LayerInputs]:
    """What the global layers of a dense pass over `ids` read, by layer index."""
    layers: dict[int, LayerInputs] = {}
    for_each_global_layer(loaded, ids, layers.__setitem__)
    return layers


def global_layers(model: Any) -> list[int]:
    """The indices of the layers without a sliding window."""
    config = model.config.get_text_config()
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    return [i for i, kind in enumerate(kinds) if kind == "full_attention"]


def block_positions(length: int, q_block: int, blocks: int) -> list[int]:
    """Ends of `blocks` query blocks, evenly spread over the second half of a prompt; the last is the prompt's end."""
    first = length // 2
    return [first + (length - first) * (i + 1) // blocks for i in range(blocks) if first >= q_block]


@dataclass(frozen=True)
class Quality:
    """Of one layer and one choice, the mean over the blocks measured."""

    recall: float  # the share of each row's attention that its kept keys hold
    error: float  # of the output: norm of the difference over the norm of dense attention's
    keys: float  # kept by a list


class ChoiceMeter:
    """Measures choices on one layer's inputs, at query blocks that end at `ends`, against dense attention there."""

    def __init__(self, layer: LayerInputs, ends: Sequence[int]) -> None:
        self.layer, self.ends = layer, ends
        self._dense: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        self._chunks: dict[Any, policies.Chunks | None] = {}

    @torch.no_grad()
    def measure(self, choice: Choice) -> Quality:
        q_block, layer = choice.config.q_block, self.layer
        if (choice.chunker, choice.takes_chunks) not in self._chunks:
            self._chunks[choice.chunker, choice.takes_chunks] = choice.cut(layer.k)
        chunks = self._chunks[choice.chunker, choice.takes_chunks]
        results = []
        for end in self.ends:
            q = layer.q[:, :, end - q_block : end]
            k, v = layer.k[:, :, :end], layer.v[:, :, :end]
            if (end, q_block) not in self._dense:
                self._dense[end, q_block] = self._attend(q, k, v, policies.dense(q, k, choice.config), q_block)
            dense_out, dense_lse = self._dense[end, q_block]
            lists = choice.runs(layer, q, k, None if chunks is None else _ended(chunks, end))
            out, lse = self._attend(q, k, v, lists, q_block)
            recall = (lse - dense_lse).exp().mean().item()
            error = ((out - dense_out).norm() / dense_out.norm()).item()
            results.append((recall, error, (lists[0][..., 1] - lists[0][..., 0]).sum(-1).float().mean().item()))
        return Quality(*(sum(column) / len(results) for column in zip(*results, strict=True)))

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, lists: tuple[Tensor, Tensor], q_block: int
    ) -> tuple[Tensor, Tensor]:
        return ops.sparse_attention(
            q, k, v, *lists, q_block, scale=self.layer.scale, softcap=self.layer.softcap, return_lse=True
        )


def _ended(chunks: policies.Chunks, end: int) -> policies.Chunks:
    """The chunks of the first `end` keys: those of the whole prompt, the one that holds key `end` cut there."""
    offsets = chunks[0].clamp(max=end)
    return offsets, (offsets[:, :-1] < offsets[:, 1:]).sum(1, dtype=torch.int32)


@torch.no_grad()
def selection_of(choice: Choice, layer: LayerInputs) -> Selection:
    """The chunks and the kept keys of a layer's whole prompt; a policy without chunks has one."""
    chunks = choice.cut(layer.k)
    runs, num_runs = choice.runs(layer, layer.q, layer.k, chunks)
    offsets, num_chunks = chunks or policies.fixed_chunks(layer.k, layer.k.shape[2])
    return Selection(offsets, num_chunks, runs, num_runs, choice.config.q_block, layer.q.shape[2], layer.k.shape[2])


@dataclass(frozen=True)
class Cost:
    """Milliseconds of one layer's whole prompt."""

    choice_ms: float
    attention_ms: float


@torch.no_grad()
def layer_cost(choice: Choice, layer: LayerInputs, repeats: int) -> Cost:
    """The best of `repeats` for choosing the keys and for attending to them.

    A dense choice is torch's attention, which knows no soft cap; with one, it is the kernel over every key. One thread
    on a CPU is timed by the process's own clock, which other processes do not disturb.
    """
    own_clock = not layer.q.is_cuda and torch.get_num_threads() == 1
    now = time.process_time if own_clock else time.perf_counter
    by_torch = choice.policy is policies.dense and layer.softcap == 0
    sync = torch.cuda.synchronize if layer.q.is_cuda else lambda: None
    best = [math.inf, math.inf]
    for _ in range(repeats):
        sync()
        begin = now()
        lists = None if by_torch else choice.runs(layer, layer.q, layer.k, choice.cut(layer.k))
        sync()
        middle = now()
        if lists is None:
            torch.nn.functional.scaled_dot_product_attention(
                layer.q, layer.k, layer.v, is_causal=True, scale=layer.scale, enable_gqa=True
            )
        else:
            ops.sparse_attention(
                layer.q, layer.k, layer.v, *lists, choice.config.q_block, scale=layer.scale, softcap=layer.softcap
            )
        sync()
        end = now()
        best = [min(best[0], middle - begin), min(best[1], end - middle)]
    return Cost(best[0] * 1e3, best[1] * 1e3)


# ---- needles and answers

# Which rows are sparse: all; the context's alone (the paper's protocol); or the question's and the answer's alone.
ROWS = ("all", "context", "question")


class Asker:
    """Asks questions about one context under one choice; the context's pass is made once."""

    def __init__(self, loaded: LoadedModel, ids: Sequence[int], choice: Choice | None, context_sparse: bool) -> None:
        self._loaded, self._choice = loaded, choice
        self._cache = DynamicCache()  # without the model's config every layer keeps every key, so it can be cropped
        self._length = len(ids)
        with PolicyAttention(loaded, choice) as attention:
            attention.sparse = context_sparse
            attention.forward(ids, self._cache, 1)

    def forced(self, question: Question, sparse: bool, choice: Choice | None = None) -> bool:
        """True if every token of an answer is the greedy choice after the question and the tokens before it.

        The question is one piece; in the answer each token is a block of its own, as in decoding. `choice` replaces the
        context's.
        """
        encode = self._loaded.tokenizer.encode
        asked = encode(question.text)
        with PolicyAttention(self._loaded, choice or self._choice) as attention:
            attention.sparse = sparse
            first = attention.forward(asked, self._cache, 1)
            for answer in question.answers:
                tokens = encode(answer)
                attention.q_block = 1
                rest = [attention.forward(tokens[:-1], self._cache, len(tokens) - 1)] if len(tokens) > 1 else []
                greedy = torch.cat([first, *rest]).argmax(-1).tolist()
                self._crop(self._length + len(asked))
                if greedy == tokens:
                    break
        self._crop(self._length)
        return greedy == tokens

    def _crop(self, length: int) -> None:
        """Back to `length` tokens: a negative count is what every version of transformers understands."""
        if (past := self._cache.get_seq_length()) > length:
            self._cache.crop(length - past)

    def generated(self, question: Question, sparse: bool) -> str:
        """The greedy answer, up to the end-of-sequence token or the question's max_new_tokens."""
        eos = self._loaded.model.generation_config.eos_token_id
        stops = set(eos if isinstance(eos, list) else [eos])
        with PolicyAttention(self._loaded, self._choice) as attention:
            attention.sparse = sparse
            tokens = [int(attention.forward(self._loaded.tokenizer.encode(question.text), self._cache, 1).argmax())]
            attention.q_block = 1
            while tokens[-1] not in stops and len(tokens) < question.max_new_tokens:
                tokens.append(int(attention.forward(tokens[-1:], self._cache, 1).argmax()))
        self._crop(self._length)
        return self._loaded.tokenizer.decode([t for t in tokens if t not in stops])


def score_answer(question: Question, answer: str) -> float:
    return METRICS[question.metric](answer, question.answers)


# ---- perplexity, time and memory


def tail_perplexity(loaded: LoadedModel, ids: Sequence[int], choice: Choice | None, tail: int) -> float:
    """Exp of the mean negative log likelihood of the last `tail` tokens, every row sparse."""
    with PolicyAttention(loaded, choice) as attention:
        logits = attention.forward(ids[:-1], None, tail)
    truth = torch.tensor(list(ids[-tail:]), device=logits.device)
    return math.exp(torch.nn.functional.cross_entropy(logits.float(), truth).item())


@dataclass(frozen=True)
class Speed:
    first_token_s: float
    peak_mib: float  # above what was in use before


def first_token(loaded: LoadedModel, ids: Sequence[int], choice: Choice | None, repeats: int = 1) -> Speed:
    """Time to the first token, the best of `repeats`, and the peak memory (of the GPU, where the model is on one)."""
    device, times = loaded.model.device, []
    on_gpu = device.type == "cuda"
    with PolicyAttention(loaded, choice) as attention:
        attention.forward(ids[:64], None, 1)
        peak = 0.0
        for _ in range(repeats):
            if on_gpu:
                torch.cuda.reset_peak_memory_stats(device)
                before = torch.cuda.memory_allocated(device)
            with PeakMemory() as memory:
                begin = time.perf_counter()
                int(attention.forward(ids, DynamicCache(config=loaded.model.config), 1).argmax())  # waits for the GPU
                times.append(time.perf_counter() - begin)
            used = (torch.cuda.max_memory_allocated(device) - before) / 2**20 if on_gpu else memory.mib
            peak = max(peak, used)
    return Speed(min(times), peak)
