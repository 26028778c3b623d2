"""Residual units that run in turn as one autograd node, and as one call into C++ each way, where one C++
backend runs every primitive of them.

Between the kernels of two units lies what Python, autograd and the dispatcher do. In a net of small images it
takes as long as the kernels, and with the caches full of activations three times as long as without. So what
depends on sizes and options alone is concluded once (:class:`_Plan`), and every tensor that need not cross
between Python and C++ does not.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad
from torch.compiler import is_compiling

from resnet_fused.primitives import dispatch, finalize_forward
from resnet_fused.primitives.layout import (
    CHANNELS_LAST,
    channels_last,
    convolution_output_shape,
    suggests_channels_last,
)
from resnet_fused.primitives.registration import below_autograd, is_ordinary

from . import autocast, last_use, running_stats, whole_unit
from .arguments import BatchNormArgs, ConvArgs
from .residual_unit import check_unit, known_geometry, residual_unit_by_dispatcher
from .residual_unit_backward import RESIDUAL_UNIT_BACKWARD, count_of


class UnitArgs(NamedTuple):
    """What one unit passes: the arguments of :func:`~resnet_fused.functional.residual_unit`."""

    norms: Sequence[BatchNormArgs]
    convs: Sequence[ConvArgs]
    shortcut: ConvArgs | None = None
    negative_slope: float = 0.0

    def uses_batch_statistics(self) -> bool:
        """Whether the first norm normalises with the statistics of the unit's input."""
        return self.norms[0].training or self.norms[0].running_mean is None

    def without_tensors(self) -> "UnitArgs":
        """The options alone; norms that use batch statistics are in training."""
        return UnitArgs(
            [BatchNormArgs(training=n.training or n.running_mean is None, eps=n.eps) for n in self.norms],
            [ConvArgs(None, None, *conv[2:]) for conv in self.convs],
            None if self.shortcut is None else ConvArgs(None, None, *self.shortcut[2:]),
            self.negative_slope,
        )


def _parameters(units: Sequence[UnitArgs]) -> list[Tensor | None]:
    """Weights and biases of all norms, of all convolutions, of the shortcuts (one entry for each unit)."""
    norms = [norm for unit in units for norm in unit.norms]
    convs = [conv for unit in units for conv in unit.convs]
    shortcuts = [unit.shortcut for unit in units]
    return [
        *[norm.weight for norm in norms],
        *[norm.bias for norm in norms],
        *[conv.weight for conv in convs],
        *[conv.bias for conv in convs],
        *[None if conv is None else conv.weight for conv in shortcuts],
        *[None if conv is None else conv.bias for conv in shortcuts],
    ]


def _split(flat: Sequence, n: int, count: int) -> tuple[Sequence, ...]:
    """What :func:`_parameters` has for n convolutions in count units, or as many values, by kind."""
    end = 4 * n + count
    return flat[:n], flat[n : 2 * n], flat[2 * n : 3 * n], flat[3 * n : 4 * n], flat[4 * n : end], flat[end:]


