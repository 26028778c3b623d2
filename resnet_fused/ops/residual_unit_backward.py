"""residual_unit_backward: all gradients of a residual unit, from the last convolution to the first.

For each convolution: weight gradient, input gradient with BatchNorm's two sums, and one pass that applies
BatchNorm's backward; in the first convolution that pass adds the identity shortcut's gradient too. A
projection shortcut's gradient joins at the pre-activation that both convolutions read.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from resnet_fused import primitives
from resnet_fused.primitives.layout import (
    canonical,
    channels_last,
    empty,
    empty_acc,
    suggests_channels_last,
)
from resnet_fused.primitives.registration import below_autograd, define, differentiable

from . import double_backward, whole_unit
from .convolution_gradients import convolution_gradients


class UnitGeometry(NamedTuple):
    """(stride, padding, dilation, groups) of each convolution, and of the shortcut."""

    convolutions: list[tuple]
    shortcut: tuple


def unit_geometry(strides, paddings, dilations, groups, shortcut_stride) -> UnitGeometry:
    """The operators' flat lists, by convolution."""
    convolutions = []
    for i, g in enumerate(groups):
        j, k = 2 * i, 2 * i + 1
        pairs = ((strides[j], strides[k]), (paddings[j], paddings[k]), (dilations[j], dilations[k]))
        convolutions.append((*pairs, g))
    return UnitGeometry(convolutions, (tuple(shortcut_stride), (0, 0), (1, 1), 1))


def count_of(shape) -> int:
    """Values per channel, N*H*W."""
    return shape[0] * shape[2] * shape[3]


def split(flat: Sequence, n: int, parts: int) -> list[list]:
    """The first parts * n items, as lists of n."""
    return [list(flat[i * n : (i + 1) * n]) for i in range(parts)]


class _Arguments(NamedTuple):
    """The operator's arguments, in the order of its schema."""

    dout: Tensor
    x: Tensor
    raw: list[Tensor]
    bns: list[Tensor]
    bn_weights: list[Tensor | None]
    bn_biases: list[Tensor | None]
    weights: list[Tensor]
    biases: list[Tensor | None]
    shortcut_weight: Tensor | None
    training: list[bool]
    eps: list[float]
    negative_slope: float
    strides: list[int]
    paddings: list[int]
    dilations: list[int]
    groups: list[int]
    shortcut_stride: list[int]
    output_mask: list[bool]

    def geometry(self) -> UnitGeometry:
        return unit_geometry(self.strides, self.paddings, self.dilations, self.groups, self.shortcut_stride)


def _backward(*args):
    a = _Arguments(*args)
    mask = whole_unit.UnitMask(a.output_mask, len(a.weights))
    shapes = whole_unit.shapes_of_unit(a)
    needs = mask.parameters()
    numbers = (a.negative_slope, a.training, a.eps)
    operator, options = whole_unit.backward_operator(
        (*shapes.key("residual_units_backward", a.x), *needs, numbers[0], *a.training, *a.eps), a.x, shapes,
        needs, numbers,
    )  # fmt: skip
    if operator is None:
        return _backward_by_primitives(a, mask)
    raw = [channels_last(t) for t in a.raw]  # hooks for saved tensors may have changed their layout
    parameters = whole_unit.joined(a.bn_weights, a.bn_biases, a.weights, a.biases)
    found = operator(
        channels_last(a.dout), channels_last(a.x), raw, a.bns, [*parameters, a.shortcut_weight, None],
        options, False,
    )  # fmt: skip
    return _by_kind(a, mask, iter(found))


def _by_kind(a: _Arguments, mask: whole_unit.UnitMask, found: Iterator[Tensor]):
    """The operator's outputs out of the gradients that residual_units_backward found."""
    dx = canonical(next(found), suggests_channels_last(a.x)) if mask.x else a.x.new_empty(0)
    for _ in filter(None, mask.bns):
        next(found)  # dgamma lies behind dbeta in one tensor
    dbetas = [next(found) if needed else None for needed in mask.bns]
    sums = [
        empty_acc(a.x, 0) if d is None else d.as_strided((2, d.numel()), (d.numel(), 1)) for d in dbetas
    ]
    dweights, dbiases = (
        [next(found) if needed else w.new_empty(0) for needed, w in zip(kind, a.weights, strict=True)]
        for kind in (mask.weights, mask.biases)
    )
    shortcut = [
        next(found) if needed else a.x.new_empty(0) for needed in (mask.shortcut_weight, mask.shortcut_bias)
    ]
    return dx, sums, dweights, dbiases, *shortcut


