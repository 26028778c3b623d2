"""Fixtures that several test files share."""

import importlib

import pytest
import torch

import resnet_fused as rf
from resnet_fused import extension


def cpu_levels() -> tuple[str, ...]:
    return extension.cpu_levels() if extension.cpu_available() else ()


def pytest_addoption(parser):
    parser.addoption(
        "--shard", metavar="I/N", help="run every N-th test from the I-th on: for N processes at once"
    )


def pytest_collection_modifyitems(config, items):
    shard = config.getoption("--shard")
    if shard is not None:
        index, count = map(int, shard.split("/"))
        items[:] = items[index::count]


#: Every backend that can run here, the C++ one at every SIMD level.
BACKENDS = ["reference", "unfused", *(f"cpu-{level}" for level in cpu_levels())]

_LEVELS = {"generic": 0, "avx2": 1, "avx512": 2, "avx512_bf16": 3, "avx512_amx": 4}


class backend_in_force:
    """use_backend, and for "cpu-<level>" the SIMD level too."""

    def __init__(self, name: str):
        self.backend, _, self.level = name.partition("-")

    def __enter__(self):
        self.previous = rf.use_backend(self.backend)
        if self.level:
            number = _LEVELS[self.level]
            assert torch.ops.resnet_fused_cpu.set_simd_level(number) == number

    def __exit__(self, *exc):
        self.previous.__exit__(*exc)
        if self.level:
            torch.ops.resnet_fused_cpu.set_simd_level(-1)


def on_every_backend(check):
    """Call check(backend) under every backend and report all that fail, by name. One test for all of them, so
    that what they are compared with is computed once."""
    failures = []
    for name in BACKENDS:
        with backend_in_force(name):
            try:
                check(name)
            except (AssertionError, RuntimeError) as error:
                failures.append(f"{name}: {error}")
    assert not failures, "\n".join(failures)


@pytest.fixture(params=BACKENDS)
def backend(request):
    """The test runs once under every backend."""
    with backend_in_force(request.param):
        yield request.param


#: The module; the package's attribute of that name is the function.
residual_units_module = importlib.import_module("resnet_fused.ops.residual_units")


@pytest.fixture
def unit_calls(monkeypatch):
    """(statistics given, statistics asked for) of every fused unit from now on, which are called one by one."""
    seen = []
    monkeypatch.setattr(residual_units_module, "_one_node", lambda *args: None)
    for module, function in (
        (residual_units_module, "residual_unit_by_dispatcher"),
        (rf.functional, "preact_conv2d"),
    ):

        def wrapper(*args, original=getattr(module, function), **kwargs):
            seen.append((kwargs["x_stats"] is not None, kwargs["return_stats"]))
            return original(*args, **kwargs)

        monkeypatch.setattr(module, function, wrapper)
    return seen


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def threads():
    """Set the number of threads; it is put back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def one_thread(threads):
    """For many tiny tensors: the threads' barriers would take more time than the work, and much more on a
    busy machine.
    """
    threads(1)


@pytest.fixture
def cpu_library():
    if not extension.cpu_available():
        pytest.skip(f"the C++ library was not loaded: {extension.failures.get('cpu')}")
