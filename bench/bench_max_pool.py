"""max_pool_forward and max_pool_backward, as in the stem of an ImageNet net: 3x3, stride 2, padding 1."""

import pytest
import torch
from harness import DTYPES, activation, nbytes
from shapes import ACTIVATIONS, shape_id

from resnet_fused.primitives import reference

WINDOWS = (3, 3), (2, 2), (1, 1)


@pytest.mark.parametrize("shape", ACTIVATIONS, ids=shape_id)
def bench_max_pool_forward(primitive, shape, dtype, device):
    x = activation(shape, DTYPES[dtype], device)
    primitive("max_pool_forward", (x, *WINDOWS), {"y": 0.0, "offsets": 0.0}, case=shape_id(shape),
              bytes_read=nbytes(x))


@pytest.mark.parametrize("shape", ACTIVATIONS, ids=shape_id)
def bench_max_pool_backward(primitive, shape, dtype, device):
    y, offsets = reference.max_pool_forward(activation(shape, DTYPES[dtype], device), *WINDOWS)
    dy = torch.randn_like(y)
    primitive("max_pool_backward", (dy, offsets, shape[2:], *WINDOWS), {"dx": 0.0}, case=shape_id(shape),
              bytes_read=nbytes(dy, offsets))
