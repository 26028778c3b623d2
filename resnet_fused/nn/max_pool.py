"""A max pool that keeps one byte per output for backward, where the operator applies."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .. import functional as F
from ..ops.arguments import pooling_pair
from ..primitives.checks import MOST_POSITIONS
from .units import is_transformed

__all__ = ["MaxPool2d", "applies"]

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def applies(pool: nn.MaxPool2d, x: Any) -> bool:
    """Whether :func:`resnet_fused.functional.max_pool2d` computes what ``pool`` makes of ``x``.

    Not under torch.func and forward-mode AD, for which it has no formula, nor for subclasses of Tensor.
    """
    if type(x) not in (Tensor, nn.Parameter) or x.dim() != 4:
        return False
    if x.dtype not in _DTYPES or x.device.type not in ("cpu", "cuda"):
        return False
    if pool.return_indices or pool.ceil_mode or pool.dilation not in (1, (1, 1), [1, 1]):
        return False
    try:
        height, width = pooling_pair(pool.kernel_size, "kernel_size")
    except (RuntimeError, TypeError):  # PyTorch's to raise
        return False
    if height * width > MOST_POSITIONS:
        return False
    return not is_transformed()


class MaxPool2d(nn.MaxPool2d):
    """:class:`torch.nn.MaxPool2d`, with the same arguments and results; backward needs one byte per output,
    where PyTorch's keeps the input and eight bytes per output.

    With dilation, ``ceil_mode``, ``return_indices``, windows of more than 256 positions and inputs that are
    not 4-D and floating it is PyTorch's own.

    Shape:
        - Input: (N, C, H, W), any memory format, or (C, H, W)
        - Output: (N, C, P, Q) or (C, P, Q) in the input's dtype and memory format
    """

    def forward(self, input: Tensor) -> Any:
        if applies(self, input):
            return F.max_pool2d(input, self.kernel_size, self.stride, self.padding)
        return super().forward(input)
