"""residual_add: the addition of a residual unit, x + y, scaled or gated, and the sum's statistics.

He et al. 2016, "Identity Mappings in Deep Residual Networks", section 3 (constant scaling, gating); Huang et
al. 2016, "Deep Networks with Stochastic Depth" (a gate of one number per image).
"""

import torch
from torch import Tensor
from torch.autograd import Function

from resnet_fused import primitives
from resnet_fused.primitives.layout import (
    acc_dtype,
    canonical,
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

from . import checks


def _check(x, y, affine, gate, slope):
    checks.activation(x, "residual_add")
    checks.addend(y, "y", x.shape, x.dtype, x.device)
    n, c = x.shape[:2]
    if affine is not None:
        checks.acc_operand(affine, "affine", ((2, c),), x)
    if gate is not None:
        checks.acc_operand(gate, "gate", ((n, c), (n, 1)), x)
    if slope is not None and slope < 0.0:
        # Backward takes the sign of the sum from the output.
        raise ValueError(f"negative_slope must be non-negative, but got {slope}")


def _forward(x, y, affine, gate, alpha, slope, want_stats):
    _check(x, y, affine, gate, slope)
    as_channels_last = suggests_channels_last(x)
    if x.numel() == 0:
        stats = empty_acc(x, 2, x.shape[1]).zero_() if want_stats else empty_acc(x, 0)
        return empty(x.shape, x, as_channels_last), stats
    out, stats = primitives.residual_add(x, y, affine, gate, alpha, slope, want_stats)
    return canonical(out, as_channels_last), stats


def _forward_fake(x, y, affine, gate, alpha, slope, want_stats):
    _check(x, y, affine, gate, slope)
    stats = empty_acc(x, 2, x.shape[1]) if want_stats else empty_acc(x, 0)
    return empty(x.shape, x, suggests_channels_last(x)), stats


_OP = define(
    "residual_add(Tensor x, Tensor y, Tensor? affine, Tensor? gate, float alpha, float? slope, "
    "bool want_stats) -> (Tensor out, Tensor stats)",
    _forward,
    _forward_fake,
)


def _gradients(dout, out, y, affine, gate, alpha, slope, output_mask):
    """Plain PyTorch, differentiable in dout, y, affine and gate: the mask of act is a constant."""
    need_x, need_y, need_affine, need_gate = output_mask
    acc = acc_dtype(dout.dtype)
    dx = dy = dout.new_empty(0)
    daffine = dgate = empty_acc(dout, 0)
    dsum = dout
    if slope is not None and slope == 0:
        dsum = torch.ops.aten.threshold_backward(dout, out, 0)
    elif slope is not None:
        dsum = torch.ops.aten.leaky_relu_backward(dout.to(acc), out.to(acc), slope, True)
    if need_x:
        dx = dsum.to(dout.dtype)
    if not (need_y or need_affine or need_gate):
        return dx, dy, daffine, dgate
    dbranch = dsum.to(acc) * alpha
    gated = dbranch if gate is None else dbranch * gate[:, :, None, None]
    if need_y:
        dy = (gated if affine is None else gated * affine[0].view(1, -1, 1, 1)).to(dout.dtype)
    if need_affine:
        daffine = torch.stack(((gated * y.to(acc)).sum((0, 2, 3)), gated.sum((0, 2, 3))))
    if need_gate:
        branch = y.to(acc)
        if affine is not None:
            branch = branch * affine[0].view(1, -1, 1, 1) + affine[1].view(1, -1, 1, 1)
        dgate = (dbranch * branch).sum((2, 3))
        if gate.shape[1] == 1:
            dgate = dgate.sum(1, keepdim=True)
    return dx, dy, daffine, dgate


def _in_channels_last(dout, out):
    """The gradients' format: the output's, if known. Behind a global average pool dout has another."""
    return suggests_channels_last(dout if out is None else out)


def _backward(dout, out, y, affine, gate, alpha, slope, output_mask):
    as_channels_last = _in_channels_last(dout, out)
    dout = canonical(dout, as_channels_last)
    dx, dy, daffine, dgate = _gradients(dout, out, y, affine, gate, alpha, slope, output_mask)
    if output_mask[0]:
        # Without an activation dx is dout itself, and an operator's output does not alias its input.
        dx = canonical(dx.clone() if dx is dout else dx, as_channels_last)
    if output_mask[1]:
        dy = canonical(dy, as_channels_last)
    return dx, dy, daffine, dgate


def _backward_fake(dout, out, y, affine, gate, alpha, slope, output_mask):
    need_x, need_y, need_affine, need_gate = output_mask
    as_channels_last = _in_channels_last(dout, out)
    return (
        empty(dout.shape, dout, as_channels_last) if need_x else dout.new_empty(0),
        empty(dout.shape, dout, as_channels_last) if need_y else dout.new_empty(0),
        empty_acc(dout, 2, dout.shape[1]) if need_affine else empty_acc(dout, 0),
        torch.empty_like(gate) if need_gate else empty_acc(dout, 0),
    )


_BACKWARD_OP = define(
    "residual_add_backward(Tensor dout, Tensor? out, Tensor? y, Tensor? affine, Tensor? gate, float alpha, "
    "float? slope, bool[4] output_mask) -> (Tensor dx, Tensor dy, Tensor daffine, Tensor dgate)",
    _backward,
    _backward_fake,
)


class _ResidualAdd(Function):
    @staticmethod
    def forward(ctx, x, y, affine, gate, alpha, slope, want_stats):
        out, stats = below_autograd(_OP, x, y, affine, gate, alpha, slope, want_stats)
        _, _, need_affine, need_gate = ctx.needs_input_grad[:4]
        # A plain addition saves nothing; the activation's mask is read from the output.
        ctx.save_for_backward(
            out if slope is not None else None, y if need_affine or need_gate else None, affine, gate
        )
        ctx.alpha, ctx.slope = alpha, slope
        ctx.mark_non_differentiable(stats)
        ctx.set_materialize_grads(False)
        return out, stats

    @staticmethod
    def backward(ctx, dout, _):
        need_x, need_y, need_affine, need_gate = ctx.needs_input_grad[:4]
        if dout is None:
            return (None,) * 7
        out, y, affine, gate = ctx.saved_tensors
        dx = dy = daffine = dgate = None
        if out is None and need_x:
            dx, need_x = dout, False
        if out is None and affine is None and gate is None and need_y:
            dy, need_y = dout if ctx.alpha == 1 else dout * ctx.alpha, False
        # Without a factor both gradients are one tensor, as those of x + y are.
        shared = need_x and need_y and affine is None and gate is None and ctx.alpha == 1
        mask = [need_x, need_y and not shared, need_affine, need_gate]
        if any(mask):
            results = call_in_backward(_BACKWARD_OP, dout, out, y, affine, gate, ctx.alpha, ctx.slope, mask)
            dx, dy, daffine, dgate = (
                r if needed else before
                for r, needed, before in zip(results, mask, (dx, dy, daffine, dgate), strict=True)
            )
        return dx, dx if shared else dy, daffine, dgate, None, None, None


differentiable(_OP, _ResidualAdd.apply)
# Where a gradient of the gradient is needed, autograd records the formula itself.
differentiable(_BACKWARD_OP, _gradients)


def _autocast(device_type: str):
    def kernel(x, y, *rest):
        # As torch.add under autocast: no cast of its own, the wider dtype wins.
        if x.dtype != y.dtype:
            dtype = torch.promote_types(x.dtype, y.dtype)
            x, y = x.to(dtype), y.to(dtype)
        with without_autocast(device_type):
            return _OP(x, y, *rest)

    return kernel


autocast_kernel(_OP, _autocast)


def residual_add(
    x: Tensor,
    y: Tensor,
    *,
    affine: Tensor | None = None,
    gate: Tensor | None = None,
    alpha: float = 1.0,
    negative_slope: float | None = None,
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """``x + alpha * gate[n, c] * (affine[0, c] * y + affine[1, c])``, and (Leaky)ReLU of it if asked for.

    Args:
        x, y: [N, C, H, W] of one shape; different dtypes are promoted as in ``x + y``.
        affine: [2, C], a scale and a shift per channel of y.
        gate: [N, C] or [N, 1] (or with two trailing dimensions of 1): per image and channel, or per image.
        alpha: a constant.
        negative_slope: None: no activation; 0: ReLU; more: LeakyReLU.
        return_stats: return mean and M2 of the sum too, [2, C] in float32 (float64 for float64), for the next
            operator's ``x_stats``.

    Returns:
        The sum, in x's memory format; or (sum, its statistics).

    Raises:
        ValueError: x is not 4-D, or negative_slope < 0.
        RuntimeError: sizes that do not match (there is no broadcasting).
    """
    if x.dtype != y.dtype:
        dtype = torch.promote_types(x.dtype, y.dtype)
        x, y = x.to(dtype), y.to(dtype)
    acc = acc_dtype(x.dtype)
    if affine is not None:
        affine = affine.to(acc)
    if gate is not None:
        if gate.dim() == 4 and gate.shape[2] == gate.shape[3] == 1:
            gate = gate.flatten(1)
        gate = gate.to(acc)
    out, stats = call(_OP, x, y, affine, gate, alpha, negative_slope, return_stats)
    return (out, stats) if return_stats else out
