"""Casting under autocast: activations only. The kernels round a float32 weight when they use it."""

import torch
from torch import Tensor


def cast(t: Tensor, device_type: str) -> Tensor:
    """t in the autocast dtype; float64 and non-floating tensors as they are, as in PyTorch."""
    if t.dtype is torch.float64 or not t.is_floating_point():
        return t
    dtype = torch.get_autocast_dtype(device_type)
    return t if t.dtype is dtype else t.to(dtype)


def cast_with_stats(x: Tensor, x_stats: Tensor | None, device_type: str) -> tuple[Tensor, Tensor | None]:
    """x in the autocast dtype, and its statistics if they still are: those of the unrounded x are not."""
    xc = cast(x, device_type)
    return xc, x_stats if xc is x else None
