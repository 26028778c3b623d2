"""The Triton kernels against the float64 oracle: on the GPU, or without one under Triton's interpreter."""

import pytest
import torch
from interpreter import run_cases

from resnet_fused import triton_kernels

if triton_kernels.unavailable() is not None:
    pytest.skip(triton_kernels.unavailable(), allow_module_level=True)

if torch.cuda.is_available():
    from triton_cases import *  # noqa: F403
    from triton_elementwise_cases import *  # noqa: F403
else:

    def test_under_the_interpreter():
        run_cases("triton_cases.py", "triton_elementwise_cases.py")
