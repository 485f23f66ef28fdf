"""What only a GPU can show: the head_dim x q_block grid of its kernels, both kernel families, graphs, streams, offsets
past 2^31, and that nothing runs where it was not built for. The other files' tests run on CUDA too, as [cuda].
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys

import pytest
import torch
from cases import DTYPES, Case, attention_options, choice_options, chunks, heads_last, qkv, runs
from compare import relative_error, same_attention
from conftest import Runner, no_cuda
from pipeline import comparable, whole
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import Cache

import dhsa_ext
from dhsa_ext import DHSAConfig, hf, reference
from dhsa_ext.info import facts
from dhsa_ext.predictor import BoundaryPredictor, PredictorConfig

pytestmark = pytest.mark.skipif(bool(no_cuda()), reason=no_cuda())

HEAD_DIMS = (64, 96, 128, 256)
Q_BLOCKS = (16, 32, 64, 128)
KERNELS = ("sm90", "sm80")  # of sparse_attention: wgmma on an sm_90 GPU, mma.sync everywhere
REFUSED = (ValueError, RuntimeError)


@pytest.fixture
def cuda():
    return Runner("cuda")


@pytest.fixture(params=KERNELS)
def kernel(request, monkeypatch):
    """The attention kernels forced, where this GPU and this build have them."""
    if request.param == "sm90" and (
        torch.cuda.get_device_capability() != (9, 0) or "90a" not in dhsa_ext.backend.backend.info("cuda_archs")
    ):
        pytest.skip("the sm90 kernel needs an sm_90 GPU and 90a compiled")
    monkeypatch.setenv("DHSA_FORCE_CUDA_KERNEL", request.param)
    return request.param


def grid() -> list[Case]:
    """Every head_dim with every q_block; what else a kernel branches on takes turns, each value several times."""
    sharing = itertools.cycle([dict(S=1), dict(S=2), dict(S=8), dict(H=6, S=2), dict(H=2, S=1)])
    logits = itertools.cycle([{}, dict(window=120), dict(softcap=5.0, scale=0.75), dict(softcap=20.0, window=90)])
    shape = itertools.cycle([{}, dict(Lq=70, Lk=400), dict(B=2), dict(dense_tail=40), dict(Lq=330, Lk=200)])
    cases = []
    for head_dim, q_block in itertools.product(HEAD_DIMS, Q_BLOCKS):
        given = dict(Lq=300, H=8, Hkv=2) | next(sharing) | next(logits) | next(shape)
        cases.append(Case(f"D{head_dim}_q{q_block}", "", D=head_dim, q_block=q_block, budget=170, **given))
    return cases


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", grid(), ids=lambda case: case.name)
def test_attention_of_both_kernels(cuda, kernel, rng, case, dtype):
    q, k, v = qkv(case, rng, dtype, heads_last)
    lists, counts = runs(case, rng)
    doubles = (x.double() for x in (q, k, v))
    want = reference.sparse_attention(*doubles, lists, counts, case.q_block, **attention_options(case))
    got = cuda.sparse_attention(q, k, v, lists, counts, case.q_block, **attention_options(case))
    same_attention(got, want, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", grid(), ids=lambda case: case.name)
def test_prefill_equals_the_stages_of_the_reference(cuda, rng, case, dtype):
    def draw():
        q, k, v = qkv(case, rng, dtype, heads_last)
        offsets, counts = chunks(rng, case.B, case.k_len)
        return (q, k, v, offsets, counts), *whole(q, k, v, offsets, counts, case)

    (q, k, v, offsets, counts), want, clear = comparable(draw)
    options = dict(q_block=case.q_block, select_heads=case.S) | choice_options(case) | attention_options(case)
    got = cuda.sparse_prefill(q, k, v, case.budget, offsets=offsets, num_chunks=counts, **options)
    same_attention(got, want, dtype, clear)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_logits_to_three_times_the_cap(cuda, kernel, rng, head_dim, dtype):
    """Where tanh is flat its derivative hides errors, where it bends it shows them: a q of one large row, in steps."""
    cap = 5.0
    case = Case("", "", Lq=200, H=4, Hkv=2, D=head_dim, softcap=cap, scale=1.0)
    q, k, v = qkv(case, rng, dtype)
    logits = (q.float() @ k.float().repeat_interleave(2, 1).mT).abs().amax()
    q = (q.float() * (3 * cap / logits)).to(dtype)
    lists, counts = runs(case, rng)
    doubles = (x.double() for x in (q, k, v))
    want = reference.sparse_attention(*doubles, lists, counts, case.q_block, **attention_options(case))
    same_attention(cuda.sparse_attention(q, k, v, lists, counts, case.q_block, **attention_options(case)), want, dtype)


def prefill_inputs(seed: int, length: int = 3000, dtype=torch.bfloat16):
    rng = torch.Generator("cuda").manual_seed(seed)
    q = torch.randn(1, length, 16, 128, device="cuda", generator=rng).to(dtype).transpose(1, 2)
    k, v = (torch.randn(1, length, 4, 128, device="cuda", generator=rng).to(dtype).transpose(1, 2) for _ in "kv")
    return q, k, v


PREFILL = dict(q_block=64, select_heads=4, dense_tail=64)


def prefill(q, k, v):
    return torch.ops.dhsa.sparse_prefill(q, k, v, 600, **PREFILL)


def same_bits(got, want):
    assert all(torch.equal(g.view(torch.int16), w.view(torch.int16)) for g, w in zip(got, want, strict=True))


def test_a_captured_prefill_replays_with_new_inputs():
    static = prefill_inputs(0)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        prefill(*static)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = prefill(*static)
    for seed in range(1, 4):
        fresh = prefill_inputs(seed)
        for to, x in zip(static, fresh, strict=True):
            to.copy_(x)
        for x in captured:
            x.fill_(torch.nan)
        graph.replay()
        same_bits(captured, prefill(*fresh))


def test_a_captured_decode_replays_with_new_inputs():
    q, k, v = prefill_inputs(0)
    offsets, counts = torch.ops.dhsa.select_boundaries(torch.ops.dhsa.boundary_scores(k), k.shape[2] // 16)
    pooled = torch.ops.dhsa.chunk_pool(k, offsets, counts, 4)

    def decode(q):
        return torch.ops.dhsa.sparse_decode(q, k, v, pooled, offsets, counts, 500)

    static = q[:, :, :1].clone()
    decode(static)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = decode(static)
    for row in (7, 1500, 2999):
        static.copy_(q[:, :, row : row + 1])
        graph.replay()
        same_bits(captured, decode(static))


def test_two_streams_at_once_do_not_disturb_each_other():
    inputs = [prefill_inputs(seed) for seed in (1, 2)]
    want = [prefill(*x) for x in inputs]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in inputs]
    for _ in range(20):
        got = []
        for stream, x in zip(streams, inputs, strict=True):
            with torch.cuda.stream(stream):
                got.append(prefill(*x))
        torch.cuda.synchronize()
        for g, w in zip(got, want, strict=True):
            same_bits(g, w)


def test_repeated_calls_give_the_same_bits():
    x = prefill_inputs(3, length=9000)
    want = prefill(*x)
    flush = torch.empty(1 << 26, dtype=torch.int32, device="cuda")  # a cold L2 moves every load
    for i in range(100):
        flush.fill_(i)
        same_bits(prefill(*x), want)


@pytest.mark.parametrize("tokens_first", [False, True], ids=["BHLD", "BLHD"])
def test_offsets_past_two_to_the_31_elements(tokens_first):
    length, heads, kv_heads, dim, q_block = 1 << 20, 32, 8, 128, 128
    if torch.cuda.mem_get_info()[0] < 40 << 30:
        pytest.skip("needs 40 GB of GPU memory")

    def draw(n):
        shape = (1, length, n, dim) if tokens_first else (1, n, length, dim)
        x = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
        return x.transpose(1, 2) if tokens_first else x

    q, k, v = draw(heads), draw(kv_heads), draw(kv_heads)
    assert q.numel() > 1 << 31
    blocks = length // q_block
    first = torch.arange(blocks, device="cuda", dtype=torch.int32) * q_block
    lists = torch.zeros(1, 1, blocks, 3, 2, device="cuda", dtype=torch.int32)
    lists[0, 0, :, 0, 1] = 64
    lists[0, 0, 4:, 1, 0], lists[0, 0, 4:, 1, 1] = first[4:] // 2, first[4:] // 2 + 63
    lists[0, 0, 4:, 2, 0], lists[0, 0, 4:, 2, 1] = first[4:] - 100, first[4:] + q_block
    counts = torch.where(first >= 4 * q_block, 3, 1).int().view(1, 1, blocks)
    out, lse = torch.ops.dhsa.sparse_attention(q, k, v, lists, counts, q_block)
    for head, row in itertools.product((0, 15, 16, 31), (5, 524287, 524288, 917504, length - 1)):
        block = row // q_block
        keys = torch.cat([torch.arange(*run) for run in lists[0, 0, block, : counts[0, 0, block]].tolist()])
        keys = keys[keys <= row].cuda()
        logits = k[0, head // 4, keys].double() @ q[0, head, row].double() / dim**0.5
        want = logits.softmax(0) @ v[0, head // 4, keys].double()
        assert relative_error(out[0, head, row], want) < 1e-2, (head, row)
        assert abs(float(lse[0, head, row] - logits.logsumexp(0))) < 2e-2, (head, row)
    pooled = torch.ops.dhsa.query_pool(q, 1, q_block, "mean")[0, 0, -1]
    torch.testing.assert_close(pooled, q[0, :, -q_block:].float().mean((0, 1)), rtol=1e-4, atol=1e-4)


def test_the_whole_pipeline_past_two_to_the_31_elements():
    """A million tokens in one call: the last rows, whose queries lie past 2^31, equal a call on those queries alone."""
    if torch.cuda.mem_get_info()[0] < 40 << 30:
        pytest.skip("needs 40 GB of GPU memory")
    length = 1 << 20
    q, k, v = (torch.randn(1, n, length, 128, device="cuda", dtype=torch.bfloat16) for n in (32, 8, 8))
    options = dict(q_block=128, select_heads=1, sink=128, local=128)
    out, lse = torch.ops.dhsa.sparse_prefill(q, k, v, 512, **options)
    last = torch.ops.dhsa.sparse_prefill(q[:, :, -1024:], k, v, 512, **options)
    same_bits((out[:, :, -1024:].contiguous(), lse[:, :, -1024:].contiguous()), last)


@pytest.mark.parametrize("word", ["sm70", "fast"])
def test_a_kernel_that_cannot_run_is_refused_by_name(monkeypatch, word):
    monkeypatch.setenv("DHSA_FORCE_CUDA_KERNEL", word)
    with pytest.raises(RuntimeError, match=f"DHSA_FORCE_CUDA_KERNEL: expected sm80, or sm90 .* got '{word}'"):
        prefill(*prefill_inputs(0, length=200))


def test_both_loaders_give_the_same_bits(monkeypatch):
    """Long runs, whole tiles of which come by TMA on sm_90a, and a budget of every key."""
    q, k, v = prefill_inputs(3)
    answers = {}
    for loader in ("gather", "tma" if facts()["CUDA kernels"] == "sm90" else "auto"):
        monkeypatch.setenv("DHSA_FORCE_CUDA_LOADER", loader)
        answers[loader] = prefill(q, k, v), torch.ops.dhsa.sparse_prefill(q, k, v, 3000, **PREFILL)
    for one, two in zip(*answers.values(), strict=True):
        same_bits(one, two)


@pytest.mark.parametrize(
    "word, kernel, said",
    [
        ("boxes", "", "expected auto, gather or tma, got 'boxes'"),
        ("tma", "sm80", "expected auto or gather where the sm_90a kernel does not run, got 'tma'"),
    ],
)
def test_a_loader_that_cannot_run_is_refused_by_name(monkeypatch, word, kernel, said):
    monkeypatch.setenv("DHSA_FORCE_CUDA_LOADER", word)
    monkeypatch.setenv("DHSA_FORCE_CUDA_KERNEL", kernel)
    with pytest.raises(RuntimeError, match=f"DHSA_FORCE_CUDA_LOADER: {said}"):
        prefill(*prefill_inputs(0, length=200))


@pytest.mark.parametrize("word", ["", "sm80"])
def test_info_names_the_kernels_that_run(word):
    env = os.environ | dict(DHSA_FORCE_CUDA_KERNEL=word)
    text = subprocess.run(
        [sys.executable, "-m", "dhsa_ext.info"], env=env, capture_output=True, text=True, check=True
    ).stdout
    line = next(line for line in text.splitlines() if line.startswith("CUDA kernels"))
    assert line.split()[-1] == (word or ("sm90" if torch.cuda.get_device_capability() == (9, 0) else "sm80"))


def test_unsupported_shapes_are_refused_before_a_launch():
    q, k, v = (torch.randn(1, 2, 20, 40, device="cuda") for _ in "qkv")
    with pytest.raises(REFUSED, match="head_dim of 64, 96, 128 or 256 on CUDA, got 40"):
        torch.ops.dhsa.sparse_prefill(q, k, v, 200)
    q, k, v = (torch.randn(1, 2, 20, 64, device="cuda") for _ in "qkv")
    with pytest.raises(REFUSED, match="q_block: expected 16, 32, 64, 128"):
        torch.ops.dhsa.sparse_prefill(q, k, v, 200, q_block=48)
    with pytest.raises(REFUSED, match="k: expected a tensor on cuda:0, got one on cpu"):
        torch.ops.dhsa.sparse_prefill(q, k.cpu(), v, 200)
    torch.cuda.synchronize()


def llama(tokens: int, layers: int = 1, **sizes):
    """A small model in float32 on the GPU, and the ids of a prompt."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97, hidden_size=64, intermediate_size=128, num_hidden_layers=layers, max_position_embeddings=8192,
        **sizes,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval().cuda(), torch.randint(2, 97, (1, tokens), device="cuda")


