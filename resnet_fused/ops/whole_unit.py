"""A whole residual unit by one C++ operator (csrc/ops/residual_unit.h), forward or backward, where one C++ backend
would run every primitive of it. Python's own sequence costs as much time as the kernels of a small unit.

What it gives is what the sequence in residual_unit.py and residual_unit_backward.py gives, to the bit.
"""

from collections.abc import Callable

import torch

from resnet_fused import cuda_kernels
from resnet_fused.primitives import dispatch
from resnet_fused.primitives.layout import acc_dtype, convolution_output_shape

def _key(direction: str, a) -> tuple:
    """All that a choice of backends can depend on."""
    x, shortcut = a.x, a.shortcut_weight
    return (
        direction, x.dtype, x.device, x.shape, *[w.shape for w in a.weights],
        None if shortcut is None else shortcut.shape, *a.strides, *a.paddings, *a.dilations, *a.groups,
        *a.shortcut_stride,
    )  # fmt: skip


class _Choices:
    """What dispatch says of the primitives of one unit."""

    def __init__(self, a):
        self._device, self._dtype = a.x.device.type, a.x.dtype
        self.backends: set[str] = set()
        self.convolutions = []
        shape = tuple(a.x.shape)
        pairs = [
            [tuple(values[2 * i : 2 * i + 2]) for values in (a.strides, a.paddings, a.dilations)]
            for i in range(len(a.weights))
        ]
        shapes = [shape]
        for weight, geometry, groups in zip(a.weights, pairs, a.groups, strict=True):
            self.convolutions.append(dispatch.ConvGeometry(shapes[-1], tuple(weight.shape), *geometry, groups))
            shapes.append(convolution_output_shape(shapes[-1], weight, *geometry))
        if a.shortcut_weight is not None:
            size = tuple(a.shortcut_weight.shape)
            stride = tuple(a.shortcut_stride)
            self.convolutions.append(dispatch.ConvGeometry(shape, size, stride, (0, 0), (1, 1), 1))

    def small(self, *primitives: str) -> None:
        for primitive in primitives:
            dtype = acc_dtype(self._dtype) if primitive.startswith("finalize") else self._dtype
            self.backends.add(dispatch.choose(primitive, self._device, dtype).backend)

    def convolution(self, primitive: str, geometry) -> None:
        self.backends.add(dispatch.choose(primitive, self._device, self._dtype, geometry).backend)

    def combined(self, geometry) -> bool:
        """Whether one kernel of ours makes both gradients."""
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


def _allowed(operator: Callable | None, x: torch.Tensor) -> bool:
    # The user can forbid TF32 at any time; a choice of backend is kept.
    return operator is not None and not (
        x.is_cuda and x.dtype is torch.float32 and not cuda_kernels.tf32_allowed()
    )


def forward_operator(a, check: Callable[[], object]) -> Callable | None:
    """The operator for the arguments of residual_unit, or None: Python's sequence is to run.

    Args:
        check: raises where the arguments do not fit; called where the answer is not known yet.
    """
    if dispatch.is_recorded():
        return None
    key = _key("residual_unit_forward", a)
    known = dispatch.kept(key)
    if known is None:
        check()
        operator = None
        if a.x.shape[0] != 0:
            choices = _Choices(a)
            choices.small("channel_stats", "finalize_forward")
            for geometry in choices.convolutions:
                choices.convolution("preact_conv_forward", geometry)
            operator = choices.operator("residual_unit_forward")
        known = dispatch.keep(key, (operator,))
    (operator,) = known
    return operator if _allowed(operator, a.x) else None


def backward_operator(a, mask) -> tuple[Callable | None, list[bool]]:
    """The operator for the arguments of residual_unit_backward or None, and its argument ``combined``."""
    if dispatch.is_recorded():
        return None, []
    key = (*_key("residual_unit_backward", a), *a.output_mask)
    known = dispatch.kept(key)
    if known is None:
        n, operator, combined = len(a.weights), None, []
        weights, biases = [*mask.weights, mask.shortcut_weight], [*mask.biases, mask.shortcut_bias]
        # A bias' gradient without the weight's is no primitive.
        if a.x.shape[0] != 0 and all(w or not b for w, b in zip(weights, biases, strict=True)):
            choices = _Choices(a)
            choices.small("finalize_backward", "preact_apply")
            for i, geometry in enumerate(choices.convolutions):
                below = mask.below(i % n)  # the shortcut reads what the first convolution reads
                both = below and weights[i] and choices.combined(geometry)
                combined.append(both)
                if below and not both:
                    choices.convolution("preact_conv_dgrad", geometry)
                if weights[i] and not both:
                    choices.convolution("preact_conv_wgrad", geometry)
            operator = choices.operator("residual_unit_backward")
        known = dispatch.keep(key, (operator, combined))
    operator, combined = known
    return (operator if _allowed(operator, a.x) else None), combined


def kept_operators() -> tuple[int, int]:
    """How many kinds of units, forward and backward apart, run by one operator, and how many kinds there have been
    since the backend was last chosen."""
    kept = dispatch.all_kept("residual_unit_")
    return sum(value[0] is not None for value in kept), len(kept)
