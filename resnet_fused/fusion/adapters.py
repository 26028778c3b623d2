"""Units that a user describes: for classes whose forward cannot be traced."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from .. import functional as F
from ..nn.units import unit_args, uses_batch_statistics
from . import leaves
from .plan import attach_stats, stats_of, unit_output_size

__all__ = ["AdapterPlan", "UnitParts", "adapter_of", "register_unit"]


@dataclass(frozen=True)
class UnitParts:
    """What a residual unit is made of: ``s + conv_n(act(norm_n(... conv_1(act(norm_1(x))))))``.

    Attributes:
        norms: BatchNorm2d layers, in order.
        convs: Conv2d layers, as many.
        shortcut: None: s = x; else a 1x1 convolution of act(norm_1(x)), without padding.
        negative_slope: of the activation below zero; 0 is ReLU.
    """

    norms: list[nn.Module] = field(default_factory=list)
    convs: list[nn.Module] = field(default_factory=list)
    shortcut: nn.Module | None = None
    negative_slope: float = 0.0


Adapter = Callable[[nn.Module], UnitParts | None]
_adapters: dict[type, Adapter] = {}


def register_unit(unit: type[nn.Module], adapter: Adapter | None = None) -> Any:
    """Tell :func:`fuse` what a class of residual units computes, where its forward cannot be traced.

    Args:
        unit: the class; its ``forward`` takes one tensor. Subclasses are not included.
        adapter: ``adapter(module) -> UnitParts``, or None where this module cannot be fused. It is called
            whenever the unit is, so that it may depend on the module's state. Left out: returns a decorator.

    Raises:
        TypeError: unit is not a class of modules.
    """
    if not (isinstance(unit, type) and issubclass(unit, nn.Module)):
        raise TypeError(f"unit should be a subclass of torch.nn.Module, but got {unit!r}")
    if adapter is None:
        return lambda function: register_unit(unit, function) and function
    if not callable(adapter):
        raise TypeError(f"adapter should be callable, but got {type(adapter).__name__}")
    _adapters[unit] = adapter
    return adapter


def adapter_of(kind: type) -> Adapter | None:
    return _adapters.get(kind)


class AdapterPlan:
    """Like a Plan, for a described unit."""

    def __init__(self, module: nn.Module, adapter: Adapter) -> None:
        self._module, self._adapter = module, adapter
        self.fuses = True

    def holds(self) -> bool:
        return True

    def reads_stats_of(self, index: int) -> bool:
        return index == 0

    def refusal(self) -> str | None:
        """Why the unit cannot be fused as it is, or None."""
        parts = self._adapter(self._module)
        if parts is None:
            return "its adapter declines"
        if not parts.norms or len(parts.norms) != len(parts.convs):
            return f"its adapter gives {len(parts.norms)} norms and {len(parts.convs)} convolutions"
        for norm in parts.norms:
            if (why := leaves.norm_refusal(norm)) is not None:
                return why
        for conv in (*parts.convs, *([parts.shortcut] if parts.shortcut is not None else [])):
            if (why := leaves.conv_refusal(conv)) is not None:
                return why
        s = parts.shortcut
        if s is not None and (s.groups, tuple(s.padding), tuple(s.dilation)) != (1, (0, 0), (1, 1)):
            return "its shortcut has padding, dilation or groups"
        return None

    def run(self, tensors: list[Tensor], hand_on: bool) -> Any:
        x = tensors[0]
        if self.refusal() is not None:
            return self._module._plain_forward(x)
        parts = self._adapter(self._module)
        if unit_output_size(x, parts.convs, parts.shortcut) is None:
            return self._module._plain_forward(x)
        wanted = hand_on and uses_batch_statistics(parts.norms[-1])
        args = unit_args(parts.norms, parts.convs, parts.shortcut, parts.negative_slope)
        result = F.residual_unit(
            x,
            args.norms,
            args.convs,
            shortcut=args.shortcut,
            negative_slope=args.negative_slope,
            x_stats=stats_of(x) if args.uses_batch_statistics() else None,
            return_stats=wanted,
        )
        if not wanted:
            return result
        attach_stats(*result)
        return result[0]
