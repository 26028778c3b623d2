"""Fused units that follow one another in an ``nn.Sequential``, run as rows: one autograd node for up to 16
units (:func:`resnet_fused.functional.residual_units`), where calling them in turn has one for each.

Units join a row if each is a whole residual unit, and nothing sees that they are not called: neither they nor
PyTorch have hooks that a call would run.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .. import functional as F
from ..nn.units import calls_forward_alone
from . import classes
from .plan import Plan, attach_stats, stats_of
from .trace import signature_of
from .unit import plan_for, runs_as_written, state_of

__all__ = ["exchange_sequentials"]


_RESULT = {flag: torch.empty(0, requires_grad=flag) for flag in (False, True)}


def exchange_sequentials(model: nn.Module) -> None:
    """Let every Sequential in which fused units follow one another run them in rows."""
    for module in model.modules():
        if type(module).forward is nn.Sequential.forward and "forward" not in module.__dict__:
            members = [classes.is_fused(member) for member in module.children()]
            if any(a and b for a, b in zip(members, members[1:], strict=False)):
                classes.exchange(module, classes.ROWS)


@classes.serves(classes.ROWS)
def _forward(self: nn.Sequential, input: Any) -> Any:
    if type(input) is not Tensor or runs_as_written(self):
        return self._plain_forward(input)
    members, x, index = list(self), input, 0
    while index < len(members):
        row, hand_on = _row_from(members, index, x)
        if len(row) < 2:
            # A module that joins no row is called as ever.
            x, index = members[index](x), index + 1
            continue
        stats = stats_of(x) if row[0].uses_batch_statistics() else None
        out = F.residual_units(x, row, x_stats=stats, return_stats=hand_on)
        x, index = out[0] if hand_on else out, index + len(row)
        if hand_on:
            attach_stats(*out)
    return x


def _row_from(members: list[nn.Module], start: int, x: Any) -> tuple[list[F.UnitArgs], bool]:
    """The units from a member on that can run as a row, and whether the result's statistics are asked for."""
    plans: list[Plan] = []
    size = None
    for member in members[start:]:
        # Of a call with what the unit before returns, all is known but the values: it is like x but for its size,
        # and where there are gradients it has one.
        signature, _ = signature_of((_RESULT[torch.is_grad_enabled()] if plans else x,), {})
        plan = None
        if classes.is_fused(member) and calls_forward_alone(member):
            plan = plan_for(member, signature)
        size = plan.unit_output_size(x, size) if isinstance(plan, Plan) else None
        if size is None:
            break
        plans.append(plan)
    if len(plans) < 2:
        return [], False
    hand_on = state_of(members[start + len(plans) - 1]).hands_on()
    return [plan.unit_args() for plan in plans], plans[-1].wants_stats_of_result(hand_on)
