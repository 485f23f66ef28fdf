"""What every test file shares: who runs the stages, the seed of the random inputs, and the line that says both.

A test that takes `run` runs once on the Python reference, once through torch.ops.dhsa on CPU tensors (the native
library where it is loaded) and once on CUDA ones; a test that takes `ops` leaves the reference out, to be compared
with it. Tests hand over CPU tensors and get CPU tensors back.
"""

from __future__ import annotations

import logging
import os
import random

import pytest
import torch
from hypothesis import HealthCheck, settings

import dhsa_ext
from dhsa_ext.backend import backend

SEED = int(os.environ.get("DHSA_TEST_SEED", random.SystemRandom().randrange(10**6)))
os.environ["DHSA_TEST_SEED"] = str(SEED)  # for the workers of pytest-xdist

settings.register_profile(
    "dhsa",
    deadline=None,
    max_examples=25,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
)
settings.load_profile("dhsa")
logging.getLogger("torch.__trace").propagate = False  # thousands of empty lines under a failed torch.compile test


def no_cuda() -> str:
    """Why nothing can run on a GPU here; "" where it can."""
    if not torch.cuda.is_available():
        return "no CUDA device is seen by torch: run `make gpu-check` on a machine with one"
    if backend.name != "native" or not backend.has_cuda:
        return "the native library has no CUDA kernels: build with DHSA_BUILD=cuda"
    return ""


def pytest_configure(config):
    config.addinivalue_line("filterwarnings", "ignore:.*runs on the float64 Python reference.*:RuntimeWarning")


def pytest_report_header(config):
    ran = f"dhsa_ext: backend {backend.name} ({backend.reason})"
    if backend.name == "native":
        ran += f", ISA {backend.info('isa_active')} of {backend.info('isas_compiled')}"
        ran += f", CUDA archs {backend.info('cuda_archs') or 'none'}"
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return [ran, f"torch {torch.__version__}, GPU {gpu}, DHSA_TEST_SEED={SEED}"]


class Runner:
    """run.<stage>(...) runs the stage where `name` says, on copies of CPU tensors with their strides kept."""

    def __init__(self, name: str):
        self.name = name
        self.device = "cuda" if name == "cuda" else "cpu"
        self.head_dims = (64, 96, 128, 256) if name == "cuda" else (8, 16, 40, 64)
        self.q_blocks = (16, 32, 64, 128) if name == "cuda" else (1, 3, 4, 16)
        self.kernels = dhsa_ext.reference if name == "reference" else torch.ops.dhsa

    def to(self, value):
        if not isinstance(value, torch.Tensor) or self.device == "cpu":
            return value
        memory = value.as_strided((value.untyped_storage().nbytes() // value.element_size(),), (1,), 0)
        return memory.to(self.device).as_strided(value.shape, value.stride(), value.storage_offset())

    def __getattr__(self, stage: str):
        kernel = getattr(self.kernels, stage)

        def call(*args, **kwargs):
            result = kernel(*(self.to(a) for a in args), **{name: self.to(a) for name, a in kwargs.items()})
            return tuple(r.cpu() for r in result) if isinstance(result, tuple) else result.cpu()

        return call

    def __repr__(self):
        return self.name


DEVICES = ("cpu",) if no_cuda() else ("cpu", "cuda")  # test_cuda.py says once why there is no "cuda"


@pytest.fixture(scope="session", params=("reference", *DEVICES))
def run(request):
    return Runner(request.param)


@pytest.fixture(scope="session", params=DEVICES)
def ops(request):
    return Runner(request.param)


@pytest.fixture
def rng(request):
    """A generator seeded by the session's seed and the test's own name."""
    return torch.Generator().manual_seed(SEED + sum(request.node.name.encode()))
