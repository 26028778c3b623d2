"""The gradients of one pre-activation convolution, by the primitives that the backend has for them."""

from torch import Tensor

from resnet_fused import primitives
from resnet_fused.primitives.preact_conv_backward_1x1 import has_kernel
from resnet_fused.primitives.reference import bias_gradient


def convolution_gradients(
    dy: Tensor,
    x: Tensor,
    bn: Tensor,
    weight: Tensor,
    dz_in: Tensor | None,
    dz_in_sums: Tensor | None,
    slope: float,
    geometry: tuple,
    need_dz: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor, Tensor]:
    """Of conv(act(bn(x))), given dy.

    Args:
        dz_in: another gradient of the pre-activation, to which this one is added.
        dz_in_sums: its sums, or None if they are not known.
        geometry: stride, padding, dilation, groups.

    Returns:
        dz and BatchNorm's sums, None if not needed; dweight and dbias, of size 0 if not needed.
    """
    if need_dz and need_weight and has_kernel(x, weight, *geometry):
        return primitives.preact_conv_backward_1x1(dy, weight, x, bn, dz_in, slope, need_bias)
    dz = sums = None
    if need_weight:
        dweight, dbias = primitives.preact_conv_wgrad(dy, x, bn, weight, slope, *geometry, need_bias)
    else:
        dweight = weight.new_empty(0)
        dbias = bias_gradient(dy, weight) if need_bias else weight.new_empty(0)
    if need_dz:
        dz, sums = primitives.preact_conv_dgrad(dy, weight, x, bn, dz_in, slope, *geometry, dz_in_sums)
    return dz, sums, dweight, dbias
