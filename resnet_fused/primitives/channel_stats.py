"""channel_stats: mean and sum of squared deviations per channel, in one read of x."""

import torch
from torch import Tensor

from . import checks, dispatch, reference
from .layout import acc_dtype, channels_last
from .registration import define_primitive

dispatch.register("channel_stats", reference=reference.channel_stats)


def channel_stats(x: Tensor) -> Tensor:
    """Statistics of a dense channels_last x [N, C, H, W].

    Returns:
        acc [2, C]: the mean, and M2 = the sum of squared deviations from it, over N, H, W. Partial (count,
        mean, M2) are merged by Chan's formula in a fixed order; E[x^2] - E[x]^2 would lose everything at a
        large mean.
    """
    return dispatch.select("channel_stats", x)(x)


def _kernel(x):
    checks.activation(x)
    return channel_stats(channels_last(x))


def _fake(x):
    return torch.empty(2, x.shape[1], dtype=acc_dtype(x.dtype), device=x.device)


define_primitive("channel_stats(Tensor x) -> Tensor", _kernel, _fake)
