"""DHSAConfig: how a model's global attention layers choose their keys."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import Any, Literal, TypeAlias

IntOrAuto: TypeAlias = Any  # an int or "auto"; Any, because DHSAConfig.over leaves ints only

# A field left at _PRESET takes its preset's value. None of these fields has None as a value of its own.
_PRESET: Any = None

PRESETS: dict[str, dict[str, Any]] = {
    # As the paper's published code chooses: one selection for all heads, sqrt(n)-pooled dot products, decode dense.
    "paper": dict(
        q_block=128, select_heads="one", pool="sqrt", score="dot", refine=0, q_stride=8, rows="sample", sink=128,
        local=128, dense_tail=64, decode="dense",
    ),
    # Chunks scored by the attention mass that means of queries would give them, then a token-level refinement; decode
    # sparse.
    "accurate": dict(
        q_block="auto", select_heads="kv", pool="mean", score="mass", refine="auto", q_stride="auto", rows="mean",
        sink=16, local=64, dense_tail=0, decode="sparse",
    ),
}  # fmt: skip

# "auto" spends what a call's length and budget leave (docs/choosing-keys.md): over more than LONG_FROM keys the choice
# would cost more than the attention, so twice as many queries share one; a budget of SMALL_BUDGET or less leaves time
# for more candidates, and needs them.
LONG_FROM, SMALL_BUDGET = 16384, 512

# ChunkIndex closes an open chunk at this length at the latest.
MAX_OPEN_CHUNK = 64


@dataclass(frozen=True)
class DHSAConfig:
    """Settings of DHSA attention in a model. Lengths are tokens.

    preset          "paper" or "accurate": the source of every field left unset
    budget          keys that a query block keeps, the forced ones (sink, local) included
    q_block         queries that share one choice of keys; "auto": 64, and 128 in a long call with room for them
    select_heads    "one" list for all heads, one per "kv" head, or one per "query" head
    pool, score     chunk vectors ("sqrt", "mean", "sum") and what they are scored by ("dot" or "mass")
    refine          0, or how many times the budget goes through the token-level stage; "auto": 8, in a short call with
                    a small budget 16, in a long one with another q_block than 128 (a decode, too) 4
    q_stride, rows  score "mass": of each q_stride queries of a block, the last is read ("sample"), or their "mean";
                    "auto": 8, and half a block in a long call
    sink, local     keys that are always kept: the first ones, and the nearest ones
    dense_tail      the last queries of a call that keep every key; each piece of a chunked prefill has its own
    decode          "dense", or "sparse": one ChunkIndex per layer chooses the keys of each new token
    layers          layer indices that run DHSA; None: every layer without a sliding window
    min_length      attention over fewer keys than this is dense; None: the budget, below which both are the same
    share_boundaries  True: the first DHSA layer of a forward pass cuts the chunks and the others reuse them
    chunk_size      mean length of a chunk: at most max(1, Lk // chunk_size) of them
    segment         0, or a forced cut at every multiple of it, with a quota of chunks for each segment: a prompt that
                    comes in pieces of `segment` tokens is cut as in one prefill, generate(prefill_chunk_size=segment)
    band_kernel     layers with a sliding window: prompts longer than the window on sparse_attention, which skips what
                    the window hides (True), or on transformers' sdpa and its mask (False); soft-capped ones always are
    nms_radius, boundary_window, threshold, strict   as in sparse_prefill

    A call is long with more than 16384 keys, and a budget small up to 512. `over` gives the numbers.

    Raises ValueError for an unknown name, a size out of range, or a budget that cannot hold its forced keys.
    """

    preset: Literal["paper", "accurate"] = "accurate"
    budget: int = 1024
    q_block: IntOrAuto = _PRESET
    select_heads: Literal["one", "kv", "query"] = _PRESET
    pool: Literal["sqrt", "mean", "sum"] = _PRESET
    score: Literal["dot", "mass"] = _PRESET
    refine: IntOrAuto = _PRESET
    q_stride: IntOrAuto = _PRESET
    rows: Literal["sample", "mean"] = _PRESET
    sink: int = _PRESET
    local: int = _PRESET
    dense_tail: int = _PRESET
    decode: Literal["dense", "sparse"] = _PRESET
    layers: tuple[int, ...] | None = None
    min_length: int | None = None
    share_boundaries: bool = False
    chunk_size: int = 16
    segment: int = 0
    band_kernel: bool = True
    nms_radius: int = 8
    boundary_window: int = 4
    threshold: float | None = None
    strict: bool = False

    def __post_init__(self) -> None:
        _one_of("preset", self.preset, tuple(PRESETS))
        for name, value in PRESETS[self.preset].items():
            if getattr(self, name) is _PRESET:
                object.__setattr__(self, name, value)
        if self.layers is not None:
            object.__setattr__(self, "layers", tuple(self.layers))
        _one_of("select_heads", self.select_heads, ("one", "kv", "query"))
        _one_of("pool", self.pool, ("sqrt", "mean", "sum"))
        _one_of("score", self.score, ("dot", "mass"))
        _one_of("rows", self.rows, ("sample", "mean"))
        _one_of("decode", self.decode, ("dense", "sparse"))
        for name in ("chunk_size", "boundary_window"):
            _at_least(name, getattr(self, name), 1)
        for name, least in (("q_block", 1), ("refine", 0), ("q_stride", 1)):
            if getattr(self, name) != "auto":
                _at_least(name, getattr(self, name), least, ' or "auto"')
        for name in ("sink", "local", "dense_tail", "nms_radius", "min_length", "segment"):
            if getattr(self, name) is not None:
                _at_least(name, getattr(self, name), 0)
        if self.budget < self.smallest_budget:
            raise ValueError(
                f"dhsa_ext.DHSAConfig: budget: expected at least {self.smallest_budget} (the forced keys of preset "
                f"{self.preset!r} with sink {self.sink}, local {self.local}, q_block {self.q_block}, decode "
                f"{self.decode!r}), got {self.budget}"
            )
        if self.decode == "sparse" and self.nms_radius >= MAX_OPEN_CHUNK:
            raise ValueError(
                f"dhsa_ext.DHSAConfig: nms_radius: expected less than {MAX_OPEN_CHUNK} with decode 'sparse', "
                f"got {self.nms_radius}"
            )

    @property
    def smallest_budget(self) -> int:
        """The forced keys of one block: sink, local and the block itself; in sparse decode the open tail as well."""
        prefill = self._forced(64 if self.q_block == "auto" else self.q_block)
        decode = self.sink + max(self.local, MAX_OPEN_CHUNK - 1 + self.boundary_window)
        return max(prefill, decode) if self.decode == "sparse" else prefill

    def _forced(self, q_block: int) -> int:
        return self.sink + self.local + q_block - 1

    @property
    def dense_below(self) -> int:
        """Attention over fewer keys than this is dense."""
        return self.budget if self.min_length is None else self.min_length

    def heads(self, query_heads: int, kv_heads: int) -> int:
        """S, the number of selections."""
        return {"one": 1, "kv": kv_heads, "query": query_heads}[self.select_heads]

    def max_chunks(self, seqlen_k: int) -> int:
        """The quota of chunks: of the whole row, or of one segment."""
        return max(1, (self.segment or seqlen_k) // self.chunk_size)

    def over(self, seqlen_k: int) -> DHSAConfig:
        """The same config with a number for each "auto", as in a prefill over so many keys."""
        return _settled(self, self.q_block, seqlen_k > LONG_FROM)

    def prefill_args(self, query_heads: int, kv_heads: int, seqlen_k: int) -> dict[str, Any]:
        """Keyword arguments of ops.sparse_prefill for this config, over seqlen_k keys."""
        same = (
            "budget", "q_block", "score", "pool", "refine", "q_stride", "rows", "sink", "local", "dense_tail",
            "boundary_window", "nms_radius", "threshold", "segment", "strict",
        )  # fmt: skip
        settled = self.over(seqlen_k)
        arguments = {name: getattr(settled, name) for name in same}
        arguments["max_chunks"] = self.max_chunks(seqlen_k)
        arguments["select_heads"] = self.heads(query_heads, kv_heads)
        return arguments

    def decode_args(self, seqlen_k: int) -> dict[str, Any]:
        """Keyword arguments of ops.sparse_decode for this config, over seqlen_k keys or a cache with room for them."""
        settled = _settled(self, 1, seqlen_k > LONG_FROM)
        return {name: getattr(settled, name) for name in ("budget", "score", "refine", "sink", "local")}

    def __str__(self) -> str:
        set_here = {f.name: getattr(self, f.name) for f in fields(self)}
        unset = {**PRESETS[self.preset], **{f.name: f.default for f in fields(self) if f.default is not _PRESET}}
        changed = [f"{k}={v!r}" for k, v in set_here.items() if k not in ("preset", "budget") and v != unset.get(k)]
        return f"DHSAConfig({', '.join([f'preset={self.preset!r}', f'budget={self.budget}', *changed])})"


@lru_cache(maxsize=64)  # asked for by every layer and token
def _settled(config: DHSAConfig, q_block: IntOrAuto, long: bool) -> DHSAConfig:
    small = config.budget <= SMALL_BUDGET
    if q_block == "auto":
        q_block = 128 if long and not small and config._forced(128) <= config.budget else 64
    if long:
        numbers = {"q_stride": max(1, q_block // 2), "refine": 8 if small or q_block == 128 else 4}
    else:
        numbers = {"q_stride": 8, "refine": 16 if small else 8}
    return replace(config, q_block=q_block, **{n: x for n, x in numbers.items() if getattr(config, n) == "auto"})


def _one_of(name: str, value: object, known: tuple[str, ...]) -> None:
    if value not in known:
        expected = ", ".join(repr(k) for k in known)
        raise ValueError(f"dhsa_ext.DHSAConfig: {name}: expected one of {expected}, got {value!r}")


def _at_least(name: str, value: object, least: int, otherwise: str = "") -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(
            f"dhsa_ext.DHSAConfig: {name}: expected an integer of at least {least}{otherwise}, got {value!r}"
        )
