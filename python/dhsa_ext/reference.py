"""Every stage in a few lines of plain torch: the oracle of the tests, and the fallback without a native library.

Each function has the name, the arguments and the results of the op in `dhsa_ext.ops`, takes any float type, runs on any
device and computes in float64; scores and pooled vectors come back as float32, indices as int32. Loops run over query
blocks, never over tokens (stage 2's greedy walk apart). Arguments are checked as the native library checks them.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F

from . import checks

Tensor = torch.Tensor
INF = math.inf


# --- shared geometry -------------------------------------------------------------------------------------------------


def chunk_capacity(k_len: int, max_chunks: int, segment: int = 0) -> int:
    """C_max, the columns for chunks."""
    if segment == 0:
        return max_chunks
    rest = k_len % segment
    return k_len // segment * max_chunks + (max(1, max_chunks * rest // segment) if rest > 0 else 0)


def run_capacity(chunks: int, budget: int, min_chunk: int) -> int:
    """R of `select_keys`."""
    # sym_min: a size that torch.compile can keep symbolic, where min() would be a guard and a recompilation
    return torch.sym_min(chunks, budget // min_chunk + 1) + 3


def refined_run_capacity(k_len: int, budget: int) -> int:
    """R of `refine_keys`."""
    return torch.sym_max(1, torch.sym_min(budget, (k_len + 1) // 2))


def _bounds(offsets: Tensor, num_chunks: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """begin, end [B, C] int64 of each chunk; columns without a chunk are empty, malformed offsets are clamped."""
    edges = offsets.long().clamp(0, length)
    begin, end = edges[:, :-1], edges[:, 1:]
    column = torch.arange(begin.shape[1], device=edges.device)
    end = torch.where(column < num_chunks.long()[:, None], torch.maximum(begin, end), begin)
    return begin, end


def _chunk_of_token(offsets: Tensor, num_chunks: Tensor, length: int) -> Tensor:
    """[B, length] int64: the chunk that holds each token, -1 outside every chunk."""
    begin, end = _bounds(offsets, num_chunks, length)
    chunk = torch.full((offsets.shape[0], length), -1, dtype=torch.long, device=offsets.device)
    for b in range(offsets.shape[0]):
        sizes = end[b] - begin[b]
        ids = torch.repeat_interleave(torch.arange(len(sizes), device=offsets.device), sizes)
        first = torch.repeat_interleave(begin[b], sizes)
        rank = torch.arange(len(ids), device=offsets.device) - torch.repeat_interleave(sizes.cumsum(0) - sizes, sizes)
        chunk[b, first + rank] = ids
    return chunk


def _to_heads(x: Tensor, heads: int) -> Tensor:
    """[B, Hx, ...] to [B, heads, ...]: the mean over groups of consecutive heads, or each head repeated."""
    if x.shape[1] % heads == 0:
        return x.unflatten(1, (heads, x.shape[1] // heads)).mean(2)
    return x.repeat_interleave(heads // x.shape[1], dim=1)


def _divisor(n: Tensor, scale: str) -> Tensor:
    n = n.double().clamp_min(1)
    return {"sqrt": n.sqrt(), "mean": n, "sum": torch.ones_like(n)}[scale]


def _ordered(scores: Tensor) -> Tensor:
    """Scores as they are compared: a NaN counts as -inf, -0 as +0."""
    return torch.where(scores.isnan(), -INF, scores) + 0.0


def _softcapped(logits: Tensor, softcap: float) -> Tensor:
    return softcap * torch.tanh(logits / softcap) if softcap > 0 else logits


def _softmax_scale(scale: float | None, head_dim: int) -> float:
    return 1.0 / math.sqrt(head_dim) if scale is None else scale


# --- stages, in pipeline order ---------------------------------------------------------------------------------------


def boundary_scores(k: Tensor, window: int = 4) -> Tensor:
    checks.boundary_scores(k, window)
    x = k.double().transpose(1, 2).flatten(2)  # [B, Lk, Hkv * D]
    scores = x.new_full(x.shape[:2], -INF)
    length = x.shape[1]
    if length >= 2 * window:
        means = x.unfold(1, window, 1).mean(-1)  # entry t: tokens t .. t + window - 1
        left, right = means[:, : length - 2 * window + 1], means[:, window:]
        norms = (left.norm(dim=-1) * right.norm(dim=-1)).clamp_min(1e-6)
        scores[:, window : length - window + 1] = 1 - (left * right).sum(-1) / norms
    return scores.float()


def boundary_logits(
    k: Tensor,
    in_proj_weight: Tensor,
    in_proj_bias: Tensor,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    gate_weight: Tensor | None,
    gate_bias: Tensor | None,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    num_heads: int,
    window: int = 4,
) -> Tensor:
    weights = [in_proj_weight, in_proj_bias, out_proj_weight, out_proj_bias, norm_weight, norm_bias]
    weights += [fc1_weight, fc1_bias, fc2_weight, fc2_bias]
    checks.boundary_logits(k, weights, gate_weight, gate_bias, num_heads, window)
    win, bin_, wout, bout, wnorm, bnorm, w1, b1, w2, b2 = (w.double() for w in weights)
    x = k.double().transpose(1, 2).flatten(2)  # [B, Lk, C_in]
    batch, length, width = x.shape
    logits = x.new_full((batch, length), -INF)
    slab = 1024  # cuts worked at once: windows of 2 * window tokens are materialised for one slab only
    for start in range(window, length - window + 1, slab):
        cuts = torch.arange(start, min(start + slab, length - window + 1), device=x.device)
        tokens = cuts[:, None] + torch.arange(-window, window, device=x.device)
        rows = x[:, tokens].flatten(0, 1)  # [B * n, 2 window, C_in]
        q, kk, v = (t.unflatten(-1, (num_heads, -1)).transpose(1, 2) for t in F.linear(rows, win, bin_).chunk(3, -1))
        attended = (q @ kk.mT / math.sqrt(width / num_heads)).softmax(-1) @ v
        attended = F.linear(attended.transpose(1, 2).flatten(2), wout, bout)
        halves = F.layer_norm(attended, (width,), wnorm, bnorm, 1e-5).unflatten(1, (2, window))
        if gate_weight is None or gate_bias is None:
            pooled = halves.mean(2)
        else:
            gate = F.linear(halves, gate_weight.double(), gate_bias.double()).softmax(2)
            pooled = (gate * halves).sum(2)
        left, right = pooled[:, 0], pooled[:, 1]
        cosine = F.cosine_similarity(left, right, dim=-1)[:, None]
        features = torch.cat([left, right, (left - right).abs(), left * right, cosine], -1)
        logits[:, cuts] = F.linear(F.linear(features, w1, b1).relu(), w2, b2).view(batch, -1)
    return logits.float()


def _block(blocked: bytearray, cut: int, nms_radius: int) -> None:
    near = slice(max(0, cut - nms_radius), cut + nms_radius + 1)
    blocked[near] = b"\1" * len(blocked[near])


def select_boundaries(
    scores: Tensor, max_chunks: int, nms_radius: int = 8, threshold: float | None = None, segment: int = 0
) -> tuple[Tensor, Tensor]:
    checks.select_boundaries(scores, max_chunks, nms_radius, threshold, segment)
    batch, length = scores.shape
    capacity = chunk_capacity(length, max_chunks, segment)
    offsets = torch.full((batch, capacity + 1), length, dtype=torch.int32)
    num_chunks = torch.zeros(batch, dtype=torch.int32)
    ordered = _ordered(scores).cpu()
    floor = -INF if threshold is None else torch.tensor(threshold, dtype=torch.float32)
    for b in range(batch):
        by_score = ordered[b].sort(descending=True, stable=True).indices
        candidates = by_score[ordered[b][by_score] > floor].tolist()
        span = segment or max(length, 1)
        forced = [*range(0, length, span), length]
        blocked = bytearray(length + 1)
        for cut in forced:
            _block(blocked, cut, nms_radius)
        room = [max_chunks - 1] * (length // span)
        if length % span:
            room.append(max(1, max_chunks * (length % span) // span) - 1)
        accepted = []
        for t in candidates:
            if room[t // span] == 0 or blocked[t]:
                continue
            accepted.append(t)
            room[t // span] -= 1
            _block(blocked, t, nms_radius)
        cuts = sorted(set(forced) | set(accepted))
        num_chunks[b] = len(cuts) - 1
        offsets[b, : len(cuts)] = torch.tensor(cuts, dtype=torch.int32)
    return offsets.to(scores.device), num_chunks.to(scores.device)


def chunk_pool(x: Tensor, offsets: Tensor, num_chunks: Tensor, heads: int, scale: str = "sqrt") -> Tensor:
    checks.chunk_pool(x, offsets, num_chunks, heads, scale)
    batch, _, length, head_dim = x.shape
    begin, end = _bounds(offsets, num_chunks, length)
    chunk = _chunk_of_token(offsets, num_chunks, length)
    capacity = offsets.shape[1] - 1
    sums = x.new_zeros((batch, heads, capacity + 1, head_dim), dtype=torch.float64)
    index = torch.where(chunk < 0, capacity, chunk)[:, None, :, None].expand(-1, heads, -1, head_dim)
    sums.scatter_add_(2, index, _to_heads(x.double(), heads))
    return (sums[:, :, :capacity] / _divisor(end - begin, scale)[:, None, :, None]).float()


def query_pool(q: Tensor, heads: int, q_block: int, scale: str = "sqrt") -> Tensor:
    checks.query_pool(q, heads, q_block, scale)
    batch, _, length, _ = q.shape
    edges = torch.arange(0, -(-length // q_block) + 1, device=q.device, dtype=torch.int32) * q_block
    offsets = edges.clamp(max=length).expand(batch, -1)
    num_chunks = torch.full((batch,), len(edges) - 1, dtype=torch.int32, device=q.device)
    return chunk_pool(q, offsets, num_chunks, heads, scale)


def chunk_scores(q_pooled: Tensor, k_pooled: Tensor) -> Tensor:
    checks.chunk_scores(q_pooled, k_pooled)
    return (q_pooled.double() @ k_pooled.double().mT).float()


def token_scores(chunk_scores: Tensor, offsets: Tensor, num_chunks: Tensor, k_len: int) -> Tensor:
    checks.token_scores(chunk_scores, offsets, num_chunks, k_len)
    chunk = _chunk_of_token(offsets, num_chunks, k_len)[:, None, None, :].expand(*chunk_scores.shape[:3], -1)
    if chunk_scores.shape[-1] == 0:
        return chunk_scores.new_full(chunk.shape, -INF)
    return torch.where(chunk < 0, -INF, chunk_scores.gather(-1, chunk.clamp_min(0)))


class _Blocks:
    """The query blocks of a call: positions of each block's first and last query, and its masks over the keys."""

    def __init__(self, q_len: int, k_len: int, q_block: int, device: torch.device):
        self.first = torch.arange(0, q_len, q_block, device=device)  # query indices
        self.last = (self.first + q_block).clamp(max=q_len) - 1
        self.p0, self.p1 = self.first + k_len - q_len, self.last + k_len - q_len
        self.q_len, self.keys = q_len, torch.arange(k_len, device=device)

    def candidates(self, window: int | None) -> Tensor:  # [nQ, Lk]
        seen = self.keys <= self.p1[:, None]
        return seen if window is None else seen & (self.keys > self.p0[:, None] - window)

    def forced(self, sink: int, local: int, tail: Tensor) -> Tensor:  # [nQ, Lk]; the keys from `tail` on have no chunk
        return (self.keys < sink) | (self.keys >= self.p0[:, None] - local + 1) | (self.keys >= tail)

    def dense(self, dense_tail: int) -> Tensor:  # [nQ]
        return self.last >= self.q_len - dense_tail


