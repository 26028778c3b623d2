"""conv2d_stats: a plain convolution and the statistics of its output, for the stem of a net."""

import torch
from torch import Tensor


def conv2d_stats(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] | str = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
) -> tuple[Tensor, Tensor]:
    """``torch.nn.functional.conv2d`` of a batch, and mean and M2 of its output per channel.

    Returns:
        y, and its statistics, [2, K] in float32 (float64 for float64). They have no derivative themselves:
        the operator that takes them as ``x_stats`` differentiates through them.
    """
    if x.dim() != 4:
        raise ValueError(f"expected 4D input (got {x.dim()}D input)")
    y = torch.nn.functional.conv2d(x, weight, bias, stride, padding, dilation, groups)
    return y, torch.ops.resnet_fused.channel_stats(y.detach())
