"""BatchNorm and activation inside a kernel, and the derivative's mask."""

import triton
import triton.language as tl

#: Values of the constexpr ACTIVATION.
NONE, RELU, LEAKY = 0, 1, 2


def kind(bn, slope: float) -> int:
    """The constexpr ACTIVATION for a bn that may be None and a negative slope."""
    return NONE if bn is None else RELU if slope == 0 else LEAKY


@triton.jit
def pre_activation(x, scale, shift):
    """z = fma(x, scale, shift) in float32. One expression for forward and backward: the mask must not flip in
    between."""
    return tl.fma(x.to(tl.float32), tl.broadcast_to(scale, x.shape), tl.broadcast_to(shift, x.shape))


@triton.jit
def rectify(z, slope, ACTIVATION: tl.constexpr):
    """act(z) in float32; NaN stays NaN, and ReLU(-inf) is 0."""
    if ACTIVATION == 1:
        z = tl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL)
    elif ACTIVATION == 2:
        z = tl.where(z > 0, z, z * slope)
    return z


@triton.jit
def activate(x, scale, shift, slope, ACTIVATION: tl.constexpr):
    """act(x * scale + shift) rounded to x's dtype; NaN stays NaN. scale and shift broadcast to x's shape."""
    if ACTIVATION == 0:
        a = x
    else:
        a = rectify(pre_activation(x, scale, shift), slope, ACTIVATION).to(x.dtype)
    return a


@triton.jit
def is_active(z, ACTIVATION: tl.constexpr):
    """Where act'(z) is 1 instead of the slope; where z is NaN as PyTorch has it for either activation."""
    if ACTIVATION == 1:
        active = (z <= 0) == 0
    else:
        active = z > 0
    return active


@triton.jit
def activation_gradient(z, da, slope, ACTIVATION: tl.constexpr):
    """da * act'(z)."""
    if ACTIVATION == 1:
        d = tl.where(is_active(z, ACTIVATION), da, 0.0)
    else:
        d = tl.where(is_active(z, ACTIVATION), da, da * slope)
    return d


@triton.jit
def operand(x, PRECISION: tl.constexpr):
    """x as a matrix product's operand. TF32: rounded to its 10 bits, ties away from zero, as ``cvt.rna.tf32``
    does; the matrix unit alone would cut the low bits off, every value towards 0."""
    if PRECISION == "tf32":
        bits = (x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000
        # A NaN's bits can be such that the sum is a number.
        x = tl.where(x == x, bits.to(tl.float32, bitcast=True), x)
    return x
