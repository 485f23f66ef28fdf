"""torch.ops.dhsa as PyTorch sees it: schemas, fakes, compile, export, and the refusal of gradients."""

import ast
from pathlib import Path

import pytest
import torch
import torch._inductor.config
from calls import OPS, split, valid_call
from cases import DTYPES, Case, qkv
from torch._dynamo.testing import CompileCounterWithBackend

import dhsa_ext


def on_device(ops, call):
    return {name: ops.to(value) for name, value in call.items()}


def opcheck(ops, op, call):
    args, kwargs = split(op, on_device(ops, call))
    torch.library.opcheck(getattr(torch.ops.dhsa, op).default, args, kwargs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_opcheck_over_types_with_strided_heads_last_and_gqa(ops, op, dtype):
    opcheck(ops, op, valid_call(op, dtype))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(("q_len", "k_len"), [(1, 1), (0, 0), (0, 20), (5, 0)])
def test_opcheck_over_empty_and_one_token_sequences(ops, op, q_len, k_len):
    opcheck(ops, op, valid_call(op, q_len=q_len, k_len=k_len))


@pytest.mark.parametrize("op", ["sparse_attention", "sparse_prefill", "sparse_decode", "chunk_mass", "refine_keys"])
@pytest.mark.parametrize(("heads", "kv_heads", "lists"), [(4, 4, 4), (6, 2, 6), (8, 1, 1)])
def test_opcheck_over_head_counts(ops, op, heads, kv_heads, lists):
    opcheck(ops, op, valid_call(op, heads=heads, kv_heads=kv_heads, lists=lists))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", ["chunk_mass", "refine_keys", "sparse_prefill"])
def test_opcheck_over_means_of_queries(ops, op, dtype):
    more = dict(score="mass", refine=2, q_stride=5) if op == "sparse_prefill" else {}
    opcheck(ops, op, valid_call(op, dtype) | more | dict(rows="mean"))


def test_every_op_is_tried_here():
    named = {
        name.split("::")[1].split(".")[0] for name in torch._C._dispatch_get_all_op_names() if name[:6] == "dhsa::"
    }
    assert named == set(OPS)


@pytest.mark.parametrize("op", OPS)
def test_schema_has_no_defaulted_list_argument(op):
    """AOTInductor breaks on them."""
    schema = getattr(torch.ops.dhsa, op).default._schema
    assert not [a.name for a in schema.arguments if "List" in str(a.type) and a.has_default_value()]
    assert torch.Tag.pt2_compliant_tag in getattr(torch.ops.dhsa, op).default.tags


@pytest.mark.parametrize("op", OPS)
def test_stub_repeats_the_schema(op):
    """Names, order, kinds and defaults; the attention ops add return_lse."""
    stub = ast.parse((Path(dhsa_ext.__file__).parent / "ops.pyi").read_text())
    schema = getattr(torch.ops.dhsa, op).default._schema
    given = [(a.name, a.kwarg_only, a.default_value if a.has_default_value() else "required") for a in schema.arguments]
    typed = [node.args for node in stub.body if isinstance(node, ast.FunctionDef) and node.name == op]
    assert typed
    for arguments in typed:
        padding = [None] * (len(arguments.args) - len(arguments.defaults))
        pairs = [(a, False, d) for a, d in zip(arguments.args, padding + arguments.defaults, strict=True)]
        pairs += [(a, True, d) for a, d in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)]
        found = [(a.arg, kw, "required" if d is None else ast.literal_eval(d)) for a, kw, d in pairs]
        assert [entry for entry in found if entry[0] != "return_lse"] == given


@pytest.mark.parametrize("op", OPS)
def test_output_of_a_transposed_input_is_dense(ops, op):
    """No output aliases an input, and every one is freshly allocated."""
    args, kwargs = split(op, on_device(ops, valid_call(op)))
    results = getattr(torch.ops.dhsa, op)(*args, **kwargs)
    given = {x.untyped_storage().data_ptr() for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)}
    for result in results if isinstance(results, tuple) else (results,):
        assert result.untyped_storage().data_ptr() not in given or result.numel() == 0


@pytest.mark.parametrize("op", OPS)
def test_inputs_that_require_grad_are_refused(ops, op):
    call = on_device(ops, valid_call(op))
    floats = [name for name, value in call.items() if isinstance(value, torch.Tensor) and value.is_floating_point()]
    for name in floats:
        args, kwargs = split(op, call | {name: call[name].detach().requires_grad_()})
        with pytest.raises(RuntimeError, match=rf"dhsa::{op}: {name}: expected .*grad.*, got "):
            getattr(torch.ops.dhsa, op)(*args, **kwargs)
        with torch.no_grad():
            getattr(torch.ops.dhsa, op)(*args, **kwargs)


