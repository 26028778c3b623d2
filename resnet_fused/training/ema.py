"""Exponential moving average of the weights, by PyTorch's own AveragedModel."""

from __future__ import annotations

from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

__all__ = ["weight_average"]


def weight_average(model: nn.Module, decay: float) -> AveragedModel:
    """A copy of ``model`` whose parameters and buffers become averages.

    After ``update_parameters(model)`` number n = 1, 2, ... every parameter and buffer is a_1 = w_1 and
    a_n = decay * a_(n-1) + (1 - decay) * w_n. The statistics of the norms are averaged too, as torchvision's
    references do, so that they stay those of the averaged weights to first order. ``module`` of the result is
    the net to evaluate.

    Args:
        decay: 0 <= decay < 1; 0.9999 averages over some 10,000 steps.
    """
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)
