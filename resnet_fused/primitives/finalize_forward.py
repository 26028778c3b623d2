"""finalize_forward: from statistics and affine parameters to the coefficients of normalisation."""

import torch
from torch import Tensor

from . import checks, dispatch, reference
from .layout import acc_dtype
from .registration import define_primitive

dispatch.register("finalize_forward", reference=reference.finalize_forward)


def finalize_forward(
    stats: Tensor | None,
    count: int,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> Tensor:
    """Coefficients of one BatchNorm.

    Args:
        stats: acc [2, C] of channel_stats: batch statistics are used, with the biased variance M2 / count.
            None: the running ones [C] are.
        weight, bias: [C], or None for 1 and 0.

    Returns:
        bn, acc [4, C]: mean, invstd = 1 / sqrt(var + eps), scale = weight * invstd, and
        shift = bias - mean * scale.
    """
    run = dispatch.select("finalize_forward", running_mean if stats is None else stats)
    return run(stats, count, running_mean, running_var, weight, bias, eps)


def _kernel(stats, count, running_mean, running_var, weight, bias, eps):
    if stats is None:
        if running_mean is None or running_var is None:
            raise RuntimeError("expected stats, or running_mean and running_var")
        source, channels = running_mean, running_mean.shape[-1]
        checks.vector(running_mean, "running_mean", channels, source)
        checks.vector(running_var, "running_var", channels, source)
    else:
        source, channels = stats, stats.shape[-1]
        stats = checks.rows(stats, "stats", 2, channels, source)
    checks.vector(weight, "weight", channels, source)
    checks.vector(bias, "bias", channels, source)
    return finalize_forward(stats, count, running_mean, running_var, weight, bias, eps)


def _fake(stats, count, running_mean, running_var, weight, bias, eps):
    source = running_mean if stats is None else stats
    return torch.empty(4, source.shape[-1], dtype=acc_dtype(source.dtype), device=source.device)


define_primitive(
    "finalize_forward(Tensor? stats, int count, Tensor? running_mean, Tensor? running_var, Tensor? weight, "
    "Tensor? bias, float eps) -> Tensor",
    _kernel,
    _fake,
)
