"""Every CUDA op once on small shapes, against the reference: the program that compute-sanitizer watches."""

import torch

import dhsa_ext
from dhsa_ext import ops, reference


def close(got: torch.Tensor, want: torch.Tensor, tolerance: float) -> None:
    got, want = got.double().cpu(), want.double().cpu()
    error = (got - want).norm() / want.norm().clamp_min(1e-30)
    assert error < tolerance, f"relative error {error:.2e}"


def main() -> None:
    torch.manual_seed(0)
    for dtype, tolerance in ((torch.bfloat16, 1e-2), (torch.float16, 2e-3), (torch.float32, 1e-5)):
        for head_dim, heads, kv_heads, select_heads, q_block in (
            (128, 4, 1, 1, 128),
            (64, 4, 2, 2, 64),
            (96, 2, 2, 2, 16),
            (256, 4, 2, 4, 32),
        ):
            q = torch.randn(1, heads, 200, head_dim).to(dtype)
            k, v = torch.randn(2, 1, kv_heads, 333, head_dim).to(dtype)
            gq, gk, gv = q.cuda(), k.cuda(), v.cuda()
            scores = ops.boundary_scores(gk)
            offsets, num_chunks = ops.select_boundaries(scores, 20)
            for got, want in zip((offsets, num_chunks), reference.select_boundaries(scores.cpu(), 20), strict=True):
                assert torch.equal(got.cpu(), want)
            width = kv_heads * head_dim
            shapes = [(3 * width, width), (3 * width,), (width, width), (width,), (width,), (width,), (1, width), (1,)]
            shapes += [(256, 4 * width + 1), (256,), (1, 256), (1,)]
            weights = [torch.randn(shape) * 0.1 for shape in shapes]
            logits = ops.boundary_logits(gk, *(w.cuda() for w in weights), 8)
            close(logits[:, 4:-3], reference.boundary_logits(k, *weights, 8)[:, 4:-3], 1e-4)
            options = dict(q_block=q_block, select_heads=select_heads, sink=8, local=16, softcap=20.0, dense_tail=20)
            shared = dict(offsets=offsets, num_chunks=num_chunks)
            got, lse = dhsa_ext.sparse_prefill(gq, gk, gv, 160, return_lse=True, **options, **shared)
            assert got.isfinite().all() and lse.isfinite().all()
            k_pooled = ops.chunk_pool(gk, offsets, num_chunks, select_heads)
            q_pooled = ops.query_pool(gq, select_heads, q_block)
            chosen = ops.chunk_scores(q_pooled, k_pooled)
            ops.token_scores(chosen, offsets, num_chunks, 333)
            runs, num_runs = ops.select_keys(
                chosen, offsets, num_chunks, 200, 333, q_block, 160, sink=8, local=16, dense_tail=20
            )
            want_runs = reference.select_keys(
                chosen.cpu(), offsets.cpu(), num_chunks.cpu(), 200, 333, q_block, 160, sink=8, local=16, dense_tail=20
            )
            assert torch.equal(runs.cpu(), want_runs[0]) and torch.equal(num_runs.cpu(), want_runs[1])
            out = ops.sparse_attention(gq, gk, gv, runs, num_runs, q_block, softcap=20.0)
            close(out, reference.sparse_attention(q, k, v, *want_runs, q_block, softcap=20.0)[0], tolerance)
            k_mean = ops.chunk_pool(gk, offsets, num_chunks, select_heads, "mean")
            mass, row_lse = ops.chunk_mass(gq, k_mean, offsets, num_chunks, 333, q_block)
            want_mass = reference.chunk_mass(q.double(), k_mean.cpu(), offsets.cpu(), num_chunks.cpu(), 333, q_block)
            close(mass, want_mass[0], 1e-4)
            ops.refine_keys(gq, gk, mass, row_lse, offsets, num_chunks, q_block, 160, 2, sink=8, local=16)
            ops.refine_keys(gq, gk, chosen, None, offsets, num_chunks, q_block, 160, 2, sink=8, local=16)
            dhsa_ext.sparse_prefill(gq, gk, gv, 160, score="mass", refine=2, strict=True, **options, **shared)
            dhsa_ext.sparse_decode(
                gq[:, :, -3:], gk, gv, k_mean, offsets, num_chunks, 90, score="mass", refine=2, sink=8, local=16
            )
            out = ops.sparse_decode(gq[:, :, -3:], gk, gv, k_pooled, offsets, num_chunks, 400)
            close(
                out,
                reference.sparse_decode(q[:, :, -3:], k, v, k_pooled.cpu(), offsets.cpu(), num_chunks.cpu(), 400)[0],
                tolerance,
            )
    torch.cuda.synchronize()
    print("every op ran on small shapes and agrees with the reference")


if __name__ == "__main__":
    main()
