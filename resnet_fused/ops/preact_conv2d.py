"""preact_conv2d: BatchNorm -> (Leaky)ReLU -> convolution (+ residual), one differentiable operator.

Forward reads x once for its statistics (not at all if they come with it) and once in the convolution;
backward recomputes the activation from x, so that only x is saved (He et al. 2016, "Identity Mappings in Deep
Residual Networks", the pre-activation; Ioffe & Szegedy 2015, "Batch Normalization", the gradients).
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from resnet_fused import primitives
from resnet_fused.primitives.layout import (
    CHANNELS_LAST,
    canonical,
    channels_last,
    convolution_is_channels_last,
    empty,
    empty_acc,
    suggests_channels_last,
)
from resnet_fused.primitives.registration import (
    autocast_kernel,
    below_autograd,
    call,
    call_in_backward,
    define,
    differentiable,
    without_autocast,
)

from . import autocast, checks, double_backward, running_stats
from .arguments import pair, resolve_padding
from .convolution_gradients import convolution_gradients
from .residual_add import residual_add


class _Arguments(NamedTuple):
    """The operator's arguments, in the order of its schema."""

    x: Tensor
    x_stats: Tensor | None
    bn_weight: Tensor | None
    bn_bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    weight: Tensor
    bias: Tensor | None
    residual: Tensor | None
    training: bool  # use batch statistics
    eps: float
    negative_slope: float
    stride: list[int]
    padding: list[int]
    dilation: list[int]
    groups: int
    want_stats: bool


def _check(a: _Arguments) -> tuple[int, int, int, int]:
    """Checks every argument; returns the shape of y."""
    x = a.x
    checks.activation(x, "preact_conv2d")
    checks.batch_norm(
        x.shape, x.dtype, x.device, a.x_stats, a.bn_weight, a.bn_bias, a.running_mean, a.running_var,
        a.training, a.eps,
    )  # fmt: skip
    shape = checks.convolution(
        x.shape, x.dtype, x.device, a.weight, a.bias, a.stride, a.padding, a.dilation, a.groups
    )
    if a.residual is not None:
        checks.addend(a.residual, "residual", shape, x.dtype, x.device)
    return shape


def _empty_outputs(a: _Arguments, shape: tuple[int, int, int, int]):
    """Uninitialised outputs, of the sizes and strides that the operator gives."""
    x = a.x
    return (
        empty(shape, x, convolution_is_channels_last(x, a.weight)),
        empty_acc(x, 2, shape[1]) if a.want_stats else empty_acc(x, 0),
        empty_acc(x, 2, x.shape[1]) if a.training and a.x_stats is None else empty_acc(x, 0),
        empty_acc(x, 4, x.shape[1]),
    )


def _forward(*args):
    a = _Arguments(*args)
    shape = _check(a)
    if a.x.shape[0] == 0:
        y, *small = _empty_outputs(a, shape)
        return y, *(t.zero_() for t in small)
    x = channels_last(a.x)
    used = computed = None
    if a.training:
        used = a.x_stats
        if used is None:
            used = computed = primitives.channel_stats(x)
    count = x.shape[0] * x.shape[2] * x.shape[3]
    bn = primitives.finalize_forward(
        used, count, a.running_mean, a.running_var, a.bn_weight, a.bn_bias, a.eps
    )
    residual = None if a.residual is None else channels_last(a.residual)
    y, y_stats = primitives.preact_conv_forward(
        x, bn, a.weight, a.bias, residual, a.negative_slope, a.stride, a.padding, a.dilation, a.groups,
        a.want_stats
    )  # fmt: skip
    y = canonical(y, convolution_is_channels_last(a.x, a.weight))
    return y, y_stats, empty_acc(x, 0) if computed is None else computed, bn


def _forward_fake(*args):
    a = _Arguments(*args)
    return _empty_outputs(a, _check(a))


_OP = define(
    "preact_conv2d(Tensor x, Tensor? x_stats, Tensor? bn_weight, Tensor? bn_bias, Tensor? running_mean, "
    "Tensor? running_var, Tensor weight, Tensor? bias, Tensor? residual, bool training, float eps, "
    "float negative_slope, int[2] stride, int[2] padding, int[2] dilation, int groups, bool want_stats) "
    "-> (Tensor y, Tensor y_stats, Tensor x_stats, Tensor bn)",
    _forward,
    _forward_fake,
)


class _BackwardArguments(NamedTuple):
    """The backward operator's arguments, in the order of its schema."""

    dy: Tensor
    x: Tensor
    bn: Tensor
    bn_weight: Tensor | None  # with bn_bias, for the second derivative
    bn_bias: Tensor | None
    weight: Tensor
    training: bool
    eps: float
    negative_slope: float
    stride: list[int]
    padding: list[int]
    dilation: list[int]
    groups: int
    output_mask: list[bool]  # of x, the BatchNorm, weight, bias


