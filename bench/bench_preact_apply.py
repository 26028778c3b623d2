"""preact_apply: BatchNorm's backward and the skip's addition in one pass."""

import pytest
import torch
from harness import DTYPES, activation, nbytes
from shapes import ACTIVATIONS, shape_id


@pytest.mark.parametrize("shape", ACTIVATIONS, ids=shape_id)
def bench_preact_apply(primitive, shape, dtype, device):
    dz, x, dskip = (activation(shape, DTYPES[dtype], device) for _ in range(3))
    coefficients = torch.randn(4, shape[1], device=device)
    primitive("preact_apply", (dz, x, coefficients, dskip), {"dx": 0.0}, case=shape_id(shape),
              bytes_read=nbytes(dz, x, coefficients, dskip))
