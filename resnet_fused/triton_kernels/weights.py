"""Weights as the convolution kernels read them."""

import torch
from torch import Tensor


def packed(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """weight [K, C, R, S] as a dense [K, R, S, C] of the activation dtype: itself if it is that, else one
    copying kernel that also rounds (float32 master weights under autocast)."""
    if weight.dtype is dtype and weight.is_contiguous(memory_format=torch.channels_last):
        return weight
    copy = torch.empty(weight.shape, dtype=dtype, device=weight.device, memory_format=torch.channels_last)
    return copy.copy_(weight)
