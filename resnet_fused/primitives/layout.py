"""Memory formats and dtypes that every layer above the kernels shares.

Inside the package an activation is *dense channels_last*: a 4-D NCHW-shaped tensor whose strides are (H*W*C,
1, W*C, C), where the stride of a dimension of size 1 says nothing.
"""

import torch
from torch import Tensor

CHANNELS_LAST = torch.channels_last


def acc_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of statistics and of accumulation: float64 for float64, else float32."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def suggests_channels_last(t: Tensor) -> bool:
    """PyTorch's own rule (``suggest_memory_format``): do the strides of a 4-D tensor say channels_last?

    Ambiguous strides (size-1 dimensions) and empty tensors count as contiguous, as they do there.
    """
    size, stride = t.shape, t.stride()
    n, c, h, w = size
    if n and c * h * w > 1 and stride == (h * w * c, 1, w * c, c):
        return True  # at once, in the case that is always asked about
    if stride[1] == 0:
        return False
    least = 0
    for d in (1, 3, 2, 0):
        if size[d] == 0 or stride[d] < least:
            return False
        if d == 0 and least == stride[1]:
            return False
        least = stride[d]
        if size[d] > 1:
            least = least * size[d]
    return True


def convolution_is_channels_last(x: Tensor, *weights: Tensor | None) -> bool:
    """PyTorch's rule for a convolution's output: channels_last if the input or the weight is."""
    return suggests_channels_last(x) or any(w is not None and suggests_channels_last(w) for w in weights)


def channels_last(t: Tensor) -> Tensor:
    """t itself if it is dense channels_last, else a copy that is."""
    if t.is_contiguous(memory_format=CHANNELS_LAST):
        return t
    return t.contiguous(memory_format=CHANNELS_LAST)


def canonical(t: Tensor, channels_last: bool) -> Tensor:
    """t in the wanted format with exactly the strides that ``torch.empty(..., memory_format=...)`` gives.

    That is what the fake kernels promise; ``.contiguous()`` leaves the strides of size-1 dimensions alone.

    t must be a tensor that the caller owns: the result may share its memory.
    """
    t = t.contiguous(memory_format=CHANNELS_LAST if channels_last else torch.contiguous_format)
    n, c, h, w = t.shape
    strides = (h * w * c, 1, w * c, c) if channels_last else (c * h * w, h * w, w, 1)
    return t if t.stride() == strides else t.as_strided(t.shape, strides)


def empty(shape: tuple[int, ...], like: Tensor, channels_last: bool = True) -> Tensor:
    """An uninitialised activation of like's dtype and device."""
    format = CHANNELS_LAST if channels_last else torch.contiguous_format
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=format)


def empty_acc(like: Tensor, *size: int) -> Tensor:
    """An uninitialised small tensor (statistics, coefficients, sums) of like's accumulation dtype."""
    return torch.empty(size, dtype=acc_dtype(like.dtype), device=like.device)


def convolution_output_size(size: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
    return (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1


def convolution_output_shape(shape, weight, stride, padding, dilation) -> tuple[int, int, int, int]:
    """The output's shape for an input and a weight of the given shapes."""
    n, _, h, w = shape
    k, _, r, s = weight
    return (
        n,
        k,
        convolution_output_size(h, r, stride[0], padding[0], dilation[0]),
        convolution_output_size(w, s, stride[1], padding[1], dilation[1]),
    )


def pool_output_shape(shape, kernel_size, stride, padding) -> tuple[int, int, int, int]:
    """The output's shape of a pooling of an input of the given shape."""
    n, c, h, w = shape
    return (
        n,
        c,
        convolution_output_size(h, kernel_size[0], stride[0], padding[0], 1),
        convolution_output_size(w, kernel_size[1], stride[1], padding[1], 1),
    )