def test_dense_float32_of_a_model_makes_no_matrix_of_logits():
    hf.register()
    model, ids = llama(6000, num_attention_heads=4, num_key_value_heads=2, head_dim=64)
    hf.configure(model, DHSAConfig(layers=()))
    answers, peaks = [], []
    with torch.no_grad():
        for implementation in ("sdpa", "dhsa"):
            model.set_attn_implementation(implementation)
            torch.cuda.reset_peak_memory_stats()
            answers.append(model(ids, logits_to_keep=1).logits)
            peaks.append(torch.cuda.max_memory_allocated() / 2**20)
    assert relative_error(answers[1].cpu(), answers[0].cpu()) < 1e-4
    assert peaks[1] < 150  # one float32 matrix of 4 x 6000 x 6000 is 549


def test_a_predictor_goes_where_its_model_is(tmp_path):
    model, _ = llama(1, num_attention_heads=2, num_key_value_heads=2, head_dim=64)
    BoundaryPredictor(PredictorConfig(kv_heads=2, head_dim=64, num_heads=4)).save(tmp_path / "p.safetensors")
    predictor = BoundaryPredictor.load(tmp_path / "p.safetensors", model)
    k = torch.randn(1, 2, 300, 64, device="cuda")
    assert predictor.cut_chunks(k, DHSAConfig())[0].is_cuda


