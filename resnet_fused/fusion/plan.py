"""What a fused unit runs: its graph, with the fused operators in the places that :mod:`.match` found.

Parameters and settings are read when the unit is called. An operator whose tensors are not what it takes
(their dtype under autocast, their number of dimensions, a broadcast) runs the user's own layers instead.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx import Node

from .. import functional as F
from ..nn.units import (
    batch_norm_args,
    conv2d_stats,
    conv_args,
    has_hooks,
    normalize,
    unit_args,
    uses_batch_statistics,
)
from ..ops.arguments import resolve_padding
from ..primitives.layout import convolution_output_shape
from . import leaves
from .match import AddOp, ConvOp, Match, NormOp, Pair, UnitOp, match
from .trace import Trace

__all__ = ["Link", "Plan", "attach_stats", "stats_of", "unit_output_size"]

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_ATTRIBUTE = "_resnet_fused_stats"


@dataclass(eq=False)
class Link:
    """How the result of a fused unit gets to another one, which reads the statistics that come with it.

    Attributes:
        parent: the module whose forward hands it over.
        between: the modules that see it on the way if they have hooks, the two units among them. What hooks do to
            its ``data`` no version counts.
    """

    parent: nn.Module
    between: list[nn.Module]


class _Attached:
    """Statistics, and the version of the tensor that they are of. Pickles and copies of the tensor, which begin to
    count anew, have none."""

    def __init__(self, version: int, stats: Tensor) -> None:
        self.version, self.stats = version, stats

    def __reduce__(self) -> tuple:
        return set, ()  # which torch.load takes with weights_only, too


def attach_stats(y: Tensor, stats: Tensor | None) -> None:
    """Let whoever reads ``y`` next have its statistics, as long as nothing changes it in place."""
    if stats is not None and not y.is_inference():
        setattr(y, _ATTRIBUTE, _Attached(y._version, stats))


def stats_of(x: Tensor) -> Tensor | None:
    """The statistics of exactly this tensor, if they came with it."""
    attached = getattr(x, _ATTRIBUTE, None)
    return attached.stats if type(attached) is _Attached and attached.version == x._version else None


def fits(x: Any) -> bool:
    """Whether x is a tensor that the operators read as the user's layers would."""
    if type(x) is not Tensor or x.dim() != 4 or x.dtype not in _DTYPES:
        return False
    kind = x.device.type
    if not torch.is_autocast_enabled(kind) or x.dtype is torch.float64:
        return True
    # A norm reads a float32 x as it is, the operators would round it first.
    return x.dtype is torch.get_autocast_dtype(kind)


def takes(conv: nn.Conv2d, x: Tensor) -> bool:
    """Whether the convolution would take x: under autocast it casts its weight, else it does not."""
    return isinstance(conv.weight, Tensor) and conv.weight.dim() == 4 and min(conv.stride) > 0 and (
        conv.weight.dtype is x.dtype or torch.is_autocast_enabled(x.device.type)
    )


def output_shape(shape: tuple, conv: nn.Conv2d) -> tuple | None:
    padding, crop = resolve_padding(conv.padding, conv.weight, conv.stride, conv.dilation)
    if crop != (0, 0):
        return None
    return convolution_output_shape(shape, conv.weight.shape, conv.stride, padding, conv.dilation)


def unit_output_size(
    x: Any, convs: list[nn.Conv2d], shortcut: nn.Conv2d | None, size: tuple | None = None
) -> tuple | None:
    """The size of what the operator of a whole unit makes of x, or of a tensor that is like x but of this size; None
    where it does not take it, or where the sides of its addition would differ in size."""
    if not fits(x) or not all(takes(c, x) for c in (*convs, *([] if shortcut is None else [shortcut]))):
        return None
    shape = start = size or tuple(x.shape)
    for conv in convs:
        shape = shape and output_shape(shape, conv)
    return shape if shape == (start if shortcut is None else output_shape(start, shortcut)) else None


class _Values(dict):
    """node -> value of one call; statistics beside them."""

    def __init__(self, hand_on: bool = False) -> None:
        super().__init__()
        self.hand_on = hand_on
        self.stats: dict[Node, Tensor] = {}
        self.shared: dict[Pair, Any] = {}