def _rank(order_class: Tensor, scores: Tensor) -> Tensor:
    """Rank of each key, 0 first: by falling class, then falling score, then rising index."""
    by_score = _ordered(scores).sort(dim=-1, descending=True, stable=True).indices
    by_class = order_class.gather(-1, by_score).sort(dim=-1, descending=True, stable=True).indices
    order = by_score.gather(-1, by_class)
    ranks = torch.arange(order.shape[-1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter_(-1, order, ranks)


def _runs(kept: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
    """Keys kept [nQ, Lk] to runs [nQ, R, 2], num_runs [nQ]; an overflow keeps the first R - 1 runs and the last."""
    padded = F.pad(kept.to(torch.int8), (1, 1))
    step = padded[:, 1:] - padded[:, :-1]
    row, begin = (step == 1).nonzero(as_tuple=True)
    end = (step == -1).nonzero(as_tuple=True)[1]
    count = (step == 1).sum(-1)
    slot = torch.arange(len(row), device=kept.device) - (count.cumsum(0) - count)[row]
    is_last = slot == count[row] - 1
    use = (slot < capacity - 1) | is_last
    runs = torch.zeros((kept.shape[0], capacity, 2), dtype=torch.int32, device=kept.device)
    where = (row[use], slot[use].clamp(max=capacity - 1))
    runs[where] = torch.stack([begin, end], -1)[use].int()
    return runs, count.clamp(max=capacity).int()


def _tail(offsets: Tensor, num_chunks: Tensor, k_len: int) -> Tensor:
    """[B] the first key that belongs to no chunk: offsets[num_chunks]."""
    last = num_chunks.long().clamp(0, offsets.shape[1] - 1)
    return offsets.long().gather(1, last[:, None])[:, 0].clamp(0, k_len)


def select_keys(
    chunk_scores: Tensor,
    offsets: Tensor,
    num_chunks: Tensor,
    q_len: int,
    k_len: int,
    q_block: int,
    budget: int,
    *,
    sink: int = 16,
    local: int = 64,
    window: int | None = None,
    dense_tail: int = 0,
    min_chunk: int = 1,
) -> tuple[Tensor, Tensor]:
    checks.select_keys(
        chunk_scores, offsets, num_chunks, q_len, k_len, q_block, budget, sink, local, window, dense_tail, min_chunk
    )
    batch, heads, blocks, chunks = chunk_scores.shape
    capacity = run_capacity(chunks, budget, min_chunk)
    runs = torch.zeros((batch, heads, blocks, capacity, 2), dtype=torch.int32, device=chunk_scores.device)
    num_runs = torch.zeros((batch, heads, blocks), dtype=torch.int32, device=chunk_scores.device)
    geometry = _Blocks(q_len, k_len, q_block, chunk_scores.device)
    candidates = geometry.candidates(window)
    tail = _tail(offsets, num_chunks, k_len)
    for b in range(batch):
        forced = geometry.forced(sink, local, tail[b]) & candidates
        keep = torch.maximum(forced.sum(-1), candidates.sum(-1).clamp(max=budget))
        keep = torch.where(geometry.dense(dense_tail), candidates.sum(-1), keep)
        for s in range(heads):
            one = token_scores(chunk_scores[b : b + 1, s : s + 1], offsets[b : b + 1], num_chunks[b : b + 1], k_len)
            rank = _rank(candidates.int() + forced.int(), one[0, 0])
            runs[b, s], num_runs[b, s] = _runs(rank < keep[:, None], capacity)
    return runs, num_runs


def block_rows(q: Tensor, first: int, last: int, q_stride: int, rows: str) -> Tensor:
    """The rows [..., n, D] that stand for queries first ... last of q [..., Lq, D], counted back from the last.

    "sample": the last query and every q_stride-th before it. "mean": the means of the q_stride queries that end there,
    the block's first row of those it has, as the native kernels take them: float32 sums in rising order, one division,
    rounded to q's type.
    """
    ends = torch.arange(last, first - 1, -q_stride, device=q.device)
    if rows == "sample":
        return q[..., ends, :]
    sums = q.new_zeros((*q.shape[:-2], len(ends), q.shape[-1]), dtype=torch.float32)
    for back in reversed(range(min(q_stride, last - first + 1))):
        held = (ends - back >= first)[:, None]
        sums = torch.where(held, sums + q[..., (ends - back).clamp_min(first), :].float(), sums)
    # The divisor is a tensor on q's device: torch would multiply by the reciprocal of a number.
    counts = torch.minimum(ends - first + 1, torch.full_like(ends, q_stride)).float()[:, None]
    return (sums / counts).to(q.dtype)


def _mass_of_block(rows: Tensor, means: Tensor, sizes: Tensor, scale: float, softcap: float) -> tuple[Tensor, Tensor]:
    """Rows [H, n, D], means [S, C, D], sizes [C] (0: not a candidate) to scores [S, C], row_lse [H, n]."""
    heads = means.shape[0]
    logits = rows.unflatten(0, (heads, -1)) @ means[:, None].mT  # [S, H / S, n, C]
    z = _softcapped(scale * logits, softcap) + sizes.double().log()
    z = torch.where(z.isfinite() & (sizes > 0), z, -INF)
    lse = z.logsumexp(-1) if z.shape[-1] else z.new_full(z.shape[:-1], -INF)
    share = torch.where(z == -INF, 0.0, (z - lse[..., None]).exp()) / sizes.double().clamp_min(1)
    return share.mean((1, 2)), lse.flatten(0, 1)


def chunk_mass(
    q: Tensor,
    k_mean: Tensor,
    offsets: Tensor,
    num_chunks: Tensor,
    k_len: int,
    q_block: int,
    q_stride: int = 8,
    *,
    rows: str = "sample",
    scale: float | None = None,
    softcap: float = 0.0,
    window: int | None = None,
) -> tuple[Tensor, Tensor]:
    checks.chunk_mass(q, k_mean, offsets, num_chunks, k_len, q_block, q_stride, rows, softcap, window)
    return _chunk_mass(q, k_mean, offsets, num_chunks, k_len, q_block, q_stride, rows, scale, softcap, window)


def _chunk_mass(q, k_mean, offsets, num_chunks, k_len, q_block, q_stride, rows, scale, softcap, window, cut_chunk=None):
    """chunk_mass; cut_chunk(b, p1) -> (chunk, size, mean [S, D]) replaces the chunk that holds p1 (strict)."""
    batch, heads, q_len, head_dim = q.shape
    geometry = _Blocks(q_len, k_len, q_block, q.device)
    blocks, samples = len(geometry.first), -(-q_block // q_stride)
    scores = q.new_zeros((batch, k_mean.shape[1], blocks, k_mean.shape[2]), dtype=torch.float32)
    row_lse = q.new_full((batch, heads, blocks, samples), INF, dtype=torch.float32)
    begin, end = _bounds(offsets, num_chunks, k_len)
    scale = _softmax_scale(scale, head_dim)
    for b in range(batch):
        for j in range(blocks):
            p0, p1 = int(geometry.p0[j]), int(geometry.p1[j])
            means, sizes = k_mean[b].double(), end[b] - begin[b]
            held = begin[b] <= p1
            if window is not None:
                held &= end[b] > p0 - window + 1
            if cut_chunk is not None and (cut := cut_chunk(b, p1)) is not None:
                means, sizes = means.clone(), sizes.clone()
                sizes[cut[0]], means[:, cut[0]] = cut[1], cut[2]
            own = block_rows(q[b], int(geometry.first[j]), int(geometry.last[j]), q_stride, rows)
            share, lse = _mass_of_block(own.double(), means, torch.where(held, sizes, 0), scale, softcap)
            scores[b, :, j] = share.float()
            row_lse[b, :, j, : own.shape[1]] = lse.float()
    return scores, row_lse


def refine_keys(
    q: Tensor,
    k: Tensor,
    chunk_scores: Tensor,
    row_lse: Tensor | None,
    offsets: Tensor,
    num_chunks: Tensor,
    q_block: int,
    budget: int,
    refine: int,
    *,
    sink: int = 16,
    local: int = 64,
    window: int | None = None,
    dense_tail: int = 0,
    q_stride: int = 8,
    rows: str = "sample",
    scale: float | None = None,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor]:
    checks.refine_keys(
        q, k, chunk_scores, row_lse, offsets, num_chunks, q_block, budget, refine,
        sink, local, window, dense_tail, q_stride, rows, softcap,
    )  # fmt: skip
    batch, q_heads, q_len, head_dim = q.shape
    kv_heads, k_len = k.shape[1:3]
    heads, blocks = chunk_scores.shape[1:3]
    capacity = refined_run_capacity(k_len, budget)
    runs = torch.zeros((batch, heads, blocks, capacity, 2), dtype=torch.int32, device=q.device)
    num_runs = torch.zeros((batch, heads, blocks), dtype=torch.int32, device=q.device)
    geometry = _Blocks(q_len, k_len, q_block, q.device)
    candidates = geometry.candidates(window)
    tail = _tail(offsets, num_chunks, k_len)
    scale = _softmax_scale(scale, head_dim)
    pooled = None if row_lse is not None else query_pool(q, heads, q_block).double()
    shared_k = None if row_lse is not None else _to_heads(k.double(), heads)
    for b in range(batch):
        forced = geometry.forced(sink, local, tail[b]) & candidates
        for s in range(heads):
            one = token_scores(chunk_scores[b : b + 1, s : s + 1], offsets[b : b + 1], num_chunks[b : b + 1], k_len)
            rank = _rank(candidates.int() + forced.int(), one[0, 0])
            kept = forced | (candidates & geometry.dense(dense_tail)[:, None])
            for j in range(blocks):
                room = max(0, min(budget, int(candidates[j].sum())) - int(forced[j].sum()))
                coarse = (rank[j] < int(forced[j].sum()) + refine * (budget - int(forced[j].sum()))) & candidates[j]
                keys = (coarse & ~forced[j]).nonzero()[:, 0]
                if room == 0 or len(keys) == 0 or bool(geometry.dense(dense_tail)[j]):
                    continue
                if pooled is not None and shared_k is not None:
                    score = shared_k[b, s, keys] @ pooled[b, s, j]
                else:
                    group = range(s * q_heads // heads, (s + 1) * q_heads // heads)
                    own = block_rows(q[b], int(geometry.first[j]), int(geometry.last[j]), q_stride, rows).double()
                    score = torch.stack(
                        [
                            _key_share(
                                own[h],
                                k[b, h * kv_heads // q_heads, keys].double(),
                                row_lse[b, h, j, : own.shape[1]].double(),  # type: ignore[index]
                                scale,
                                softcap,
                            )
                            for h in group
                        ]
                    ).mean(0)
                best = _ordered(score.float()).sort(descending=True, stable=True).indices[:room]
                kept[j, keys[best]] = True
            runs[b, s], num_runs[b, s] = _runs(kept, capacity)
    return runs, num_runs


def _key_share(rows: Tensor, keys: Tensor, row_lse: Tensor, scale: float, softcap: float) -> Tensor:
    """Rows [n, D], keys [m, D], row_lse [n] to [m]: the mean over the rows of min(1, exp(s - row_lse))."""
    s = _softcapped(scale * rows @ keys.mT, softcap)
    return (s - row_lse[:, None]).exp().clamp(max=1).mean(0)


def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    runs: Tensor,
    num_runs: Tensor,
    q_block: int,
    *,
    scale: float | None = None,
    softcap: float = 0.0,
    window: int | None = None,
) -> tuple[Tensor, Tensor]:
    checks.sparse_attention(q, k, v, runs, num_runs, q_block, softcap, window)
    batch, heads, q_len, head_dim = q.shape
    kv_heads, k_len = k.shape[1:3]
    lists, blocks, capacity = runs.shape[1:4]
    scale = _softmax_scale(scale, head_dim)
    geometry = _Blocks(q_len, k_len, q_block, q.device)
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    lse = q.new_full((batch, heads, q_len), -INF, dtype=torch.float32)
    group = heads // lists  # query heads that read one list
    for b in range(batch):
        for s in range(lists):
            q_heads = slice(s * group, (s + 1) * group)
            kv_of_head = torch.arange(s * group, (s + 1) * group, device=q.device) * kv_heads // heads
            for j in range(blocks):
                kept = torch.zeros(k_len, dtype=torch.bool, device=q.device)
                for begin, end in runs[b, s, j, : int(num_runs[b, s, j].clamp(0, capacity))].tolist():
                    kept[max(0, min(begin, k_len)) : max(0, min(end, k_len))] = True
                keys = kept.nonzero()[:, 0]
                rows = slice(int(geometry.first[j]), int(geometry.last[j]) + 1)
                p = torch.arange(int(geometry.p0[j]), int(geometry.p1[j]) + 1, device=q.device)[:, None]
                logits = q[b, q_heads, rows].double() @ k[b, :, keys].double()[kv_of_head].mT
                seen = keys <= p if window is None else (keys <= p) & (keys > p - window)
                logits = _softcapped(scale * logits, softcap).masked_fill(~seen, -INF)
                if len(keys):
                    row_lse = logits.logsumexp(-1)
                    share = torch.where(seen, (logits - row_lse[..., None]).exp(), 0.0)
                    out[b, q_heads, rows] = (share @ v[b, :, keys].double()[kv_of_head]).to(q.dtype)
                    lse[b, q_heads, rows] = row_lse.float()
    return out, lse


def _strict_chunk_scores(q_pooled, k_pooled, k, offsets, num_chunks, q_len, q_block, pool):
    """chunk_scores with the chunk that holds each block's p1 pooled up to p1 only."""
    scores = chunk_scores(q_pooled, k_pooled)
    cut_chunk = _cut_chunk(k, offsets, num_chunks, q_pooled.shape[1], pool)
    last_position = _Blocks(q_len, k.shape[2], q_block, k.device).p1.tolist()
    for b in range(k.shape[0]):
        for j, p1 in enumerate(last_position):
            if (cut := cut_chunk(b, p1)) is not None:
                scores[b, :, j, cut[0]] = (q_pooled[b, :, j].double() * cut[2].float().double()).sum(-1).float()
    return scores


def _cut_chunk(k: Tensor, offsets: Tensor, num_chunks: Tensor, heads: int, scale: str):
    """A function (b, p1) -> (chunk, size, vector [S, D]) of the chunk that holds p1, ended at p1 + 1; or None."""
    begin, end = _bounds(offsets, num_chunks, k.shape[2])

    def cut(b: int, p1: int):
        held = ((begin[b] <= p1) & (p1 < end[b])).nonzero()
        if len(held) == 0:
            return None
        chunk = int(held[0])
        first = int(begin[b, chunk])
        total = _to_heads(k[b : b + 1, :, first : p1 + 1].double(), heads)[0].sum(1)
        size = p1 + 1 - first
        return chunk, size, total / _divisor(torch.tensor(size), scale).to(total.device)

    return cut


def sparse_prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    budget: int,
    *,
    max_chunks: int | None = None,
    q_block: int = 64,
    select_heads: int | None = None,
    score: str = "dot",
    pool: str = "sqrt",
    refine: int = 0,
    q_stride: int = 8,
    rows: str = "sample",
    sink: int = 16,
    local: int = 64,
    dense_tail: int = 0,
    boundary_window: int = 4,
    nms_radius: int = 8,
    threshold: float | None = None,
    segment: int = 0,
    strict: bool = False,
    offsets: Tensor | None = None,
    num_chunks: Tensor | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    window: int | None = None,
) -> tuple[Tensor, Tensor]:
    checks.sparse_prefill(
        q, k, v, budget, max_chunks, q_block, select_heads, score, pool, refine, q_stride, rows, sink, local,
        dense_tail, boundary_window, nms_radius, segment, offsets, num_chunks, softcap, window,
    )  # fmt: skip
    q_len, k_len = q.shape[2], k.shape[2]
    heads = k.shape[1] if select_heads is None else select_heads
    sink, local = min(sink, k_len), min(local, k_len)
    min_chunk = 1
    if offsets is None or num_chunks is None:
        if max_chunks is None:
            max_chunks = max(1, (segment or k_len) // 16)
        min_chunk = nms_radius + 1 if segment == 0 else 1
        scores = boundary_scores(k, boundary_window)
        offsets, num_chunks = select_boundaries(scores, max_chunks, nms_radius, threshold, segment)
    pool = "mean" if score == "mass" else pool
    k_pooled = chunk_pool(k, offsets, num_chunks, heads, pool)
    row_lse = None
    if score == "mass":
        if strict:
            cut_chunk = _cut_chunk(k, offsets, num_chunks, heads, "mean")
            chosen, row_lse = _chunk_mass(
                q, k_pooled, offsets, num_chunks, k_len, q_block, q_stride, rows, scale, softcap, window, cut_chunk
            )
        else:
            chosen, row_lse = chunk_mass(
                q, k_pooled, offsets, num_chunks, k_len, q_block, q_stride,
                rows=rows, scale=scale, softcap=softcap, window=window,
            )  # fmt: skip
    else:
        q_pooled = query_pool(q, heads, q_block)
        if strict:
            chosen = _strict_chunk_scores(q_pooled, k_pooled, k, offsets, num_chunks, q_len, q_block, pool)
        else:
            chosen = chunk_scores(q_pooled, k_pooled)
    forced: dict[str, Any] = dict(sink=sink, local=local, window=window, dense_tail=dense_tail)
    if refine:
        runs, num_runs = refine_keys(
            q, k, chosen, row_lse, offsets, num_chunks, q_block, budget, refine,
            q_stride=q_stride, rows=rows, scale=scale, softcap=softcap, **forced,
        )  # fmt: skip
    else:
        runs, num_runs = select_keys(
            chosen, offsets, num_chunks, q_len, k_len, q_block, budget, min_chunk=min_chunk, **forced
        )
    return sparse_attention(q, k, v, runs, num_runs, q_block, scale=scale, softcap=softcap, window=window)


def sparse_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_pooled: Tensor,
    offsets: Tensor,
    num_chunks: Tensor,
    budget: int,
    *,
    score: str = "dot",
    refine: int = 0,
    sink: int = 16,
    local: int = 64,
    min_chunk: int = 1,
    scale: float | None = None,
    softcap: float = 0.0,
    window: int | None = None,
    cache_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    checks.sparse_decode(
        q, k, v, k_pooled, offsets, num_chunks, budget, score, refine, sink, local, min_chunk, softcap, window,
        cache_seqlens,
    )  # fmt: skip
    if cache_seqlens is not None:
        options: dict[str, Any] = dict(
            score=score, refine=refine, sink=sink, local=local, min_chunk=min_chunk, scale=scale, softcap=softcap,
            window=window,
        )  # fmt: skip
        out, lse = torch.empty_like(q), torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
        for b, held in enumerate(cache_seqlens.clamp(0, k.shape[2]).tolist()):
            row = slice(b, b + 1)
            cache = (k[row, :, :held], v[row, :, :held], k_pooled[row], offsets[row], num_chunks[row])
            out[row], lse[row] = sparse_decode(q[row], *cache, budget, **options)
        return out, lse
    q_len, k_len = q.shape[2], k.shape[2]
    sink, local = min(sink, k_len), min(local, k_len)
    row_lse = None
    if score == "mass":
        chosen, row_lse = chunk_mass(
            q, k_pooled, offsets, num_chunks, k_len, 1, 1, scale=scale, softcap=softcap, window=window
        )
    else:
        chosen = chunk_scores(query_pool(q, k_pooled.shape[1], 1), k_pooled)
    forced: dict[str, Any] = dict(sink=sink, local=local, window=window)
    if refine:
        runs, num_runs = refine_keys(
            q, k, chosen, row_lse, offsets, num_chunks, 1, budget, refine,
            q_stride=1, scale=scale, softcap=softcap, **forced,
        )  # fmt: skip
    else:
        runs, num_runs = select_keys(
            chosen, offsets, num_chunks, q_len, k_len, 1, budget, min_chunk=min_chunk, **forced
        )
    return sparse_attention(q, k, v, runs, num_runs, 1, scale=scale, softcap=softcap, window=window)
