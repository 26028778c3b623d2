"""max_pool2d: max pooling that saves one byte per output for backward, where PyTorch's saves its input and
eight bytes per output.

What backward needs of a window is which of its positions was taken, the argmax of Krizhevsky et al. 2012,
"ImageNet Classification with Deep Convolutional Neural Networks", section 3.4 (overlapping pooling).
"""

import torch
from torch import Tensor
from torch.autograd import Function
from torch.overrides import handle_torch_function, has_torch_function_unary

from resnet_fused import primitives
from resnet_fused.primitives.layout import (
    CHANNELS_LAST,
    canonical,
    channels_last,
    empty,
    suggests_channels_last,
)
from resnet_fused.primitives.reference import max_pool_indices
from resnet_fused.primitives.registration import (
    below_autograd,
    call,
    call_in_backward,
    define,
    differentiable,
    keep_dtypes,
)

from . import checks
from .arguments import pooling_pair


def _empty_offsets(size, like: Tensor) -> Tensor:
    return torch.empty(size, dtype=torch.uint8, device=like.device, memory_format=CHANNELS_LAST)


def _forward(x, kernel_size, stride, padding):
    size = checks.max_pool(x, kernel_size, stride, padding)
    as_channels_last = suggests_channels_last(x)
    if x.numel() == 0:
        return empty(size, x, as_channels_last), _empty_offsets(size, x)
    y, offsets = primitives.max_pool_forward(channels_last(x), kernel_size, stride, padding)
    return canonical(y, as_channels_last), offsets


def _forward_fake(x, kernel_size, stride, padding):
    size = checks.max_pool(x, kernel_size, stride, padding)
    return empty(size, x, suggests_channels_last(x)), _empty_offsets(size, x)


_OP = define(
    "max_pool2d(Tensor x, int[2] kernel_size, int[2] stride, int[2] padding) -> (Tensor y, Tensor offsets)",
    _forward,
    _forward_fake,
)


def _backward(dy, offsets, input_size, as_channels_last, kernel_size, stride, padding):
    if dy.numel() == 0:
        return empty((*dy.shape[:2], *input_size), dy, as_channels_last)
    dx = primitives.max_pool_backward(
        channels_last(dy), channels_last(offsets), input_size, kernel_size, stride, padding
    )
    return canonical(dx, as_channels_last)


def _backward_fake(dy, offsets, input_size, as_channels_last, kernel_size, stride, padding):
    return empty((*dy.shape[:2], *input_size), dy, as_channels_last)


_BACKWARD_OP = define(
    "max_pool2d_backward(Tensor dy, Tensor offsets, SymInt[2] input_size, bool channels_last, "
    "int[2] kernel_size, int[2] stride, int[2] padding) -> Tensor",
    _backward,
    _backward_fake,
)


class _MaxPool2d(Function):
    @staticmethod
    def forward(ctx, x, kernel_size, stride, padding):
        y, offsets = below_autograd(_OP, x, kernel_size, stride, padding)
        ctx.save_for_backward(offsets)
        ctx.arguments = (x.shape[2:], suggests_channels_last(x), kernel_size, stride, padding)
        ctx.mark_non_differentiable(offsets)
        ctx.set_materialize_grads(False)
        return y, offsets

    @staticmethod
    def backward(ctx, dy, _):
        if dy is None:
            return (None,) * 4
        return call_in_backward(_BACKWARD_OP, dy, *ctx.saved_tensors, *ctx.arguments), None, None, None


class _Backward(Function):
    """Linear in dy: the derivative of dx takes from its gradient what backward has put there."""

    @staticmethod
    def forward(ctx, dy, offsets, input_size, as_channels_last, *windows):
        ctx.save_for_backward(offsets)
        ctx.width, ctx.windows = input_size[1], windows
        return below_autograd(_BACKWARD_OP, dy, offsets, input_size, as_channels_last, *windows)

    @staticmethod
    def backward(ctx, ddx):
        (offsets,) = ctx.saved_tensors
        indices = max_pool_indices(offsets, ctx.width, *ctx.windows)
        ddy = ddx.flatten(2).gather(2, indices.flatten(2)).view(offsets.shape)
        return ddy, None, None, None, None, None, None


differentiable(_OP, _MaxPool2d.apply)
differentiable(_BACKWARD_OP, _Backward.apply)
keep_dtypes(_OP)


def max_pool2d(
    x: Tensor,
    kernel_size: int | tuple[int, int],
    stride: int | tuple[int, int] | None = None,
    padding: int | tuple[int, int] = 0,
) -> Tensor:
    """:func:`torch.nn.functional.max_pool2d`, bit for bit, with one byte per output saved for backward.

    float16 and bfloat16: gradients of windows that overlap are added in float32 and rounded once.

    Args:
        x: [N, C, H, W], floating, in any memory format.
        kernel_size: height and width of the window, at most 256 positions.
        stride: of the windows; None: kernel_size.
        padding: with -inf on each side, at most half of kernel_size.

    Returns:
        [N, C, P, Q] in x's dtype and memory format, P = (H + 2*padding - kernel_size) // stride + 1. Under
        autocast dtypes stay what they are.

    Raises:
        ValueError: x is not 4-D.
        NotImplementedError: a dtype that is not floating.
        RuntimeError: windows that do not fit, in PyTorch's words, or of more than 256 positions.
    """
    if has_torch_function_unary(x):
        return handle_torch_function(max_pool2d, (x,), x, kernel_size, stride=stride, padding=padding)
    kernel_size = pooling_pair(kernel_size, "kernel_size")
    stride = kernel_size if stride is None or stride in ([], ()) else pooling_pair(stride, "stride")
    return call(_OP, x, kernel_size, stride, pooling_pair(padding, "padding"))[0]
