"""bn_act_forward: normalise and activate, the elementwise half of the unfused forward path."""

from torch import Tensor

from . import checks, dispatch, reference
from .layout import channels_last, empty
from .registration import define_primitive

dispatch.register("bn_act_forward", reference=reference.bn_act_forward)


def bn_act_forward(x: Tensor, bn: Tensor, slope: float) -> Tensor:
    """a = act(x * scale + shift), act(z) = z > 0 ? z : slope * z (NaN stays NaN), rounded to x's dtype.

    Args:
        x: [N, C, H, W], dense channels_last.
        bn: acc [4, C] of finalize_forward.
    """
    return dispatch.select("bn_act_forward", x)(x, bn, slope)


def _kernel(x, bn, slope):
    checks.activation(x)
    return bn_act_forward(channels_last(x), checks.rows(bn, "bn", 4, x.shape[1], x), slope)


define_primitive(
    "bn_act_forward(Tensor x, Tensor bn, float slope) -> Tensor",
    _kernel,
    lambda x, bn, slope: empty(x.shape, x),
)
