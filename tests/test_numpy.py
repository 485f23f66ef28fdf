"""The ops on NumPy arrays: the bits of the torch ops on CPU tensors, whatever the type and the number of threads."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from calls import OPS, valid_call
from cases import chunks, heads_last, rand

import dhsa_ext
from dhsa_ext.backend import backend

arrays = pytest.importorskip(
    "dhsa_ext.numpy", reason="the NumPy module is not built: run pip install -e .", exc_type=ImportError
)
pytestmark = [
    pytest.mark.skipif(backend.name != "native", reason="the torch ops run on the reference, not the kernels"),
    pytest.mark.skipif(
        arrays._numpy.isas_compiled() != backend.info("isas_compiled"),
        reason="the two modules were not built together: run pip install -e .",
    ),
]

ROOT = Path(__file__).resolve().parents[1]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
HAS_LSE = ("sparse_attention", "sparse_prefill", "sparse_decode")


def to_array(value):
    """The same memory, strides kept; bfloat16 as its bits."""
    if not isinstance(value, torch.Tensor):
        return value
    return (value.view(torch.uint16) if value.dtype == torch.bfloat16 else value).numpy()


def on_arrays(op, call, **more):
    """What dhsa_ext.numpy returns for a call on tensors, as a tuple of arrays."""
    values = {name: to_array(value) for name, value in call.items()}
    if any(isinstance(value, torch.Tensor) and value.dtype == torch.bfloat16 for value in call.values()):
        values["dtype"] = "bfloat16"
    if op in HAS_LSE:
        values["return_lse"] = True
    result = getattr(arrays, op)(**values, **more)
    return result if isinstance(result, tuple) else (result,)


def on_tensors(op, call):
    result = getattr(torch.ops.dhsa, op)(**call)
    return tuple(to_array(r) for r in (result if isinstance(result, tuple) else (result,)))


def assert_same_bits(got, expected):
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert a.tobytes() == b.tobytes()


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_as_the_torch_op(op, dtype):
    call = valid_call(op, dtype)
    assert_same_bits(on_arrays(op, call), on_tensors(op, call))


def options(op, rng):
    """Every optional argument away from its default: two of them in each other's place would show."""
    softmax = dict(scale=0.2, softcap=5.0, window=33)
    choice = dict(sink=3, local=6)
    offsets, num_chunks = chunks(rng, 2, 90, 7)
    return {
        "boundary_scores": [dict(window=5)],
        "boundary_logits": [dict(window=5, num_heads=4), dict(gate_weight=None, gate_bias=None)],
        "select_boundaries": [dict(max_chunks=4, nms_radius=5, threshold=0.1, segment=32)],
        "chunk_pool": [dict(scale="mean", heads=1), dict(scale="sum", heads=4)],
        "query_pool": [dict(scale="sum", heads=1, q_block=7)],
        "select_keys": [dict(choice, window=50, dense_tail=9, min_chunk=2)],
        "chunk_mass": [dict(softmax, q_stride=3, rows="mean")],
        "refine_keys": [
            dict(choice, window=50, dense_tail=9, rows="mean", scale=0.2, softcap=5.0),
            dict(choice, row_lse=None, refine=3),
        ],
        "sparse_attention": [softmax],
        "sparse_prefill": [
            dict(softmax, select_heads=1, score="mass", pool="mean", refine=2, q_stride=3, dense_tail=9, strict=True),
            dict(choice, select_heads=2, score="mass", refine=2, q_stride=5, rows="mean"),
            dict(boundary_window=3, nms_radius=5, threshold=0.1, segment=32, select_heads=4, pool="sum"),
            dict(offsets=offsets, num_chunks=num_chunks, max_chunks=None),
        ],
        "sparse_decode": [
            dict(softmax, score="mass", refine=2),
            dict(choice, min_chunk=2),
            dict(cache_seqlens=torch.tensor([90, 41], dtype=torch.int32)),
        ],
    }.get(op, [])  # fmt: skip


@pytest.mark.parametrize("op", OPS)
def test_every_option_reaches_its_place(op, rng):
    for option in options(op, rng):
        call = {**valid_call(op), **option}
        assert_same_bits(on_arrays(op, call), on_tensors(op, call))


