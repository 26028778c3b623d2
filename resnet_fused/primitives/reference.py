"""Every primitive in plain PyTorch: the oracle of the tests (given float64), and a backend for every case.

Arithmetic is in the accumulation dtype (float32, or float64 for float64), and each output is rounded once to
the activation dtype. Argument names and shapes: see the file of each primitive.
"""

import torch
from torch import Tensor

from .layout import acc_dtype, canonical, channels_last, convolution_output_shape, empty

_PER_CHANNEL = (1, -1, 1, 1)


def _row(table: Tensor, i: int) -> Tensor:
    return table[i].view(_PER_CHANNEL)


def _no_stats(x: Tensor) -> Tensor:
    return torch.empty(0, dtype=acc_dtype(x.dtype), device=x.device)


def _pre_activation(x: Tensor, bn: Tensor) -> Tensor:
    """z = x * scale + shift."""
    return torch.addcmul(_row(bn, 3), x.to(bn.dtype), _row(bn, 2))


def _activation(z: Tensor, slope: float) -> Tensor:
    # Not torch.where(z > 0, ...): NaN stays NaN, and -inf * 0 must not become NaN.
    return torch.relu(z) if slope == 0 else torch.nn.functional.leaky_relu(z, slope)


def _activated(x: Tensor, bn: Tensor | None, slope: float) -> Tensor:
    """The activation as the convolution reads it: rounded to x's dtype, then widened to the acc dtype."""
    acc = acc_dtype(x.dtype)
    return x.to(acc) if bn is None else _activation(_pre_activation(x, bn), slope).to(x.dtype).to(acc)


def channel_stats(x: Tensor) -> Tensor:
    acc = acc_dtype(x.dtype)
    if x.numel() == 0:
        return torch.zeros(2, x.shape[1], dtype=acc, device=x.device)
    xa, count = x.to(acc), x.numel() // x.shape[1]
    mean = xa.mean((0, 2, 3))
    # Corrected two-pass (Chan, Golub & LeVeque 1983, eq. 1.7): residue removes the mean's rounding error.
    deviation = xa - mean.view(_PER_CHANNEL)
    residue = deviation.sum((0, 2, 3))
    m2 = deviation.square().sum((0, 2, 3))
    # Where the squares overflow, the correction may too, and inf - inf is no number.
    m2 = torch.where(m2.isinf(), m2, (m2 - residue.square() / count).clamp_min(0))
    return torch.stack((mean + residue / count, m2))


