"""bn_act_pool_forward: normalise, activate and take the mean over each image's pixels (global average
pooling, Lin et al. 2013), the end of a pre-activation net."""

from torch import Tensor

from . import checks, dispatch, reference
from .layout import channels_last, empty
from .registration import define_primitive

dispatch.register("bn_act_pool_forward", reference=reference.bn_act_pool_forward)


def bn_act_pool_forward(x: Tensor, bn: Tensor, slope: float) -> Tensor:
    """y = the mean over h and w of act(x * scale + shift), in the acc dtype, rounded once.

    Args:
        x: [N, C, H, W], dense channels_last; H and W not 0.
        bn: acc [4, C] of finalize_forward.

    Returns:
        [N, C, 1, 1] in x's dtype.
    """
    return dispatch.select("bn_act_pool_forward", x)(x, bn, slope)


def _kernel(x, bn, slope):
    checks.pooled(x)
    return bn_act_pool_forward(channels_last(x), checks.rows(bn, "bn", 4, x.shape[1], x), slope)


define_primitive(
    "bn_act_pool_forward(Tensor x, Tensor bn, float slope) -> Tensor",
    _kernel,
    lambda x, bn, slope: empty((*x.shape[:2], 1, 1), x),
)
