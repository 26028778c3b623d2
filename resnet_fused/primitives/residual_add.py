"""residual_add: the addition of a residual unit, with its scaling variants and the statistics of the sum.

The primitive and the forward of the differentiable operator are one operator, so its schema is in
ops/residual_add.py.
"""

from torch import Tensor

from . import dispatch, reference
from .layout import CHANNELS_LAST

dispatch.register("residual_add", reference=reference.residual_add)


def residual_add(
    x: Tensor,
    y: Tensor,
    affine: Tensor | None,
    gate: Tensor | None,
    alpha: float,
    slope: float | None,
    want_stats: bool,
) -> tuple[Tensor, Tensor]:
    """out = act(x + alpha * gate[n, c] * (affine[0, c] * y + affine[1, c])), rounded once.

    Args:
        x, y: [N, C, H, W], one dtype. The kernels take dense channels_last; other layouts are served by the
            reference.
        affine: acc [2, C], or None for the identity.
        gate: acc [N, C] or [N, 1], or None for 1.
        slope: negative slope of act, or None for no activation.

    Returns:
        out in x's dtype and memory format; stats of out as rounded, acc [2, C], or [0] if not wanted.
    """
    if x.is_contiguous(memory_format=CHANNELS_LAST) and y.is_contiguous(memory_format=CHANNELS_LAST):
        run = dispatch.select("residual_add", x)
    else:
        run = dispatch.select_reference("residual_add", x, "not channels_last")
    return run(x, y, affine, gate, alpha, slope, want_stats)
