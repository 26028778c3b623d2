"""residual_unit: x_{l+1} = s(x_l) + F(x_l), a whole pre-activation unit as one differentiable operator.

F is one or more pre-activation convolutions; s is the identity, or a projection of the unit's first
pre-activation (He et al. 2016, "Identity Mappings in Deep Residual Networks", equation 1 and figure 4(e)).
One autograd node saves x and the raw outputs of the convolutions; no activation is stored. Statistics come
with x and leave with the sum, so no pass over memory is spent on them; a projection unit shares one set of
statistics between its first convolution and its shortcut.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from resnet_fused import primitives
from resnet_fused.primitives.layout import (
    canonical,
    channels_last,
    convolution_is_channels_last,
    convolution_output_shape,
    empty,
    empty_acc,
)
from resnet_fused.primitives.registration import (
    autocast_kernel,
    below_autograd,
    call,
    call_in_backward,
    call_without_autocast,
    define,
    differentiable,
)

from . import autocast, checks, running_stats, whole_unit
from .arguments import BatchNormArgs, ConvArgs, pair, resolve_padding
from .residual_unit_backward import (
    RESIDUAL_UNIT_BACKWARD,
    UnitGeometry,
    count_of,
    split,
    unit_geometry,
)


class _Arguments(NamedTuple):
    """The operator's arguments, in the order of its schema."""

    x: Tensor
    x_stats: Tensor | None
    bn_weights: list[Tensor | None]
    bn_biases: list[Tensor | None]
    running_means: list[Tensor | None]
    running_vars: list[Tensor | None]
    weights: list[Tensor]
    biases: list[Tensor | None]
    shortcut_weight: Tensor | None
    shortcut_bias: Tensor | None
    training: list[bool]  # per BatchNorm: use batch statistics
    eps: list[float]
    negative_slope: float
    strides: list[int]  # pairs, flattened
    paddings: list[int]
    dilations: list[int]
    groups: list[int]
    shortcut_stride: list[int]
    want_stats: bool
    want_raw: bool  # backward needs the raw outputs; without it they are freed as the unit goes on

    def is_channels_last(self) -> bool:
        return convolution_is_channels_last(self.x, *self.weights, self.shortcut_weight)


def _check(a: _Arguments) -> tuple[UnitGeometry, list[tuple]]:
    """Checks every argument; returns the geometry and the shapes of x and of each convolution's output."""
    x, n = a.x, len(a.weights)
    singles = (
        a.bn_weights,
        a.bn_biases,
        a.running_means,
        a.running_vars,
        a.biases,
        a.training,
        a.eps,
        a.groups,
    )
    pairs = (a.strides, a.paddings, a.dilations)
    if n == 0 or any(len(s) != n for s in singles) or any(len(p) != 2 * n for p in pairs):
        raise RuntimeError(
            "residual_unit: expected at least one convolution, and a BatchNorm and a geometry for each, but "
            f"got {n} weights, lists of length {[len(s) for s in singles]} and, of pairs, "
            f"{[len(p) for p in pairs]}"
        )
    geometry = unit_geometry(*pairs, a.groups, a.shortcut_stride)
    checks.activation(x, "residual_unit")
    shapes = [tuple(x.shape)]
    for i in range(n):
        checks.batch_norm(
            shapes[i], x.dtype, x.device, a.x_stats if i == 0 else None, a.bn_weights[i], a.bn_biases[i],
            a.running_means[i], a.running_vars[i], a.training[i], a.eps[i],
        )  # fmt: skip
        at = geometry.convolutions[i]
        shapes.append(checks.convolution(shapes[i], x.dtype, x.device, a.weights[i], a.biases[i], *at))
    shortcut = shapes[0]
    if a.shortcut_weight is not None:
        shortcut = checks.convolution(
            shapes[0], x.dtype, x.device, a.shortcut_weight, a.shortcut_bias, *geometry.shortcut
        )
    checks.same_size(shapes[-1], shortcut)
    return geometry, shapes


def check_unit(*args) -> tuple[int, ...]:
    """Checks the operator's arguments up to shortcut_stride; returns the output's shape."""
    return _check(_Arguments(*args, False, False))[1][-1]


