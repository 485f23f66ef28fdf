"""Brute-force twins of the stages: loops over tokens, numpy float64, written from the specification's sentences.

They share no line and no idea (no prefix sums, no sorting of chunks, no gather) with dhsa_ext.reference, and are slow
on purpose: a test that holds the reference against them checks what the words say. Arrays in, arrays out.
"""

import math

import numpy as np


def blocks(q_len, k_len, q_block):
    """Yield (block, first query, last query, p0, p1) of each query block."""
    for block, first in enumerate(range(0, q_len, q_block)):
        last = min(first + q_block, q_len) - 1
        yield block, first, last, k_len - q_len + first, k_len - q_len + last


def no_nan(score):
    return -math.inf if math.isnan(score) else float(score)


def boundary_scores(k, window):
    batch, _, k_len, _ = k.shape
    scores = np.full((batch, k_len), -math.inf)
    for b in range(batch):
        for t in range(window, k_len - window + 1):
            left = np.concatenate([head[t - window : t].mean(0) for head in k[b]])
            right = np.concatenate([head[t : t + window].mean(0) for head in k[b]]) if t < k_len else left
            norms = np.linalg.norm(left) * np.linalg.norm(right)
            scores[b, t] = 1.0 - left @ right / max(norms, 1e-6)
    return scores


