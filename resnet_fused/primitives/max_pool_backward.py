"""max_pool_backward: the input gradient of max pooling, from the positions that forward took."""

from torch import Tensor

from . import checks, dispatch, reference
from .layout import channels_last, empty
from .registration import define_primitive

dispatch.register("max_pool_backward", reference=reference.max_pool_backward)


def max_pool_backward(dy: Tensor, offsets: Tensor, input_size, kernel_size, stride, padding) -> Tensor:
    """dx: each gradient at the position that its window took; where windows overlap, their sum in the order
    of (p, q), in the acc dtype and rounded once.

    Args:
        dy: [N, C, P, Q], dense channels_last.
        offsets: of max_pool_forward.
        input_size: H and W of x.
        kernel_size, stride, padding: as in forward.

    Returns:
        [N, C, H, W] in dy's dtype, channels_last.
    """
    return dispatch.select("max_pool_backward", dy)(dy, offsets, input_size, kernel_size, stride, padding)


def _kernel(dy, offsets, input_size, kernel_size, stride, padding):
    checks.activation(dy, "dy")
    size = checks.pool_geometry((*dy.shape[:2], *input_size), kernel_size, stride, padding)
    checks.like(dy, "dy", dy, size, "y")
    checks.offsets(offsets, size, dy)
    return max_pool_backward(
        channels_last(dy), channels_last(offsets), input_size, kernel_size, stride, padding
    )


define_primitive(
    "max_pool_backward(Tensor dy, Tensor offsets, SymInt[2] input_size, int[2] kernel_size, int[2] stride, "
    "int[2] padding) -> Tensor",
    _kernel,
    lambda dy, offsets, input_size, *_: empty((*dy.shape[:2], *input_size), dy),
)
