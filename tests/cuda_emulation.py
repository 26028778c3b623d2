"""The emulated CUDA library (tests/cuda_emulator): built and loaded when it is first asked for."""

import functools
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]


@functools.cache
def library():
    """torch.ops.resnet_fused_cuda_emulated: the operators of the CUDA library for CPU tensors."""
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
    assert library().damaged_margins() == 0, "a kernel wrote outside of its tensors"
