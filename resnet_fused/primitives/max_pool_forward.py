"""max_pool_forward: max pooling that says which position of each window it took, in one byte."""

import torch
from torch import Tensor

from . import checks, dispatch, reference
from .layout import CHANNELS_LAST, channels_last, empty, pool_output_shape
from .registration import define_primitive

dispatch.register("max_pool_forward", reference=reference.max_pool_forward)


def max_pool_forward(x: Tensor, kernel_size, stride, padding) -> tuple[Tensor, Tensor]:
    """y as torch.nn.functional.max_pool2d has it, ties, NaN and windows of -inf included.

    Args:
        x: [N, C, H, W], dense channels_last.
        kernel_size, stride, padding: pairs of int; kernel_size of at most 256 positions.

    Returns:
        y in x's dtype, and offsets, uint8, both [N, C, P, Q], channels_last: position (r, s) of the window,
        whose part outside of x counts too, is r * kernel_size[1] + s.
    """
    return dispatch.select("max_pool_forward", x)(x, kernel_size, stride, padding)


def _kernel(x, kernel_size, stride, padding):
    checks.pool(x, kernel_size, stride, padding)
    return max_pool_forward(channels_last(x), kernel_size, stride, padding)


def _fake(x, kernel_size, stride, padding):
    size = pool_output_shape(x.shape, kernel_size, stride, padding)
    return empty(size, x), torch.empty(size, dtype=torch.uint8, device=x.device, memory_format=CHANNELS_LAST)


define_primitive(
    "max_pool_forward(Tensor x, int[2] kernel_size, int[2] stride, int[2] padding) "
    "-> (Tensor y, Tensor offsets)",
    _kernel,
    _fake,
)
