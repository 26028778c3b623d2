"""The class of a fused unit: the user's own, with a forward that runs a plan.

A unit is fused by exchanging its class for a generated subclass of it, so that the module itself, its
parameters, buffers, hooks and names stay what they are; :func:`restore` exchanges it back.
"""

from __future__ import annotations

import copyreg
import threading
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from ..nn.units import has_global_hooks
from .adapters import AdapterPlan, adapter_of
from .guards import Untraceable
from .plan import Plan
from .trace import is_fused, signature_of, trace

__all__ = ["UnitState", "convert", "is_fused", "make_plan", "original_class", "restore", "state_of"]

_STATE = "_resnet_fused"
_MOST_PLANS = 16  # of one unit; a forward that is traced anew at every call is cheaper left alone
_classes: dict[type, type] = {}
_lock = threading.RLock()


def make_plan(module: nn.Module, signature: tuple, leaves: Iterable[nn.Module] = ()) -> Plan | AdapterPlan:
    """How a module would run as a fused unit.

    Raises:
        Untraceable: with the reason.
    """
    adapter = adapter_of(original_class(module))
    if adapter is None:
        return Plan(trace(module, signature, leaves))
    args, kwargs, _ = signature
    if len(args) != 2 or args[1][0] != "tensor" or len(kwargs) > 1:
        raise Untraceable("a unit with an adapter takes one tensor")
    return AdapterPlan(module, adapter)


class UnitState:
    """What a fused unit knows beside its parameters. Copies and pickles hold no plans: these are made anew.

    Attributes:
        hand_on: the unit's result is read by another fused unit, which wants its statistics.
    """

    def __init__(self, hand_on: bool = False) -> None:
        self.hand_on = hand_on
        self._plans: dict[tuple, list[Plan | AdapterPlan | None]] = {}
        self._count = 0

    def __getstate__(self) -> dict[str, Any]:
        return {"hand_on": self.hand_on}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)

    def plan(self, module: nn.Module, signature: tuple) -> Plan | AdapterPlan | None:
        """The plan for a call; None if the forward has to run as it was written."""
        plans = self._plans.setdefault(signature, [])
        for plan in plans:
            if plan is None or plan.holds():
                return plan
        if self._count >= _MOST_PLANS:
            return None
        self._count += 1
        try:
            plan = make_plan(module, signature)
        except Untraceable:
            plan = None
        plans.append(plan)
        return plan


def _captured() -> bool:
    """Whether PyTorch is looking at the forward itself: it gets the one that the user wrote."""
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._are_functorch_transforms_active()
        or torch.autograd.forward_ad._current_level >= 0
    )


def _forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    if _captured() or has_global_hooks():
        return self._plain_forward(*args, **kwargs)
    state = self.__dict__.get(_STATE)
    if state is None:  # made by the class itself, as by slicing a Sequential
        state = self.__dict__[_STATE] = UnitState()
    try:
        signature, tensors = signature_of(args, kwargs)
    except Untraceable:
        return self._plain_forward(*args, **kwargs)
    plan = state.plan(self, signature)
    if plan is None or not plan.fuses:
        return self._plain_forward(*args, **kwargs)
    return plan.run(tensors, state.hand_on)


def _make(cls: type, *args: Any) -> nn.Module:
    """An instance for copy and pickle: made by the user's class, then of the generated one."""
    module = copyreg.__newobj__(cls, *args)
    module.__class__ = _class_of(cls)
    return module


def _reduce_ex(self: nn.Module, protocol: int) -> tuple:
    function, args, *rest = super(type(self), self).__reduce_ex__(protocol)
    if function is not copyreg.__newobj__:
        raise TypeError(
            f"a fused {original_class(self).__name__} cannot be copied, since its class has its own way of "
            "being copied: call resnet_fused.unfuse(model) first"
        )
    return _make, (original_class(self), *args[1:]), *rest


def _class_of(cls: type) -> type:
    with _lock:
        if cls not in _classes:
            body = {
                "forward": _forward,
                "_plain_forward": cls.forward,
                "_original_class": cls,
                "__reduce_ex__": _reduce_ex,
                "__module__": cls.__module__,
                "__qualname__": cls.__qualname__,
                "__doc__": cls.__doc__,
            }
            _classes[cls] = type(cls)(cls.__name__, (cls,), body)
        return _classes[cls]


def original_class(module: nn.Module) -> type:
    """The class that the user gave a module."""
    return getattr(type(module), "_original_class", type(module))


def convert(module: nn.Module) -> None:
    """Make a module a fused unit, in place."""
    if not is_fused(module):
        module.__class__ = _class_of(type(module))
    module.__dict__[_STATE] = UnitState()


def restore(module: nn.Module) -> None:
    """Undo :func:`convert`."""
    module.__class__ = original_class(module)
    module.__dict__.pop(_STATE, None)


def state_of(module: nn.Module) -> UnitState:
    return module.__dict__[_STATE]