def finalize_forward(
    stats: Tensor | None,
    count: int,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> Tensor:
    if stats is not None:
        mean, var = stats[0], stats[1] / count
    else:
        mean, var = running_mean, running_var
    # bfloat16 running statistics are widened; float64 ones stay.
    acc = acc_dtype(mean.dtype)
    mean = mean.to(acc)
    invstd = (var.to(acc) + eps).rsqrt()
    scale = invstd if weight is None else weight.to(acc) * invstd
    shift = -mean * scale if bias is None else torch.addcmul(bias.to(acc), mean, scale, value=-1)
    return torch.stack((mean, invstd, scale, shift))


def update_running_stats(
    running_mean: Tensor, running_var: Tensor, stats: Tensor, count: int, momentum: float
) -> None:
    for running, new in ((running_mean, stats[0]), (running_var, stats[1] / (count - 1))):
        running.copy_(running.to(new.dtype) * (1 - momentum) + new * momentum)


def bn_act_forward(x: Tensor, bn: Tensor, slope: float) -> Tensor:
    return canonical(_activation(_pre_activation(x, bn), slope).to(x.dtype), True)


def bn_act_backward(
    da: Tensor, x: Tensor, bn: Tensor, dz_in: Tensor | None, slope: float
) -> tuple[Tensor, Tensor]:
    z, d = _pre_activation(x, bn), da.to(bn.dtype)
    # Where z is NaN: as PyTorch has it for either function.
    dz = torch.where(z > 0, d, d * slope) if slope != 0 else torch.where(z <= 0, 0.0, d)
    if dz_in is not None:
        dz = dz + dz_in.to(bn.dtype)
    dz = canonical(dz.to(x.dtype), True)
    # Sums of what is stored, since preact_apply reads what is stored.
    d = dz.to(bn.dtype)
    xhat = (x.to(bn.dtype) - _row(bn, 0)) * _row(bn, 1)
    return dz, torch.stack((d.sum((0, 2, 3)), (d * xhat).sum((0, 2, 3))))


def bn_act_pool_forward(x: Tensor, bn: Tensor, slope: float) -> Tensor:
    a = _activation(_pre_activation(x, bn), slope)
    return canonical(a.mean((2, 3), keepdim=True).to(x.dtype), True)


def bn_act_pool_backward(dy: Tensor, x: Tensor, bn: Tensor, slope: float) -> tuple[Tensor, Tensor]:
    # In the acc dtype: it is rounded after the mask alone.
    da = dy.to(bn.dtype) / (x.shape[2] * x.shape[3])
    return bn_act_backward(da, x, bn, None, slope)


def _rounded_weight(weight: Tensor, x: Tensor) -> Tensor:
    return weight.to(x.dtype).to(acc_dtype(x.dtype))


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
    acc = acc_dtype(x.dtype)
    if x.numel() == 0:
        y = empty(convolution_output_shape(x.shape, weight.shape, stride, padding, dilation), x)
    else:
        y = torch.ops.aten.convolution(
            _activated(x, bn, slope),
            _rounded_weight(weight, x),
            None if bias is None else bias.to(acc),
            stride,
            padding,
            dilation,
            False,
            [0, 0],
            groups,
        )
        if residual is not None:
            y = y + residual.to(acc)
        y = canonical(y.to(x.dtype), True)
    return y, channel_stats(y) if want_stats else _no_stats(x)


def _convolution_backward(dy, x, weight, stride, padding, dilation, groups, mask):
    return torch.ops.aten.convolution_backward(
        dy, x, weight, None, stride, padding, dilation, False, [0, 0], groups, mask
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
) -> tuple[Tensor, Tensor]:
    acc = acc_dtype(x.dtype)
    if x.numel() == 0:
        return torch.empty_like(x), torch.zeros(2, x.shape[1], dtype=acc, device=x.device)
    da = _convolution_backward(
        dy.to(acc),
        x.to(acc),
        _rounded_weight(weight, x),
        stride,
        padding,
        dilation,
        groups,
        [True, False, False],
    )[0]
    return bn_act_backward(da, x, bn, dz_in, slope)


def bias_gradient(dy: Tensor, weight: Tensor) -> Tensor:
    """Sum over N, H, W, in the weight's dtype."""
    return dy.sum((0, 2, 3), dtype=acc_dtype(dy.dtype)).to(weight.dtype)


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
    acc = acc_dtype(x.dtype)
    dweight = torch.zeros_like(weight)
    if x.numel() != 0:
        dweight.copy_(
            _convolution_backward(
                dy.to(acc),
                _activated(x, bn, slope),
                _rounded_weight(weight, x),
                stride,
                padding,
                dilation,
                groups,
                [False, True, False],
            )[1]
        )
    return dweight, bias_gradient(dy, weight) if want_bias else weight.new_empty(0)


def preact_conv_backward_1x1(
    dy: Tensor, weight: Tensor, x: Tensor, bn: Tensor, dz_in: Tensor | None, slope: float, want_bias: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    geometry = ((1, 1), (0, 0), (1, 1), 1)
    return (
        *preact_conv_dgrad(dy, weight, x, bn, dz_in, slope, *geometry),
        *preact_conv_wgrad(dy, x, bn, weight, slope, *geometry, want_bias),
    )


def finalize_backward(sums: Tensor, bn: Tensor, count: int, training: bool) -> Tensor:
    mean, invstd, scale = bn[0], bn[1], bn[2]
    if not training:
        zero = torch.zeros_like(mean)
        return torch.stack((scale, zero, zero, mean))
    return torch.stack((scale, -scale * invstd * sums[1] / count, -scale * sums[0] / count, mean))


def preact_apply(dz: Tensor, x: Tensor, coefficients: Tensor, dskip: Tensor | None) -> Tensor:
    acc = coefficients.dtype
    dx = _row(coefficients, 0) * dz.to(acc) + _row(coefficients, 2)
    dx = dx + _row(coefficients, 1) * (x.to(acc) - _row(coefficients, 3))
    if dskip is not None:
        dx = dx + dskip.to(acc)
    return canonical(dx.to(x.dtype), True)


def residual_add(
    x: Tensor,
    y: Tensor,
    affine: Tensor | None,
    gate: Tensor | None,
    alpha: float,
    slope: float | None,
    want_stats: bool,
) -> tuple[Tensor, Tensor]:
    acc = acc_dtype(x.dtype)
    branch = y.to(acc)
    if affine is not None:
        branch = torch.addcmul(_row(affine, 1), branch, _row(affine, 0))
    if gate is not None:
        branch = branch * gate[:, :, None, None]
    out = x.to(acc) + (branch if alpha == 1 else branch * alpha)
    if slope is not None:
        out = _activation(out, slope)
    out = out.to(x.dtype)
    return out, channel_stats(out) if want_stats else _no_stats(x)


def _window_corners(shape, stride, padding, device) -> tuple[Tensor, Tensor]:
    """Row [P, 1] and column [Q] of the input that position (0, 0) of each window has; negative outside."""
    p, q = (torch.arange(size, device=device) for size in shape[2:])
    return (p * stride[0] - padding[0])[:, None], q * stride[1] - padding[1]


def max_pool_forward(x: Tensor, kernel_size, stride, padding) -> tuple[Tensor, Tensor]:
    y, indices = torch.nn.functional.max_pool2d(x, kernel_size, stride, padding, return_indices=True)
    top, left = _window_corners(y.shape, stride, padding, x.device)
    width = max(x.shape[3], 1)
    offsets = (indices // width - top) * kernel_size[1] + (indices % width - left)
    return canonical(y, True), canonical(offsets.to(torch.uint8), True)


def max_pool_indices(offsets: Tensor, width: int, kernel_size, stride, padding) -> Tensor:
    """The index h * width + w into an image that each offset stands for: PyTorch's, int64 [N, C, P, Q]."""
    top, left = _window_corners(offsets.shape, stride, padding, offsets.device)
    offsets = offsets.long()
    return (offsets // kernel_size[1] + top) * width + (offsets % kernel_size[1] + left)


def max_pool_backward(dy: Tensor, offsets: Tensor, input_size, kernel_size, stride, padding) -> Tensor:
    indices = channels_last(max_pool_indices(offsets, input_size[1], kernel_size, stride, padding))
    wide = dy.to(acc_dtype(dy.dtype))
    dx = torch.ops.aten.max_pool2d_with_indices_backward(
        wide, empty((*dy.shape[:2], *input_size), wide), kernel_size, stride, padding, (1, 1), False, indices
    )
    return canonical(dx.to(dy.dtype), True)
