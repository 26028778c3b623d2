"""preact_conv_wgrad: the weight gradient, with the activation recomputed from x."""

import pytest
from harness import ConvInputs, mean_abs, nbytes
from shapes import CONVOLUTIONS, shape_id

BACKENDS = "convolution"


@pytest.mark.parametrize("conv", CONVOLUTIONS, ids=shape_id)
def bench_preact_conv_wgrad(primitive, conv, dtype, device):
    t = ConvInputs(conv, dtype, device)
    n, _, p, q = conv.output
    primitive("preact_conv_wgrad", (t.dy, t.x, t.bn, t.weight, 0.0, *conv.geometry, False),
              {"dweight": mean_abs(t.dy) * mean_abs(t.x) * n * p * q}, case=str(conv),
              bytes_read=nbytes(t.dy, t.x, t.bn), flops=conv.flops)
