"""Running statistics, updated outside the functional operators."""

import torch
from torch import Tensor

from resnet_fused import primitives


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
            running_mean.copy_(torch.lerp(running_mean.to(stats.dtype), mean, momentum))
            running_var.copy_(torch.lerp(running_var.to(stats.dtype), m2 / (count - 1), momentum))
    elif (
        torch.compiler.is_compiling()
        or type(running_mean) is not Tensor
        or torch._C._len_torch_dispatch_stack()
    ):
        torch.ops.resnet_fused.update_running_stats.default(running_mean, running_var, stats, count, momentum)
    else:
        # The same without three trips through the dispatcher: deep nets have a thousand of these.
        primitives.update_running_stats(running_mean, running_var, stats, count, momentum)
        for t in (running_mean, running_var):
            if not t.is_inference():
                torch.autograd.graph.increment_version(t)
