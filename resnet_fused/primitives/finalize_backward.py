"""finalize_backward: from BatchNorm's two sums to the coefficients of its input gradient."""

import torch
from torch import Tensor

from . import checks, dispatch, reference
from .registration import define_primitive

dispatch.register("finalize_backward", reference=reference.finalize_backward)


def finalize_backward(sums: Tensor, bn: Tensor, count: int, training: bool) -> Tensor:
    """Coefficients of dx = A*dz + B*(x - mean) + C.

    With batch statistics (training) the mean and the variance depend on x (Ioffe & Szegedy 2015, section 3):
    A = scale, B = -scale * invstd * sum(dz * xhat) / count, C = -scale * sum(dz) / count.
    Else A = scale, B = C = 0.

    Args:
        sums: acc [2, C] of preact_conv_dgrad; bn: acc [4, C] of finalize_forward; count: N*H*W of x.

    Returns:
        acc [4, C]: A, B, C, mean.
    """
    return dispatch.select("finalize_backward", sums)(sums, bn, count, training)


def _kernel(sums, bn, count, training):
    if bn.dim() != 2:
        raise RuntimeError(f"expected 2D bn (got {bn.dim()}D bn)")
    bn = checks.rows(bn, "bn", 4, bn.shape[1], bn)
    return finalize_backward(checks.rows(sums, "sums", 2, bn.shape[1], bn), bn, count, training)


define_primitive(
    "finalize_backward(Tensor sums, Tensor bn, int count, bool training) -> Tensor",
    _kernel,
    lambda sums, bn, count, training: torch.empty(4, bn.shape[1], dtype=bn.dtype, device=bn.device),
)
