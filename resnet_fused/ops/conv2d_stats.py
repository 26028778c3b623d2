"""conv2d_stats: a plain convolution and the statistics of its output: what the stem of a net hands to its first unit."""

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
    """``torch.nn.functional.conv2d`` of a batch, with mean and M2 of y per channel, [2, K] in float32 (float64 for float64).

    The statistics are not differentiable themselves: the operator that takes them differentiates through them.
    """
    if x.dim() != 4:
        raise ValueError(f"expected 4D input (got {x.dim()}D input)")
    y = torch.nn.functional.conv2d(x, weight, bias, stride, padding, dilation, groups)
    return y, torch.ops.resnet_fused.channel_stats(y.detach())
