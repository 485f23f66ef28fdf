"""Sparse attention on NumPy arrays, no torch: choose keys and attend, in one call and stage by stage, then decode.

python examples/without_torch.py
"""

import numpy as np

from dhsa_ext import numpy as dhsa

rng = np.random.default_rng(0)
heads, kv_heads, length, head_dim, budget = 8, 2, 2048, 64, 512
q = rng.standard_normal((1, heads, length, head_dim), np.float32)
k, v = (rng.standard_normal((1, kv_heads, length, head_dim), np.float32) for _ in range(2))

# Everything in one call: each block of 64 queries attends to the 512 keys that it chose.
out = dhsa.sparse_prefill(q, k, v, budget)

# The same, stage by stage; between any two of them a choice of your own can step in.
offsets, num_chunks = dhsa.select_boundaries(dhsa.boundary_scores(k), max_chunks=length // 16)
k_pooled = dhsa.chunk_pool(k, offsets, num_chunks, kv_heads)
q_pooled = dhsa.query_pool(q, kv_heads, q_block=64)
runs, num_runs = dhsa.select_keys(
    dhsa.chunk_scores(q_pooled, k_pooled), offsets, num_chunks, length, length, q_block=64, budget=budget
)
staged = dhsa.sparse_attention(q, k, v, runs, num_runs, q_block=64)
print(f"{num_chunks[0]} chunks, {num_runs.mean():.1f} runs of keys for each block of queries")
print(f"one call against its stages: worst difference {np.abs(out - staged).max():.1e}")

# One new token over the same cache, in bfloat16: NumPy has no such type, its bits travel as uint16.
q16, k16, v16 = ((x.view(np.uint32) + 0x8000 >> 16).astype(np.uint16) for x in (q[:, :, -1:], k, v))
step = dhsa.sparse_decode(q16, k16, v16, k_pooled, offsets, num_chunks, budget, dtype="bfloat16")
print(f"a decoded token: {step.dtype} bits of shape {step.shape}")
