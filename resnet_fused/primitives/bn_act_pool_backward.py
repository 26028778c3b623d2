"""bn_act_pool_backward: the backward of bn_act_pool_forward up to BatchNorm, and BatchNorm's two sums."""

import torch
from torch import Tensor

from . import checks, dispatch, reference
from .layout import channels_last, empty
from .registration import define_primitive

dispatch.register("bn_act_pool_backward", reference=reference.bn_act_pool_backward)


def bn_act_pool_backward(dy: Tensor, x: Tensor, bn: Tensor, slope: float) -> tuple[Tensor, Tensor]:
    """dz = dy / (H * W) * act'(z), with the mask recomputed from x.

    Args:
        dy: [N, C, 1, 1] in x's dtype.
        x: [N, C, H, W], dense channels_last.
        bn: acc [4, C] of finalize_forward.

    Returns:
        dz and sums, as of bn_act_backward.
    """
    return dispatch.select("bn_act_pool_backward", x)(dy, x, bn, slope)


def _kernel(dy, x, bn, slope):
    checks.pooled(x)
    checks.like(dy, "dy", x, (*x.shape[:2], 1, 1), "y")
    bn = checks.rows(bn, "bn", 4, x.shape[1], x)
    return bn_act_pool_backward(channels_last(dy), channels_last(x), bn, slope)


define_primitive(
    "bn_act_pool_backward(Tensor dy, Tensor x, Tensor bn, float slope) -> (Tensor dz, Tensor sums)",
    _kernel,
    lambda dy, x, bn, slope: (
        empty(x.shape, x),
        torch.empty(2, x.shape[1], dtype=bn.dtype, device=x.device),
    ),
)
