"""Whole residual units by one C++ operator (csrc/ops/residual_units.h), forward or backward, where one C++
backend would run every primitive of them. Python's own sequence costs as much time as the kernels of a small
unit.

What it gives is what the sequence in residual_unit.py and residual_unit_backward.py gives, to the bit.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from resnet_fused import cuda_kernels
from resnet_fused.primitives import dispatch
from resnet_fused.primitives.layout import acc_dtype, convolution_output_shape


class UnitShapes(NamedTuple):
    """What a choice of backends depends on, beside x: of the operators' lists, over all units."""

    weights: Sequence[torch.Size]
    shortcut_weights: Sequence[torch.Size | None]  # one for each unit
    strides: Sequence[int]  # pairs, flattened
    paddings: Sequence[int]
    dilations: Sequence[int]
    groups: Sequence[int]
    shortcut_strides: Sequence[int]
    lengths: Sequence[int]  # convolutions in each unit

    def key(self, direction: str, x: Tensor) -> tuple:
        """What conclusions are kept under."""
        return (direction, x.dtype, x.device, x.shape, *map(tuple, self))


def options(
    negative_slope: float,
    training: Sequence[bool],
    eps: Sequence[float],
    units: UnitShapes,
    output_mask: Sequence[bool] = (),
    combined: Sequence[bool] = (),
) -> Tensor:
    """The operators' argument of that name: the numbers in the order that csrc/ops/residual_units.h reads them in."""
    numbers = [len(units.lengths)]
    for u, length in enumerate(units.lengths):
        numbers += length, *units.shortcut_strides[2 * u : 2 * u + 2]
    numbers.append(negative_slope)
    for i, group in enumerate(units.groups):
        pair = slice(2 * i, 2 * i + 2)
        numbers += training[i], eps[i], *units.strides[pair], *units.paddings[pair], *units.dilations[pair], group
    with torch.inference_mode(False):  # it may be kept
        return torch.tensor([*numbers, *output_mask, *combined], dtype=torch.float64, device="cpu")


def shapes_of_unit(a) -> UnitShapes:
    """Of one unit: of the arguments of residual_unit or of residual_unit_backward."""
    return UnitShapes(
        [weight.shape for weight in a.weights],
        [None if a.shortcut_weight is None else a.shortcut_weight.shape],
        a.strides, a.paddings, a.dilations, a.groups, a.shortcut_stride, [len(a.weights)],
    )  # fmt: skip


def joined(*lists: Sequence) -> list:
    """Lists of what each convolution of a unit has, one after the other, as the operators take them."""
    if any(len(one) != len(lists[0]) for one in lists):
        raise RuntimeError(f"expected lists of the same length, but got {[len(one) for one in lists]}")
    return [value for one in lists for value in one]


class _Choices:
    """What dispatch says of the primitives of units."""

    def __init__(self, x: Tensor, units: UnitShapes):
        self._device, self._dtype = x.device.type, x.dtype
        self.backends: set[str] = set()
        self.convolutions: list[dispatch.ConvGeometry] = []
        self.shortcuts: list[dispatch.ConvGeometry | None] = []
        shape, at = tuple(x.shape), 0
        for u, length in enumerate(units.lengths):
            first = shape
            for i in range(at, at + length):
                pairs = [
                    tuple(values[2 * i : 2 * i + 2])
                    for values in (units.strides, units.paddings, units.dilations)
                ]
                weight = units.weights[i]
                self.convolutions.append(dispatch.ConvGeometry(shape, tuple(weight), *pairs, units.groups[i]))
                shape = convolution_output_shape(shape, weight, *pairs)
            at += length
            weight, stride = units.shortcut_weights[u], tuple(units.shortcut_strides[2 * u : 2 * u + 2])
            self.shortcuts.append(
                None
                if weight is None
                else dispatch.ConvGeometry(first, tuple(weight), stride, (0, 0), (1, 1), 1)
            )

    def small(self, *primitives: str) -> None:
        for primitive in primitives:
            dtype = acc_dtype(self._dtype) if primitive.startswith("finalize") else self._dtype
            self.backends.add(dispatch.choose(primitive, self._device, dtype).backend)

    def forward(self, geometry) -> None:
        self._convolution("preact_conv_forward", geometry)

    def backward(self, geometry, below: bool, weight: bool) -> bool:
        """Of a convolution whose gradients are needed: whether one kernel of ours makes both."""
        if below and weight and self._combined(geometry):
            return True
        if below:
            self._convolution("preact_conv_dgrad", geometry)
        if weight:
            self._convolution("preact_conv_wgrad", geometry)
        return False

    def _convolution(self, primitive: str, geometry) -> None:
        self.backends.add(dispatch.choose(primitive, self._device, self._dtype, geometry).backend)

    def _combined(self, geometry) -> bool:
        primitive = "preact_conv_backward_1x1"
        if geometry.weight[-1] != 1 or not dispatch.has_own(primitive, self._device):
            return False
        backend = dispatch.choose(primitive, self._device, self._dtype, geometry).backend
        if backend in ("reference", "unfused"):
            return False
        self.backends.add(backend)
        return True

    def operator(self, name: str) -> Callable | None:
        """The operator of the one backend that runs everything, or None."""
        if len(self.backends) != 1:
            return None
        return dispatch.own_operator(next(iter(self.backends)), name)


def is_allowed(operator: Callable | None, x: Tensor) -> bool:
    """Whether there is one, and it may run now."""
    # The user can forbid TF32 at any time; a choice of backend is kept.
    return operator is not None and not (
        x.is_cuda and x.dtype is torch.float32 and not cuda_kernels.tf32_allowed()
    )


