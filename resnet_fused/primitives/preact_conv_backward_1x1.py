"""preact_conv_backward_1x1: both gradients of a 1x1 convolution, where one kernel reads dy and x for both."""

import torch
from torch import Tensor

from . import checks, dispatch, reference
from .layout import channels_last, empty
from .preact_conv_dgrad import preact_conv_dgrad
from .preact_conv_wgrad import preact_conv_wgrad
from .registration import define_primitive

#: stride, padding, dilation, groups.
_GEOMETRY = ((1, 1), (0, 0), (1, 1), 1)


def _unfused(dy, weight, x, bn, dz_in, slope, want_bias):
    return (
        *preact_conv_dgrad(dy, weight, x, bn, dz_in, slope, *_GEOMETRY),
        *preact_conv_wgrad(dy, x, bn, weight, slope, *_GEOMETRY, want_bias),
    )


dispatch.register(
    "preact_conv_backward_1x1", reference=reference.preact_conv_backward_1x1, unfused=_unfused
)


def has_kernel(x: Tensor, weight: Tensor, stride, padding, dilation, groups: int) -> bool:
    """Whether a convolution has both gradients from one kernel. Where it has not, call preact_conv_dgrad and
    preact_conv_wgrad: they may be needed apart."""
    return weight.shape[-1] == 1 and dispatch.has_kernel(
        "preact_conv_backward_1x1", x, weight, stride, padding, dilation, groups
    )


def preact_conv_backward_1x1(
    dy: Tensor, weight: Tensor, x: Tensor, bn: Tensor, dz_in: Tensor | None, slope: float, want_bias: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """preact_conv_dgrad and preact_conv_wgrad of a 1x1 convolution with stride 1, padding 0 and groups 1.

    Args:
        dy: [N, K, H, W]; x, dz_in: [N, C, H, W]; one dtype, dense channels_last.
        weight: [K, C, 1, 1], any strides; x's dtype, or float32 with half-precision x (rounded when used).
        bn: acc [4, C] of finalize_forward.
        dz_in: another gradient of z, such as the projection shortcut's.

    Returns:
        dz and sums as preact_conv_dgrad gives them; dweight and dbias as preact_conv_wgrad does.
    """
    run = dispatch.select_convolution("preact_conv_backward_1x1", x, weight, *_GEOMETRY)
    return run(dy, weight, x, bn, dz_in, slope, want_bias)


def _kernel(dy, weight, x, bn, dz_in, *rest):
    size = checks.convolution(x, weight, *_GEOMETRY)
    if weight.shape[2:] != (1, 1):
        raise RuntimeError(f"expected weight to be of a 1x1 kernel, but got size {list(weight.shape)}")
    checks.like(dy, "dy", x, size, "y")
    checks.like(dz_in, "dz_in", x)
    bn = checks.rows(bn, "bn", 4, x.shape[1], x)
    return preact_conv_backward_1x1(
        channels_last(dy),
        weight,
        channels_last(x),
        bn,
        None if dz_in is None else channels_last(dz_in),
        *rest,
    )


def _fake(dy, weight, x, bn, dz_in, slope, want_bias):
    return (
        empty(x.shape, x),
        torch.empty(2, x.shape[1], dtype=bn.dtype, device=x.device),
        torch.empty_like(weight),
        weight.new_empty(weight.shape[0] if want_bias else 0),
    )


define_primitive(
    "preact_conv_backward_1x1(Tensor dy, Tensor weight, Tensor x, Tensor bn, Tensor? dz_in, float slope, "
    "bool want_bias) -> (Tensor dz, Tensor sums, Tensor dweight, Tensor dbias)",
    _kernel,
    _fake,
)
