"""sparse_prefill put together from the reference's stages, block by block, and which of its rows are comparable.

Two backends that agree on every stage to 1e-4 may still keep different keys where scores are closer than that. `whole`
says for each row whether its block's cut-offs are clear of such keys; only clear rows are compared.
"""

from __future__ import annotations

import brute
import numpy as np
import torch
from cases import Case, attention_options, choice_options
from compare import NEAR_CUT, keys_of, settled, token_share

from dhsa_ext import reference


def strict_view(offsets, counts, p1):
    """Every row's chunks as a strict block with last position p1 sees them."""
    rows = [brute.strict_chunks(o, int(c), p1) for o, c in zip(offsets.numpy(), counts.numpy(), strict=True)]
    return torch.from_numpy(np.stack([r[0] for r in rows])), torch.tensor([r[1] for r in rows], dtype=torch.int32)


def scores_of(q, k, offsets, counts, case: Case, score, pool, q_stride, rows, strict):
    """Chunk scores [B, S, nQ, C] and row_lse or None, every block on its own."""
    columns = offsets.shape[1] - 1
    scores = torch.zeros(case.B, case.S, case.blocks, columns)
    samples = -(-case.q_block // q_stride)
    row_lse = torch.full((case.B, case.H, case.blocks, samples), torch.inf) if score == "mass" else None
    for block, first, last, _, p1 in brute.blocks(case.Lq, case.k_len, case.q_block):
        seen, n = strict_view(offsets, counts, p1) if strict else (offsets, counts)
        k_pooled = reference.chunk_pool(k, seen, n, case.S, "mean" if score == "mass" else pool)
        if score == "dot":
            q_pooled = reference.query_pool(q[:, :, first : last + 1], case.S, case.q_block)
            scores[:, :, block] = reference.chunk_scores(q_pooled, k_pooled)[:, :, 0]
        elif strict and p1 >= 0:
            one = reference.chunk_mass(
                q[:, :, first : last + 1], k_pooled, seen, n, p1 + 1, case.q_block, q_stride,
                rows=rows, **attention_options(case),
            )  # fmt: skip
            scores[:, :, block], row_lse[:, :, block] = one[0][:, :, 0], one[1][:, :, 0]
        elif not strict:
            args = (k_pooled, offsets, counts, case.k_len, case.q_block, q_stride)
            mass, lse = reference.chunk_mass(q, *args, rows=rows, **attention_options(case))
            scores[:, :, block], row_lse[:, :, block] = mass[:, :, block], lse[:, :, block]
    return scores, row_lse


def whole(
    q, k, v, offsets, counts, case: Case, score="dot", pool="sqrt", refine=0, q_stride=8, rows="sample", strict=False
):
    """((out, lse) in float64, clear rows [B, H, Lq]) of a prefill with these chunks.

    The choice sees q in its own type, to which means of queries are rounded.
    """
    scores, row_lse = scores_of(q, k, offsets, counts, case, score, pool, q_stride, rows, strict)
    choice = choice_options(case) | dict(sink=min(case.sink, case.k_len), local=min(case.local, case.k_len))
    logits = dict(scale=case.scale, softcap=case.softcap)
    if refine:
        args = (scores, row_lse, offsets, counts, case.q_block, case.budget, refine)
        runs, n = reference.refine_keys(q, k, *args, q_stride=q_stride, rows=rows, **choice, **logits)
    else:
        args = (scores, offsets, counts, case.Lq, case.k_len, case.q_block, case.budget)
        runs, n = reference.select_keys(*args, **choice)
    tokens = reference.token_scores(scores, offsets, counts, case.k_len)
    clear = torch.ones(case.B, case.H, case.Lq, dtype=torch.bool)
    for (b, s), (block, first, last, p0, p1) in (
        (list_, block)
        for list_ in np.ndindex(case.B, case.S)
        for block in brute.blocks(case.Lq, case.k_len, case.q_block)
    ):
        chunk_end = int(offsets[b, counts[b]])
        keys = set(brute.candidates(p0, p1, case.window))
        forced = {j for j in keys if brute.forced(j, p0, choice["sink"], choice["local"], chunk_end)}
        kept, free = keys_of(runs[b, s, block], n[b, s, block]) - forced, keys - forced
        if last >= case.Lq - case.dense_tail:
            continue
        heads = slice(s * case.H // case.S, (s + 1) * case.H // case.S)
        size = float(tokens[b, s, block, sorted(keys)].abs().nan_to_num(0, 0, 0).max()) if keys else 0.0
        if refine:
            room = max(0, case.budget - len(forced))
            short_list = set(brute.falling(free, tokens[b, s, block].numpy())[: refine * room])
            fine = settled(tokens[b, s, block], short_list, free, NEAR_CUT * size)
            share = second_score(q, k, row_lse, case, b, s, block, first, last, q_stride, rows)
            fine = fine and settled(share, kept, short_list)
        else:
            fine = settled(tokens[b, s, block], kept, free, NEAR_CUT * size)
        clear[b, heads, first : last + 1] = fine
    q, k, v = (x.double() for x in (q, k, v))
    answer = reference.sparse_attention(q, k, v, runs, n, case.q_block, **attention_options(case))
    return answer, clear


def comparable(draw, tries=20):
    """draw() -> (inputs, want, clear), until half of the rows are clear: long rows have near ties now and then."""
    for _ in range(tries):
        inputs, want, clear = draw()
        if clear.numel() == 0 or clear.double().mean() >= 0.5:
            return inputs, want, clear
    raise AssertionError("near ties in every draw: too few rows to compare")


def second_score(q, k, row_lse, case, b, s, block, first, last, q_stride, rows="sample"):
    """[Lk]: what refine_keys ranks a block's short list by."""
    heads = list(range(s * case.H // case.S, (s + 1) * case.H // case.S))
    if row_lse is None:
        q_pooled = reference.query_pool(q[b : b + 1, :, first : last + 1], case.S, case.q_block)[0, s, 0]
        return torch.from_numpy(brute.reduce_heads(k[b : b + 1].double().numpy(), case.S)[0, s]) @ q_pooled.double()
    read = k[b, [h * case.Hkv // case.H for h in heads]]
    scale = case.D**-0.5 if case.scale is None else case.scale
    lse = row_lse[b, heads, block]
    return token_share(
        q[b, heads], read, lse, first, last, q_stride=q_stride, rows=rows, scale=scale, softcap=case.softcap
    )
