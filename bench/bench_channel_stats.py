"""channel_stats: mean and M2 per channel, one read of x."""

import pytest
from harness import DTYPES, activation, nbytes
from shapes import ACTIVATIONS, shape_id


@pytest.mark.parametrize("shape", ACTIVATIONS, ids=shape_id)
def bench_channel_stats(primitive, shape, dtype, device):
    x = activation(shape, DTYPES[dtype], device)
    primitive("channel_stats", (x,), {"stats": None}, case=shape_id(shape), bytes_read=nbytes(x))