def test_defaults_are_the_schemas(rng):
    q, k, v = (heads_last(rng, 1, 2, 300, 32, torch.float32) for _ in range(3))
    for op, call in (("sparse_prefill", dict(q=q, k=k, v=v, budget=160)), ("boundary_scores", dict(k=k))):
        assert_same_bits(on_arrays(op, call), on_tensors(op, call))


@pytest.mark.parametrize("op", OPS)
def test_any_number_of_threads_gives_the_same_bits(op):
    call = valid_call(op, q_len=150, k_len=170)
    one = on_arrays(op, call, threads=1)
    for threads in (2, 3, 16):
        for _ in range(5):
            assert_same_bits(on_arrays(op, call, threads=threads), one)


def test_calls_from_several_threads(rng):
    # The GIL is released while an op runs, so that their pools' work meets.
    calls = [{**valid_call("sparse_prefill", seed=seed), "q_block": 16} for seed in range(4)]
    expected = [on_arrays("sparse_prefill", call, threads=1) for call in calls]
    failed = []

    def work(i):
        try:
            for _ in range(20):
                assert_same_bits(on_arrays("sparse_prefill", calls[i], threads=3), expected[i])
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []


def test_strided_views_are_read_in_place(rng):
    q, k, v = (rand(rng, 1, 40, 2, 16).transpose(1, 2) for _ in range(3))  # [B, L, H, D] memory
    call = dict(q=q, k=k, v=v, budget=30, sink=2, local=4, q_block=8, nms_radius=2)
    assert not to_array(q).flags.c_contiguous
    assert_same_bits(on_arrays("sparse_prefill", call), on_tensors("sparse_prefill", call))


def test_read_only_arrays_are_inputs():
    k = np.ones((1, 1, 16, 8), np.float32)
    k.flags.writeable = False
    assert arrays.boundary_scores(k).shape == (1, 16)


def test_without_return_lse_only_out_comes_back():
    call = {name: to_array(value) for name, value in valid_call("sparse_prefill").items()}
    out, lse = arrays.sparse_prefill(**call, return_lse=True)
    assert lse.shape == out.shape[:3]
    assert arrays.sparse_prefill(**call).tobytes() == out.tobytes()


# Every op in a process of its own, without torch: prints a digest of all outputs.
DIGEST = """
import hashlib, pickle, sys
sys.modules["torch"] = None
import dhsa_ext.numpy
digest = hashlib.sha256()
for op, call in pickle.load(open(sys.argv[1], "rb")):
    result = getattr(dhsa_ext.numpy, op)(**call)
    for array in result if isinstance(result, tuple) else (result,):
        digest.update(array.tobytes())
print(digest.hexdigest())
"""


