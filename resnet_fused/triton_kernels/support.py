"""Which cases the Triton kernels take. No Triton is imported here."""

import torch

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
#: Kernels read bn as float32 and add in float32; a kernel's taps are unrolled into constants.
_MAX_TAPS = 49


def declines(primitive: str, dtype: torch.dtype, geometry=None) -> str | None:
    """Why the Triton kernels leave this case to the unfused path, or None if they take it.

    Args:
        primitive: a primitive's name, such as ``"preact_conv_forward"``.
        dtype: of the activations.
        geometry: for convolutions, anything with the fields of ``primitives.dispatch.ConvGeometry``.
    """
    if dtype not in _DTYPES:
        return f"the triton kernels do not take {dtype}"
    if geometry is None:
        return None
    if geometry.groups != 1:
        return f"the triton kernels do not take groups={geometry.groups}"
    n, c, h, w = geometry.input
    k, _, r, s = geometry.weight
    if r * s > _MAX_TAPS:
        return f"the triton kernels do not take {r}x{s} kernels"
    strided, dilated = max(geometry.stride) > 1, max(geometry.dilation) > 1
    if primitive in ("preact_conv_dgrad", "preact_conv_backward_1x1") and strided and dilated:
        return "the triton input gradient does not take stride and dilation together"
    pixels = n * (h + 2 * geometry.padding[0]) * (w + 2 * geometry.padding[1])
    if pixels >= 2**31 - 2**24:
        return f"the triton kernels count pixels in 32 bits, but there are {pixels}"
    if primitive == "preact_conv_backward_1x1":
        if r * s > 1 or strided or max(geometry.padding) > 0:
            return "one kernel for both gradients is for 1x1 convolutions with stride 1 and no padding"
        if k > (64 if dtype is torch.float32 else 256) or c > 512:
            return f"the weight gradient of {k} x {c} channels does not stay in registers"
        if c > 256 and k > 64:  # estimated: 430 us for 512 -> 128 at 28x28, apart 200-270; to be measured
            return f"one kernel for both gradients of {k} x {c} channels is expected to be slower than two"
        if c % 8 or k % 8:
            return f"{c} and {k} channels are not multiples of 8"
        if dtype is torch.float32 and torch.backends.cudnn.conv.fp32_precision != "tf32":
            return "one kernel for both gradients needs a matrix unit, and TF32 is not allowed"
    return None
