"""The inputs of one shape, and what its contestants share: lists and exact answers, each made when first asked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from answers import check_rows, exact_rows, sampled_rows
from lists import Lists, aligned_lists, chosen_lists, scattered_lists, single_key_lists, whole_lists
from shapes import Shape


class Inputs:
    """Seeded random q [B, H, Lq, D], k and v [B, Hkv, Lk, D], contiguous as scaled_dot_product_attention likes them."""

    def __init__(self, shape: Shape, device: str, dtype: torch.dtype) -> None:
        generator = torch.Generator(device).manual_seed(0)

        def normal(heads: int, length: int) -> Tensor:
            size = (shape.batch, heads, length, shape.head_dim)
            return torch.randn(size, device=device, dtype=dtype, generator=generator)

        q = normal(shape.heads, shape.queries)
        k, v = normal(shape.heads_kv, shape.seqlen_k), normal(shape.heads_kv, shape.seqlen_k)
        self._set(shape, q, k, v)

    def _set(self, shape: Shape, q: Tensor, k: Tensor, v: Tensor) -> None:
        self.shape, self.q, self.k, self.v = shape, q, k, v
        self.device, self.dtype = q.device.type, q.dtype
        self.rows = sampled_rows(shape)
        self.made: dict[str, Lists] = {}
        self._exact: dict[str, Tensor] = {}

    @classmethod
    def of(cls, other: Inputs, shape: Shape) -> Inputs:
        """The same q, k, v for a shape that chooses its keys in another way."""
        inputs = cls.__new__(cls)
        inputs._set(shape, other.q, other.k, other.v)
        return inputs

    def lists(self, kind: str) -> Lists:
        """A, B and C of lists.py; "tail", A with a dense tail of 64 queries; "chunks"; "dense", every key."""
        makers: dict[str, Callable[[], Lists]] = {
            "A": lambda: chosen_lists(self.q, self.k, self.shape),
            "tail": lambda: chosen_lists(self.q, self.k, self.shape.but(dense_tail=64)),
            "B": lambda: aligned_lists(self.shape, self.device),
            "C": lambda: single_key_lists(self.shape, self.device),
            "chunks": lambda: scattered_lists(self.shape, self.device),
            "dense": lambda: whole_lists(self.shape, self.device),
        }
        if kind not in self.made:
            self.made[kind] = makers[kind]()
        return self.made[kind]

    def checker(self, kind: str, share: float = 1.0, shape: Shape | None = None) -> Callable[[Any], None]:
        """A check against the exact answer on those lists; "all" is attention to every key up to the query."""

        def check(answer: Any) -> None:
            if kind not in self._exact:
                lists = None if kind == "all" else self.lists(kind)
                self._exact[kind] = exact_rows(self.q, self.k, self.v, lists, shape or self.shape, self.rows)
            check_rows(answer, self._exact[kind], self.rows, self.dtype, share)

        return check


def sizes(shape: Shape) -> dict[str, Any]:
    """The shape as the fields of a result."""
    return dict(
        seqlen_q=shape.queries, seqlen_k=shape.seqlen_k, budget=shape.budget, heads=shape.heads,
        heads_kv=shape.heads_kv, head_dim=shape.head_dim, q_block=shape.q_block, select_heads=shape.select_heads,
    )  # fmt: skip