class _Plan:
    """What is the same in every call with units of one kind and inputs of one size.

    Attributes:
        operator: runs the units forward; None: they have to be called one by one.
        saves_statistics: of each norm they are saved, half as much as the rows that backward makes of them.
        units: the options of each.
        sizes: the number of convolutions, and of units.
        counts: N*H*W of what each norm reads.
        training: whether every norm uses batch statistics.
        numbers: negative slope, training and eps, as whole_unit.options takes them.
        options: of the operator, where there is one.
    """

    def __init__(self, x: Tensor, x_stats: Tensor | None, units: Sequence[UnitArgs]):
        self.units = [unit.without_tensors() for unit in units]
        convs = [conv for unit in units for conv in unit.convs]
        lengths = [len(unit.convs) for unit in units]
        self.sizes = (len(convs), len(units))
        training = [norm.training for unit in self.units for norm in unit.norms]
        eps = [norm.eps for unit in self.units for norm in unit.norms]
        self.training = all(training)
        geometry = zip(*[known_geometry(unit.convs, unit.shortcut) for unit in units], strict=True)
        strides, paddings, dilations, groups, shortcut_strides = (
            [value for of_unit in column for value in of_unit] for column in geometry
        )
        rest = (strides, paddings, dilations, groups, shortcut_strides, lengths)
        self.numbers = (units[0].negative_slope, training, eps)
        self.shapes = whole_unit.UnitShapes(
            [conv.weight.shape for conv in convs],
            [None if unit.shortcut is None else unit.shortcut.weight.shape for unit in units],
            *rest,
        )
        self.operator = None
        # Each unit by itself copies an input of another layout, and gives it back to its output.
        if suggests_channels_last(x) and x.is_contiguous(memory_format=CHANNELS_LAST):
            self.operator = whole_unit.kept_forward_operator(
                x, self.shapes, lambda: _check(x, x_stats, units)
            )
        self.options = self.operator and whole_unit.options(*self.numbers, self.shapes)
        self.saves_statistics = self.operator is not None and self.operator.namespace == "resnet_fused_cpu"
        self.counts, shape = [], x.shape
        for i, conv in enumerate(convs if self.operator else []):
            self.counts.append(count_of(shape))
            at = slice(2 * i, 2 * i + 2)
            shape = convolution_output_shape(
                shape, conv.weight.shape, strides[at], paddings[at], dilations[at]
            )

    def with_parameters(self, parameters: Sequence[Tensor | None]) -> list[UnitArgs]:
        """The units with these, and without running statistics."""
        n, count = self.sizes
        gammas, betas, weights, biases, *shortcuts = map(iter, _split(parameters, n, count))
        units = []
        for unit in self.units:
            norms = [norm._replace(weight=next(gammas), bias=next(betas)) for norm in unit.norms]
            convs = [conv._replace(weight=next(weights), bias=next(biases)) for conv in unit.convs]
            weight, bias = map(next, shortcuts)
            shortcut = None if weight is None else unit.shortcut._replace(weight=weight, bias=bias)
            units.append(UnitArgs(norms, convs, shortcut, unit.negative_slope))
        return units


def _plan(x: Tensor, x_stats: Tensor | None, units: Sequence[UnitArgs]) -> _Plan:
    key = ["unit_plan", x.dtype, x.device, x.shape, x.stride()]
    for unit in units:
        for norm in unit.norms:
            key += norm.training or norm.running_mean is None, norm.eps
        for conv in unit.convs:
            key += conv.weight.shape, conv[2:]
        key += (
            None if unit.shortcut is None else (unit.shortcut.weight.shape, unit.shortcut[2:]),
            unit.negative_slope,
        )
    key = tuple(key)
    return dispatch.kept(key) or dispatch.keep(key, _Plan(x, x_stats, units))


def _unit_arguments(unit: UnitArgs) -> tuple:
    """Of residual_unit's schema: bn_weights, bn_biases, weights, biases; then training to shortcut_stride."""
    return (
        [norm.weight for norm in unit.norms],
        [norm.bias for norm in unit.norms],
        [conv.weight for conv in unit.convs],
        [conv.bias for conv in unit.convs],
    ), (
        [norm.training or norm.running_mean is None for norm in unit.norms],
        [norm.eps for norm in unit.norms],
        unit.negative_slope,
        *known_geometry(unit.convs, unit.shortcut),
    )


def _check(x: Tensor, x_stats: Tensor | None, units: Sequence[UnitArgs]) -> None:
    """Raises what the units would, before any of them has run."""
    for unit in units:
        (bn_weights, bn_biases, weights, biases), options = _unit_arguments(unit)
        shortcut = (None, None) if unit.shortcut is None else unit.shortcut[:2]
        shape = check_unit(
            x, x_stats, bn_weights, bn_biases, [norm.running_mean for norm in unit.norms],
            [norm.running_var for norm in unit.norms], weights, biases, *shortcut, *options,
        )  # fmt: skip
        x, x_stats = x.detach().new_empty(()).expand(shape), None  # of the shape that matters, without memory


def _has_to_see_units(x: Tensor) -> bool:
    """Whether something looks on that the units have to come to one by one."""
    return (
        is_compiling()
        or not is_ordinary(x)
        or forward_ad._current_level >= 0
        or dispatch.is_recorded()
        or torch._C._is_tracing()
    )


