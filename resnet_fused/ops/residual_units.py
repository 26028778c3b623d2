"""residual_units: residual units in turn, as one autograd node where one C++ backend runs them.

In a deep net of small images, what Python, autograd and the dispatcher do for each unit takes as long as its
kernels. Here they do it once for up to 16 units with identity shortcuts (half of those in turn at most).
What comes out is what the units give by themselves, to the bit; wherever something has to see the units one
by one (torch.compile, functorch, a dispatch that is recorded, a backend that runs only some of the
primitives), they are called one by one.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad

from resnet_fused.primitives.layout import (
    canonical,
    channels_last,
    convolution_output_shape,
    suggests_channels_last,
)
from resnet_fused.primitives.registration import below_autograd, is_ordinary, without_autocast

from . import autocast, running_stats, whole_unit
from .arguments import BatchNormArgs, ConvArgs
from .residual_unit import as_dtype, check_unit, known_geometry, residual_unit
from .residual_unit_backward import RESIDUAL_UNIT_BACKWARD, count_of, split

#: Units in one node at most. A node's saved tensors are freed, and its gradients handed to
#: DistributedDataParallel, only when all of it is done. For the same reason one part in SHARE of the units in
#: turn is the most (two units in a node cost a net of nine 4 % of peak memory), and a projecting unit has a
#: node of its own: its input is larger than what is saved for the units behind it.
MOST = 16
SHARE = 2


class UnitArgs(NamedTuple):
    """What one unit passes: the arguments of :func:`~resnet_fused.functional.residual_unit`."""

    norms: Sequence[BatchNormArgs]
    convs: Sequence[ConvArgs]
    shortcut: ConvArgs | None = None
    negative_slope: float = 0.0

    def uses_batch_statistics(self) -> bool:
        """Whether the first norm normalises with the statistics of the unit's input."""
        return self.norms[0].training or self.norms[0].running_mean is None


