"""A prepared launch goes through Triton once, and then straight to the compiled kernel. No GPU: Triton is
played by fakes."""

from types import SimpleNamespace

import pytest
import torch

from resnet_fused import triton_kernels

if triton_kernels.unavailable() is not None:
    pytest.skip(triton_kernels.unavailable(), allow_module_level=True)

from resnet_fused.triton_kernels import launch


class Kernel:
    """Records how it is called: like a JITFunction, kernel[grid](...) launches and gives the compiled
    kernel."""

    __name__ = "fake"

    def __init__(self):
        self.slow, self.fast = [], []

    def __getitem__(self, grid):
        def run(*args, **options):
            self.slow.append((grid, args, options))
            return Compiled(self)

        return run


class Compiled:
    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        return lambda *args, stream: self.kernel.fast.append((grid, args, stream))


@pytest.fixture
def kernel(monkeypatch):
    active = SimpleNamespace(get_current_device=lambda: 3, get_current_stream=lambda device: 100 + device)
    monkeypatch.setattr(launch, "driver", SimpleNamespace(active=active))
    monkeypatch.setattr(launch, "JITFunction", Kernel)
    return Kernel()


def test_second_call_is_direct(kernel):
    x = torch.zeros(8)
    prepared = launch.Launch(kernel, (5,), (torch.float32, None), (7, 0.5), (True, 16), num_warps=4)
    options = {"enable_fp_fusion": True, "num_warps": 4}
    prepared(x, None)
    assert kernel.slow == [((5, 1, 1), (x, None, 7, 0.5, True, 16), options)] and not kernel.fast
    prepared(x, None)
    assert len(kernel.slow) == 1
    assert kernel.fast == [((5, 1, 1), (x.data_ptr(), None, 7, 0.5, True, 16), 103)]


def test_misaligned_tensors_take_tritons_own_way(kernel):
    x = torch.zeros(8)
    prepared = launch.Launch(kernel, (5, 2), (torch.float32,), (), ())
    prepared(x[1:])
    prepared(x[1:])
    assert len(kernel.slow) == 2 and not kernel.fast
    prepared(x)
    prepared(x)
    prepared(x[1:])
    assert len(kernel.slow) == 4 and len(kernel.fast) == 1


def test_wrong_dtype_is_noticed_at_the_first_call(kernel):
    with pytest.raises(AssertionError):
        launch.Launch(kernel, (1,), (torch.float16,), (), ())(torch.zeros(8))
