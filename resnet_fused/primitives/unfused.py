"""The convolution primitives out of an elementwise primitive and the framework's own convolution.

It serves what the fused kernels decline (groups, half precision, devices without kernels) and the shapes at
which the framework's convolution was measured to win. Argument names and shapes: see the file of each
primitive.
"""

import torch
from torch import Tensor

from .bn_act_backward import bn_act_backward
from .bn_act_forward import bn_act_forward
from .channel_stats import channel_stats
from .layout import acc_dtype, canonical
from .reference import bias_gradient
from .residual_add import residual_add


def _activated(x: Tensor, bn: Tensor | None, slope: float) -> Tensor:
    return x if bn is None else bn_act_forward(x, bn, slope)


def preact_conv_forward(x, bn, weight, bias, residual, slope, stride, padding, dilation, groups, want_stats):
    y = torch.ops.aten.convolution(
        _activated(x, bn, slope),
        weight.to(x.dtype),
        None if bias is None else bias.to(x.dtype),
        stride,
        padding,
        dilation,
        False,
        [0, 0],
        groups,
    )
    y = canonical(y, True)
    if residual is not None:
        y, stats = residual_add(y, residual, None, None, 1.0, None, want_stats)
        return canonical(y, True), stats
    if want_stats:
        return y, channel_stats(y)
    return y, torch.empty(0, dtype=acc_dtype(x.dtype), device=x.device)


def preact_conv_dgrad(dy, weight, x, bn, dz_in, slope, stride, padding, dilation, groups):
    da = torch.ops.aten.convolution_backward(
        dy,
        x,
        weight.to(x.dtype),
        None,
        stride,
        padding,
        dilation,
        False,
        [0, 0],
        groups,
        [True, False, False],
    )[0]
    return bn_act_backward(canonical(da, True), x, bn, dz_in, slope)


def preact_conv_wgrad(dy, x, bn, weight, slope, stride, padding, dilation, groups, want_bias):
    dweight = torch.empty_like(weight)
    gradient = torch.ops.aten.convolution_backward(
        dy,
        _activated(x, bn, slope),
        weight.to(x.dtype),
        None,
        stride,
        padding,
        dilation,
        False,
        [0, 0],
        groups,
        [False, True, False],
    )[1]
    if gradient.dtype is weight.dtype and gradient.stride() == dweight.stride():
        dweight = gradient
    else:
        dweight.copy_(gradient)
    return dweight, bias_gradient(dy, weight) if want_bias else weight.new_empty(0)