def _backward_by_primitives(a: _Arguments, mask: whole_unit.UnitMask):
    n = len(a.weights)
    if a.x.shape[0] == 0:
        outputs = _empty_outputs(a, mask)
        for t in (*outputs[1], *outputs[2], *outputs[3], *outputs[4:]):
            t.zero_()
        return outputs
    geometry, slope = a.geometry(), a.negative_slope
    x, dout = channels_last(a.x), channels_last(a.dout)
    projects = a.shortcut_weight is not None
    dx, dshortcut_weight, dshortcut_bias = x.new_empty(0), x.new_empty(0), x.new_empty(0)
    sums, dweights, dbiases = [None] * n, [None] * n, [None] * n
    dy = dout
    for i in reversed(range(n)):
        h = x if i == 0 else channels_last(a.raw[i - 1])
        bn, weight, at = a.bns[i], a.weights[i], geometry.convolutions[i]
        sums[i] = empty_acc(x, 0)
        below = mask.below(i)
        dz, dweights[i], dbiases[i] = None, weight.new_empty(0), weight.new_empty(0)
        if dy is not None:
            dz, bn_sums, dweights[i], dbiases[i] = convolution_gradients(
                dy, h, bn, weight, None, None, slope, at, below, mask.weights[i], mask.biases[i]
            )
            dy = None  # free it before the next one is allocated
        if i == 0 and projects:  # adds to the other gradient of z
            joined = (None, None) if dz is None else (dz, bn_sums)
            need = (below, mask.shortcut_weight, mask.shortcut_bias)
            dz, bn_sums, dshortcut_weight, dshortcut_bias = convolution_gradients(
                dout, x, bn, a.shortcut_weight, *joined, slope, geometry.shortcut, *need
            )
        if not below or dz is None:  # nothing further down needs a gradient
            continue
        if i > 0 or mask.x:
            coefficients = primitives.finalize_backward(bn_sums, bn, count_of(h.shape), a.training[i])
            dskip = dout if i == 0 and not projects else None
            dy = primitives.preact_apply(dz, h, coefficients, dskip)
        dz = None
        if mask.bns[i]:
            sums[i] = bn_sums
    if mask.x:
        dx = canonical(dy, suggests_channels_last(a.x))
    return dx, sums, dweights, dbiases, dshortcut_weight, dshortcut_bias


def _empty_outputs(a: _Arguments, mask: whole_unit.UnitMask):
    """Uninitialised outputs, of the sizes and strides that the operator gives."""
    x, weights = a.x, a.weights

    def bias_like(wanted, weight):
        return weight.new_empty(weight.shape[0] if wanted else 0)

    def weight_like(wanted, weight):
        return torch.empty_like(weight) if wanted else weight.new_empty(0)

    shortcut = (x.new_empty(0), x.new_empty(0))
    if a.shortcut_weight is not None:
        shortcut = (
            weight_like(mask.shortcut_weight, a.shortcut_weight),
            bias_like(mask.shortcut_bias, a.shortcut_weight),
        )
    channels = [x.shape[1], *(w.shape[0] for w in weights[:-1])]
    return (
        empty(x.shape, x, suggests_channels_last(x)) if mask.x else x.new_empty(0),
        [empty_acc(x, 2, c) if m else empty_acc(x, 0) for m, c in zip(mask.bns, channels, strict=True)],
        [weight_like(m, w) for m, w in zip(mask.weights, weights, strict=True)],
        [bias_like(m, w) for m, w in zip(mask.biases, weights, strict=True)],
        *shortcut,
    )


def _backward_fake(*args):
    a = _Arguments(*args)
    return _empty_outputs(a, whole_unit.UnitMask(a.output_mask, len(a.weights)))


RESIDUAL_UNIT_BACKWARD = define(
    "residual_unit_backward(Tensor dout, Tensor x, Tensor[] raw, Tensor[] bns, Tensor?[] bn_weights, "
    "Tensor?[] bn_biases, Tensor[] weights, Tensor?[] biases, Tensor? shortcut_weight, bool[] training, "
    "float[] eps, float negative_slope, int[] strides, int[] paddings, int[] dilations, int[] groups, "
    "int[2] shortcut_stride, bool[] output_mask) -> (Tensor dx, Tensor[] sums, Tensor[] dweights, "
    "Tensor[] dbiases, Tensor dshortcut_weight, Tensor dshortcut_bias)",
    _backward,
    _backward_fake,
)