def forward_operator(x: Tensor, units: UnitShapes, check: Callable[[], object]) -> Callable | None:
    """The operator for units that x goes through, or None: Python's sequence is to run.

    Args:
        check: raises where the arguments do not fit; called where the answer is not known yet.
    """
    if dispatch.is_recorded() or torch._C._is_tracing():  # which does not take lists of optional tensors
        return None
    operator = kept_forward_operator(x, units, check)
    return operator if is_allowed(operator, x) else None


def kept_forward_operator(x: Tensor, units: UnitShapes, check: Callable[[], object]) -> Callable | None:
    """:func:`forward_operator` until another backend is chosen, whatever may forbid it at times."""
    key = units.key("residual_units_forward", x)
    known = dispatch.kept(key)
    if known is None:
        check()
        operator = None
        if x.shape[0] != 0:
            choices = _Choices(x, units)
            choices.small("channel_stats", "finalize_forward")
            for geometry in (*choices.convolutions, *choices.shortcuts):
                if geometry is not None:
                    choices.forward(geometry)
            operator = choices.operator("residual_units_forward")
        known = dispatch.keep(key, (operator,))
    return known[0]


class UnitMask:
    """residual_unit_backward's output_mask by name: x; the BatchNorms, weights and biases in order; the
    shortcut's weight and bias."""

    def __init__(self, mask: Sequence[bool], n: int):
        self.x = mask[0]
        self.bns, self.weights, self.biases = (mask[1 + i * n : 1 + (i + 1) * n] for i in range(3))
        self.shortcut_weight, self.shortcut_bias = mask[3 * n + 1 :]

    def below(self, i: int) -> bool:
        """Whether anything that convolution i's input depends on needs a gradient."""
        return self.x or any(self.bns[: i + 1]) or any(self.weights[:i]) or any(self.biases[:i])

    def parameters(self) -> list[bool]:
        """residual_units_backward's output_mask: both parameters of every BatchNorm where one is needed."""
        rest = (*self.weights, *self.biases, self.shortcut_weight, self.shortcut_bias)
        return [self.x, *self.bns, *self.bns, *rest]


class UnitsMask:
    """residual_units_backward's output_mask: x; weights and biases of the BatchNorms, of the convolutions; of
    the shortcuts, one for each unit."""

    def __init__(self, mask: Sequence[bool], lengths: Sequence[int]):
        n, count = sum(lengths), len(lengths)
        self._lengths = lengths
        self.x = mask[0]
        gammas, betas, self.weights, self.biases = (mask[1 + i * n : 1 + (i + 1) * n] for i in range(4))
        self.bns = [gamma or beta for gamma, beta in zip(gammas, betas, strict=True)]
        self.shortcut_weights, self.shortcut_biases = mask[4 * n + 1 : -count], mask[-count:]

    def unit(self, u: int) -> list[bool]:
        """That of residual_unit_backward, for one unit: its x needs a gradient if anything does that it
        depends on."""
        start = sum(self._lengths[:u])
        own = slice(start, start + self._lengths[u])
        lists = (self.bns, self.weights, self.biases)
        shortcuts = (self.shortcut_weights, self.shortcut_biases)
        below = self.x or any(any(m[:start]) for m in lists) or any(any(m[:u]) for m in shortcuts)
        return [below, *(needed for m in lists for needed in m[own]), *(m[u] for m in shortcuts)]


def backward_operator(
    key: tuple,
    x: Tensor,
    units: UnitShapes,
    output_mask: Sequence[bool],
    numbers: tuple[float, Sequence[bool], Sequence[float]],
) -> tuple[Callable | None, Tensor | None]:
    """The operator for the backward of units that x went through or None, and its argument ``options``.

    Args:
        key: what the answer is kept under; it begins with "residual_units_backward".
        output_mask: as :class:`UnitsMask` has it.
        numbers: negative_slope, training and eps, as :func:`options` takes them.
    """
    if dispatch.is_recorded() or torch._C._is_tracing():
        return None, None
    known = dispatch.kept(key)
    if known is None:
        operator, combined = _choose_backward(x, units, UnitsMask(output_mask, units.lengths))
        given = None if operator is None else options(*numbers, units, output_mask, combined)
        known = dispatch.keep(key, (operator, given))
    return known if is_allowed(known[0], x) else (None, None)


def _choose_backward(x: Tensor, units: UnitShapes, mask: UnitsMask) -> tuple[Callable | None, list[bool]]:
    weights, biases = (*mask.weights, *mask.shortcut_weights), (*mask.biases, *mask.shortcut_biases)
    # A bias' gradient without the weight's is no primitive.
    if x.shape[0] == 0 or any(b and not w for w, b in zip(weights, biases, strict=True)):
        return None, []
    choices = _Choices(x, units)
    choices.small("finalize_backward", "preact_apply")
    combined, of_shortcuts, at = [], [], 0
    for u, n in enumerate(units.lengths):
        own = UnitMask(mask.unit(u), n)
        for i, geometry in enumerate(choices.convolutions[at : at + n]):
            combined.append(choices.backward(geometry, own.below(i), own.weights[i]))
        shortcut = choices.shortcuts[u]  # reads what the first convolution reads
        of_shortcuts.append(
            shortcut is not None and choices.backward(shortcut, own.below(0), own.shortcut_weight)
        )
        at += n
    return choices.operator("residual_units_backward"), combined + of_shortcuts


def kept_operators() -> tuple[int, int]:
    """How many kinds of units or rows of units, forward and backward apart, run by one operator, and how many
    kinds there have been since the backend was last chosen."""
    kept = dispatch.all_kept("residual_units_")
    return sum(value[0] is not None for value in kept), len(kept)
