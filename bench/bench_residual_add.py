"""residual_add with the statistics of the sum."""

import pytest
from harness import DTYPES, activation, nbytes
from shapes import ACTIVATIONS, shape_id


@pytest.mark.parametrize("shape", ACTIVATIONS, ids=shape_id)
def bench_residual_add(primitive, shape, dtype, device):
    x, y = (activation(shape, DTYPES[dtype], device) for _ in range(2))
    primitive("residual_add", (x, y, None, None, 1.0, None, True), {"out": 0.0, "stats": None},
              case=shape_id(shape), bytes_read=nbytes(x, y))
