"""The Triton kernels against the float64 oracle: the files triton_*cases.py, on the GPU, or without one under
Triton's interpreter, which has to be chosen before Triton is imported and so runs in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from resnet_fused import triton_kernels

if triton_kernels.unavailable() is not None:
    pytest.skip(triton_kernels.unavailable(), allow_module_level=True)

if torch.cuda.is_available():
    from triton_cases import *  # noqa: F403
    from triton_elementwise_cases import *  # noqa: F403
else:

    def test_under_the_interpreter():
        cases = sorted(map(str, Path(__file__).parent.glob("triton_*cases.py")))
        # The interpreter works in NumPy on small tiles: more threads only get in each other's way.
        env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", *cases]
        run = subprocess.run(command, env=env, capture_output=True, text=True)
        assert run.returncode == 0, run.stdout + run.stderr
        assert " passed" in run.stdout