def _forward(*args):
    a = _Arguments(*args)
    shapes = whole_unit.shapes_of_unit(a)
    operator = whole_unit.forward_operator(a.x, shapes, lambda: _check(a))
    if operator is None:
        return _forward_by_primitives(a)
    try:
        parameters = whole_unit.joined(a.bn_weights, a.bn_biases, a.weights, a.biases)
        out, *rest = operator(
            channels_last(a.x), a.x_stats, [*parameters, a.shortcut_weight, a.shortcut_bias],
            whole_unit.options(a.negative_slope, a.training, a.eps, shapes),
            whole_unit.joined(a.running_means, a.running_vars), [], [], a.want_stats, a.want_raw, True,
        )  # fmt: skip
    except (RuntimeError, IndexError):
        _check(a)  # raises what PyTorch raises
        raise
    return (out if a.is_channels_last() else canonical(out, False)), *rest


def _forward_by_primitives(a: _Arguments):
    geometry, shapes = _check(a)
    if a.x.shape[0] == 0:
        outputs = _empty_outputs(a, shapes)
        for t in (outputs[1], *outputs[3], *outputs[4]):
            t.zero_()
        return outputs
    x, slope, n = channels_last(a.x), a.negative_slope, len(a.weights)
    raw, stats, bns = [], [], []
    h, h_stats, given = x, a.x_stats, a.x_stats is not None
    for i in range(n):
        if not a.training[i]:
            h_stats = None
        elif h_stats is None:
            h_stats = primitives.channel_stats(h)
        # Statistics that came as an argument are not an output: outputs do not alias inputs.
        stats.append(empty_acc(x, 0) if h_stats is None or given else h_stats)
        bn = primitives.finalize_forward(
            h_stats, count_of(shapes[i]), a.running_means[i], a.running_vars[i], a.bn_weights[i],
            a.bn_biases[i], a.eps[i],
        )  # fmt: skip
        bns.append(bn)
        residual, last = None, i == n - 1
        if last and a.shortcut_weight is None:
            residual = x
        elif last:
            # As late as possible: the projection's output lives for one convolution.
            residual, _ = primitives.preact_conv_forward(
                x, bns[0], a.shortcut_weight, a.shortcut_bias, None, slope, *geometry.shortcut, False
            )
        want_stats = a.want_stats if last else a.training[i + 1]
        h, h_stats = primitives.preact_conv_forward(
            h, bn, a.weights[i], a.biases[i], residual, slope, *geometry.convolutions[i], want_stats
        )
        given = False
        if a.want_raw and not last:
            raw.append(h)
    return canonical(h, a.is_channels_last()), h_stats, raw, stats, bns


def _empty_outputs(a: _Arguments, shapes: list[tuple]):
    """Uninitialised outputs, of the sizes and strides that the operator gives."""

    def stats_of(shape, wanted):
        return empty_acc(a.x, 2, shape[1]) if wanted else empty_acc(a.x, 0)

    return (
        empty(shapes[-1], a.x, a.is_channels_last()),
        stats_of(shapes[-1], a.want_stats),
        [empty(shape, a.x) for shape in shapes[1:-1]] if a.want_raw else [],
        [stats_of(shapes[i], t and (i > 0 or a.x_stats is None)) for i, t in enumerate(a.training)],
        [empty_acc(a.x, 4, shape[1]) for shape in shapes[:-1]],
    )


def _forward_fake(*args):
    a = _Arguments(*args)
    return _empty_outputs(a, _check(a)[1])


_OP = define(
    "residual_unit(Tensor x, Tensor? x_stats, Tensor?[] bn_weights, Tensor?[] bn_biases, "
    "Tensor?[] running_means, Tensor?[] running_vars, Tensor[] weights, Tensor?[] biases, "
    "Tensor? shortcut_weight, Tensor? shortcut_bias, bool[] training, float[] eps, "
    "float negative_slope, int[] strides, int[] paddings, int[] dilations, int[] groups, "
    "int[2] shortcut_stride, bool want_stats, bool want_raw) "
    "-> (Tensor out, Tensor out_stats, Tensor[] raw, Tensor[] stats, Tensor[] bns)",
    _forward,
    _forward_fake,
)


