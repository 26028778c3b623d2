"""preact_conv_backward_1x1: both gradients of a 1x1 convolution in one kernel; unfused: by two primitives."""

import pytest
from harness import ConvInputs, mean_abs, nbytes
from shapes import CONVOLUTIONS, shape_id

BACKENDS = "convolution"
POINTWISE = [conv for conv in CONVOLUTIONS if conv.kernel == conv.stride == 1]


@pytest.mark.parametrize("conv", POINTWISE, ids=shape_id)
def bench_preact_conv_backward_1x1(primitive, conv, dtype, device):
    t = ConvInputs(conv, dtype, device)
    n, _, h, w = conv.input
    terms = mean_abs(t.dy) * n * h * w
    primitive("preact_conv_backward_1x1", (t.dy, t.weight, t.x, t.bn, None, 0.0, False),
              {"dz": 0.0, "sums": terms, "dweight": terms * mean_abs(t.x)}, case=str(conv),
              bytes_read=nbytes(t.dy, t.weight, t.x, t.bn), flops=2 * conv.flops)
