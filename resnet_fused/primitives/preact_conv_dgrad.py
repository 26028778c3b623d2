"""preact_conv_dgrad: the gradient that reaches BatchNorm's output, with BatchNorm's two sums."""

import torch
from torch import Tensor

from . import checks, dispatch, reference, unfused
from .layout import channels_last, empty
from .registration import define_primitive

dispatch.register(
    "preact_conv_dgrad", reference=reference.preact_conv_dgrad, unfused=unfused.preact_conv_dgrad
)


def preact_conv_dgrad(
    dy: Tensor,
    weight: Tensor,
    x: Tensor,
    bn: Tensor,
    dz_in: Tensor | None,
    slope: float,
    stride,
    padding,
    dilation,
    groups: int,
    dz_in_sums: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """dz = conv_transpose(dy, weight) * act'(z) (+ dz_in), z = x * scale + shift.

    Args:
        dy: [N, K, P, Q]; x, dz_in: [N, C, H, W]; one dtype, dense channels_last.
        weight: [K, C/groups, R, S], any strides; x's dtype, or float32 with half-precision x (rounded when
            used).
        bn: acc [4, C] of finalize_forward.
        dz_in: another gradient of z, such as the projection shortcut's.
        dz_in_sums: its sums, where they are known: the CPU's kernel of a strided 1x1 convolution then leaves
            alone what the convolution does not read.

    Returns:
        dz in x's dtype, and sums, acc [2, C]: sum(dz) and sum(dz * xhat), xhat = (x - mean) * invstd, of dz
        as rounded.
    """
    run = dispatch.select_convolution("preact_conv_dgrad", x, weight, stride, padding, dilation, groups)
    if dz_in is not None and dz_in_sums is not None and getattr(run, "namespace", "") == "resnet_fused_cpu":
        run = torch.ops.resnet_fused_cpu.preact_conv_dgrad_with_sums.default
        return run(dy, weight, x, bn, dz_in, dz_in_sums, slope, stride, padding, dilation, groups)
    return run(dy, weight, x, bn, dz_in, slope, stride, padding, dilation, groups)


def _kernel(dy, weight, x, bn, dz_in, slope, *geometry):
    checks.like(dy, "dy", x, checks.convolution(x, weight, *geometry), "y")
    checks.like(dz_in, "dz_in", x)
    bn = checks.rows(bn, "bn", 4, x.shape[1], x)
    return preact_conv_dgrad(
        channels_last(dy),
        weight,
        channels_last(x),
        bn,
        None if dz_in is None else channels_last(dz_in),
        slope,
        *geometry,
    )


def _fake(dy, weight, x, bn, dz_in, slope, stride, padding, dilation, groups):
    return empty(x.shape, x), torch.empty(2, x.shape[1], dtype=bn.dtype, device=x.device)


define_primitive(
    "preact_conv_dgrad(Tensor dy, Tensor weight, Tensor x, Tensor bn, Tensor? dz_in, float slope, "
    "int[2] stride, int[2] padding, int[2] dilation, int groups) -> (Tensor dz, Tensor sums)",
    _kernel,
    _fake,
)