def test_compiled_inputs_that_require_grad_are_refused(ops):
    q = torch.randn(1, 2, 8, 64, device=ops.device, requires_grad=True)
    k = torch.randn(1, 2, 8, 64, device=ops.device)
    compiled = torch.compile(lambda q: torch.ops.dhsa.sparse_prefill(2.0 * q, k, k, 200), backend="aot_eager")
    with pytest.raises(RuntimeError, match=r"dhsa::sparse_prefill: q: expected .*grad.*, got "):
        compiled(q)
    with torch.no_grad():
        compiled(q)


def by_stages(q, k, v):
    """The pipeline one op at a time, with sizes computed from shapes, as a model would write it."""
    length = k.shape[2]
    offsets, n = dhsa_ext.select_boundaries(dhsa_ext.boundary_scores(k), max(1, length // 16))
    k_pooled = dhsa_ext.chunk_pool(k, offsets, n, 2)
    scores = dhsa_ext.chunk_scores(dhsa_ext.query_pool(q, 2, 32), k_pooled)
    runs, num = dhsa_ext.select_keys(scores, offsets, n, q.shape[2], length, 32, 70, sink=4, local=16, min_chunk=9)
    return dhsa_ext.sparse_attention(q, k, v, runs, num, 32)


def accurate_stages(q, k, v):
    length = k.shape[2]
    offsets, n = dhsa_ext.select_boundaries(dhsa_ext.boundary_scores(k), max(1, length // 16))
    mass, lse = dhsa_ext.chunk_mass(q, dhsa_ext.chunk_pool(k, offsets, n, 2, "mean"), offsets, n, length, 32)
    runs, num = dhsa_ext.refine_keys(q, k, mass, lse, offsets, n, 32, 70, 3, sink=4, local=16)
    return dhsa_ext.sparse_attention(q, k, v, runs, num, 32)


def in_one_call(q, k, v):
    return dhsa_ext.sparse_prefill(q, k, v, 70, q_block=32, sink=4, local=16) * 2


def a_decode_step(q, k, v):
    offsets, n = dhsa_ext.select_boundaries(dhsa_ext.boundary_scores(k), 8)
    pooled = dhsa_ext.chunk_pool(k, offsets, n, 2)
    return dhsa_ext.sparse_decode(q[:, :, -2:], k, v, pooled, offsets, n, 70, sink=4, local=16)


MODELS = pytest.mark.parametrize("model", [by_stages, accurate_stages, in_one_call, a_decode_step])


def tensors(ops, length, rng):
    return [ops.to(x) for x in qkv(Case("compiled", "", Lq=length), rng)]


@MODELS
def test_compiled_without_a_graph_break_and_once_for_all_lengths(ops, rng, model):
    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    compiled(*tensors(ops, 100, rng))
    first = counter.frame_count
    for length in (173, 256, 311):
        q, k, v = tensors(ops, length, rng)
        assert torch.equal(compiled(q, k, v), model(q, k, v))
    assert counter.frame_count == first, "compiled again for another length"


@torch._inductor.config.patch(compile_threads=1)  # no pool of compiler processes for one small kernel
def test_compiled_by_inductor(ops, rng):
    torch._dynamo.reset()
    compiled = torch.compile(lambda q, k, v: torch.relu(in_one_call(q, k, v)) + 1, fullgraph=True)
    q, k, v = tensors(ops, 150, rng)
    assert torch.allclose(compiled(q, k, v), torch.relu(in_one_call(q, k, v)) + 1)


class Layer(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, q, k, v):
        return self.model(q, k, v)


@MODELS
def test_exported_with_a_dynamic_length(ops, rng, model):
    length = torch.export.Dim("length", min=96, max=4096)
    q, k, v = tensors(ops, 128, rng)
    exported = torch.export.export(Layer(model), (q, k, v), dynamic_shapes=({2: length},) * 3).module()
    for size in (128, 200, 97):
        q, k, v = tensors(ops, size, rng)
        assert torch.equal(exported(q, k, v), model(q, k, v))


def test_fake_tensors_need_no_data(ops, rng):
    """A 1M-token prefill is shaped, checked and not computed."""
    with torch.device("meta"):
        q, k = torch.empty(1, 32, 2**20, 128, dtype=torch.bfloat16), torch.empty(1, 8, 2**20, 128, dtype=torch.bfloat16)
    out, lse = torch.ops.dhsa.sparse_prefill(q, k, k, 2048)
    assert out.shape == q.shape and out.dtype == torch.bfloat16 and lse.shape == q.shape[:3]
    with pytest.raises((ValueError, RuntimeError), match="dhsa::sparse_prefill: budget: expected"):
        torch.ops.dhsa.sparse_prefill(q, k, k, 100)
