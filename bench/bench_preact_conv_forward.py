"""preact_conv_forward: BatchNorm -> ReLU -> convolution (+ shortcut), with the statistics of its output."""

import pytest
from harness import ConvInputs, nbytes
from shapes import CONVOLUTIONS, shape_id

BACKENDS = "convolution"


@pytest.mark.parametrize("conv", CONVOLUTIONS, ids=shape_id)
def bench_preact_conv_forward(primitive, conv, dtype, device):
    t = ConvInputs(conv, dtype, device)
    residual = t.dy if conv.residual else None  # any tensor of the output's shape
    primitive("preact_conv_forward", (t.x, t.bn, t.weight, None, residual, 0.0, *conv.geometry, True),
              {"y": 0.0, "stats": None}, case=str(conv),
              bytes_read=nbytes(t.x, t.bn, t.weight, residual), flops=conv.flops)
