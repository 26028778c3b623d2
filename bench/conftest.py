"""Fixtures of the benchmarks: every one runs under each backend of the device, in each dtype."""

import pytest
import torch
from harness import DTYPES, PrimitiveBench, Timer, backends

from resnet_fused.primitives.dispatch import unavailable


def pytest_addoption(parser):
    parser.addoption("--device", choices=["cpu", "cuda"], help="default: cuda where there is one, else cpu")


def device_of(config) -> str:
    return config.getoption("device") or ("cuda" if torch.cuda.is_available() else "cpu")


def skip_marks(backend: str) -> list:
    why = unavailable(backend)
    return [pytest.mark.skip(reason=f"backend {backend!r} is not available: {why}")] if why else []


def pytest_generate_tests(metafunc):
    device = device_of(metafunc.config)
    if "device" in metafunc.fixturenames:
        metafunc.parametrize("device", [device])
    if "backend" in metafunc.fixturenames:
        kind = getattr(metafunc.module, "BACKENDS", "elementwise")
        names = backends(device, convolution=kind != "elementwise")
        params = [pytest.param(name, marks=skip_marks(name)) for name in names]
        metafunc.parametrize("backend", [*params, *(["eager"] if kind == "unit" else [])])
    if "dtype" in metafunc.fixturenames:
        metafunc.parametrize("dtype", getattr(metafunc.module, "BENCH_DTYPES", list(DTYPES)))


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def timer(benchmark, device, backend):
    return Timer(benchmark, device, backend)


@pytest.fixture
def primitive(timer, backend, dtype):
    """Verify a primitive, then time it."""
    return PrimitiveBench(timer, backend, dtype)
