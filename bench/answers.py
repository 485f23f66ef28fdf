"""Right or wrong, before anything is timed: sampled queries answered in float64 from the keys that a list names."""

from __future__ import annotations

import torch
from torch import Tensor

from lists import Lists
from shapes import Shape

# ‖out − exact‖ / ‖exact‖, as dhsa_ext's tests have it: one rounding of the output, and on tensor cores one of the
# probabilities.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
# sparse_prefill may choose another key than the single stages do where two chunks score within rounding of each other:
# so many of the sampled queries have to agree.
AGREE = 7 / 8


def sampled_rows(shape: Shape, count: int = 16) -> list[int]:
    """Queries spread over the call: the first, the last, and odd ones between, not all at block edges."""
    return sorted({round(i * (shape.queries - 1) / max(1, count - 1)) for i in range(count)})


def keys_of(runs: Tensor, count: int, end: int) -> Tensor:
    """The keys of one list [R, 2] below `end`, rising."""
    start, stop = runs[:count].long().clamp(max=end).unbind(-1)
    length = stop - start
    before = torch.cumsum(length, 0) - length
    return torch.repeat_interleave(start - before, length) + torch.arange(int(length.sum()), device=runs.device)


def exact_rows(q: Tensor, k: Tensor, v: Tensor, lists: Lists | None, shape: Shape, rows: list[int]) -> Tensor:
    """float64 [B, H, rows, D]: attention over the listed keys, or over every key that is not in the future."""
    batch, heads, _, head_dim = q.shape
    heads_kv = k.shape[1]
    out = torch.zeros(batch, heads, len(rows), head_dim, dtype=torch.float64, device=q.device)
    select_heads = 1 if lists is None else lists[0].shape[1]
    groups = max(heads_kv, select_heads)  # the heads of a group share K, V and list
    for i, row in enumerate(rows):
        end = shape.seqlen_k - shape.queries + row + 1
        for b in range(batch):
            for g in range(groups):
                of_kv, of_list = g * heads_kv // groups, g * select_heads // groups
                if lists is None:
                    keys: Tensor | slice = slice(0, end)
                else:
                    where = (b, of_list, row // shape.q_block)
                    keys = keys_of(lists[0][where], int(lists[1][where]), end)
                group = slice(g * heads // groups, (g + 1) * heads // groups)
                logits = q[b, group, row].double() @ k[b, of_kv, keys].double().mT * head_dim**-0.5
                if shape.softcap:
                    logits = shape.softcap * torch.tanh(logits / shape.softcap)
                out[b, group, i] = logits.softmax(-1) @ v[b, of_kv, keys].double()
    return out


def row_errors(answer: Tensor | tuple[Tensor, ...], exact: Tensor, rows: list[int]) -> Tensor:
    """Relative error of each sampled query [rows], all heads together."""
    out = answer[0] if isinstance(answer, tuple) else answer
    got, want = (x.double().transpose(0, 2).flatten(1) for x in (out[:, :, rows], exact))
    return (got - want).norm(dim=1) / want.norm(dim=1).clamp_min(1e-30)


def check_rows(
    answer: Tensor | tuple[Tensor, ...], exact: Tensor, rows: list[int], dtype: torch.dtype, share: float = 1.0
) -> None:
    """Raise AssertionError unless at least `share` of the sampled queries are within the type's tolerance."""
    errors = row_errors(answer, exact, rows)
    agree = int((errors <= TOLERANCE[dtype]).sum())
    assert agree >= share * len(rows), (
        f"wrong answer: {len(rows) - agree} of {len(rows)} sampled queries off, worst relative error "
        f"{float(errors.nan_to_num(torch.inf).max()):.1e}"
    )