def run_in_one_node(
    units: Sequence[UnitArgs], x: Tensor, x_stats: Tensor | None, return_stats: bool
) -> tuple[Tensor, Tensor | None] | None:
    """What the units give one by one, to the bit; or None where they have to be called so.

    Args:
        units, x, x_stats, return_stats: as for :func:`~resnet_fused.functional.residual_units`.

    Returns:
        out and, if asked for, its statistics.
    """
    slope = units[0].negative_slope
    if (
        _has_to_see_units(x)
        or x.dim() != 4
        or any(
            [not len(unit.norms) == len(unit.convs) > 0 or unit.negative_slope != slope for unit in units]
        )
    ):
        return None
    if torch.is_autocast_enabled(x.device.type):
        x, x_stats = autocast.cast_with_stats(x, x_stats, x.device.type)
    try:
        plan = _plan(x, x_stats, units)
    except TypeError:  # a list among the options
        return None
    if not whole_unit.is_allowed(plan.operator, x):
        return None
    norms = [norm for unit in units for norm in unit.norms]
    means = [norm.running_mean for norm in norms]
    if len(units) > 1:
        tracked = [id(mean) for mean in means if mean is not None]
        if len(set(tracked)) != len(tracked):
            return None  # a unit that occurs twice updates its running statistics twice, in order
    parameters = _parameters(units)
    differentiable = torch.is_grad_enabled() and torch._C._any_requires_grad(x, *parameters)
    # A second derivative runs the forward again, and running statistics may have changed by then.
    if differentiable and not plan.training:
        return None

    running = means + [norm.running_var for norm in norms]
    changes = running_stats.changes_of(norms, x.device)
    momenta, batches_tracked = changes or ([], [])

    def run(want_raw: bool):
        try:
            with torch._C._AutoDispatchBelowAutograd():
                return plan.operator(
                    x, x_stats, parameters, plan.options, running, momenta, batches_tracked, return_stats,
                    want_raw, want_raw and not plan.saves_statistics,
                )  # fmt: skip
        except RuntimeError:
            _check(x, x_stats, units)  # raises what PyTorch raises
            raise

    if differentiable:
        others: list = []
        out = _apply(plan, run, others, x_stats, x, *parameters)
        out_stats, stats = others
    else:
        out, out_stats, _, stats, _ = run(False)
    if changes is None:
        given = [s if i > 0 or x_stats is None else x_stats for i, s in enumerate(stats)]
        updates = [row for row in zip(norms, given, plan.counts, strict=True) if row[0].training]
        running_stats.update_of_unit(updates)
    return out, out_stats if return_stats else None


@last_use.gives_fresh_output
class _ResidualUnits(Function):
    """Lists come flattened: autograd sees only tensors that are arguments. As in residual_unit, only out is
    given through autograd."""

    @staticmethod
    def forward(ctx, plan, run, others, x_stats, x, *parameters):
        out, out_stats, raw, stats, bns = run(True)
        others += out_stats, stats
        ctx.plan = plan
        if plan.saves_statistics:
            bns = stats if x_stats is None else [x_stats, *stats[1:]]
        ctx.save_for_backward(x, *raw, *bns, *parameters)
        ctx.owns_raw = last_use.may_be_owned()
        ctx.set_materialize_grads(False)
        return out

    @staticmethod
    def backward(ctx, dout):
        needs = ctx.needs_input_grad[4:]
        if dout is None:
            return (None,) * (4 + len(needs))
        plan, (x, *saved) = ctx.plan, ctx.saved_tensors
        n = plan.sizes[0]
        is_last = ctx.owns_raw and last_use.is_now()
        if is_last:
            ctx.maybe_clear_saved_tensors()  # a second backward raises, even if this one fails half-way
        parameters = saved[2 * n - 1 :]
        if torch.is_grad_enabled():
            return None, None, None, None, *_differentiable_gradients(plan, dout, x, parameters, needs)
        # The user's hooks for saved tensors may have given them another layout.
        x, *raw = [channels_last(t) for t in (x, *saved[: n - 1])]
        bns = saved[n - 1 : 2 * n - 1]
        del saved
        # Whoever else holds what was saved (by grad_fn.saved_tensors, say) keeps it as it is.
        reuse_raw = is_last and last_use.are_only_references(raw)
        operator, options = whole_unit.backward_operator(
            ("residual_units_backward", plan, *needs), x, plan.shapes, needs, plan.numbers
        )
        if operator is None:
            return None, None, None, None, *_gradients_by_primitives(plan, dout, x, raw, bns, parameters, needs)
        with torch._C._AutoDispatchBelowAutograd():
            found = iter(operator(channels_last(dout), x, raw, bns, parameters, options, reuse_raw))
        gradients = [next(found) if needed else None for needed in needs]
        return None, None, None, None, *_in_dtypes_of(gradients, (x, *parameters))


