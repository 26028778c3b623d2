"""preact_apply: BatchNorm's input gradient and the skip connection's addition in one pass."""

from torch import Tensor

from . import checks, dispatch, reference
from .layout import channels_last, empty
from .registration import define_primitive

dispatch.register("preact_apply", reference=reference.preact_apply)


def preact_apply(dz: Tensor, x: Tensor, coefficients: Tensor, dskip: Tensor | None) -> Tensor:
    """dx = dskip + A*dz + B*(x - mean) + C, rounded once.

    Args:
        dz, x, dskip: [N, C, H, W], one dtype, dense channels_last; dskip is the identity shortcut's gradient,
            or None.
        coefficients: acc [4, C] of finalize_backward: A, B, C, mean.
    """
    return dispatch.select("preact_apply", x)(dz, x, coefficients, dskip)


def _kernel(dz, x, coefficients, dskip):
    checks.activation(x)
    checks.like(dz, "dz", x)
    checks.like(dskip, "dskip", x)
    coefficients = checks.rows(coefficients, "coefficients", 4, x.shape[1], x)
    dskip = None if dskip is None else channels_last(dskip)
    return preact_apply(channels_last(dz), channels_last(x), coefficients, dskip)


define_primitive(
    "preact_apply(Tensor dz, Tensor x, Tensor coefficients, Tensor? dskip) -> Tensor",
    _kernel,
    lambda dz, x, coefficients, dskip: empty(x.shape, x),
)
