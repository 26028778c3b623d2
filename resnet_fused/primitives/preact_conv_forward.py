"""preact_conv_forward: y = conv(act(bn(x))) + bias + residual, with the statistics of y."""

import torch
from torch import Tensor

from . import checks, dispatch, reference, unfused
from .layout import acc_dtype, channels_last, convolution_output_shape, empty
from .registration import define_primitive

dispatch.register(
    "preact_conv_forward", reference=reference.preact_conv_forward, unfused=unfused.preact_conv_forward
)


def preact_conv_forward(
    x: Tensor,
    bn: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    slope: float,
    stride,
    padding,
    dilation,
    groups: int,
    want_stats: bool,
) -> tuple[Tensor, Tensor]:
    """The fused pre-activation convolution.

    Args:
        x: [N, C, H, W], dense channels_last.
        bn: acc [4, C] of finalize_forward; None: no normalisation and no activation (a plain convolution).
        weight: [K, C/groups, R, S], any strides; x's dtype, or float32 with half-precision x (rounded when
            used).
        bias: [K], same dtypes; or None.
        residual: [N, K, P, Q] of x's dtype, dense channels_last, added before the one rounding of y; or None.
        slope: negative slope of the activation, 0 for ReLU.
        stride, padding, dilation: pairs. Padding comes after the activation: a padded pixel is 0.

    Returns:
        y [N, K, P, Q] in x's dtype, dense channels_last; and stats of y as rounded, acc [2, K], or [0] if not
        wanted.
    """
    run = dispatch.select_convolution("preact_conv_forward", x, weight, stride, padding, dilation, groups)
    return run(x, bn, weight, bias, residual, slope, stride, padding, dilation, groups, want_stats)


def _kernel(x, bn, weight, bias, residual, slope, stride, padding, dilation, groups, want_stats):
    size = checks.convolution(x, weight, stride, padding, dilation, groups)
    checks.vector(bias, "bias", weight.shape[0], x)
    checks.like(residual, "residual", x, size, "y")
    bn = checks.rows(bn, "bn", 4, x.shape[1], x)
    residual = None if residual is None else channels_last(residual)
    geometry = (stride, padding, dilation, groups)
    return preact_conv_forward(
        channels_last(x), bn, weight, bias, residual, slope, *geometry, want_stats
    )


def _fake(x, bn, weight, bias, residual, slope, stride, padding, dilation, groups, want_stats):
    shape = convolution_output_shape(x.shape, weight.shape, stride, padding, dilation)
    stats = torch.empty((2, shape[1]) if want_stats else (0,), dtype=acc_dtype(x.dtype), device=x.device)
    return empty(shape, x), stats


define_primitive(
    "preact_conv_forward(Tensor x, Tensor? bn, Tensor weight, Tensor? bias, Tensor? residual, float slope, "
    "int[2] stride, int[2] padding, int[2] dilation, int groups, bool want_stats) "
    "-> (Tensor y, Tensor stats)",
    _kernel,
    _fake,
)
