"""Patterns in the graph of one unit: what the fused operators compute, found by dataflow alone.

norm -> activation -> convolutions becomes a :class:`Pair`. The operators to run in their place are an
:class:`UnitOp` (a whole residual unit), a :class:`ConvOp` (one convolution with its norm, activation and, if
there is one, the residual addition), an :class:`AddOp` (an addition with stochastic depth before it or an
activation after it) and a :class:`NormOp` (a norm whose result such an addition reads). Everything else
stays as the user wrote it.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Container
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.fx import Node
from torch.nn import functional as F

from . import leaves
from .trace import IN_PLACE, Trace

__all__ = ["AddOp", "ConvOp", "Match", "NormOp", "Pair", "UnitOp", "match"]

_INPLACE_OPERATORS = {operator.setitem, *(getattr(operator, f"__{name}__") for name in IN_PLACE)}
_ADDITIONS = (operator.add, operator.iadd, torch.add)
#: Functions whose result shares no memory with their arguments.
_FRESH = (operator.add, operator.mul, operator.sub, torch.add, torch.mul, torch.cat, F.conv2d, F.batch_norm)


@dataclass(eq=False)
class Pair:
    """A norm, its activation and the convolutions that read it, of a value x."""

    x: Node
    norm: Node
    act: Node | None  # None: the norm activates its result itself
    convs: list[Node]
    slope: float

    @property
    def output(self) -> Node:
        return self.norm if self.act is None else self.act


@dataclass(eq=False)
class ConvOp:
    """One convolution of a pair, (and an addition that it is the last user of)."""

    pair: Pair
    conv: Node
    add: Node | None = None
    residual: Node | None = None

    @property
    def anchor(self) -> Node:
        return self.conv if self.add is None else self.add

    @property
    def reads(self) -> list[Node]:
        return [self.pair.x, *([] if self.residual is None else [self.residual])]


@dataclass(eq=False)
class UnitOp:
    """A whole residual unit: pairs in turn, and the identity or a projection of the first activation."""

    pairs: list[Pair]
    convs: list[Node]
    shortcut: Node | None
    add: Node

    @property
    def anchor(self) -> Node:
        return self.add

    @property
    def reads(self) -> list[Node]:
        return [self.pairs[0].x]


@dataclass(eq=False)
class AddOp:
    """An addition; gate: the node of stochastic depth on ``y``; act: the activation of the sum."""

    x: Node
    y: Node
    gate: Node | None
    add: Node
    act: Node | None
    slope: float | None
    anchor: Node

    @property
    def reads(self) -> list[Node]:
        return [self.x, self.y]


@dataclass(eq=False)
class NormOp:
    """A norm without an activation that a fused addition reads: the end of an original residual unit."""

    x: Node
    norm: Node

    @property
    def anchor(self) -> Node:
        return self.norm

    @property
    def reads(self) -> list[Node]:
        return [self.x]


@dataclass
class Match:
    """What was found in a graph.

    Attributes:
        ops: the operators to run, by the node at whose place they run.
        covered: nodes that do not run on their own.
        refused: norm node -> why the norm, which an activation and a convolution follow, is left alone.
        idle: norm node -> why there was nothing to fuse.
        additions: additions of two values, whether or not they are fused.
        sources: node -> the node that computes its value, past those that hand on what they get.
    """

    ops: dict[Node, ConvOp | UnitOp | AddOp | NormOp] = field(default_factory=dict)
    covered: set[Node] = field(default_factory=set)
    refused: dict[Node, str] = field(default_factory=dict)
    idle: dict[Node, str] = field(default_factory=dict)
    additions: list[Node] = field(default_factory=list)
    sources: dict[Node, Node] = field(default_factory=dict)


def match(traced: Trace) -> Match:
    """Find what can be fused in a traced unit, given the present state of its layers."""
    banned: set[Node] = set()
    while True:
        matcher = _Matcher(traced, banned)
        found = matcher.run()
        conflicts = matcher.conflicts(found)
        if not conflicts:
            return found
        banned |= conflicts


def changed_in_place(traced: Trace, fresh: Container[nn.Module]) -> Callable[[Node], bool]:
    """Whether anything in a trace changes a node's value, or what shares its memory, in place.

    Args:
        fresh: modules whose results are in memory of their own.
    """
    return _Matcher(traced, set()).changed(set(), fresh)


class _Matcher:
    def __init__(self, traced: Trace, banned: set[Node]) -> None:
        self.modules, self.nodes, self.banned = traced.modules, list(traced.graph.nodes), banned
        self.position = {node: i for i, node in enumerate(self.nodes)}
        self.calls = Counter(
            id(self.modules[n.target]) for n in self.nodes if n.op == "call_module"
        )

    # --- what a node is ---

    def module(self, node: Node) -> nn.Module | None:
        return self.modules[node.target] if node.op == "call_module" else None

    def is_simple_call(self, node: Node) -> bool:
        return len(node.args) == 1 and isinstance(node.args[0], Node) and not node.kwargs

    def passes(self, node: Node) -> bool:
        """Whether the node returns its first argument as it is."""
        module = self.module(node)
        if module is not None:
            return self.is_simple_call(node) and leaves.passes_through(module)
        if node.op == "call_function" and node.target in (F.dropout, F.dropout2d):
            p = node.kwargs.get("p", node.args[1] if len(node.args) > 1 else 0.5)
            training = node.kwargs.get("training", node.args[2] if len(node.args) > 2 else True)
            return training is False or p == 0.0
        return False

    def resolve(self, node: Node) -> Node:
        """The node that computes the value, past those that hand it on."""
        while self.passes(node):
            node = node.args[0]
        return node

    def users(self, node: Node) -> list[Node]:
        found = []
        for user in node.users:
            found += self.users(user) if self.passes(user) else [user]
        return found

    def slope(self, node: Node) -> float | None:
        """The slope of an activation's node; None if it is something else."""
        module = self.module(node)
        if module is not None:
            return leaves.activation_slope(module) if self.is_simple_call(node) else None
        name = node.target if node.op == "call_method" else getattr(node.target, "__name__", "")
        if node.op not in ("call_method", "call_function") or not isinstance(node.args[:1], tuple):
            return None
        if name in ("relu", "relu_") and (node.op == "call_method" or node.target in _RELUS):
            return 0.0
        if node.op == "call_function" and node.target in (F.leaky_relu, F.leaky_relu_):
            slope = node.kwargs.get("negative_slope", node.args[1] if len(node.args) > 1 else 0.01)
            return float(slope) if isinstance(slope, (int, float)) and slope >= 0 else None
        return None

    def is_conv(self, node: Node, a: Node) -> bool:
        return (
            isinstance(self.module(node), nn.Conv2d) and self.is_simple_call(node)
            and self.resolve(node.args[0]) is a
        )  # fmt: skip

    def sides(self, node: Node) -> tuple[Node, Node] | None:
        """The operands of an addition of two values."""
        function = node.op == "call_function" and node.target in _ADDITIONS
        if not function and not (node.op == "call_method" and node.target in ("add", "add_")):
            return None
        if len(node.args) != 2 or node.kwargs or not all(isinstance(a, Node) for a in node.args):
            return None
        return node.args

    def mutates(self, node: Node) -> Node | None:
        """The argument that a node changes in place, if it may."""
        first = next(iter(node.all_input_nodes), None)
        if first is None or node.op in ("placeholder", "output", "get_attr") or self.passes(node):
            return None
        if node.op == "call_module":
            return first if getattr(self.module(node), "inplace", False) else None
        if node.op == "call_method":
            changes = node.target.endswith("_") and not node.target.endswith("__")
            return first if changes or node.target == "__setitem__" else None
        if isinstance(node.kwargs.get("out"), Node):
            return node.kwargs["out"]
        name = getattr(node.target, "__name__", "")
        flagged = any(a is True for a in node.args) or node.kwargs.get("inplace") is True
        changes = node.target in _INPLACE_OPERATORS or flagged or name.endswith("_")
        return first if changes else None

    # --- pairs ---

    def pairs(self, found: Match) -> list[Pair]:
        pairs = []
        for node in self.nodes:
            norm = self.module(node)
            if norm is None or not leaves.is_norm(norm):
                continue
            act, a, slope = None, node, leaves.norm_slope(norm)
            if slope is None:
                users = self.users(node)
                acts = [u for u in users if self.slope(u) is not None]
                if not acts:
                    found.idle[node] = "no ReLU follows"
                    continue
                act = a = acts[0]
                slope = self.slope(act)
                if len(users) > 1 or self.resolve(act.args[0]) is not node:
                    found.refused[node] = "its output is used by more than the activation"
                    if not any(self.is_conv(u, a) for u in self.users(a)):
                        found.idle[node] = found.refused.pop(node)
                    continue
            users = self.users(a)
            convs = [u for u in users if self.is_conv(u, a)]
            if not convs:
                what = ", ".join(dict.fromkeys(map(self.name, users))) or "nothing"
                found.idle[node] = f"its activation goes to {what}, not to a convolution"
                continue
            reason = self.refusal(node, norm, a, users, convs)
            if reason is not None:
                found.refused[node] = reason
            else:
                x = self.resolve(node.args[0])
                convs.sort(key=self.position.get)
                pairs.append(Pair(x, node, act, convs, slope))
        return pairs

    def refusal(self, node, norm, a, users, convs) -> str | None:
        reason = leaves.norm_refusal(norm)
        if reason is not None:
            return reason
        if not self.is_simple_call(node):
            return "the norm is called with more than one argument"
        for other in users:
            if other not in convs:
                return f"its activation is used by {self.name(other)} too"
        for conv in convs:
            reason = leaves.conv_refusal(self.module(conv))
            if reason is not None:
                return f"{conv.target}: {reason}"
        for used in (node, *convs):
            if self.calls[id(self.module(used))] > 1:
                return f"{used.target} is used twice"
        if node in self.banned:
            return "a value that it reads is changed in place"
        return None

    def name(self, node: Node) -> str:
        if node.op == "output":
            return "the unit's output"
        if node.op == "call_module":
            return type(self.module(node)).__name__
        return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "a function")

    # --- operators ---

    def run(self) -> Match:
        found = Match(sources={node: self.resolve(node) for node in self.nodes})
        pairs = self.pairs(found)
        of_conv = {conv: pair for pair in pairs for conv in pair.convs}
        taken: set[Node] = set()  # convolutions that an operator has
        for node in self.nodes:
            sides = self.sides(node)
            if sides is None:
                continue
            found.additions.append(node)
            if node in self.banned:
                continue
            u, v = map(self.resolve, sides)
            if u is v or (self.mutates(node) is not None and not self.is_private(u, node)):
                continue
            op = self.unit_op(node, u, v, of_conv) or self.conv_op(node, u, v, of_conv, taken)
            if op is None:
                op = self.add_op(node, u, v)
            if op is None:
                continue
            found.ops[op.anchor] = op
            if isinstance(op, UnitOp):
                taken |= {*op.convs, *([op.shortcut] if op.shortcut is not None else [])}
            elif isinstance(op, ConvOp):
                taken.add(op.conv)
        for pair in pairs:
            for conv in pair.convs:
                if conv not in taken:
                    found.ops[conv] = ConvOp(pair, conv)
        for op in self.norm_ops(found):
            found.ops[op.anchor] = op
        for op in found.ops.values():
            found.covered |= self.covers(op)
        return found

    def norm_ops(self, found: Match) -> list[NormOp]:
        added = {node for op in found.ops.values() if isinstance(op, AddOp) for node in (op.x, op.y)}
        nodes = [node for node in found.idle if node in added and self.is_own_norm(node)]
        return [NormOp(self.resolve(node.args[0]), node) for node in nodes]

    def is_own_norm(self, node: Node) -> bool:
        """Whether a norm that activates nothing is what the operator computes."""
        norm = self.module(node)
        if node in self.banned or not self.is_simple_call(node) or self.calls[id(norm)] > 1:
            return False
        return leaves.norm_refusal(norm) is None and leaves.norm_slope(norm) is None

    def is_private(self, node: Node, user: Node) -> bool:
        """Whether the value is fresh memory that only ``user`` reads."""
        module = self.module(node)
        gate = module is not None and leaves.per_image_gate(module)
        return (gate or self.is_fresh(node)) and self.users(node) == [user]

    def is_fresh(self, node: Node) -> bool:
        """Whether the node's result shares no memory with its arguments."""
        if self.passes(node) or self.mutates(node) is not None:
            return False
        module = self.module(node)
        if module is not None:
            return isinstance(module, (nn.Conv2d, nn.ReLU, nn.LeakyReLU)) or leaves.is_norm(module)
        return node.op == "call_function" and node.target in _FRESH

    def unit_op(self, add: Node, u: Node, v: Node, of_conv: dict[Node, Pair]) -> UnitOp | None:
        for last, other in ((u, v), (v, u)):
            pairs: list[Pair] = []
            convs: list[Node] = []
            conv = last
            while conv in of_conv:
                user = add if conv is last else pairs[0].norm
                if self.users(conv) != [user]:
                    break
                pair = of_conv[conv]
                pairs.insert(0, pair)
                convs.insert(0, conv)
                if len({p.slope for p in pairs}) > 1:
                    break
                if other is pair.x and pair.convs == [conv]:
                    return UnitOp(pairs, convs, None, add)
                if other is not conv and sorted(pair.convs, key=id) == sorted((conv, other), key=id):
                    if self.users(other) == [add] and self.is_projection(other):
                        return UnitOp(pairs, convs, other, add)
                if pair.convs != [conv]:
                    break
                conv = pair.x
        return None

    def is_projection(self, conv: Node) -> bool:
        module = self.module(conv)
        return module.groups == 1 and module.padding == (0, 0) and module.dilation == (1, 1)

    def conv_op(self, add, u, v, of_conv, taken) -> ConvOp | None:
        for last, other in ((u, v), (v, u)):
            # Both sides may be convolutions of pairs: the later one takes the addition.
            if last in of_conv and last not in taken and self.users(last) == [add]:
                if not (other in of_conv and self.position[other] > self.position[last]
                        and other not in taken and self.users(other) == [add]):  # fmt: skip
                    return ConvOp(of_conv[last], last, add, other)
        return None

    def add_op(self, add: Node, u: Node, v: Node) -> AddOp | None:
        users = self.users(add)
        act = users[0] if len(users) == 1 and self.slope(users[0]) is not None else None
        for gate, other in ((v, u), (u, v)):
            module = self.module(gate)
            if module is not None and leaves.per_image_gate(module) and self.users(gate) == [add]:
                y = self.resolve(gate.args[0])
                if self.is_simple_call(gate) and self.users(y) == [gate]:
                    slope = None if act is None else self.slope(act)
                    return AddOp(other, y, gate, add, act, slope, add if act is None else act)
        if act is None:
            return None
        return AddOp(u, v, None, add, act, self.slope(act), act)

    def covers(self, op: ConvOp | UnitOp | AddOp | NormOp) -> set[Node]:
        """The nodes that an operator stands for, except a gate, which runs in its own place."""
        if isinstance(op, NormOp):
            return {op.norm}
        if isinstance(op, AddOp):
            return {op.add, *([] if op.act is None else [op.act])}
        if isinstance(op, ConvOp):
            return {op.pair.norm, op.pair.output, op.conv, *([] if op.add is None else [op.add])}
        nodes = {op.add, *op.convs, *([] if op.shortcut is None else [op.shortcut])}
        for pair in op.pairs:
            nodes |= {pair.norm, pair.output}
        return nodes

    # --- values that are changed in place ---

    def conflicts(self, found: Match) -> set[Node]:
        """Norms and additions whose operators read a value that something left alone changes in place."""
        is_changed = self.changed(found.covered)
        banned = set()
        for op in found.ops.values():
            if any(map(is_changed, op.reads)):
                if isinstance(op, UnitOp):
                    banned |= {op.add, *(pair.norm for pair in op.pairs)}
                elif isinstance(op, ConvOp):
                    banned.add(op.pair.norm)
                else:
                    banned.add(op.anchor if isinstance(op, NormOp) else op.add)
        return banned - self.banned

    def changed(self, covered: set[Node], fresh: Container[nn.Module] = ()) -> Callable[[Node], bool]:
        """Whether a node's value shares memory with one that a node, of the covered ones aside, changes in place."""
        group: dict[Node, Node] = {}

        def root(node: Node) -> Node:
            while group.get(node, node) is not node:
                node = group[node]
            return node

        for node in self.nodes:
            group.setdefault(node, node)
            if self.is_fresh(node) or self.module(node) in fresh:
                continue
            target = self.mutates(node)
            for value in node.all_input_nodes if target is None else [target]:
                group[root(value)] = root(node)
        changed = {
            root(target) for node in self.nodes
            if node not in covered and (target := self.mutates(node)) is not None
        }  # fmt: skip
        return lambda node: root(node) in changed


_RELUS = (F.relu, F.relu_, torch.relu, torch.relu_)
