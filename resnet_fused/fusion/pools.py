"""Max pools of a user's model that keep one byte per output for backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from .. import functional as F
from ..nn import max_pool
from . import classes
from .unit import captured

__all__ = ["exchange_pools"]


def exchange_pools(model: nn.Module, filter_fn: Callable[[str, nn.Module], bool] | None = None) -> None:
    """Let every max pool of the model run :func:`resnet_fused.functional.max_pool2d` where that applies."""
    for name, module in model.named_modules():
        if type(module).forward is nn.MaxPool2d.forward and "forward" not in module.__dict__:
            if filter_fn is None or filter_fn(name, module):
                classes.exchange(module, classes.POOL)


@classes.serves(classes.POOL)
def _forward(self: nn.MaxPool2d, input: Any) -> Any:
    if captured() or not max_pool.applies(self, input):
        return self._plain_forward(input)
    return F.max_pool2d(input, self.kernel_size, self.stride, self.padding)
