"""bn_act_backward: act's backward and BatchNorm's two sums, the elementwise half of the unfused backward."""

import torch
from torch import Tensor

from . import checks, dispatch, reference
from .layout import channels_last, empty
from .registration import define_primitive

dispatch.register("bn_act_backward", reference=reference.bn_act_backward)


def bn_act_backward(
    da: Tensor, x: Tensor, bn: Tensor, dz_in: Tensor | None, slope: float
) -> tuple[Tensor, Tensor]:
    """dz = da * act'(z) (+ dz_in), with the mask recomputed from x.

    Args:
        da, x, dz_in: [N, C, H, W], dense channels_last, one dtype.
        bn: acc [4, C] of finalize_forward.

    Returns:
        dz in x's dtype, and sums, acc [2, C]: sum(dz) and sum(dz * xhat), xhat = (x - mean) * invstd, of dz
        as rounded.
    """
    return dispatch.select("bn_act_backward", x)(da, x, bn, dz_in, slope)


def _kernel(da, x, bn, dz_in, slope):
    checks.activation(x)
    checks.like(da, "da", x)
    checks.like(dz_in, "dz_in", x)
    bn = checks.rows(bn, "bn", 4, x.shape[1], x)
    return bn_act_backward(
        channels_last(da), channels_last(x), bn, None if dz_in is None else channels_last(dz_in), slope
    )


def _fake(da, x, bn, dz_in, slope):
    return empty(x.shape, x), torch.empty(2, x.shape[1], dtype=bn.dtype, device=x.device)


define_primitive(
    "bn_act_backward(Tensor da, Tensor x, Tensor bn, Tensor? dz_in, float slope) -> (Tensor dz, Tensor sums)",
    _kernel,
    _fake,
)
