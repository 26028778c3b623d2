"""bn_act_forward and bn_act_backward: the elementwise parts of the unfused path; bn_act_pool_forward and
_backward: the same with global average pooling, the end of a net."""

import pytest
from harness import DTYPES, activation, bn_rows, mean_abs, nbytes
from shapes import ACTIVATIONS, shape_id


@pytest.mark.parametrize("shape", ACTIVATIONS, ids=shape_id)
def bench_bn_act_forward(primitive, shape, dtype, device):
    x, bn = activation(shape, DTYPES[dtype], device), bn_rows(shape[1], device)
    primitive("bn_act_forward", (x, bn, 0.0), {"a": 0.0}, case=shape_id(shape), bytes_read=nbytes(x, bn))


@pytest.mark.parametrize("shape", ACTIVATIONS, ids=shape_id)
def bench_bn_act_backward(primitive, shape, dtype, device):
    da, x = (activation(shape, DTYPES[dtype], device) for _ in range(2))
    bn = bn_rows(shape[1], device)
    terms = mean_abs(da) * (x.numel() // shape[1])
    primitive("bn_act_backward", (da, x, bn, None, 0.0), {"dz": 0.0, "sums": terms},
              case=shape_id(shape), bytes_read=nbytes(da, x, bn))


@pytest.mark.parametrize("shape", ACTIVATIONS, ids=shape_id)
def bench_bn_act_pool_forward(primitive, shape, dtype, device):
    x, bn = activation(shape, DTYPES[dtype], device), bn_rows(shape[1], device)
    primitive("bn_act_pool_forward", (x, bn, 0.0), {"y": 0.0}, case=shape_id(shape), bytes_read=nbytes(x, bn))


@pytest.mark.parametrize("shape", ACTIVATIONS, ids=shape_id)
def bench_bn_act_pool_backward(primitive, shape, dtype, device):
    x, bn = activation(shape, DTYPES[dtype], device), bn_rows(shape[1], device)
    dy = activation((*shape[:2], 1, 1), DTYPES[dtype], device)
    terms = mean_abs(dy) * shape[0]
    primitive("bn_act_pool_backward", (dy, x, bn, 0.0), {"dz": 0.0, "sums": terms},
              case=shape_id(shape), bytes_read=nbytes(dy, x, bn))
