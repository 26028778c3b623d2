"""conv2d and conv2d_stats: a plain convolution, and one with the statistics of its output."""

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


def _breaks_the_library(weight: Tensor, stride: tuple[int, int]) -> bool:
    """Whether oneDNN's kernel for AVX2 (jit_avx2_1x1_convolution_bwd_weights, in PyTorch 2.13 and 2.15) writes past
    the end of the weight gradient, in channels_last."""
    return weight.shape[2:] == (1, 1) and weight.shape[1] < 8 and max(stride) > 1


def _is_product(weight: Tensor, geometry: tuple) -> bool:
    """Whether the convolution is a matrix product of pixels and weights, and so its input gradient another."""
    return weight.shape[2:] == (1, 1) and geometry[0] == (1, 1) and geometry[1] == (0, 0)


class _Conv2d(Function):
    """By the kernel that can leave the statistics in its epilogue. The gradient of the weight is by this
    package's kernels where it fills their lanes (or the library's would fail), that of the input in 1x1
    convolutions; else they are the framework's."""

    @staticmethod
    def forward(ctx, x, weight, bias, want_stats, *geometry):
        y, stats = preact_conv_forward(
            channels_last(x), None, weight, bias, None, 0.0, *geometry, want_stats
        )
        ctx.geometry = geometry
        ctx.bias = None if bias is None else (bias.shape, bias.dtype)
        ctx.save_for_backward(x, weight)
        ctx.mark_non_differentiable(stats)
        ctx.set_materialize_grads(False)
        return canonical(y, convolution_is_channels_last(x, weight)), stats

    @staticmethod
    def backward(ctx, dy, _):
        need_x, need_weight, need_bias, *_ = ctx.needs_input_grad
        dx = dweight = dbias = None
        if dy is not None:
            x, weight = ctx.saved_tensors
            geometry = ctx.geometry
            if not torch.is_grad_enabled():  # the framework's have a derivative
                ours = _fills_lanes(weight, geometry[2]) or _breaks_the_library(weight, geometry[0])
                if need_weight and ours:
                    rest = (None, weight, 0.0, *geometry, need_bias)
                    dweight, dbias = preact_conv_wgrad(channels_last(dy), channels_last(x), *rest)
                    dbias = dbias.to(ctx.bias[1]) if need_bias else None
                    need_weight = need_bias = False
                turned = weight.transpose(0, 1)
                if need_x and _is_product(weight, geometry) and _has_kernel(dy, turned, geometry):
                    dx, _ = preact_conv_forward(
                        channels_last(dy), None, turned, None, None, 0.0, *geometry, False
                    )
                    dx, need_x = canonical(dx, convolution_is_channels_last(x, weight)), False
            if need_x or need_weight or need_bias:
                stride, padding, dilation, groups = geometry
                library_dx, library_dweight, library_dbias = torch.ops.aten.convolution_backward(
                    dy, x, weight.to(x.dtype), ctx.bias and ctx.bias[0], stride, padding, dilation, False,
                    (0, 0), groups, (need_x, need_weight, need_bias),
                )  # fmt: skip
                dx = library_dx if need_x else dx
                dweight = library_dweight.to(weight.dtype) if need_weight else dweight
                dbias = library_dbias.to(ctx.bias[1]) if need_bias else dbias
        return dx, dweight, dbias, None, None, None, None, None


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
    # A product of single pixels lies in both formats at once.
    if not convolution_is_channels_last(x, weight) and not (
        x.shape[2:] == (1, 1) and _is_product(weight, geometry)
    ):
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


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, options: tuple, want_stats: bool):
    """y and its statistics (empty if not wanted) by the CPU's kernel; None: it is for the library."""
    if x.dim() != 4:
        raise ValueError(f"expected 4D input (got {x.dim()}D input)")
    stride, padding, dilation, groups = options
    if isinstance(padding, str) or _is_looked_at(x, weight):
        return None
    geometry = (pair(stride, "stride"), pair(padding, "padding"), pair(dilation, "dilation"), groups)
    xc = x
    if torch.is_autocast_enabled("cpu") and x.device.type == "cpu":
        xc = autocast.cast(x, "cpu")
    elif any(t is not None and t.dtype is not x.dtype for t in (weight, bias)):  # conv2d raises
        return None
    if not _has_kernel(xc, weight, geometry):
        return None
    if bias is not None and not (
        is_ordinary(bias)
        and bias.shape == weight.shape[:1]
        and bias.dtype in (xc.dtype, acc_dtype(xc.dtype))
        and bias.device == x.device
    ):
        return None
    return _Conv2d.apply(xc, weight, bias, want_stats, *geometry)


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

    On the CPU, in channels_last, one kernel of this package does both; elsewhere the library
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
    found = _convolve(x, weight, bias, (stride, padding, dilation, groups), True)
    if found is not None:
        return found
    y = torch.nn.functional.conv2d(x, weight, bias, stride, padding, dilation, groups)
    return y, torch.ops.resnet_fused.channel_stats(y.detach())


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] | str = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
) -> Tensor:
    """``torch.nn.functional.conv2d`` of a batch, for convolutions that no norm stands in front of: by this
    package's kernels on the CPU in channels_last, elsewhere by the library.

    Args:
        x, weight, bias, stride, padding, dilation, groups: as conv2d has them; autocast casts them as its.

    Returns:
        y [N, K, P, Q] in the dtype and the memory format of conv2d's.

    Raises:
        ValueError: x is not 4-D.
        RuntimeError: as conv2d does.
    """
    found = _convolve(x, weight, bias, (stride, padding, dilation, groups), False)
    if found is not None:
        return found[0]
    return torch.nn.functional.conv2d(x, weight, bias, stride, padding, dilation, groups)