@pytest.fixture
def ordered_prefetch(monkeypatch):
    """As transformers 5.24 does it: 5.17 brings a layer's keys back into memory from which others are still read."""
    prefetch = Cache.prefetch

    def after_the_rest(self, *args, **kwargs):
        self.prefetch_stream.wait_stream(torch.cuda.default_stream())
        return prefetch(self, *args, **kwargs)

    monkeypatch.setattr(Cache, "prefetch", after_the_rest)


@pytest.mark.parametrize("decode", ["dense", "sparse"])
@pytest.mark.usefixtures("ordered_prefetch")
def test_an_offloaded_cache_answers_as_one_on_the_gpu(decode):
    """Each layer's keys come back from the CPU before it attends, in new tensors."""
    hf.register()
    model, ids = llama(1200, layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=64)

    def generate(implementation: str, budget: int, cache: str):
        hf.configure(model, DHSAConfig("accurate", budget=budget, decode=decode))
        model.set_attn_implementation(implementation)
        given = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, cache_implementation=cache,
            output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
        return torch.stack(given.logits).cpu()

    dense = generate("sdpa", 1280, "dynamic")
    whole = generate("dhsa", 1280, "offloaded")
    assert relative_error(whole, dense) < 1e-4
    chosen = [generate("dhsa", 192, cache) for cache in ("offloaded", "dynamic")]
    assert relative_error(chosen[0], dense) > 1e-3  # the budget leaves keys out
    assert relative_error(*chosen) < 1e-5
