"""Running statistics, updated outside the functional operators.

As in PyTorch's batch norm, the update is none that autograd counts: a plain norm of the same buffers may have saved
them, which in training it never reads again.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from resnet_fused import primitives
from resnet_fused.primitives.update_running_stats import update_running_stats_of_unit

from .arguments import BatchNormArgs


def _is_traced(t: Tensor) -> bool:
    """Whether something looks on that has to see the operators."""
    return torch.compiler.is_compiling() or type(t) is not Tensor or torch._C._len_torch_dispatch_stack() != 0


def update(
    running_mean: Tensor, running_var: Tensor, stats: Tensor, count: int, momentum: float | Tensor
) -> None:
    """running = (1 - momentum) * running + momentum * batch statistic, in place; the variance unbiased.

    Args:
        stats: acc [2, C], mean and M2, of an input with count = N*H*W values per channel; count 0 changes
            nothing.
        momentum: a float, or a 0-dim tensor, which is read by tensor arithmetic, never by the host.
    """
    if count == 0:
        return
    if isinstance(momentum, Tensor):
        with torch.no_grad():
            mean, m2 = stats.unbind(0)
            momentum = momentum.to(stats.dtype)
            for running, batch in ((running_mean, mean), (running_var, m2 / (count - 1))):
                updated = torch.lerp(running.to(stats.dtype), batch, momentum)
                (running if _is_traced(running) else running.data).copy_(updated)
    elif _is_traced(running_mean):
        torch.ops.resnet_fused.update_running_stats.default(running_mean, running_var, stats, count, momentum)
    else:
        # The same without three trips through the dispatcher: deep nets have a thousand of these.
        primitives.update_running_stats(running_mean, running_var, stats, count, momentum)


def changes_of(
    norms: Sequence[BatchNormArgs], device: torch.device
) -> tuple[list[float], list[Tensor]] | None:
    """What the operators of whole units are given to update the running statistics of norms, whose inputs are on
    device: the momenta of all, and the counters of batches. None where update_of_unit has to do it."""
    momenta, batches = [], []
    for norm in norms:
        momenta.append(norm.momentum)
        if not norm.training:
            continue
        mean, tracked = norm.running_mean, norm.num_batches_tracked
        if mean is not None:
            if isinstance(norm.momentum, Tensor) or type(mean) is not Tensor:
                return None
        if tracked is not None:
            if type(tracked) is not Tensor or tracked.dtype is not torch.int64 or tracked.device != device:
                return None
            batches.append(tracked)
    return momenta, batches


def update_of_unit(norms: list[tuple[BatchNormArgs, Tensor, int]]) -> None:
    """:func:`update` and one batch more in num_batches_tracked, for several BatchNorms in training.

    Args:
        norms: each with the statistics of its input and their count.
    """
    means, variances, all_stats, counts, momenta, batches = [], [], [], [], [], []
    for norm, stats, count in norms:
        mean, tracked = norm.running_mean, norm.num_batches_tracked
        if tracked is not None:
            if tracked.dtype is torch.int64 and tracked.device == stats.device and not _is_traced(tracked):
                batches.append(tracked)
            else:
                tracked.add_(1)
        if mean is None:
            continue
        if isinstance(norm.momentum, Tensor) or _is_traced(mean):
            update(mean, norm.running_var, stats, count, norm.momentum)
        elif count != 0:
            means.append(mean)
            variances.append(norm.running_var)
            all_stats.append(stats)
            counts.append(count)
            momenta.append(norm.momentum)
    if means or batches:
        update_running_stats_of_unit(means, variances, all_stats, counts, momenta, batches)
