"""conv2d_stats: a plain convolution and the statistics of its output, for the stem of a net."""

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad

from resnet_fused.primitives import dispatch, preact_conv_forward, preact_conv_wgrad
from resnet_fused.primitives.layout import (
    acc_dtype,
    canonical,
    channels_last,
    convolution_is_channels_last,
    convolution_output_shape,
)
from resnet_fused.primitives.registration import is_ordinary

from . import autocast
from .arguments import pair

#: With fewer input channels the weight gradient's kernel has output channels as lanes: with 1-12 input and at
#: least 16 output channels, 3x3 and 7x7, it took 0.05-1.05 of the library's time at AVX-512's levels (0.91-0.58
#: in stems of 3), and likewise at the lower ones with the library held to their instructions (but 1.16 in a 7x7
#: in float32 on SSE2). Fewer outputs took up to 1.5 of it, 1x1 2.0: they leave lanes idle and are the library's.
_MANY_CHANNELS = 16


def _fills_lanes(weight: Tensor, dilation: tuple[int, int]) -> bool:
    """Whether this package's weight gradient is the faster one."""
    k, c, r, s = weight.shape
    return c >= _MANY_CHANNELS or (k >= _MANY_CHANNELS and r * s > 1 and (s == 1 or dilation[1] == 1))


class _Conv2dStats(Function):
    """By the kernel that has the statistics in its epilogue; both gradients are the framework's, but for the
    weight's where it fills a kernel's lanes."""

    @staticmethod
    def forward(ctx, x, weight, *geometry):
        y, stats = preact_conv_forward(channels_last(x), None, weight, None, None, 0.0, *geometry, True)
        ctx.geometry = geometry
        ctx.save_for_backward(x, weight)
        ctx.mark_non_differentiable(stats)
        ctx.set_materialize_grads(False)
        return canonical(y, True), stats

    @staticmethod
    def backward(ctx, dy, _):
        need_x, need_weight, *_ = ctx.needs_input_grad
        dx = dweight = None
        if dy is not None:
            x, weight = ctx.saved_tensors
            if need_weight and _fills_lanes(weight, ctx.geometry[2]) and not torch.is_grad_enabled():
                rest = (None, weight, 0.0, *ctx.geometry, False)
                dweight, _ = preact_conv_wgrad(channels_last(dy), channels_last(x), *rest)
                need_weight = False
            if need_x or need_weight:
                stride, padding, dilation, groups = ctx.geometry
                dx, library_dweight, _ = torch.ops.aten.convolution_backward(
                    dy, x, weight.to(x.dtype), None, stride, padding, dilation, False, (0, 0), groups,
                    (need_x, need_weight, False),
                )  # fmt: skip
                if need_weight:
                    dweight = library_dweight.to(weight.dtype)
        return dx, dweight, None, None, None, None


def _has_kernel(x: Tensor, weight: Tensor, geometry: tuple) -> bool:
    """Whether the CPU's kernel takes the convolution; it is left to PyTorch to say what is wrong with one."""
    if x.device.type != "cpu" or weight.device.type != "cpu" or weight.dim() != 4 or x.numel() == 0:
        return False
    stride, padding, dilation, groups = geometry
    if weight.dtype not in (x.dtype, acc_dtype(x.dtype)) or weight.shape[1] * groups != x.shape[1]:
        return False
    if min(stride) < 1 or min(padding) < 0 or min(dilation) < 1 or groups != 1 or weight.numel() == 0:
        return False
    if min(convolution_output_shape(x.shape, weight.shape, stride, padding, dilation)) < 1:
        return False
    if not convolution_is_channels_last(x, weight):
        return False
    return dispatch.has_kernel("preact_conv_forward", x, weight, *geometry)


def _is_looked_at(x: Tensor, weight: Tensor) -> bool:
    """Whether something has to see the library's convolution."""
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or forward_ad._current_level >= 0
        or not (is_ordinary(x) and is_ordinary(weight))
    )


def conv2d_stats(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] | str = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
) -> tuple[Tensor, Tensor]:
    """``torch.nn.functional.conv2d`` of a batch, and mean and M2 of its output per channel.

    On the CPU, in channels_last and without bias, one kernel of this package does both; elsewhere the library
    convolves and a pass over its output takes the statistics.

    Args:
        x, weight, bias, stride, padding, dilation, groups: as conv2d has them; autocast casts them as its.

    Returns:
        y, and its statistics, [2, K] in float32 (float64 for float64). They have no derivative themselves:
        the operator that takes them as ``x_stats`` differentiates through them.

    Raises:
        ValueError: x is not 4-D.
        RuntimeError: as conv2d does.
    """
    if x.dim() != 4:
        raise ValueError(f"expected 4D input (got {x.dim()}D input)")
    if bias is None and not isinstance(padding, str) and not _is_looked_at(x, weight):
        geometry = (pair(stride, "stride"), pair(padding, "padding"), pair(dilation, "dilation"), groups)
        xc = autocast.cast(x, "cpu") if torch.is_autocast_enabled("cpu") and x.device.type == "cpu" else x
        if _has_kernel(xc, weight, geometry):
            return _Conv2dStats.apply(xc, weight, *geometry)
    y = torch.nn.functional.conv2d(x, weight, bias, stride, padding, dilation, groups)
    return y, torch.ops.resnet_fused.channel_stats(y.detach())