def residual_units(
    x: Tensor, units: Sequence[UnitArgs], *, x_stats: Tensor | None = None, return_stats: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """Pre-activation residual units, each with the output of the one before.

    Args:
        x, x_stats, return_stats: as for :func:`~resnet_fused.functional.residual_unit`.
        units: at least one; the statistics of what one returns are handed to the next.

    Returns:
        What the last unit returns: out, or (out, its statistics).

    Raises:
        ValueError, RuntimeError: as residual_unit does. Units before the one that raises may have updated
            their running statistics.
    """
    units = list(units)
    if not units:
        raise ValueError("residual_units: expected at least one unit")
    rows = _rows(units)
    for own, following in zip(rows, [*rows[1:], None], strict=True):
        wanted = return_stats if following is None else following[0].uses_batch_statistics()
        x, x_stats = _one_node(own, x, x_stats, wanted) or _one_by_one(own, x, x_stats, wanted)
    return (x, x_stats) if return_stats else x


def _rows(units: list[UnitArgs]) -> list[list[UnitArgs]]:
    """The units of each node."""
    rows: list[list[UnitArgs]] = []
    for unit in units:
        if rows and unit.shortcut is None and rows[-1][0].shortcut is None:
            rows[-1].append(unit)
        else:
            rows.append([unit])
    cut = []
    for row in rows:
        nodes = -(-len(row) // max(1, min(MOST, len(row) // SHARE)))
        cut += [row[len(row) * i // nodes : len(row) * (i + 1) // nodes] for i in range(nodes)]
    return cut


def _one_by_one(units: Sequence[UnitArgs], x: Tensor, x_stats: Tensor | None, return_stats: bool):
    for unit, following in zip(units, [*units[1:], None]):
        wanted = return_stats if following is None else following.uses_batch_statistics()
        out = residual_unit(
            x, unit.norms, unit.convs, shortcut=unit.shortcut, negative_slope=unit.negative_slope,
            x_stats=x_stats, return_stats=wanted,
        )  # fmt: skip
        x, x_stats = out if wanted else (out, None)
    return x, x_stats


class _Lists(NamedTuple):
    """The C++ operator's arguments between x_stats and want_stats: everything over all units."""

    bn_weights: list[Tensor | None]
    bn_biases: list[Tensor | None]
    running_means: list[Tensor | None]
    running_vars: list[Tensor | None]
    weights: list[Tensor]
    biases: list[Tensor | None]
    shortcut_weights: list[None]  # one for each unit, as all of a shortcut
    shortcut_biases: list[None]
    training: list[bool]
    eps: list[float]
    negative_slope: float
    strides: list[int]
    paddings: list[int]
    dilations: list[int]
    groups: list[int]
    shortcut_strides: list[int]
    lengths: list[int]

    @classmethod
    def of(cls, units: Sequence[UnitArgs]) -> "_Lists":
        norms = [norm for unit in units for norm in unit.norms]
        convs = [conv for unit in units for conv in unit.convs]
        geometry = [known_geometry(unit.convs, None) for unit in units]
        nothing = [None] * len(units)
        strides, paddings, dilations, groups, shortcut_strides = (
            [value for of_unit in column for value in of_unit] for column in zip(*geometry, strict=True)
        )
        return cls(
            [norm.weight for norm in norms],
            [norm.bias for norm in norms],
            [norm.running_mean for norm in norms],
            [norm.running_var for norm in norms],
            [conv.weight for conv in convs],
            [conv.bias for conv in convs],
            nothing,
            nothing,
            [norm.training or norm.running_mean is None for norm in norms],
            [norm.eps for norm in norms],
            units[0].negative_slope,
            strides, paddings, dilations, groups, shortcut_strides,
            [len(unit.convs) for unit in units],
        )  # fmt: skip

    def shapes(self) -> whole_unit.UnitShapes:
        return whole_unit.UnitShapes(self.weights, self.shortcut_weights, *self[11:])

    def parameters(self) -> list[Tensor | None]:
        return [*self.bn_weights, *self.bn_biases, *self.weights, *self.biases]

    def with_parameters(self, parameters: Sequence[Tensor | None]) -> "_Lists":
        """These, with other values for what parameters() returns, and without the running statistics."""
        nothing = [None] * len(self.weights)
        bn_weights, bn_biases, weights, biases = split(parameters, len(self.weights), 4)
        return self._replace(
            bn_weights=bn_weights, bn_biases=bn_biases, running_means=nothing, running_vars=nothing,
            weights=weights, biases=biases,
        )  # fmt: skip

    def span(self, u: int) -> slice:
        """Where a unit's norms and convolutions are."""
        start = sum(self.lengths[:u])
        return slice(start, start + self.lengths[u])

    def geometry(self, u: int) -> tuple[list[int], list[int], list[int], list[int], list[int]]:
        """strides, paddings, dilations, groups, shortcut_stride of a unit, as in residual_unit's schema."""
        at = self.span(u)
        pairs = slice(2 * at.start, 2 * at.stop)
        return (
            self.strides[pairs], self.paddings[pairs], self.dilations[pairs], self.groups[at],
            self.shortcut_strides[2 * u : 2 * u + 2],
        )  # fmt: skip

    def unit(self, u: int) -> tuple[list[BatchNormArgs], list[ConvArgs]]:
        """The norms and the convolutions of a unit."""
        norms, convs = [], []
        for i in range(len(self.weights))[self.span(u)]:
            pairs = (tuple(v[2 * i : 2 * i + 2]) for v in (self.strides, self.paddings, self.dilations))
            norms.append(
                BatchNormArgs(
                    self.bn_weights[i], self.bn_biases[i], self.running_means[i], self.running_vars[i],
                    self.training[i], eps=self.eps[i],
                )
            )  # fmt: skip
            convs.append(ConvArgs(self.weights[i], self.biases[i], *pairs, self.groups[i]))
        return norms, convs


def _check(x: Tensor, x_stats: Tensor | None, lists: _Lists) -> None:
    """Raises what the units would, before any of them has run."""
    for u in range(len(lists.lengths)):
        at = lists.span(u)
        shape = check_unit(
            x, x_stats, *(values[at] for values in lists[:6]), None, None,
            lists.training[at], lists.eps[at], lists.negative_slope, *lists.geometry(u),
        )  # fmt: skip
        x, x_stats = x.detach().new_empty(()).expand(shape), None  # of the shape that matters, without memory


def _one_node(
    units: Sequence[UnitArgs], x: Tensor, x_stats: Tensor | None, return_stats: bool
) -> tuple[Tensor, Tensor | None] | None:
    """:func:`_one_by_one` by one operator, or None where they have to be called so."""
    if (
        len(units) == 1
        or torch.compiler.is_compiling()
        or not is_ordinary(x)
        or forward_ad._current_level >= 0
    ):
        return None
    slope = units[0].negative_slope
    if x.dim() != 4 or any(
        len(unit.norms) != len(unit.convs) or unit.negative_slope != slope for unit in units
    ):
        return None
    if torch.is_autocast_enabled(x.device.type):
        x, x_stats = autocast.cast_with_stats(x, x_stats, x.device.type)
    lists = _Lists.of(units)
    parameters = lists.parameters()
    differentiable = torch.is_grad_enabled() and torch._C._any_requires_grad(x, *parameters)
    # A second derivative runs the forward again, and running statistics may have changed by then.
    if not suggests_channels_last(x) or (differentiable and not all(lists.training)):
        return None
    means = [id(mean) for mean in lists.running_means if mean is not None]
    if len(set(means)) != len(means):
        return None  # a unit that occurs twice updates its running statistics twice, in order
    operator = whole_unit.forward_operator(x, lists.shapes(), lambda: _check(x, x_stats, lists))
    if operator is None:
        return None

    def run(want_raw: bool):
        try:
            return operator(channels_last(x), x_stats, *lists, return_stats, want_raw)
        except RuntimeError:
            _check(x, x_stats, lists)  # raises what PyTorch raises
            raise

    with without_autocast(x.device.type):
        if differentiable:
            others: list = []
            out = _ResidualUnits.apply(run, lists, others, x, *parameters)
            out_stats, stats = others
        else:
            with torch._C._AutoDispatchBelowAutograd():
                out, out_stats, _, stats, _ = run(False)
    _update_running_stats(units, lists, x, x_stats, stats)
    return out, out_stats if return_stats else None


def _update_running_stats(
    units: Sequence[UnitArgs], lists: _Lists, x: Tensor, x_stats: Tensor | None, stats: list[Tensor]
) -> None:
    updates, i = [], 0
    shape = x.shape
    for unit in units:
        for norm, conv in zip(unit.norms, unit.convs, strict=True):
            if norm.training:
                used = x_stats if i == 0 and x_stats is not None else stats[i]
                updates.append((norm, used, count_of(shape)))
            at = slice(2 * i, 2 * i + 2)
            shape = convolution_output_shape(
                shape, conv.weight, lists.strides[at], lists.paddings[at], lists.dilations[at]
            )
            i += 1
    if updates:
        running_stats.update_of_unit(updates)


class _ResidualUnits(Function):
    """Lists come flattened: autograd sees only tensors that are arguments. As in residual_unit, only out is
    given through autograd."""

    @staticmethod
    def forward(ctx, run, lists, others, x, *parameters):
        out, out_stats, raw, stats, bns = run(True)
        others += out_stats, stats
        ctx.lists = lists.with_parameters([None] * len(parameters))  # which are saved
        ctx.save_for_backward(x, *raw, *bns, *parameters)
        ctx.set_materialize_grads(False)
        return out

    @staticmethod
    def backward(ctx, dout):
        if dout is None:
            return (None,) * len(ctx.needs_input_grad)
        x, *saved = ctx.saved_tensors
        n = len(ctx.lists.weights)
        raw, bns, parameters = saved[: n - 1], saved[n - 1 : 2 * n - 1], saved[2 * n - 1 :]
        lists = ctx.lists.with_parameters(parameters)
        needs = ctx.needs_input_grad[3:]
        if torch.is_grad_enabled():
            return None, None, None, *_differentiable_gradients(lists, dout, x, parameters, needs)
        need_gammas, need_betas = needs[1 : n + 1], needs[n + 1 : 2 * n + 1]
        mask = [needs[0], *[g or b for g, b in zip(need_gammas, need_betas)], *needs[2 * n + 1 :]]
        with torch._C._AutoDispatchBelowAutograd():
            dx, sums, dweights, dbiases = _backward(lists, dout, x, raw, bns, mask)
        rows = [(None, None) if s is None or s.numel() == 0 else s.unbind(0) for s in sums]
        found = [dx, *[dgamma for _, dgamma in rows], *[dbeta for dbeta, _ in rows], *dweights, *dbiases]
        of = [x, *parameters]
        gradients = [
            as_dtype(g, t) if needed else None for g, t, needed in zip(found, of, needs, strict=True)
        ]
        return None, None, None, *gradients


def _backward(
    lists: _Lists, dout: Tensor, x: Tensor, raw: list[Tensor], bns: list[Tensor], output_mask: list[bool]
) -> tuple:
    """dx, sums, dweights, dbiases.

    Args:
        output_mask: x; the BatchNorms, weights and biases.
    """
    n, count = len(lists.weights), len(lists.lengths)
    output_mask = [*output_mask, *[False] * (2 * count)]  # no shortcut has parameters
    operator, combined = whole_unit.backward_operator(x, lists.shapes(), output_mask)
    if operator is not None:
        dx, *rest = operator(
            channels_last(dout), channels_last(x), raw, bns, lists.weights, lists.shortcut_weights,
            lists.training, lists.negative_slope, *lists[11:], output_mask, combined,
        )  # fmt: skip
        return canonical(dx, True) if output_mask[0] else dx, *rest[:3]
    # The backend has been changed since, or is to run the primitives one by one.
    mask = whole_unit.UnitsMask(output_mask, lists.lengths)
    sums, dweights, dbiases = [None] * n, [None] * n, [None] * n
    for u in reversed(range(count)):
        at, needs = lists.span(u), mask.unit(u)
        if not any(needs):
            break
        dout, sums[at], dweights[at], dbiases[at], _, _ = below_autograd(
            RESIDUAL_UNIT_BACKWARD, dout, raw[at.start - 1] if u else x, raw[at.start : at.stop - 1], bns[at],
            lists.bn_weights[at], lists.bn_biases[at], lists.weights[at], lists.biases[at], None,
            lists.training[at], lists.eps[at], lists.negative_slope, *lists.geometry(u), needs,
        )  # fmt: skip
    return dout, sums, dweights, dbiases


def _differentiable_gradients(
    lists: _Lists, dout: Tensor, x: Tensor, parameters: list, needs: list[bool]
) -> list:
    """The gradients with a derivative of their own: through the units one by one, run again from x."""
    with torch.enable_grad(), torch.autocast(x.device.type, enabled=False):
        # Aliases: a parameter that two units share has a gradient from each.
        x, *parameters = (None if t is None else t.view_as(t) for t in (x, *parameters))
        lists = lists.with_parameters(parameters)
        h = x
        for u in range(len(lists.lengths)):
            h = residual_unit(h, *lists.unit(u), negative_slope=lists.negative_slope)
        inputs = [t for t, needed in zip((x, *parameters), needs, strict=True) if needed]
        gradients = iter(torch.autograd.grad(h, inputs, dout, create_graph=True))
    return [next(gradients) if needed else None for needed in needs]