def _backward_outputs(a: _BackwardArguments):
    """Uninitialised outputs, of the sizes and strides that the backward operator gives."""
    need_x, need_bn, need_weight, need_bias = a.output_mask
    x, weight = a.x, a.weight
    return (
        empty(x.shape, x, suggests_channels_last(x)) if need_x else x.new_empty(0),
        empty_acc(x, 2, x.shape[1]) if need_bn else empty_acc(x, 0),
        torch.empty_like(weight) if need_weight else weight.new_empty(0),
        weight.new_empty(weight.shape[0] if need_bias else 0),
    )


def _backward(*args):
    a = _BackwardArguments(*args)
    need_x, need_bn, need_weight, need_bias = a.output_mask
    if a.x.shape[0] == 0:
        dx, *rest = _backward_outputs(a)
        return dx, *(t.zero_() for t in rest)
    x, dy, weight, slope = channels_last(a.x), channels_last(a.dy), a.weight, a.negative_slope
    geometry = (a.stride, a.padding, a.dilation, a.groups)
    dz, bn_sums, dweight, dbias = convolution_gradients(
        dy, x, a.bn, weight, None, None, slope, geometry, need_x or need_bn, need_weight, need_bias
    )
    dx = x.new_empty(0)
    if need_x:
        count = x.shape[0] * x.shape[2] * x.shape[3]
        coefficients = primitives.finalize_backward(bn_sums, a.bn, count, a.training)
        dx = canonical(primitives.preact_apply(dz, x, coefficients, None), suggests_channels_last(a.x))
    return dx, bn_sums if need_bn else empty_acc(x, 0), dweight, dbias


_BACKWARD_OP = define(
    "preact_conv2d_backward(Tensor dy, Tensor x, Tensor bn, Tensor? bn_weight, Tensor? bn_bias, "
    "Tensor weight, bool training, float eps, float negative_slope, int[2] stride, int[2] padding, "
    "int[2] dilation, int groups, bool[4] output_mask) "
    "-> (Tensor dx, Tensor sums, Tensor dweight, Tensor dbias)",
    _backward,
    lambda *args: _backward_outputs(_BackwardArguments(*args)),
)


class _PreactConv2d(Function):
    @staticmethod
    def forward(ctx, *args):
        y, y_stats, x_stats, bn = below_autograd(_OP, *args)
        a = _Arguments(*args)
        ctx.options = args[9:16]
        ctx.bias_dtype = None if a.bias is None else a.bias.dtype
        # Not the running statistics: they may change before backward (DDP with two forwards). bn is a copy.
        ctx.save_for_backward(a.x, bn, a.bn_weight, a.bn_bias, a.weight)
        ctx.mark_non_differentiable(y_stats, x_stats, bn)
        ctx.set_materialize_grads(False)
        return y, y_stats, x_stats, bn

    @staticmethod
    def backward(ctx, dy, *_):
        need_x, _, need_bn_weight, need_bn_bias, _, _, need_weight, need_bias, need_residual, *_ = (
            ctx.needs_input_grad
        )
        gradients = [None] * len(ctx.needs_input_grad)
        if dy is None:
            return tuple(gradients)
        x, bn, bn_weight, bn_bias, weight = ctx.saved_tensors
        mask = [need_x, need_bn_weight or need_bn_bias, need_weight, need_bias]
        if any(mask):
            dx, sums, dweight, dbias = call_in_backward(
                _BACKWARD_OP, dy, x, bn, bn_weight, bn_bias, weight, *ctx.options, mask
            )
            if need_x:
                gradients[0] = dx
            if need_bn_weight:
                gradients[2] = sums[1].to(bn_weight.dtype)
            if need_bn_bias:
                gradients[3] = sums[0].to(bn_bias.dtype)
            if need_weight:
                gradients[6] = dweight
            if need_bias:
                gradients[7] = dbias.to(ctx.bias_dtype)
        if need_residual:
            gradients[8] = dy
        return tuple(gradients)


