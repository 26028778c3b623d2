"""The emulated CUDA library (tests/cuda_emulator): built and loaded when it is first asked for. With
RESNET_FUSED_TEST_DEVICE=cuda the real one in its place, for the same tests on a GPU.
"""

import functools
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

from resnet_fused import extension

ROOT = Path(__file__).resolve().parents[1]


class OnDevice:
    """The operators of the CUDA library, for CPU tensors: they go to the device, the results come back.

    The hardware has its own schedule and number of multiprocessors: what sets them does nothing, and tests that go
    through several compare repeated runs.
    """

    def __init__(self, operators, device: str):
        self._operators, self._device = operators, device

    def set_schedule(self, order: int, late: bool) -> None:
        pass

    def set_multiprocessors(self, count: int) -> None:
        pass

    @staticmethod
    def uses_halo(n: int, h: int, w: int, padding: int, forward: bool) -> bool:
        """halo_fits of csrc/kernels/cuda/halo.h, for a 3x3 convolution with stride 1."""
        rows, columns = (size + 2 * padding - 2 if forward else size for size in (h, w))
        tiles = min(
            -(-n // (128 // (high * wide))) * -(-rows // high) * -(-columns // wide)
            for high, wide in ((8, 16), (16, 8), (8, 8))
        )
        return 3 * n * rows * columns >= 2 * 128 * tiles

    def __getattr__(self, name: str):
        if not hasattr(self._operators, name):
            pytest.skip(f"{name} is a control of the emulator")
        operator = getattr(self._operators, name)

        def run(*args):
            there = [a.to(self._device) if isinstance(a, torch.Tensor) else a for a in args]
            result = operator(*there)
            if operator.default._schema.is_mutable:
                for here, changed in zip(args, there, strict=True):
                    if isinstance(here, torch.Tensor):
                        here.copy_(changed)
            if isinstance(result, torch.Tensor):
                return result.cpu()
            return None if result is None else tuple(t.cpu() for t in result)

        return run


@functools.cache
def library():
    """torch.ops.resnet_fused_cuda_emulated: the operators of the CUDA library for CPU tensors."""
    if "RESNET_FUSED_TEST_DEVICE" in os.environ:
        assert extension.cuda_loaded(), "RESNET_FUSED_TEST_DEVICE is set, but the CUDA library is not loaded"
        return OnDevice(torch.ops.resnet_fused_cuda, os.environ["RESNET_FUSED_TEST_DEVICE"])
    if not (ROOT / "setup.py").exists():
        pytest.skip("not run from a checkout")
    command = [sys.executable, "setup.py", "--quiet", "build_emulator"]
    result = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "VERBOSE": ""}
    )
    assert result.returncode == 0, result.stdout + result.stderr
    path = ROOT / "build" / sysconfig.get_platform() / "libresnet_fused_cuda_emulated.so"
    torch.ops.load_library(str(path))
    return torch.ops.resnet_fused_cuda_emulated


def check_memory():
    """Nothing was written outside of an output or a buffer since the last check."""
    if not isinstance(library(), OnDevice):  # there compute-sanitizer looks (bench.gpu)
        assert library().damaged_margins() == 0, "a kernel wrote outside of its tensors"
