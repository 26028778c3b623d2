"""preact_conv_wgrad: the gradients of a convolution's parameters, with the activation recomputed from x."""

import torch
from torch import Tensor

from . import checks, dispatch, reference, unfused
from .layout import channels_last
from .registration import define_primitive

dispatch.register(
    "preact_conv_wgrad", reference=reference.preact_conv_wgrad, unfused=unfused.preact_conv_wgrad
)


def preact_conv_wgrad(
    dy: Tensor,
    x: Tensor,
    bn: Tensor | None,
    weight: Tensor,
    slope: float,
    stride,
    padding,
    dilation,
    groups: int,
    want_bias: bool,
) -> tuple[Tensor, Tensor]:
    """Weight and bias gradients of y = conv(act(bn(x)), weight) + bias.

    Args:
        dy: [N, K, P, Q]; x: [N, C, H, W]; one dtype, dense channels_last.
        bn: acc [4, C] of finalize_forward; None: no normalisation and no activation.
        weight: read for its shape, dtype and strides only.

    Returns:
        dweight in the weight's dtype and memory format, and dbias [K] ([0] if not wanted) in the weight's
        dtype.
    """
    run = dispatch.select_convolution("preact_conv_wgrad", x, weight, stride, padding, dilation, groups)
    return run(dy, x, bn, weight, slope, stride, padding, dilation, groups, want_bias)


def _kernel(dy, x, bn, weight, slope, stride, padding, dilation, groups, want_bias):
    geometry = (stride, padding, dilation, groups)
    checks.like(dy, "dy", x, checks.convolution(x, weight, *geometry), "y")
    bn = checks.rows(bn, "bn", 4, x.shape[1], x)
    return preact_conv_wgrad(
        channels_last(dy), channels_last(x), bn, weight, slope, *geometry, want_bias
    )


def _fake(dy, x, bn, weight, slope, stride, padding, dilation, groups, want_bias):
    return torch.empty_like(weight), weight.new_empty(weight.shape[0] if want_bias else 0)


define_primitive(
    "preact_conv_wgrad(Tensor dy, Tensor x, Tensor? bn, Tensor weight, float slope, int[2] stride, "
    "int[2] padding, int[2] dilation, int groups, bool want_bias) -> (Tensor dweight, Tensor dbias)",
    _kernel,
    _fake,
)
