"""update_running_stats: the exponential moving average of batch statistics, in place."""

import torch
from torch import Tensor

from . import checks, dispatch, reference
from .registration import LIBRARY, define_primitive

dispatch.register("update_running_stats", reference=reference.update_running_stats)


def update_running_stats(
    running_mean: Tensor, running_var: Tensor, stats: Tensor, count: int, momentum: float
) -> None:
    """running = (1 - momentum) * running + momentum * new, with the unbiased variance M2 / (count - 1).

    Args:
        running_mean, running_var: [C], acc or activation dtype; changed in place.
        stats: acc [2, C] of channel_stats.
        count: N*H*W of the tensor that stats are of; 0 (an empty batch) changes nothing.
    """
    if count == 0:
        return
    run = dispatch.select("update_running_stats", stats)
    run(running_mean, running_var, stats, count, momentum)


def update_running_stats_of_unit(
    running_means: list[Tensor],
    running_vars: list[Tensor],
    stats: list[Tensor],
    counts: list[int],
    momenta: list[float],
    batches_tracked: list[Tensor],
) -> None:
    """:func:`update_running_stats` of several BatchNorms in one call, where the backend has that.

    Args:
        counts: none of them 0.
        batches_tracked: int64, one element each: 1 is added. Of any number of BatchNorms.
    """
    x = stats[0] if stats else batches_tracked[0]
    operator = dispatch.select_several("update_running_stats", "update_running_stats_of_unit", x)
    if operator is not None:
        operator(running_means, running_vars, stats, counts, momenta, batches_tracked)
        return
    if batches_tracked:
        torch._foreach_add_(batches_tracked, 1)
    for arguments in zip(running_means, running_vars, stats, counts, momenta, strict=True):
        update_running_stats(*arguments)


def _kernel(running_mean, running_var, stats, count, momentum):
    channels = stats.shape[-1]
    stats = checks.rows(stats, "stats", 2, channels, stats)
    checks.vector(running_mean, "running_mean", channels, stats)
    checks.vector(running_var, "running_var", channels, stats)
    update_running_stats(running_mean, running_var, stats, count, momentum)


_OP = define_primitive(
    "update_running_stats(Tensor(a!) running_mean, Tensor(b!) running_var, Tensor stats, int count, "
    "float momentum) -> ()",
    _kernel,
    lambda running_mean, running_var, stats, count, momentum: None,
)


def _count_change(*args):
    # Autograd must see that the buffers changed: another node may have saved them.
    with torch._C._AutoDispatchBelowADInplaceOrView():
        _OP(*args)
    for t in args[:2]:
        if not t.is_inference():
            torch.autograd.graph.increment_version(t)


LIBRARY.impl("update_running_stats", _count_change, "ADInplaceOrView")