class _PreactConv2dBackward(Function):
    @staticmethod
    def forward(ctx, *args):
        outputs = below_autograd(_BACKWARD_OP, *args)
        ctx.options = args[6:]
        ctx.save_for_backward(*args[:6])
        ctx.set_materialize_grads(False)
        return outputs

    @staticmethod
    def backward(ctx, ddx, dsums, ddweight, ddbias):
        a = _BackwardArguments(*ctx.saved_tensors, *ctx.options)
        need_x, need_bn, need_weight, need_bias = a.output_mask
        gamma = torch.ones_like(a.bn[0]) if a.bn_weight is None else a.bn_weight
        beta = torch.zeros_like(a.bn[0]) if a.bn_bias is None else a.bn_bias
        # The value of the bias is of no consequence for the gradients.
        bias = a.dy.new_zeros(a.dy.shape[1])

        def function(x, gamma, beta, weight, bias):
            frozen = None if a.training else a.bn
            act = double_backward.pre_activation(x, gamma, beta, frozen, a.eps, a.negative_slope)
            return double_backward.convolution(act, weight, bias, a.stride, a.padding, a.dilation, a.groups)

        cotangents = (
            ddx if need_x else None,
            dsums[1] if need_bn and dsums is not None else None,
            dsums[0] if need_bn and dsums is not None else None,
            ddweight if need_weight else None,
            ddbias if need_bias else None,
        )
        ddy, (dx, dgamma, dbeta, dweight, _) = double_backward.vjp_of_vjp(
            function, (a.x, gamma, beta, a.weight, bias), a.dy, cotangents
        )
        dgamma = None if a.bn_weight is None else dgamma
        dbeta = None if a.bn_bias is None else dbeta
        return ddy, dx, None, dgamma, dbeta, dweight, *(None,) * len(ctx.options)


differentiable(_OP, _PreactConv2d.apply)
differentiable(_BACKWARD_OP, _PreactConv2dBackward.apply)


def _autocast(device_type: str):
    def kernel(x, x_stats, bn_weight, bn_bias, running_mean, running_var, weight, bias, residual, *rest):
        x, x_stats = autocast.cast_with_stats(x, x_stats, device_type)
        if residual is not None:
            residual = autocast.cast(residual, device_type)
        with without_autocast(device_type):
            return _OP(
                x, x_stats, bn_weight, bn_bias, running_mean, running_var, weight, bias, residual, *rest
            )

    return kernel


autocast_kernel(_OP, _autocast)


def preact_conv2d(
    x: Tensor,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    training: bool = False,
    momentum: float | Tensor = 0.1,
    eps: float = 1e-5,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] | str = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    negative_slope: float = 0.0,
    residual: Tensor | None = None,
    x_stats: Tensor | None = None,
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """BatchNorm -> ReLU -> convolution: ``conv2d(relu(batch_norm(x, ...)), weight, bias, ...) (+ residual)``.

    Padding comes after the activation, as it does when the three are separate modules.

    Args:
        x: [N, C, H, W]; float32, float64, bfloat16 or float16; channels_last is the fast layout.
        bn_weight, bn_bias: [C] in x's dtype, or float32 with half-precision x; or None (``affine=False``).
        running_mean, running_var: [C], updated in place when training; None: batch statistics in every mode.
        weight: [K, C/groups, R, S], in x's dtype, or float32 with half-precision x (rounded when used).
        bias: [K] or None.
        training: normalise by the statistics of x; else by the running ones.
        momentum: factor of the exponential average, a float or a 0-dim tensor (see :class:`BatchNormArgs`).
        eps: added to the variance.
        stride, padding, dilation, groups: as in ``torch.nn.functional.conv2d``, 'same' and 'valid' included.
        negative_slope: 0 is ReLU, more is LeakyReLU.
        residual: [N, K, P, Q] in x's dtype, added to the convolution's output.
        x_stats: mean and M2 of exactly this x, as returned with it, [2, C] in float32 (float64 for float64):
            saves a read.
        return_stats: return the statistics of y too, for the next operator's ``x_stats``.

    Returns:
        y [N, K, P, Q], channels_last if x or the weight is, else contiguous; or (y, statistics of y).

    Raises:
        ValueError, RuntimeError: as nn.BatchNorm2d and nn.Conv2d do for the same arguments.
    """
    stride, dilation = pair(stride, "stride"), pair(dilation, "dilation")
    padding, (top, left) = resolve_padding(padding, weight, stride, dilation)
    whole = not (top or left)
    y, y_stats, computed, _ = call(
        _OP,
        x,
        x_stats,
        bn_weight,
        bn_bias,
        running_mean,
        running_var,
        weight,
        bias,
        residual if whole else None,
        training or running_mean is None,
        eps,
        negative_slope,
        stride,
        padding,
        dilation,
        groups,
        return_stats and whole,
    )
    if training and running_mean is not None:
        stats = computed if computed.numel() != 0 else x_stats
        running_stats.update(running_mean, running_var, stats, x.shape[0] * x.shape[2] * x.shape[3], momentum)
    if whole:
        return (y, y_stats) if return_stats else y
    format = CHANNELS_LAST if suggests_channels_last(y) else torch.contiguous_format
    y = y[:, :, top:, left:].contiguous(memory_format=format)
    if residual is not None:
        return residual_add(y, residual, return_stats=return_stats)
    return (y, torch.ops.resnet_fused.channel_stats(y.detach())) if return_stats else y
