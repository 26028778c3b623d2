"""The residual units of a net, taken apart while the net runs: every term of every addition stays at hand."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

__all__ = ["ObservedUnit", "observe", "residual_units", "vector_jacobian_product"]


def residual_units(net: nn.Module) -> list[tuple[str, nn.Module]]:
    """Name and module of the residual units of a plain net, in the order in which they run.

    Raises:
        TypeError: not a net of residual units.
        ValueError: a fused net, whose units do not run one by one.
    """
    if not hasattr(net, "residual_units"):
        raise TypeError(
            f"expected a net of residual units (with residual_units()), but got {type(net).__name__}"
        )
    if getattr(net, "fused", False):
        raise ValueError(
            "propagation is measured in the plain net: build it by create_model(..., fused=False) and load "
            "the fused net's state_dict, whose keys are the same"
        )
    return list(net.residual_units())


def vector_jacobian_product(output: Tensor, x: Tensor, vector: Tensor) -> Tensor:
    """(d output / d x)^T vector; the graph is kept."""
    if output is x:
        return vector
    if not output.requires_grad:
        return torch.zeros_like(x)
    (found,) = torch.autograd.grad(output, x, vector, retain_graph=True, allow_unused=True)
    return torch.zeros_like(x) if found is None else found


@dataclass
class ObservedUnit:
    """One unit's call: x_{l+1} = f(y), y = h(x_l) + F(x_l).

    ``x`` and ``out`` are leaves of autograd, so each unit has a graph of its own; ``out`` is the ``x`` of the
    next.

    Attributes:
        name: in the net.
        x, shortcut, residual, addition, after, out: x_l, h, F, y, f(y), and f(y) detached.
        gate_source, gate_input: what the gate of the shortcut reads, and the same values as a leaf, so that
            the gate's own derivative can be told from the shortcut's; None without a gate.
        factor: k where h(x) = k * x: a number, or a tensor of the shape of x (gates 1 - g, dropout's mask);
            None for projections and 1x1 convolutions.
        keeps_shape: x_l and x_{l+1} can be compared: same shape, and the shortcut starts from x_l itself.
        elementwise_after: f acts on each element for itself (the identity, ReLU), not so a BatchNorm.
    """

    name: str
    x: Tensor
    shortcut: Tensor
    residual: Tensor
    addition: Tensor
    after: Tensor
    out: Tensor
    gate_source: Tensor | None
    gate_input: Tensor | None
    factor: float | Tensor | None
    keeps_shape: bool
    elementwise_after: bool

    def through_after(self, vector: Tensor) -> Tensor:
        """J_f^T vector."""
        return vector_jacobian_product(self.after, self.addition, vector)

    def through_shortcut(self, vector: Tensor) -> Tensor:
        """J_h^T vector, a gate taken as it is."""
        return vector_jacobian_product(self.shortcut, self.x, vector)

    def through_residual(self, vector: Tensor) -> Tensor:
        """J_F^T vector, and what comes by way of the gate: everything that passes weights."""
        found = vector_jacobian_product(self.residual, self.x, vector)
        if self.gate_input is None:
            return found
        gate = vector_jacobian_product(self.shortcut, self.gate_input, vector)
        gate = gate + vector_jacobian_product(self.residual, self.gate_input, vector)
        return found + vector_jacobian_product(self.gate_source, self.x, gate)

    def through(self, vector: Tensor) -> Tensor:
        """The whole unit's gradient, by autograd alone: J^T vector, from ``out`` to ``x``."""
        inputs = [self.x] if self.gate_input is None else [self.x, self.gate_input]
        found = torch.autograd.grad(self.after, inputs, vector, retain_graph=True)
        if self.gate_input is None:
            return found[0]
        return found[0] + vector_jacobian_product(self.gate_source, self.x, found[1])


@contextlib.contextmanager
def observe(net: nn.Module) -> Iterator[list[ObservedUnit]]:
    """Inside, a call of ``net`` appends its units to the list, and its output is a function of the last
    ``out`` alone.

    The values are those of the net's own forward, bit for bit. Memory is that of a forward for a backward.

    Args:
        net: a plain net with ``residual_units()``, whose units have ``terms`` and ``after_addition``.

    Raises:
        TypeError, ValueError: see :func:`residual_units`.
    """
    units = residual_units(net)
    found: list[ObservedUnit] = []
    with contextlib.ExitStack() as stack:
        for name, unit in units:
            carried: dict[str, Tensor] = {}
            gate = getattr(unit, "gate", None)
            if isinstance(gate, nn.Module):
                stack.callback(gate.register_forward_pre_hook(_separate(carried)).remove)
                stack.callback(gate.register_forward_hook(_keep_gate(carried)).remove)
            unit.forward = _observed(
                name, unit, carried, found
            )  # of the instance: its class has the other one
            stack.callback(delattr, unit, "forward")
        yield found


def _separate(carried: dict[str, Tensor]):
    def before_gate(gate: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
        carried["source"] = inputs[0]
        carried["input"] = inputs[0].detach().requires_grad_()
        return (carried["input"],)

    return before_gate


def _keep_gate(carried: dict[str, Tensor]):
    def after_gate(gate: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        carried["factor"] = 1 - torch.sigmoid(output.detach())

    return after_gate


def _observed(name: str, unit: nn.Module, carried: dict[str, Tensor], found: list[ObservedUnit]):
    def forward(x: Tensor) -> Tensor:
        carried.clear()
        x = x.detach().requires_grad_()
        shortcut, residual = unit.terms(x)
        addition = residual + shortcut
        after = unit.after_addition(addition)
        out = after.detach().requires_grad_()
        starts_from_x = shortcut is x or getattr(unit, "preactivation", None) != "shared"
        found.append(
            ObservedUnit(
                name,
                x,
                shortcut,
                residual,
                addition,
                after,
                out,
                carried.get("source"),
                carried.get("input"),
                _factor(unit, x, shortcut, carried),
                starts_from_x and x.shape == out.shape,
                after is addition or getattr(unit, "order", None) == "original",
            )
        )
        return out

    return forward


def _factor(
    unit: nn.Module, x: Tensor, shortcut: Tensor, carried: dict[str, Tensor]
) -> float | Tensor | None:
    if shortcut is x:
        return 1.0
    kind = getattr(unit, "shortcut_kind", None)
    if kind == "none":
        return 0.0
    base = getattr(unit, "downsample", None) or getattr(unit, "shortcut", None)
    if base is not None or getattr(unit, "preactivation", None) == "shared":
        return None
    if kind == "constant_scaling":
        return float(unit.settings["shortcut_scale"])
    if kind == "dropout":
        return vector_jacobian_product(shortcut, x, torch.ones_like(shortcut))
    return carried.get("factor")
