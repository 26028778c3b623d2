"""preact: BatchNorm -> (Leaky)ReLU alone, one differentiable operator, for wherever no convolution reads the
activation directly; or with global average pooling behind, the end of a pre-activation net.

Backward recomputes the mask from x, so that only x is saved (Ioffe & Szegedy 2015, "Batch Normalization").
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from resnet_fused import primitives
from resnet_fused.primitives import dispatch
from resnet_fused.primitives.layout import (
    CHANNELS_LAST,
    canonical,
    channels_last,
    empty,
    empty_acc,
    suggests_channels_last,
)
from resnet_fused.primitives.registration import (
    below_autograd,
    call,
    call_in_backward,
    define,
    differentiable,
    is_ordinary,
    keep_dtypes,
)

from . import checks, double_backward, last_use, running_stats


class _Arguments(NamedTuple):
    """The operator's arguments, in the order of its schema."""

    x: Tensor
    x_stats: Tensor | None
    bn_weight: Tensor | None
    bn_bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    training: bool  # use batch statistics
    eps: float
    negative_slope: float
    global_avg_pool: bool = False


def _check(a: _Arguments) -> None:
    checks.activation(a.x, "preact")
    checks.batch_norm(
        a.x.shape, a.x.dtype, a.x.device, a.x_stats, a.bn_weight, a.bn_bias, a.running_mean, a.running_var,
        a.training, a.eps,
    )  # fmt: skip
    if a.global_avg_pool:
        checks.mean_over_pixels(a.x, "preact")


def _forward_shape(a: _Arguments) -> tuple[int, ...]:
    return (*a.x.shape[:2], 1, 1) if a.global_avg_pool else a.x.shape


def _empty_outputs(a: _Arguments):
    """Uninitialised outputs, of the sizes and strides that the operator gives."""
    x = a.x
    return (
        empty(_forward_shape(a), x, suggests_channels_last(x)),
        empty_acc(x, 2, x.shape[1]) if a.training and a.x_stats is None else empty_acc(x, 0),
        empty_acc(x, 4, x.shape[1]),
    )


def _count(x: Tensor) -> int:
    return x.shape[0] * x.shape[2] * x.shape[3]


def _forward(*args):
    a = _Arguments(*args)
    _check(a)
    if a.x.shape[0] == 0:
        out, *small = _empty_outputs(a)
        return out, *(t.zero_() for t in small)
    x = channels_last(a.x)
    used = computed = None
    if a.training:
        used = a.x_stats
        if used is None:
            used = computed = primitives.channel_stats(x)
    bn = primitives.finalize_forward(
        used, _count(x), a.running_mean, a.running_var, a.bn_weight, a.bn_bias, a.eps
    )
    forward = primitives.bn_act_pool_forward if a.global_avg_pool else primitives.bn_act_forward
    out = forward(x, bn, a.negative_slope)
    return canonical(out, suggests_channels_last(a.x)), empty_acc(x, 0) if computed is None else computed, bn


def _forward_fake(*args):
    a = _Arguments(*args)
    _check(a)
    return _empty_outputs(a)


_OP = define(
    "preact(Tensor x, Tensor? x_stats, Tensor? bn_weight, Tensor? bn_bias, Tensor? running_mean, "
    "Tensor? running_var, bool training, float eps, float negative_slope, bool global_avg_pool=False) "
    "-> (Tensor out, Tensor x_stats, Tensor bn)",
    _forward,
    _forward_fake,
)


class _BackwardArguments(NamedTuple):
    """The backward operator's arguments, in the order of its schema."""

    dout: Tensor
    x: Tensor
    bn: Tensor
    bn_weight: Tensor | None  # with bn_bias, for the second derivative
    bn_bias: Tensor | None
    training: bool
    eps: float
    negative_slope: float
    global_avg_pool: bool = False


def _backward_outputs(*args):
    """Uninitialised outputs, of the sizes and strides that the backward operator gives."""
    x = _BackwardArguments(*args).x
    return empty(x.shape, x, suggests_channels_last(x)), empty_acc(x, 2, x.shape[1])


def _in_place_operator(x: Tensor, pool: bool):
    """All of backward in one operator that may write over its arguments, or None."""
    primitive = "bn_act_pool_backward" if pool else "bn_act_backward"
    return dispatch.select_several(primitive, "preact_backward", x)


def _backward_over(x: Tensor, dout: Tensor, bn: Tensor, options: tuple):
    """What the backward operator gives behind a mean, in the memory of x; None where no operator can."""
    training, _, negative_slope, _ = options
    in_place = _in_place_operator(x, True)
    if in_place is None or not x.is_contiguous(memory_format=CHANNELS_LAST) or not is_ordinary(dout):
        return None
    # dx is x itself then: not as the tensor that has a graph.
    return in_place(channels_last(dout), x.detach(), bn, training, negative_slope, True, False, True)


def _backward(*args):
    a = _BackwardArguments(*args)
    if a.x.shape[0] == 0:
        return tuple(t.zero_() for t in _backward_outputs(*args))
    x, dout = channels_last(a.x), channels_last(a.dout)
    is_copy = dout is not a.dout  # as behind a global average pool
    pool = a.global_avg_pool
    in_place = _in_place_operator(x, pool)
    if in_place is not None:
        dx, sums = in_place(dout, x, a.bn, a.training, a.negative_slope, pool, is_copy, False)
    else:
        if pool:
            dz, sums = primitives.bn_act_pool_backward(dout, x, a.bn, a.negative_slope)
        else:
            dz, sums = primitives.bn_act_backward(dout, x, a.bn, None, a.negative_slope)
        del dout
        coefficients = primitives.finalize_backward(sums, a.bn, _count(x), a.training)
        dx = primitives.preact_apply(dz, x, coefficients, None)
    return canonical(dx, suggests_channels_last(a.x)), sums