class _ResidualUnitBackward(Function):
    """The second derivative. Lists come flattened: autograd sees only tensors that are arguments."""

    @staticmethod
    def forward(ctx, n, raw, bns, options, dout, x, *parameters):
        dx, sums, dweights, dbiases, dshortcut_weight, dshortcut_bias = below_autograd(
            RESIDUAL_UNIT_BACKWARD, dout, x, raw, bns, *split(parameters, n, 4), parameters[-1], *options
        )
        ctx.n, ctx.options = n, options
        ctx.save_for_backward(dout, x, *bns, *parameters)
        ctx.set_materialize_grads(False)
        return dx, *sums, *dweights, *dbiases, dshortcut_weight, dshortcut_bias

    @staticmethod
    def backward(ctx, ddx, *seconds):
        n = ctx.n
        dout, x, *saved = ctx.saved_tensors
        bns, parameters = saved[:n], saved[n:]
        a = _Arguments(dout, x, [], bns, *split(parameters, n, 4), parameters[-1], *ctx.options)
        geometry, mask = a.geometry(), whole_unit.UnitMask(a.output_mask, n)
        dsums, ddweights, ddbiases = split(seconds, n, 3)

        def wanted(values, needed):
            return [v if m else None for v, m in zip(values, needed, strict=True)]

        def default(values, defaults):
            return [d if v is None else v for v, d in zip(values, defaults, strict=True)]

        dsums = wanted(dsums, mask.bns)
        inputs = [
            x,
            *default(a.bn_weights, [torch.ones_like(bn[0]) for bn in bns]),
            *default(a.bn_biases, [torch.zeros_like(bn[0]) for bn in bns]),
            *a.weights,
            *default(a.biases, [dout.new_zeros(w.shape[0]) for w in a.weights]),
        ]
        cotangents = [
            ddx if mask.x else None,
            *(None if s is None else s[1] for s in dsums),
            *(None if s is None else s[0] for s in dsums),
            *wanted(ddweights, mask.weights),
            *wanted(ddbiases, mask.biases),
        ]
        if a.shortcut_weight is not None:
            inputs += [a.shortcut_weight, dout.new_zeros(a.shortcut_weight.shape[0])]
            cotangents += wanted(seconds[3 * n :], (mask.shortcut_weight, mask.shortcut_bias))

        def unit(x, *flat):
            gammas, betas, weights, biases = split(flat, n, 4)
            h, first = x, None
            for i in range(n):
                frozen = None if a.training[i] else bns[i]
                act = double_backward.pre_activation(
                    h, gammas[i], betas[i], frozen, a.eps[i], a.negative_slope
                )
                first = act if i == 0 else first
                h = double_backward.convolution(act, weights[i], biases[i], *geometry.convolutions[i])
            if a.shortcut_weight is None:
                return h + x
            return h + double_backward.convolution(first, *flat[4 * n :], *geometry.shortcut)

        ddout, (dx, *gradients) = double_backward.vjp_of_vjp(unit, inputs, dout, cotangents)
        dgammas, dbetas, dweights, dbiases = split(gradients, n, 4)

        def of_given(values, arguments):
            return (None if t is None else v for v, t in zip(values, arguments, strict=True))

        return (
            *(None,) * 4,
            ddout,
            dx,
            *of_given(dgammas, a.bn_weights),
            *of_given(dbetas, a.bn_biases),
            *dweights,
            *of_given(dbiases, a.biases),
            None if a.shortcut_weight is None else gradients[4 * n],
        )


def _apply(*args):
    a = _Arguments(*args)
    n = len(a.weights)
    parameters = (*a.bn_weights, *a.bn_biases, *a.weights, *a.biases, a.shortcut_weight)
    flat = _ResidualUnitBackward.apply(n, a.raw, a.bns, args[9:], a.dout, a.x, *parameters)
    return flat[0], *split(flat[1:], n, 3), flat[-2], flat[-1]


differentiable(RESIDUAL_UNIT_BACKWARD, _apply)