def select_boundaries(scores, max_chunks, nms_radius, threshold=None, segment=0):
    """The greedy loop, one candidate at a time."""
    batch, k_len = scores.shape
    least = -math.inf if threshold is None else float(np.float32(threshold))
    whole, rest = (0, k_len) if segment == 0 else divmod(k_len, segment)
    rest_quota = max_chunks if segment == 0 else max(1, max_chunks * rest // segment)
    columns = max_chunks if segment == 0 else whole * max_chunks + (rest_quota if rest else 0)
    offsets = np.full((batch, columns + 1), k_len, np.int32)
    counts = np.zeros(batch, np.int32)
    for b in range(batch):
        forced = {0, k_len} | (set(range(0, k_len, segment)) if segment else set())
        cuts = set(forced)
        chunks = {start: 1 for start in forced - {k_len}}
        order = sorted((t for t in range(k_len) if no_nan(scores[b, t]) > least), key=lambda t: (-scores[b, t], t))
        for t in order:
            home = t // segment * segment if segment else 0
            quota = max_chunks if segment and home + segment <= k_len else rest_quota
            if chunks[home] < quota and all(abs(t - cut) > nms_radius for cut in cuts):
                cuts.add(t)
                chunks[home] += 1
        row = sorted(cuts)
        offsets[b, : len(row)] = row
        counts[b] = len(row) - 1 if k_len else 0
    return offsets, counts


def reduce_heads(x, heads):
    """[B, Hx, L, D] -> [B, S, L, D]: the mean over groups of consecutive heads, or the head that each one reads."""
    given = x.shape[1]
    if given % heads == 0:
        group = given // heads
        return np.stack([x[:, s * group : (s + 1) * group].mean(1) for s in range(heads)], 1)
    return np.stack([x[:, s // (heads // given)] for s in range(heads)], 1)


def pool(x, begin, end, scale):
    """[B, S, D] over tokens [begin, end) of x [B, S, L, D]."""
    count = end - begin
    return x[:, :, begin:end].sum(2) / {"sqrt": math.sqrt(count), "mean": count, "sum": 1}[scale]


def chunk_pool(x, offsets, num_chunks, heads, scale):
    reduced = reduce_heads(x, heads)
    pooled = np.zeros((x.shape[0], heads, offsets.shape[1] - 1, x.shape[3]))
    for b in range(x.shape[0]):
        for c in range(num_chunks[b]):
            pooled[b, :, c] = pool(reduced[b : b + 1], offsets[b, c], offsets[b, c + 1], scale)[0]
    return pooled


def query_pool(q, heads, q_block, scale):
    batch, _, q_len, dim = q.shape
    pooled = np.zeros((batch, heads, -(-q_len // q_block), dim))
    for block, first, last, _, _ in blocks(q_len, q_len, q_block):
        pooled[:, :, block] = pool(reduce_heads(q, heads), first, last + 1, scale)
    return pooled


def chunk_scores(q_pooled, k_pooled):
    scores = np.zeros((*q_pooled.shape[:3], k_pooled.shape[2]))
    for b, s, i, c in np.ndindex(*scores.shape):
        scores[b, s, i, c] = q_pooled[b, s, i] @ k_pooled[b, s, c]
    return scores


def token_scores(scores, offsets, num_chunks, k_len):
    tokens = np.full((*scores.shape[:3], k_len), -math.inf)
    for b in range(scores.shape[0]):
        for c in range(num_chunks[b]):
            for j in range(offsets[b, c], offsets[b, c + 1]):
                tokens[b, :, :, j] = scores[b, :, :, c]
    return tokens


def candidates(p0, p1, window):
    return [j for j in range(p1 + 1) if window is None or j > p0 - window]


def forced(j, p0, sink, local, chunk_end):
    return j < sink or j >= p0 - local + 1 or j >= chunk_end


def falling(keys, score):
    """Keys by falling score, ties to the lower index, NaN as -inf."""
    return sorted(keys, key=lambda j: (-no_nan(score[j]), j))


def kept_keys(tokens, offsets, num_chunks, q_len, k_len, q_block, budget, sink, local, window=None, dense_tail=0):
    """{(b, s, block): set of kept keys}, token by token."""
    kept = {}
    for b, s in np.ndindex(*tokens.shape[:2]):
        end = offsets[b, num_chunks[b]]
        for block, _, last, p0, p1 in blocks(q_len, k_len, q_block):
            keys = candidates(p0, p1, window)
            keep = {j for j in keys if forced(j, p0, sink, local, end)}
            for j in falling(set(keys) - keep, tokens[b, s, block]):
                if len(keep) < min(budget, len(keys)):
                    keep.add(j)
            kept[b, s, block] = set(keys) if last >= q_len - dense_tail else keep
    return kept


def as_runs(kept, shape, capacity):
    """The canonical lists: half-open, rising, merged; a list too long keeps its first R - 1 runs and its last."""
    runs = np.zeros((*shape, capacity, 2), np.int32)
    counts = np.zeros(shape, np.int32)
    for where, keys in kept.items():
        found = []
        for j in sorted(keys):
            if found and found[-1][1] == j:
                found[-1][1] = j + 1
            else:
                found.append([j, j + 1])
        if len(found) > capacity:
            found = found[: capacity - 1] + found[-1:]
        counts[where] = len(found)
        if found:
            runs[where][: len(found)] = found
    return runs, counts


def run_capacity(columns, budget, min_chunk):
    return min(columns, budget // min_chunk + 1) + 3


def select_keys(scores, offsets, num_chunks, q_len, k_len, q_block, budget, *, sink=16, local=64, window=None,
                dense_tail=0, min_chunk=1):  # fmt: skip
    tokens = token_scores(scores, offsets, num_chunks, k_len)
    kept = kept_keys(tokens, offsets, num_chunks, q_len, k_len, q_block, budget, sink, local, window, dense_tail)
    return as_runs(kept, scores.shape[:3], run_capacity(scores.shape[3], budget, min_chunk))


def capped(logit, softcap):
    return softcap * math.tanh(logit / softcap) if softcap > 0 else logit


def rows_of(q, first, last, q_stride, rows):
    """The vectors of q [Lq, D] that stand for queries first ... last, the last one first.

    "sample": that query and every q_stride-th before it; "mean": the mean of the q_stride queries that end there, or of
    those the block has. In float64, without the rounding to q's type.
    """
    ends = range(last, first - 1, -q_stride)
    return [q[i] if rows == "sample" else np.mean([q[j] for j in range(first, i + 1)][-q_stride:], 0) for i in ends]


def log_sum_exp(values):
    top = max(values, default=-math.inf)
    return top if math.isinf(top) else top + math.log(sum(math.exp(v - top) for v in values))


def chunk_mass(q, k_mean, offsets, num_chunks, k_len, q_block, q_stride=8, *, rows="sample", scale=None, softcap=0.0,
               window=None):  # fmt: skip
    batch, heads, q_len, dim = q.shape
    lists, columns = k_mean.shape[1:3]
    scale = dim**-0.5 if scale is None else scale
    n_blocks, group = -(-q_len // q_block), heads // lists
    scores = np.zeros((batch, lists, n_blocks, columns))
    row_lse = np.full((batch, heads, n_blocks, -(-q_block // q_stride)), math.inf)
    for b, h in np.ndindex(batch, heads):
        for block, first, last, p0, p1 in blocks(q_len, k_len, q_block):
            known = rows_of(q[b, h], first, last, q_stride, rows)
            for r, u in enumerate(known):
                logits = {}
                for c in range(num_chunks[b]):
                    begin, end = offsets[b, c], offsets[b, c + 1]
                    if begin <= p1 and (window is None or end > p0 - window + 1):
                        z = capped(scale * float(u @ k_mean[b, h // group, c]), softcap) + math.log(end - begin)
                        logits[c] = z if math.isfinite(z) else -math.inf
                row_lse[b, h, block, r] = log_sum_exp(logits.values())
                for c, z in logits.items():
                    if z > -math.inf:
                        length = offsets[b, c + 1] - offsets[b, c]
                        share = math.exp(z - row_lse[b, h, block, r]) / length
                        scores[b, h // group, block, c] += share / (len(known) * group)
    return scores, row_lse


def refine_keys(q, k, scores, row_lse, offsets, num_chunks, q_block, budget, refine, *, sink=16, local=64, window=None,
                dense_tail=0, q_stride=8, rows="sample", scale=None, softcap=0.0):  # fmt: skip
    (batch, heads, q_len, dim), (kv_heads, k_len) = q.shape, k.shape[1:3]
    lists = scores.shape[1]
    scale = dim**-0.5 if scale is None else scale
    tokens = token_scores(scores, offsets, num_chunks, k_len)
    q_pooled, k_reduced = query_pool(q, lists, q_block, "sum"), reduce_heads(k, lists)
    kept = {}
    for b, s in np.ndindex(batch, lists):
        sharing = range(s * (heads // lists), (s + 1) * (heads // lists))
        for block, first, last, p0, p1 in blocks(q_len, k_len, q_block):
            keys = candidates(p0, p1, window)
            keep = {j for j in keys if forced(j, p0, sink, local, offsets[b, num_chunks[b]])}
            room = max(0, budget - len(keep))
            short_list = falling(set(keys) - keep, tokens[b, s, block])[: refine * room]
            score = {}
            for j in short_list:
                if row_lse is None:
                    score[j] = q_pooled[b, s, block] @ k_reduced[b, s, j]
                    continue
                shares = []
                for h in sharing:
                    for r, u in enumerate(rows_of(q[b, h], first, last, q_stride, rows)):
                        logit = capped(scale * float(u @ k[b, h // (heads // kv_heads), j]), softcap)
                        excess = logit - row_lse[b, h, block, r]
                        shares.append(excess if math.isnan(excess) else math.exp(min(0.0, excess)))
                score[j] = sum(shares) / len(shares)
            keep |= set(falling(short_list, score)[:room])
            kept[b, s, block] = set(keys) if last >= q_len - dense_tail else keep
    return as_runs(kept, scores.shape[:3], max(1, min(budget, (k_len + 1) // 2)))


def keys_of(runs, count):
    return [j for start, end in runs[:count] for j in range(start, end)]


def sparse_attention(q, k, v, runs, num_runs, q_block, *, scale=None, softcap=0.0, window=None):
    batch, heads, q_len, dim = q.shape
    kv_heads, k_len = k.shape[1:3]
    scale = dim**-0.5 if scale is None else scale
    out, lse = np.zeros(q.shape), np.full(q.shape[:3], -math.inf)
    for b, h, i in np.ndindex(batch, heads, q_len):
        where = b, h // (heads // runs.shape[1]), i // q_block
        p = k_len - q_len + i
        keys = [j for j in keys_of(runs[where], num_runs[where]) if j <= p and (window is None or j > p - window)]
        kv = h // (heads // kv_heads)
        logits = [capped(scale * float(q[b, h, i] @ k[b, kv, j]), softcap) for j in keys]
        lse[b, h, i] = log_sum_exp(logits)
        for j, logit in zip(keys, logits, strict=True):
            out[b, h, i] += math.exp(logit - lse[b, h, i]) * v[b, kv, j]
    return out, lse


def dense_attention(q, k, v, *, scale=None, softcap=0.0, window=None):
    """The same over every key: one run [0, Lk) for each block of the whole call."""
    batch, q_len, k_len = q.shape[0], q.shape[2], k.shape[2]
    runs = np.tile(np.array([0, k_len], np.int32), (batch, 1, 1, 1, 1))
    counts = np.ones((batch, 1, 1), np.int32)
    return sparse_attention(q, k, v, runs, counts, max(1, q_len), scale=scale, softcap=softcap, window=window)


def strict_chunks(offsets, num_chunks, p1):
    """One row's offsets and count as a strict block sees them: the chunk that holds p1 ends at p1 + 1."""
    seen, count = offsets.copy(), num_chunks
    for c in range(num_chunks):
        if offsets[c] <= p1 < offsets[c + 1]:
            seen[c + 1 :], count = p1 + 1, c + 1
    return seen, count