_BACKWARD_OP = define(
    "preact_backward(Tensor dout, Tensor x, Tensor bn, Tensor? bn_weight, Tensor? bn_bias, bool training, "
    "float eps, float negative_slope, bool global_avg_pool=False) -> (Tensor dx, Tensor sums)",
    _backward,
    _backward_outputs,
)


class _Preact(Function):
    @staticmethod
    def forward(ctx, *args):
        out, x_stats, bn = below_autograd(_OP, *args)
        a = _Arguments(*args)
        ctx.options = args[6:]
        # Not the running statistics: they may change before backward (DDP with two forwards). bn is a copy.
        ctx.save_for_backward(a.x, bn, a.bn_weight, a.bn_bias)
        ctx.may_own_x = a.global_avg_pool and last_use.is_fresh(a.x) and last_use.may_be_owned()
        ctx.mark_non_differentiable(x_stats, bn)
        ctx.set_materialize_grads(False)
        return out, x_stats, bn

    @staticmethod
    def backward(ctx, dout, *_):
        need_x, _, need_weight, need_bias, *_ = ctx.needs_input_grad
        gradients = [None] * len(ctx.needs_input_grad)
        if dout is None:
            return tuple(gradients)
        x, bn, bn_weight, bn_bias = ctx.saved_tensors
        found = None
        if ctx.may_own_x and last_use.is_now():
            ctx.maybe_clear_saved_tensors()
            if last_use.is_only_reference(x):
                found = _backward_over(x, dout, bn, ctx.options)
        dx, sums = found or call_in_backward(_BACKWARD_OP, dout, x, bn, bn_weight, bn_bias, *ctx.options)
        if need_x:
            gradients[0] = dx
        if need_weight:
            gradients[2] = sums[1].to(bn_weight.dtype)
        if need_bias:
            gradients[3] = sums[0].to(bn_bias.dtype)
        return tuple(gradients)


class _PreactBackward(Function):
    @staticmethod
    def forward(ctx, *args):
        outputs = below_autograd(_BACKWARD_OP, *args)
        ctx.options = args[5:]
        ctx.save_for_backward(*args[:5])
        ctx.set_materialize_grads(False)
        return outputs

    @staticmethod
    def backward(ctx, ddx, dsums):
        a = _BackwardArguments(*ctx.saved_tensors, *ctx.options)
        gamma = torch.ones_like(a.bn[0]) if a.bn_weight is None else a.bn_weight
        beta = torch.zeros_like(a.bn[0]) if a.bn_bias is None else a.bn_bias

        def function(x, gamma, beta):
            frozen = None if a.training else a.bn
            y = double_backward.pre_activation(x, gamma, beta, frozen, a.eps, a.negative_slope)
            return y.mean((2, 3), keepdim=True) if a.global_avg_pool else y

        ddout, (dx, dgamma, dbeta) = double_backward.vjp_of_vjp(
            function,
            (a.x, gamma, beta),
            a.dout,
            (ddx, None if dsums is None else dsums[1], None if dsums is None else dsums[0]),
        )
        dgamma = None if a.bn_weight is None else dgamma
        dbeta = None if a.bn_bias is None else dbeta
        return ddout, dx, None, dgamma, dbeta, *(None,) * len(ctx.options)


differentiable(_OP, _Preact.apply)
differentiable(_BACKWARD_OP, _PreactBackward.apply)
keep_dtypes(_OP)  # as autocast leaves batch_norm and relu alone


def preact(
    x: Tensor,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    *,
    training: bool = False,
    momentum: float | Tensor = 0.1,
    eps: float = 1e-5,
    negative_slope: float = 0.0,
    x_stats: Tensor | None = None,
    global_avg_pool: bool = False,
) -> Tensor:
    """BatchNorm -> ReLU: ``relu(batch_norm(x, ...))``, saving x alone for backward.

    Args:
        x: [N, C, H, W]; float32, float64, bfloat16 or float16; channels_last is the fast layout.
        bn_weight, bn_bias: [C] in x's dtype, or float32 with half-precision x; or None (``affine=False``).
        running_mean, running_var: [C], updated in place when training; None: batch statistics in every mode.
        training: normalise by the statistics of x; else by the running ones.
        momentum: factor of the exponential average, a float or a 0-dim tensor (see :class:`BatchNormArgs`).
        eps: added to the variance.
        negative_slope: 0 is ReLU, more is LeakyReLU.
        x_stats: mean and M2 of exactly this x, [2, C] in float32 (float64 for float64): saves a read.
        global_avg_pool: return the activation's mean over each image's pixels alone
            (``adaptive_avg_pool2d(..., 1)``; Lin et al. 2013, "Network in Network", section 3.2), taken in
            float32 (float64) before it is rounded; the activation is not stored.

    Returns:
        [N, C, H, W] in x's dtype and layout; [N, C, 1, 1] with global_avg_pool.

    Raises:
        ValueError, RuntimeError: as nn.BatchNorm2d does for the same arguments; global_avg_pool of images
            without pixels.
    """
    out, computed, _ = call(
        _OP,
        x,
        x_stats,
        bn_weight,
        bn_bias,
        running_mean,
        running_var,
        training or running_mean is None,
        eps,
        negative_slope,
        global_avg_pool,
    )
    if training and running_mean is not None:
        stats = computed if computed.numel() != 0 else x_stats
        running_stats.update(running_mean, running_var, stats, _count(x), momentum)
    return out