class Plan:
    """How one unit runs, for one kind of call and one state of its code's surroundings.

    Attributes:
        traced, found: the graph and the patterns in it.
        fuses: whether there is any operator to run.
    """

    def __init__(self, traced: Trace) -> None:
        self.traced = traced
        self.found: Match = match(traced)
        self.fuses = bool(self.found.ops)
        self._nodes = list(traced.graph.nodes)
        self._modules = traced.modules
        called = {n.target: self._modules[n.target] for n in self._nodes if n.op == "call_module"}
        self._layers = [(module, leaves.leaf_state(module)) for module in called.values()]
        self._sources = self.found.sources
        self._gates = {
            op.gate: op for op in self.found.ops.values() if isinstance(op, AddOp) and op.gate is not None
        }
        readers: dict[Node, list[nn.Module]] = {}
        for op in self.found.ops.values():
            pair = op.pairs[0] if isinstance(op, UnitOp) else getattr(op, "pair", None)
            reader = op if isinstance(op, NormOp) else pair
            if reader is not None:
                readers.setdefault(reader.x, []).append(self._modules[reader.norm.target])
        self._readers = readers
        result = self._nodes[-1].args[0]
        self.output = self._sources[result] if isinstance(result, Node) else None
        self._steps = self._compile()
        self._whole = self._whole_unit()

    # --- what is asked of it from outside ---

    def holds(self) -> bool:
        """Whether all that the plan was made for is as it was."""
        return (
            self.traced.changed() is None
            and all(leaves.leaf_state(module) == state for module, state in self._layers)
            and not any(has_hooks(module) for name, module in self.traced.absorbed.items() if name)
        )

    def reads_stats_of(self, index: int) -> bool:
        """Whether a fused norm reads the index-th tensor of the call."""
        placeholders = [n for n in self._nodes if n.op == "placeholder"]
        return index < len(placeholders) and placeholders[index] in self._readers

    def unit_output_size(self, x: Tensor, size: tuple | None = None) -> tuple | None:
        """If the plan is one whole unit and nothing else, :func:`unit_output_size`; else None."""
        return None if self._whole is None else self._output_size(self._whole, x, size)

    def unit_args(self) -> F.UnitArgs:
        """Of such a plan, what the operator takes. A norm without momentum counts the batch here."""
        return self._unit_args(self._whole)

    def wants_stats_of_result(self, hand_on: bool) -> bool:
        """Of such a plan, whether the statistics of its result are to be attached to it."""
        norm = self._norm(self._whole.pairs[-1])
        return hand_on and self.traced.absorbed[""].training and uses_batch_statistics(norm)

    def module(self, node: Node) -> nn.Module | None:
        """The layer that a node calls."""
        return self._modules[node.target] if node.op == "call_module" else None

    # --- making it ---

    def _compile(self) -> list[tuple[Callable[[_Values], Any], Node, list[Node]]]:
        """(function, node that it computes, values that nothing reads any more), in order."""
        steps, reads = [], []
        for node in self._nodes:
            if node.op in ("placeholder", "output") or self._sources[node] is not node:
                continue
            op = self.found.ops.get(node)
            if op is None and node in self.found.covered:
                continue
            if op is not None:
                steps.append((self._function_of(op), node))
                inputs = [self._sources[n] for m in self.nodes_of(op) for n in m.all_input_nodes]
                reads.append([*inputs, *op.reads])
            elif node in self._gates:
                steps.append((lambda values, node=node: self._gate(node, values), node))
                reads.append([self._sources[n] for n in node.all_input_nodes])
            elif node in self._readers and self._is_plain_conv(node):
                steps.append((lambda values, node=node: self._run_plain_conv(node, values), node))
                reads.append([self._sources[n] for n in node.all_input_nodes])
            else:
                steps.append((lambda values, node=node: self._call(node, values), node))
                reads.append([self._sources[n] for n in node.all_input_nodes])
        last: dict[Node, int] = {}
        for i, nodes in enumerate(reads):
            last.update(dict.fromkeys(nodes, i))
        for node in self._nodes[-1].all_input_nodes:
            last.pop(self._sources[node], None)
        dead: list[list[Node]] = [[] for _ in steps]
        for node, i in last.items():
            dead[i].append(node)
        return [(function, node, nodes) for (function, node), nodes in zip(steps, dead, strict=True)]

    def nodes_of(self, op) -> list[Node]:
        if isinstance(op, ConvOp):
            nodes = [op.pair.norm, op.pair.act, op.conv, op.add]
        elif isinstance(op, AddOp):
            nodes = [op.add, op.act]
        elif isinstance(op, NormOp):
            nodes = [op.norm]
        else:
            nodes = [*(n for p in op.pairs for n in (p.norm, p.act)), *op.convs, op.shortcut, op.add]
        return sorted({n for n in nodes if n is not None}, key=self._nodes.index)

    def _whole_unit(self) -> UnitOp | None:
        """The operator, if the plan is one whole unit of the call's only tensor."""
        placeholders = [n for n in self._nodes if n.op == "placeholder"]
        ops = list(self.found.ops.values())
        if len(ops) != 1 or not isinstance(ops[0], UnitOp) or len(self._steps) != 1 or len(placeholders) != 1:
            return None
        op = ops[0]
        return op if self.output is op.anchor and op.pairs[0].x is placeholders[0] else None

    def _function_of(self, op) -> Callable[[_Values], Any]:
        run = {
            UnitOp: self._run_unit, ConvOp: self._run_conv, AddOp: self._run_add, NormOp: self._run_norm
        }[type(op)]  # fmt: skip
        return lambda values: run(op, values)

    # --- running it ---

    def run(self, tensors: list[Tensor], hand_on: bool) -> Any:
        """The unit's result for the tensors of a call.

        Args:
            hand_on: attach the statistics of the result to it, where they cost no pass.
        """
        values = _Values(hand_on and self.traced.absorbed[""].training)
        for node, tensor in zip((n for n in self._nodes if n.op == "placeholder"), tensors, strict=True):
            values[node] = tensor
            if node in self._readers and (stats := stats_of(tensor)) is not None:
                values.stats[node] = stats
        for function, node, dead in self._steps:
            values[node] = function(values)
            for n in dead:
                values.pop(n, None)
        result = fx.node.map_arg(self._nodes[-1].args[0], lambda n: values[self._sources[n]])
        if values.hand_on and self.output in values.stats and type(result) is Tensor:
            attach_stats(result, values.stats[self.output])
        return result

    def _call(self, node: Node, values: _Values) -> Any:
        """Run a node as the user wrote it."""

        def value(n: Node) -> Any:
            return values[self._sources[n]]

        args, kwargs = fx.node.map_arg((node.args, node.kwargs), value)
        if node.op == "call_module":
            return self._modules[node.target](*args, **kwargs)
        if node.op == "call_function":
            return node.target(*args, **kwargs)
        if node.op == "call_method":
            return getattr(args[0], node.target)(*args[1:], **kwargs)
        module, _, name = node.target.rpartition(".")  # get_attr
        return getattr(self._modules[module], name)

    def _norm(self, pair: Pair | NormOp) -> nn.BatchNorm2d:
        return self._modules[pair.norm.target]

    def _conv(self, node: Node) -> nn.Conv2d:
        return self._modules[node.target]

    def _wants_stats(self, node: Node, values: _Values, norm: nn.Module) -> bool:
        """Whether a norm will read the node's value with the statistics of the batch."""
        readers = self._readers.get(node, ())
        if any(uses_batch_statistics(reader) for reader in readers):
            return True
        return values.hand_on and node is self.output and uses_batch_statistics(norm)

    def _keep(self, result: Any, node: Node, values: _Values, with_stats: bool) -> Tensor:
        if not with_stats:
            return result
        values.stats[node] = result[1]
        return result[0]

    def _run_unit(self, op: UnitOp, values: _Values) -> Tensor:
        first = op.pairs[0]
        x = values[first.x]
        if self._output_size(op, x) is None:
            return self._plainly(op, values)
        wanted = self._wants_stats(op.anchor, values, self._norm(op.pairs[-1]))
        args = self._unit_args(op)
        result = F.residual_unit(
            x,
            args.norms,
            args.convs,
            shortcut=args.shortcut,
            negative_slope=args.negative_slope,
            x_stats=values.stats.get(first.x) if args.uses_batch_statistics() else None,
            return_stats=wanted,
        )
        return self._keep(result, op.anchor, values, wanted)

    def _output_size(self, op: UnitOp, x: Any, size: tuple | None = None) -> tuple | None:
        return unit_output_size(x, [self._conv(node) for node in op.convs], self._shortcut(op), size)

    def _unit_args(self, op: UnitOp) -> F.UnitArgs:
        norms, convs = map(self._norm, op.pairs), map(self._conv, op.convs)
        return unit_args(norms, convs, self._shortcut(op), op.pairs[0].slope)

    def _shortcut(self, op: UnitOp) -> nn.Conv2d | None:
        return None if op.shortcut is None else self._conv(op.shortcut)

    def _run_conv(self, op: ConvOp, values: _Values) -> Tensor:
        pair, conv = op.pair, self._conv(op.conv)
        x = values[pair.x]
        if not fits(x) or not all(takes(self._conv(c), x) for c in pair.convs):
            return self._plainly(op, values)
        norm = self._norm(pair)
        args, stats = self._norm_of(pair, norm, x, values)
        residual = None if op.residual is None else values[self._sources[op.residual]]
        inside = residual is not None and (
            type(residual) is Tensor and residual.dtype is x.dtype
            and tuple(residual.shape) == output_shape(tuple(x.shape), conv)
        )  # fmt: skip
        wanted = (inside or op.add is None) and self._wants_stats(op.anchor, values, norm)
        c = conv_args(conv)
        result = F.preact_conv2d(
            x,
            args.weight,
            args.bias,
            args.running_mean,
            args.running_var,
            c.weight,
            c.bias,
            training=args.training,
            momentum=args.momentum,
            eps=args.eps,
            stride=c.stride,
            padding=c.padding,
            dilation=c.dilation,
            groups=c.groups,
            negative_slope=pair.slope,
            residual=residual if inside else None,
            x_stats=stats,
            return_stats=wanted,
        )
        result = self._keep(result, op.anchor, values, wanted)
        if op.add is None or inside:
            return result
        return self._add_plainly(op.add, op.conv, result, values)

    def _is_plain_conv(self, node: Node) -> bool:
        module = self.module(node)
        return isinstance(module, nn.Conv2d) and leaves.conv_refusal(module) is None

    def _run_plain_conv(self, node: Node, values: _Values) -> Tensor:
        """A convolution without a norm in front, with the statistics that a fused norm behind it reads."""
        x = values[self._sources[node.all_input_nodes[0]]]
        wanted = any(uses_batch_statistics(reader) for reader in self._readers[node])
        if not (wanted and type(x) is Tensor and x.dim() == 4):
            return self._call(node, values)
        return self._keep(conv2d_stats(self._conv(node), x), node, values, True)

    def _norm_of(self, pair: Pair, norm: nn.BatchNorm2d, x: Tensor, values: _Values):
        """The norm's arguments and the statistics of x, for one of the convolutions that share it.

        The first of them counts the batch and updates the running statistics, the others do not.
        """
        stats = values.stats.get(pair.x) if uses_batch_statistics(norm) else None
        if len(pair.convs) == 1:
            return batch_norm_args(norm), stats
        if pair not in values.shared:
            if stats is None and uses_batch_statistics(norm) and x.numel() > 0:
                stats = torch.ops.resnet_fused.channel_stats(x.detach())
            args = batch_norm_args(norm)
            again = args._replace(running_mean=None, running_var=None) if args.training else args
            values.shared[pair] = again, stats
            return args, stats
        return values.shared[pair]

    def _run_norm(self, op: NormOp, values: _Values) -> Tensor:
        x, norm = values[op.x], self._norm(op)
        if not fits(x):
            return self._plainly(op, values)
        stats = values.stats.get(op.x) if uses_batch_statistics(norm) else None
        return normalize(norm, x, stats, negative_slope=1.0)  # no activation

    def _run_add(self, op: AddOp, values: _Values) -> Tensor:
        x, y = values[op.x], values[op.y]
        gate = None if op.gate is None else values[op.gate]
        fits = type(x) is Tensor and type(y) is Tensor and x.shape == y.shape and x.dim() == 4
        if fits and x.dtype is y.dtype and x.dtype in _DTYPES:
            readers = self._readers.get(op.anchor, ())
            wanted = values.hand_on and op.anchor is self.output
            wanted = wanted or any(uses_batch_statistics(r) for r in readers)
            result = F.residual_add(x, y, gate=gate, negative_slope=op.slope, return_stats=wanted)
            return self._keep(result, op.anchor, values, wanted)
        if gate is None:
            return self._plainly(op, values)
        result = self._add_plainly(op.add, op.gate, y * gate, values)
        return result if op.act is None else self._replay([op.act], {op.add: result}, values)

    def _gate(self, node: Node, values: _Values) -> Tensor:
        """The factors of stochastic depth: what the layer makes of ones, one for each image.

        It draws the same random numbers as for the whole tensor, at the same place.
        """
        y = values[self._sources[node.args[0]]]
        return self._modules[node.target](torch.ones((y.shape[0], 1, 1, 1), dtype=y.dtype, device=y.device))

    # --- in the user's own layers ---

    def _plainly(self, op: ConvOp | UnitOp | AddOp | NormOp, values: _Values) -> Any:
        nodes, known = self.nodes_of(op), {}
        if isinstance(op, ConvOp) and len(op.pair.convs) > 1:
            # The norm runs once for all that share it.
            first = [n for n in (op.pair.norm, op.pair.act) if n is not None]
            if op.pair not in values.shared:
                values.shared[op.pair] = self._replay(first, {}, values)
            known[op.pair.output] = values.shared[op.pair]
            nodes = [n for n in nodes if n not in first]
        return self._replay(nodes, known, values)

    def _replay(self, nodes: list[Node], known: dict[Node, Any], values: _Values) -> Any:
        inner = _Values()
        inner.update(values)
        inner.update(known)
        result = None
        for node in nodes:
            result = inner[node] = self._call(node, inner)
        return result

    def _add_plainly(self, add: Node, of: Node, value: Any, values: _Values) -> Any:
        """The user's addition, with the value of one of its sides."""
        return self._replay([add], {of: value}, values)