class _ResidualUnit(Function):
    """Lists come flattened: autograd sees only tensors that are arguments.

    Only out has a derivative, and only it is given through autograd; the rest goes into the list ``others``, for
    every output of a Function costs some microseconds.
    """

    @staticmethod
    def forward(ctx, n, constants, options, others, x, *parameters):
        x_stats, running_means, running_vars = constants
        bn_weights, bn_biases, weights, biases = split(parameters, n, 4)
        shortcut = parameters[4 * n :]
        out, *rest = below_autograd(
            _OP, x, x_stats, bn_weights, bn_biases, running_means, running_vars, weights, biases, *shortcut,
            *options, True,
        )  # fmt: skip
        others += rest
        _, raw, _, bns = rest
        ctx.n, ctx.options = n, options[:-1]
        ctx.shortcut_bias_dtype = None if shortcut[1] is None else shortcut[1].dtype
        # Not the running statistics: they may change before backward (DDP with two forwards). bns are copies.
        ctx.save_for_backward(x, *raw, *bns, *parameters[:-1])
        ctx.set_materialize_grads(False)
        return out

    @staticmethod
    def backward(ctx, dout):
        if dout is None:
            return (None,) * len(ctx.needs_input_grad)
        n = ctx.n
        need_x, *needs = ctx.needs_input_grad[4:]
        x, *saved = ctx.saved_tensors
        raw, bns, parameters = saved[: n - 1], saved[n - 1 : 2 * n - 1], saved[2 * n - 1 :]
        bn_weights, bn_biases, weights, biases = split(parameters, n, 4)
        need_gammas, need_betas = needs[:n], needs[n : 2 * n]
        dx, sums, dweights, dbiases, dshortcut_weight, dshortcut_bias = call_in_backward(
            RESIDUAL_UNIT_BACKWARD, dout, x, raw, bns, bn_weights, bn_biases, weights, biases, parameters[-1],
            *ctx.options,
            [need_x, *[g or b for g, b in zip(need_gammas, need_betas)], *needs[2 * n :]],
        )  # fmt: skip
        gradients = [None, None, None, None, dx if need_x else None]
        for row, needed, of in ((1, need_gammas, bn_weights), (0, need_betas, bn_biases)):
            gradients += [as_dtype(s[row], t) if m else None for s, t, m in zip(sums, of, needed)]
        gradients += [d if m else None for d, m in zip(dweights, needs[2 * n : 3 * n])]
        gradients += [as_dtype(d, t) if m else None for d, t, m in zip(dbiases, biases, needs[3 * n : 4 * n])]
        gradients.append(dshortcut_weight if needs[4 * n] else None)
        gradients.append(dshortcut_bias.to(ctx.shortcut_bias_dtype) if needs[4 * n + 1] else None)
        return tuple(gradients)


def as_dtype(gradient: Tensor, of: Tensor) -> Tensor:
    """A parameter's gradient in the parameter's dtype."""
    return gradient if gradient.dtype is of.dtype else gradient.to(of.dtype)


def _apply(*args):
    a = _Arguments(*args)
    n = len(a.weights)
    if not len(a.bn_weights) == len(a.bn_biases) == len(a.biases) == n > 0:
        _check(a)  # raises
    constants = (a.x_stats, a.running_means, a.running_vars)
    parameters = (*a.bn_weights, *a.bn_biases, *a.weights, *a.biases, a.shortcut_weight, a.shortcut_bias)
    others = []
    # want_raw is left out: a gradient needs them.
    out = _ResidualUnit.apply(n, constants, args[10:-1], others, a.x, *parameters)
    return out, *others


differentiable(_OP, _apply)


def _autocast(device_type: str):
    def kernel(x, x_stats, *rest):
        x, x_stats = autocast.cast_with_stats(x, x_stats, device_type)
        return call_without_autocast(_OP, device_type, x, x_stats, *rest)

    return kernel


autocast_kernel(_OP, _autocast)