# Function.apply looks at every argument for functorch's sake, which is_ordinary has excluded.
_apply = super(Function, _ResidualUnits).apply


def _in_dtypes_of(gradients: Sequence[Tensor | None], of: Sequence[Tensor | None]) -> list[Tensor | None]:
    return [
        g if g is None or g.dtype is t.dtype else g.to(t.dtype) for g, t in zip(gradients, of, strict=True)
    ]


def _gradients_by_primitives(
    plan: _Plan, dout: Tensor, x: Tensor, raw: list, bns: list, parameters: list, needs: Sequence[bool]
) -> list[Tensor | None]:
    """Where the backend has been changed since, or is to run the primitives one by one."""
    mask = whole_unit.UnitsMask(needs, plan.shapes.lengths)
    n, count = plan.sizes
    norms = [norm for unit in plan.with_parameters(parameters) for norm in unit.norms]
    bns = [
        bn if bn.shape[0] == 4 else finalize_forward(bn, c, None, None, norm.weight, norm.bias, norm.eps)
        for bn, c, norm in zip(bns, plan.counts, norms, strict=True)
    ]
    sums, dweights, dbiases = [None] * n, [None] * n, [None] * n
    dshortcut_weights, dshortcut_biases = [None] * count, [None] * count
    end = n
    for u, unit in reversed(list(enumerate(plan.with_parameters(parameters)))):
        at = slice(end - len(unit.convs), end)
        end = at.start
        if not any(mask.unit(u)):
            break
        tensors, options = _unit_arguments(unit)
        shortcut_weight = None if unit.shortcut is None else unit.shortcut.weight
        dout, sums[at], dweights[at], dbiases[at], dshortcut_weights[u], dshortcut_biases[u] = below_autograd(
            RESIDUAL_UNIT_BACKWARD, dout, raw[at.start - 1] if u else x, raw[at.start : at.stop - 1], bns[at],
            *tensors, shortcut_weight, *options, mask.unit(u),
        )  # fmt: skip
    rows = [(None, None) if s is None or s.numel() == 0 else s.unbind(0) for s in sums]
    found = [
        dout, *[dgamma for _, dgamma in rows], *[dbeta for dbeta, _ in rows], *dweights, *dbiases,
        *dshortcut_weights, *dshortcut_biases,
    ]  # fmt: skip
    found = [g if needed else None for g, needed in zip(found, needs, strict=True)]
    return _in_dtypes_of(found, (x, *parameters))


def _differentiable_gradients(
    plan: _Plan, dout: Tensor, x: Tensor, parameters: list, needs: Sequence[bool]
) -> list[Tensor | None]:
    """The gradients with a derivative of their own: through the units one by one, run again from x."""
    with torch.enable_grad(), torch.autocast(x.device.type, enabled=False):
        # Aliases: a parameter that two units share has a gradient from each.
        x, *parameters = (None if t is None else t.view_as(t) for t in (x, *parameters))
        h = x
        for unit in plan.with_parameters(parameters):
            h = residual_unit_by_dispatcher(
                h, unit.norms, unit.convs, shortcut=unit.shortcut, negative_slope=unit.negative_slope
            )
        inputs = [t for t, needed in zip((x, *parameters), needs, strict=True) if needed]
        gradients = iter(torch.autograd.grad(h, inputs, dout, create_graph=True))
    return [next(gradients) if needed else None for needed in needs]
