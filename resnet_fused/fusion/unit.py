"""A fused unit: a user's module with a forward that runs a plan."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from ..nn.units import has_global_hooks, has_hooks, is_transformed
from . import classes
from .adapters import AdapterPlan, adapter_of
from .classes import original_class
from .guards import Untraceable
from .plan import Link, Plan
from .trace import signature_of, trace

__all__ = ["UnitState", "captured", "convert", "make_plan", "plan_for", "restore", "runs_as_written", "state_of"]

_STATE = "_resnet_fused"
_MOST_PLANS = 16  # of one unit; a forward that is traced anew at every call is cheaper left alone


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

    Args:
        link: how the unit's result gets to the fused unit that wants its statistics, if there is one.
    """

    def __init__(self, link: Link | None = None) -> None:
        self.link = link
        self._owner: weakref.ref | None = None  # the module that the plans are of
        self._plans: dict[tuple, list[Plan | AdapterPlan | None]] = {}
        self._count = 0

    def __getstate__(self) -> dict[str, Any]:
        return {}  # the modules of a link may lie outside of what is pickled

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()

    def __deepcopy__(self, memo: dict) -> UnitState:
        whole = self.link is not None and id(self.link.parent) in memo
        return UnitState(copy.deepcopy(self.link, memo) if whole else None)

    def belongs_to(self, module: nn.Module) -> bool:
        """Whether no other module, as one that this is a shallow copy of, has made the plans."""
        if self._owner is None:
            self._owner = weakref.ref(module)
        return self._owner() is module

    def hands_on(self) -> bool:
        """Whether the statistics of the unit's result are to be attached to it: another fused unit gets it, and
        nothing on the way sees it."""
        return self.link is not None and not any([has_hooks(module) for module in self.link.between])

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


def captured() -> bool:
    """Whether PyTorch is looking at the forward itself: it gets the one that the user wrote."""
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or is_transformed()
    )


def runs_as_written(module: nn.Module) -> bool:
    """Whether a fused module has to run the forward that the user wrote, whatever its plans are."""
    # A replica of DataParallel lives for one call.
    return captured() or has_global_hooks() or "_is_replica" in module.__dict__


def plan_for(module: nn.Module, signature: tuple) -> Plan | AdapterPlan | None:
    """The plan of a fused unit for a call; None if the forward has to run as it was written."""
    plan = state_of(module).plan(module, signature)
    return plan if plan is not None and plan.fuses else None


@classes.serves(classes.UNIT)
def _forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    if runs_as_written(self):
        return self._plain_forward(*args, **kwargs)
    try:
        signature, tensors = signature_of(args, kwargs)
    except Untraceable:
        return self._plain_forward(*args, **kwargs)
    plan = plan_for(self, signature)
    if plan is None:
        return self._plain_forward(*args, **kwargs)
    return plan.run(tensors, state_of(self).hands_on())


def convert(module: nn.Module) -> None:
    """Make a module a fused unit, in place."""
    classes.exchange(module, classes.UNIT)
    module.__dict__[_STATE] = UnitState()


def restore(module: nn.Module) -> None:
    """Undo :func:`convert`."""
    classes.restore(module)
    module.__dict__.pop(_STATE, None)


def state_of(module: nn.Module) -> UnitState:
    state = module.__dict__.get(_STATE)
    # None: made by the class itself, as by slicing a Sequential.
    if state is None or not state.belongs_to(module):
        state = module.__dict__[_STATE] = UnitState()
        state.belongs_to(module)
    return state
