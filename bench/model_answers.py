"""Does every contestant give the model's answer? Last logits against the same model with attention in float32.

Rounding differs from kernel to kernel, and a deep model with random weights makes more of it. How much is measured, not
guessed: the bound is three times what it does to the model's own attention (eager where logits are soft-capped, sdpa
elsewhere), on the whole prompt or on the same prompt in two pieces, whichever is more. The prompt is longer than the
model's window, so that a window that is not kept shows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache

from dhsa_ext import DHSAConfig, hf
from dhsa_ext.hf import dhsa_mask

EXACT = "dhsa_bench_exact"
FLOOR = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 5e-3}  # of the bound: a few roundings of one layer


def exact_attention(
    module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, scaling: float | None = None,
    sliding_window: int | None = None, softcap: float | None = None, **_: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Causal attention over whole, unpadded prompts, in float32, one KV head at a time."""
    seqlen_q, seqlen_k = q.shape[2], k.shape[2]
    query = torch.arange(seqlen_k - seqlen_q, seqlen_k, device=q.device)[:, None]
    key = torch.arange(seqlen_k, device=q.device)
    hidden = (key > query) | (key <= query - (sliding_window or seqlen_k))
    grouped = q.unflatten(1, (k.shape[1], -1))
    out = torch.empty_like(grouped)
    for head in range(k.shape[1]):
        logits = grouped[:, head].float() @ k[:, head, None].float().mT * (scaling or q.shape[-1] ** -0.5)
        logits = softcap * torch.tanh(logits / softcap) if softcap else logits
        out[:, head] = logits.masked_fill_(hidden, -torch.inf).softmax(-1) @ v[:, head, None].float()
    return out.flatten(1, 2).transpose(1, 2).contiguous(), None


def relative_errors(
    model: Any, entrants: list[Any], device: str, meter: Any, name: str
) -> tuple[float, dict[str, float | str]]:
    """The bound, and each contestant's relative error, or why it has none.

    meter(contestant, device) registers the contestant's attention as `name`.
    """
    length = max(256, (getattr(model.config, "sliding_window", None) or 0) + 128)
    ids = torch.randint(2, model.config.vocab_size, (1, length), device=device)
    soft_capped = bool(getattr(model.config, "attn_logit_softcapping", None))
    AttentionInterface.register(EXACT, exact_attention)
    AttentionMaskInterface.register(EXACT, dhsa_mask)
    exact = _logits(model, ids, EXACT)

    def error(logits: Tensor) -> float:
        return ((logits - exact).norm() / exact.norm()).item()

    own = "eager" if soft_capped else "sdpa"
    noise = max(error(_logits(model, ids, own)), error(_logits(model, ids, own, pieces=100)))
    errors: dict[str, float | str] = {}
    for contestant in entrants:
        if contestant.implementation == "sdpa" and soft_capped:
            errors[contestant.name] = "wrong: sdpa has no soft cap"
            continue
        try:
            if contestant.config is not None:
                config = contestant.config
                hf.register(DHSAConfig(config.preset, budget=max(length, 512), layers=config.layers, min_length=0))
            meter(contestant, device)
            errors[contestant.name] = error(_logits(model, ids, name))
        except Exception as failure:
            errors[contestant.name] = f"{type(failure).__name__}: {(str(failure).splitlines() or [''])[0]}"[:200]
    return max(FLOOR[model.dtype], 3 * noise), errors


def _logits(model: Any, ids: Tensor, implementation: str, pieces: int = 0) -> Tensor:
    model.set_attn_implementation(implementation)
    cache, logits = DynamicCache(config=model.config), torch.empty(0)
    for part in (ids[:, :pieces], ids[:, pieces:]) if pieces else (ids,):
        logits = model(part, past_key_values=cache, logits_to_keep=1).logits
    return logits.float()