def run_alone(script, *arguments, **env):
    return subprocess.run(
        [sys.executable, "-c", script, *arguments], env={**os.environ, **env}, cwd=ROOT / "tests",
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


def test_every_output_element_is_written(tmp_path):
    # glibc fills what malloc hands out with another byte in each process: an element left as it was would differ.
    import pickle

    calls = [(op, {name: to_array(value) for name, value in valid_call(op).items()}) for op in OPS]
    (tmp_path / "calls").write_bytes(pickle.dumps(calls))
    digests = set()
    for fill in ("0", "85", "255"):
        done = run_alone(DIGEST, str(tmp_path / "calls"), MALLOC_PERTURB_=fill, DHSA_NUM_THREADS="2")
        assert done.returncode == 0, done.stderr
        digests.add(done.stdout)
    assert len(digests) == 1


FORK = """
import os, sys
import numpy, dhsa_ext.numpy as ops
k = numpy.random.default_rng(0).standard_normal((4, 4, 64, 8), numpy.float32)
before = ops.boundary_scores(k, threads=3).tobytes()
child = os.fork()
if child == 0:
    os._exit(0 if ops.boundary_scores(k, threads=3).tobytes() == before else 1)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_a_forked_process_has_threads_of_its_own():
    assert run_alone("import sys; sys.modules['torch'] = None" + FORK).returncode == 0


# --- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("op", "change", "sentence"),
    [
        ("sparse_prefill", dict(budget=3), "dhsa::sparse_prefill: budget: expected"),
        ("sparse_prefill", dict(score="cosine"), "score: expected one of 'dot', 'mass', got 'cosine'"),
        ("sparse_prefill", dict(window=0), "window: expected an integer >= 1, got 0"),
        ("sparse_attention", dict(num_runs=np.zeros((2, 2, 5), np.int64)), "num_runs: expected float32, .* got int64"),
        ("sparse_attention", dict(q=[[1.0]]), "q: expected a NumPy array, got list"),
        ("chunk_scores", dict(q_pooled=None), "q_pooled: expected a NumPy array, got NoneType"),
        ("boundary_scores", dict(k=np.zeros((1, 1, 8, 8))), "k: expected float32, .* got float64"),
        ("boundary_scores", dict(k=np.zeros((1, 1, 8, 8), ">f4")), "k: expected float32, .* got >f4"),
        ("boundary_scores", dict(k=np.zeros((1, 1, 8, 8), np.uint16)), "or uint16 with dtype='bfloat16', got uint16"),
        ("boundary_scores", dict(k=np.zeros((1, 1, 8, 12), np.float32)), "k: expected a head_dim"),
        ("boundary_scores", dict(k=np.zeros((1,) * 6, np.float32)), "k: expected at most 5 dimensions, got 6"),
        ("boundary_scores", dict(dtype="bfloat16"), "dtype: expected uint16 arrays with dtype='bfloat16', got none"),
        ("boundary_scores", dict(dtype="float16"), "dtype: expected None or 'bfloat16', got 'float16'"),
        ("boundary_scores", dict(threads=0), "threads: expected an integer >= 1, got 0"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_sentence(op, change, sentence):
    call = {name: to_array(value) for name, value in valid_call(op).items()}
    with pytest.raises(ValueError, match=sentence) as raised:
        getattr(arrays, op)(**{**call, **change})
    assert "\n" not in str(raised.value)


def test_strides_of_broken_elements():
    pairs = np.zeros(64, [("x", np.float32), ("y", np.int8)])  # five bytes apart
    with pytest.raises(ValueError, match="scores: expected strides of whole elements, got 5 bytes"):
        arrays.select_boundaries(pairs["x"].reshape(1, 64), 4)


def test_dhsa_num_threads(monkeypatch):
    k = np.ones((1, 1, 16, 8), np.float32)
    monkeypatch.setenv("DHSA_NUM_THREADS", "2")
    arrays.boundary_scores(k)
    monkeypatch.setenv("DHSA_NUM_THREADS", "many")
    with pytest.raises(ValueError, match="DHSA_NUM_THREADS: expected an integer >= 1, got 'many'"):
        arrays.boundary_scores(k)


# --- without torch ---------------------------------------------------------------------------------------------------


def test_the_package_without_torch():
    script = """
import sys
sys.modules["torch"] = None
import dhsa_ext, dhsa_ext.numpy
assert dhsa_ext.__version__ and dhsa_ext.DHSAConfig().budget
assert not hasattr(dhsa_ext, "no_such_name")
for name in ("sparse_prefill", "reference"):
    try:
        getattr(dhsa_ext, name)
    except ImportError as error:
        print(error)
"""
    done = run_alone(script)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        f"dhsa_ext.{name} needs torch >= 2.10, which is not installed here; "
        "the ops on NumPy arrays are in dhsa_ext.numpy"
        for name in ("sparse_prefill", "reference")
    ]


def test_info_without_torch():
    script = "import sys; sys.modules['torch'] = None; from dhsa_ext import info; info.main()"
    done = run_alone(script)
    assert done.returncode == 0, done.stderr
    assert "none (torch is not installed)" in done.stdout and backend.info("isas_compiled") in done.stdout


def test_the_example_runs_without_torch():
    script = "import runpy, sys; sys.modules['torch'] = None; runpy.run_path(sys.argv[1], run_name='__main__')"
    done = run_alone(script, str(ROOT / "examples" / "without_torch.py"))
    assert done.returncode == 0, done.stderr
    assert "worst difference" in done.stdout


def test_every_native_op_has_a_function():
    assert set(arrays.__all__) == set(OPS) == set(dhsa_ext.__all__) - {"DHSAConfig", "reference"}