def _geometry(
    convs: Sequence[ConvArgs], shortcut: ConvArgs | None
) -> tuple[list[int], list[int], list[int], list[int], tuple[int, int]]:
    """strides, paddings, dilations, groups of the convolutions, flat, and the stride of the shortcut."""
    strides, paddings, dilations = [], [], []
    for conv in convs:
        stride, dilation = pair(conv.stride, "stride"), pair(conv.dilation, "dilation")
        padding, crop = resolve_padding(conv.padding, conv.weight, stride, dilation)
        if crop != (0, 0):
            raise ValueError("padding='same' with an even kernel is asymmetric: use preact_conv2d for it")
        strides += stride
        paddings += padding
        dilations += dilation
    shortcut_stride = (1, 1)
    if shortcut is not None:
        shortcut_stride = pair(shortcut.stride, "stride")
        padding, _ = resolve_padding(shortcut.padding, shortcut.weight, shortcut_stride, (1, 1))
        if (padding, pair(shortcut.dilation, "dilation"), shortcut.groups) != ((0, 0), (1, 1), 1):
            raise ValueError(
                "the shortcut of a residual unit has padding 0, dilation 1 and groups 1, but got padding="
                f"{shortcut.padding}, dilation={shortcut.dilation}, groups={shortcut.groups}"
            )
    return strides, paddings, dilations, [conv.groups for conv in convs], shortcut_stride


_geometries: dict[tuple, tuple] = {}


def known_geometry(convs: Sequence[ConvArgs], shortcut: ConvArgs | None) -> tuple:
    """:func:`_geometry`, remembered for arguments that are what nn.Conv2d has: tuples and integers."""
    if torch.compiler.is_compiling():
        return _geometry(convs, shortcut)
    key = tuple([c[2:] for c in convs]) if shortcut is None else (*[c[2:] for c in convs], shortcut[2:], None)
    try:
        known = _geometries.get(key)
    except TypeError:  # a list among them
        return _geometry(convs, shortcut)
    if known is None:
        known = _geometry(convs, shortcut)
        if not any(isinstance(c.padding, str) for c in (*convs, *([shortcut] if shortcut else ()))):
            if len(_geometries) > 1000:
                _geometries.clear()
            _geometries[key] = known
    return known


def residual_unit_by_dispatcher(
    x: Tensor,
    norms: Sequence[BatchNormArgs],
    convs: Sequence[ConvArgs],
    *,
    shortcut: ConvArgs | None = None,
    negative_slope: float = 0.0,
    x_stats: Tensor | None = None,
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`~resnet_fused.functional.residual_unit` by torch.ops.resnet_fused.residual_unit, for whatever
    has to see the dispatcher's operator: the same arguments, results and errors."""
    strides, paddings, dilations, groups, shortcut_stride = known_geometry(convs, shortcut)
    columns = zip(*norms, strict=True) if norms else ((),) * len(BatchNormArgs._fields)
    bn_weights, bn_biases, running_means, running_vars, training, _, eps, _ = columns
    out, out_stats, _, stats, _ = call(
        _OP,
        x,
        x_stats,
        list(bn_weights),
        list(bn_biases),
        list(running_means),
        list(running_vars),
        [conv.weight for conv in convs],
        [conv.bias for conv in convs],
        None if shortcut is None else shortcut.weight,
        None if shortcut is None else shortcut.bias,
        [t or mean is None for t, mean in zip(training, running_means, strict=True)],
        list(eps),
        negative_slope,
        strides,
        paddings,
        dilations,
        groups,
        shortcut_stride,
        return_stats,
        False,
    )
    if any(training):
        updates, shape = [], x.shape
        for i, (norm, conv) in enumerate(zip(norms, convs, strict=True)):
            if norm.training:
                used = stats[i] if i > 0 or x_stats is None or stats[0].numel() != 0 else x_stats
                updates.append((norm, used, count_of(shape)))
            at = slice(2 * i, 2 * i + 2)
            shape = convolution_output_shape(
                shape, conv.weight.shape, strides[at], paddings[at], dilations[at]
            )
        running_stats.update_of_unit(updates)
    return (out, out_stats) if return_stats else out
