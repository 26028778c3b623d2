"""Which modules of a model are units to fuse, and why the rest are not.

Modules are looked at from the inside out. A module becomes a unit if its graph holds a pattern that none of
its submodules holds alone; submodules without an addition of their own are then part of it. A module with an
addition is never part of another unit, so that residual units stay units.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.fx import Node

from ..nn.units import StatsModule
from . import leaves
from .adapters import AdapterPlan, adapter_of
from .classes import original_class
from .guards import Untraceable
from .match import AddOp, ConvOp, NormOp, UnitOp, changed_in_place
from .plan import Link, Plan
from .trace import default_signature, trace
from .unit import make_plan

__all__ = ["Analysis", "NormStatus", "analyze"]


@dataclass
class NormStatus:
    """What becomes of one norm.

    Attributes:
        name: its name in the model.
        state: "fused"; "refused": an activation and a convolution follow, but they stay as they are; "idle":
            there is nothing to fuse.
        reason: why it is not fused.
        convs: the convolutions that it is fused with, or would be.
    """

    name: str
    state: str
    reason: str = ""
    convs: list[str] = field(default_factory=list)


@dataclass
class Analysis:
    """Attributes:
        units: module -> its plan, for those to fuse.
        names: module -> its (first) name in the model.
        norms: module -> what becomes of it, for every norm of the model, in the model's order.
        operators: module -> kind of operator ("unit", "conv", "conv + addition") that computes it, for every
            fused convolution.
        links: unit -> how its result gets to another unit, which reads its statistics.
        untraced: module -> why its forward could not be traced, where that matters.
    """

    units: dict[nn.Module, Plan | AdapterPlan] = field(default_factory=dict)
    names: dict[nn.Module, str] = field(default_factory=dict)
    norms: dict[nn.Module, NormStatus] = field(default_factory=dict)
    operators: dict[nn.Module, str] = field(default_factory=dict)
    links: dict[nn.Module, Link] = field(default_factory=dict)
    untraced: dict[nn.Module, str] = field(default_factory=dict)

    def refused(self) -> list[NormStatus]:
        return [norm for norm in self.norms.values() if norm.state == "refused"]

    def unit_counts(self) -> tuple[int, int]:
        """(units that are fused, units that were found): those with at least one candidate."""
        fused = {self.names[unit] for unit in self.units}
        inside = tuple(name + "." if name else "" for name in fused)
        left = {
            norm.name.rpartition(".")[0] for norm in self.refused() if not norm.name.startswith(inside)
        }
        return len(fused), len(fused | left)


def is_ours(module: nn.Module) -> bool:
    """Whether a module is a fused one of this package, a unit or a net."""
    return isinstance(module, StatsModule) or getattr(module, "hands_on_statistics", False) is True


def _stack(node: Node) -> list[str]:
    """The modules that a node was called in, from the outside in; the traced one is not among them."""
    stack = [name for name, _ in node.meta.get("nn_module_stack", {}).values()]
    return [name for name in stack if node.op != "call_module" or name != node.target]


def _owner(nodes: list[Node]) -> str:
    """The innermost module that all nodes were called in; "" is the traced one."""
    common = ""
    for level in zip(*map(_stack, nodes), strict=False):
        if len(set(level)) > 1:
            break
        common = level[0]
    return common


def analyze(model: nn.Module, filter_fn: Callable[[str, nn.Module], bool] | None = None) -> Analysis:
    """Find the units of a model. Nothing is changed.

    Args:
        filter_fn: ``filter_fn(name, module)`` is asked for every module that would become a unit.
    """
    analyst = _Analyst(model, filter_fn)
    analyst.visit(model)
    analyst.finish(model)
    return analyst.result


class _Analyst:
    def __init__(self, model: nn.Module, filter_fn) -> None:
        self.result = Analysis(names={m: name for name, m in reversed(list(model.named_modules()))})
        self.filter_fn = filter_fn
        self.sealed: set[nn.Module] = set()  # kept as a node in the graphs of the modules around it
        self.seen: set[nn.Module] = set()

    def visit(self, module: nn.Module) -> None:
        if module in self.seen:
            return
        self.seen.add(module)
        if is_ours(module):
            self.skip(module)
            return
        for child in module.children():
            self.visit(child)
        if self.is_layer(module):
            return
        try:
            plan = self.plan(module, self.sealed)
        except Untraceable as error:
            self.sealed.add(module)
            self.result.untraced[module] = str(error)
            return
        if isinstance(plan, AdapterPlan):
            self.adapt(module, plan)
            return
        self.judge(module, plan)

    def plan(self, module: nn.Module, leaves: set[nn.Module]) -> Plan | AdapterPlan:
        """A plan for the call that a module most likely gets: with a tensor, or else a list of them."""
        try:
            return make_plan(module, default_signature(module), leaves)
        except Untraceable:
            try:
                return make_plan(module, default_signature(module, several=True), leaves)
            except Untraceable:
                pass
            raise

    def skip(self, module: nn.Module) -> None:
        self.sealed.add(module)
        for part in module.modules():
            if leaves.is_norm(part):
                reason = f"{type(module).__name__} of resnet_fused is fused as it is"
                self.result.norms[part] = NormStatus(self.result.names[part], "idle", reason)

    def is_layer(self, module: nn.Module) -> bool:
        if isinstance(module, (nn.Conv2d, torch.jit.ScriptModule, nn.ModuleList)) or leaves.is_norm(module):
            return True
        if type(module) is nn.ModuleDict or "forward" in module.__dict__:
            return True
        inside = [m for m in module.modules() if m is not module]
        if not any(isinstance(m, nn.Conv2d) or leaves.is_norm(m) for m in inside):
            return True
        kind = original_class(module)
        return kind.__module__.startswith(("torch.nn", "torch.ao")) and kind is not nn.Sequential

    def judge(self, module: nn.Module, plan: Plan) -> None:
        result = self.result
        patterns = [plan.nodes_of(op) for op in plan.found.ops.values()]
        crossing = [nodes for nodes in patterns if _owner(nodes) == ""]
        if any(_owner([add]) == "" for add in plan.found.additions):
            self.sealed.add(module)
        if not crossing:
            self.note_norms(plan)
            return
        # Units inside that have no part in any of these patterns stay units.
        involved = {name for nodes in crossing for node in nodes for name in _stack(node)}
        apart = {
            part
            for name, part in plan.traced.absorbed.items()
            if part in result.units and name not in involved
        } - {module}
        if apart:
            plan = self.plan(module, self.sealed | apart)
        found = plan.found
        self.note_norms(plan)
        name = result.names[module]
        if self.filter_fn is not None and not self.filter_fn(name, module):
            self.sealed.add(module)
            for node in found.covered:
                status = result.norms.get(plan.module(node))
                if status is not None and _owner([node]) == "":
                    status.state, status.reason = "refused", "excluded by filter_fn"
            return
        for part in plan.traced.absorbed.values():
            result.units.pop(part, None)
        result.units[module] = plan
        for op in found.ops.values():
            if isinstance(op, UnitOp):
                for node in (*op.convs, *([op.shortcut] if op.shortcut is not None else [])):
                    result.operators[plan.module(node)] = "unit"
            elif isinstance(op, ConvOp):
                kind = "conv" if op.add is None else "conv + addition"
                result.operators[plan.module(op.conv)] = kind

    def note_norms(self, plan: Plan) -> None:
        names, found = self.result.names, plan.found
        convs: dict[Node, list[str]] = {}
        added: set[Node] = set()
        for op in found.ops.values():
            if isinstance(op, AddOp):
                added |= {op.x, op.y}
            elif isinstance(op, ConvOp):
                convs.setdefault(op.pair.norm, []).append(names[plan.module(op.conv)])
            elif not isinstance(op, NormOp):
                for pair in op.pairs:
                    convs[pair.norm] = [names[plan.module(conv)] for conv in pair.convs]
        for node in plan.traced.graph.nodes:
            norm = plan.module(node)
            if norm is None or not leaves.is_norm(norm):
                continue
            name = names[norm]
            if node in convs:
                status = NormStatus(name, "fused", "", convs[node])
            elif node in found.refused:
                status = NormStatus(name, "refused", found.refused[node])
            elif node in added:
                status = NormStatus(name, "idle", "goes to the fused addition")
            else:
                status = NormStatus(name, "idle", found.idle.get(node, "not part of a pattern"))
            before = self.result.norms.get(norm)
            if before is None or before.reason != "excluded by filter_fn":
                self.result.norms[norm] = status

    def adapt(self, module: nn.Module, plan: AdapterPlan) -> None:
        result = self.result
        reason = plan.refusal()
        name = result.names[module]
        if reason is None and self.filter_fn is not None and not self.filter_fn(name, module):
            reason = "excluded by filter_fn"
        self.sealed.add(module)
        for part in module.modules():
            if part is not module:
                result.units.pop(part, None)
                result.operators.pop(part, None)
        parts = adapter_of(original_class(module))(module)
        norms = parts.norms if parts is not None else [m for m in module.modules() if leaves.is_norm(m)]
        convs = [] if parts is None else [[result.names[c]] for c in parts.convs]
        convs += [[]] * (len(norms) - len(convs))
        if convs and parts is not None and parts.shortcut is not None:
            convs[0] = [*convs[0], result.names[parts.shortcut]]
        for norm, names in zip(norms, convs, strict=False):
            state = "fused" if reason is None else "refused"
            result.norms[norm] = NormStatus(result.names[norm], state, reason or "", names)
        if reason is None:
            result.units[module] = plan
            for conv in (*parts.convs, *([parts.shortcut] if parts.shortcut is not None else [])):
                result.operators[conv] = "unit"

    def finish(self, model: nn.Module) -> None:
        """Norms that no trace has seen, the model's order, and who hands statistics to whom."""
        result = self.result
        ordered = {}
        for module in model.modules():
            if not leaves.is_norm(module):
                continue
            status = result.norms.get(module)
            if status is None:
                status = NormStatus(result.names[module], *self.unseen(result.names[module]))
            ordered[module] = status
        result.norms = ordered
        fused = [status for status in ordered.values() if status.state == "fused"]
        fused_convs = {name for status in fused for name in status.convs}
        result.operators = {
            conv: kind for conv, kind in result.operators.items() if result.names[conv] in fused_convs
        }
        self.link(model)

    def unseen(self, name: str) -> tuple[str, str]:
        reason = None
        for module, why in self.result.untraced.items():
            at = self.result.names[module]
            if (not at or name.startswith(at + ".")) and (reason is None or len(at) > reason[0]):
                reason = (len(at), f"{type(module).__name__}: {why}")
        return ("refused", reason[1]) if reason is not None else ("idle", "nothing calls it")

    def link(self, module: nn.Module) -> None:
        units = self.result.units
        if module in units or not any(m in units for m in module.modules()):
            return
        try:
            traced = trace(module, default_signature(module), units)
        except Untraceable:
            for child in module.children():
                self.link(child)
            return

        def path(node: Node) -> list[Node]:
            """The node, those behind it that hand its value on, and the one that computes it."""
            nodes = [node]
            while (
                node.op == "call_module" and len(node.args) == 1 and isinstance(node.args[0], Node)
                and leaves.passes_through(traced.modules[node.target])
            ):  # fmt: skip
                node = node.args[0]
                nodes.append(node)
            return nodes

        is_changed = changed_in_place(traced, units)
        for node in traced.graph.nodes:
            reader = traced.modules[node.target] if node.op == "call_module" else None
            if reader not in units:
                continue
            for index, value in enumerate(node.args):
                handed = path(value) if isinstance(value, Node) else []
                if not handed or handed[-1].op != "call_module" or is_changed(handed[-1]):
                    continue
                producer = traced.modules[handed[-1].target]
                if producer not in units or not units[reader].reads_stats_of(index):
                    continue
                calls = [node, *handed]
                stacks = [set(_stack(call)) for call in calls]
                crossed = set.union(*stacks) - set.intersection(*stacks)  # calls of these end or begin on the way
                between = [*(traced.modules[call.target] for call in calls), *map(traced.absorbed.get, crossed)]
                self.result.links[producer] = Link(module, between)
