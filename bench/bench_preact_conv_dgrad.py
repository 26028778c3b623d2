"""preact_conv_dgrad: the input gradient, ReLU's mask and BatchNorm's two sums."""

import pytest
from harness import ConvInputs, mean_abs, nbytes
from shapes import CONVOLUTIONS, shape_id

BACKENDS = "convolution"


@pytest.mark.parametrize("conv", CONVOLUTIONS, ids=shape_id)
def bench_preact_conv_dgrad(primitive, conv, dtype, device):
    t = ConvInputs(conv, dtype, device)
    n, _, h, w = conv.input
    terms = mean_abs(t.dy) * n * h * w
    primitive("preact_conv_dgrad", (t.dy, t.weight, t.x, t.bn, None, 0.0, *conv.geometry),
              {"dz": 0.0, "sums": terms}, case=str(conv),
              bytes_read=nbytes(t.dy, t.weight, t.x, t.bn), flops=conv.flops)
