"""Convolutions of a user's model outside of its units: stems and classifiers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ..nn.units import convolution
from . import classes, leaves
from .analysis import Analysis
from .unit import captured

__all__ = ["exchange_convolutions"]


def exchange_convolutions(
    model: nn.Module, found: Analysis, filter_fn: Callable[[str, nn.Module], bool] | None = None
) -> None:
    """Let the convolutions outside of units run :func:`resnet_fused.functional.conv2d` where that applies.

    What lies beside a norm that was left alone is left alone, too.
    """
    units = [found.names[unit] for unit in found.units]
    beside = [norm.name.rpartition(".")[0] for norm in found.refused()]
    prefixes = tuple(name + "." if name else "" for name in (*units, *beside))
    for name, module in model.named_modules():
        if not isinstance(module, nn.Conv2d) or name.startswith(prefixes) or leaves.conv_refusal(module):
            continue
        if filter_fn is None or filter_fn(name, module):
            classes.exchange(module, classes.CONVOLUTION)


@classes.serves(classes.CONVOLUTION)
def _forward(self: nn.Conv2d, input: Any) -> Any:
    if captured() or type(input) is not Tensor or input.dim() != 4 or self.padding_mode != "zeros":
        return self._plain_forward(input)
    return convolution(self, input)
