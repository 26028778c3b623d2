"""Checks of the differentiable operators' arguments: once per operator, before anything is allocated.

Exception types and wording are PyTorch's own for the same mistake in nn.BatchNorm2d and nn.Conv2d. Shapes are
passed rather than tensors where a tensor is still to be computed, so that real and fake kernels share every
check.
"""

import torch
from torch import Tensor

from resnet_fused.primitives.checks import MOST_POSITIONS
from resnet_fused.primitives.layout import acc_dtype, convolution_output_size, pool_output_shape

_TYPE_NAMES = {
    torch.float32: "float",
    torch.float64: "double",
    torch.bfloat16: "c10::BFloat16",
    torch.float16: "c10::Half",
}


def _type_name(dtype: torch.dtype) -> str:
    return _TYPE_NAMES.get(dtype, str(dtype))


def device(t: Tensor, expected: torch.device) -> None:
    if t.device != expected:
        raise RuntimeError(
            "Expected all tensors to be on the same device, but found at least two devices, "
            f"{expected} and {t.device}!"
        )


def activation(x: Tensor, operator: str) -> None:
    """x is an activation: 4-D and of a floating dtype that the kernels know."""
    if x.dim() != 4:
        raise ValueError(f"expected 4D input (got {x.dim()}D input)")
    if x.dtype not in _TYPE_NAMES:
        raise NotImplementedError(
            f"\"{operator}\" not implemented for '{str(x.dtype).removeprefix('torch.')}'"
        )


def mean_over_pixels(x: Tensor, operator: str) -> None:
    """The images of an activation have pixels to take a mean of."""
    if min(x.shape[2:]) < 1:
        raise RuntimeError(
            f"{operator}: expected input to have non-zero spatial size for global_avg_pool, but input has "
            f"sizes {list(x.shape)}"
        )


def batch_norm(
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    on: torch.device,
    stats: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    eps: float,
) -> None:
    """One BatchNorm of an input of the given shape; training: it uses batch statistics."""
    n, c, h, w = shape
    if training:
        if n * h * w == 1:
            raise ValueError(
                f"Expected more than 1 value per channel when training, got input size {torch.Size(shape)}"
            )
        if eps <= 0.0:
            raise ValueError(f"batch_norm eps must be positive during training, but got {eps}")
    elif eps < 0.0:
        raise ValueError(f"batch_norm eps must be non-negative, but got {eps}")
    if (running_mean is None) != (running_var is None) and training:
        raise ValueError("running_mean and running_var must either both be None or neither be None")
    acc = acc_dtype(dtype)
    for name, t in (
        ("running_mean", running_mean),
        ("running_var", running_var),
        ("weight", weight),
        ("bias", bias),
    ):
        if t is None:
            if not training and name.startswith("running"):
                raise RuntimeError(f"{name} must be defined in evaluation mode")
            continue
        if t.dim() != 1 or t.shape[0] != c:
            raise RuntimeError(f"{name} should contain {c} elements not {t.numel()}")
        if t.dtype is not acc and t.dtype is not dtype:
            raise RuntimeError(
                f"Input type ({_type_name(dtype)}) and batch norm {name} type ({_type_name(t.dtype)}) "
                f"should be the same, or {name} of type {_type_name(acc)}"
            )
        device(t, on)
    if stats is not None:
        if stats.dim() != 2 or stats.shape[0] != 2 or stats.shape[1] != c:
            raise RuntimeError(f"x_stats should be of size [2, {c}], but got {list(stats.shape)}")
        if stats.dtype is not acc:
            raise RuntimeError(
                f"expected x_stats of type {_type_name(acc)}, but got {_type_name(stats.dtype)}"
            )
        device(stats, on)


def convolution(
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    on: torch.device,
    weight: Tensor,
    bias: Tensor | None,
    stride,
    padding,
    dilation,
    groups: int,
) -> tuple[int, int, int, int]:
    """One convolution of an input of the given shape; returns the shape of its output."""
    for name, values, least in (("stride", stride, 1), ("padding", padding, 0), ("dilation", dilation, 1)):
        if len(values) != 2:
            raise RuntimeError(
                f"expected {name} to be a single integer value or a list of 2 values to match the "
                f"convolution dimensions, but got {name}={list(values)}"
            )
        if values[0] < least or values[1] < least:
            raise RuntimeError(f"{'negative' if least == 0 else 'non-positive'} {name} is not supported")
    if groups < 1:
        raise RuntimeError("non-positive groups is not supported")
    size = list(weight.shape)
    if len(size) != 4:
        raise RuntimeError(
            f"expected a 4-dimensional weight for a 4-dimensional input, but got weight of size {size}"
        )
    if size[0] < groups:
        raise RuntimeError(
            f"Given groups={groups}, expected weight to be at least {groups} at dimension 0, but got "
            f"weight of size {size} instead"
        )
    if size[0] % groups != 0:
        raise RuntimeError(
            f"Given groups={groups}, expected weight to be divisible by {groups} at dimension 0, but got "
            f"weight of size {size} instead"
        )
    n, c, h, w = shape
    if c != size[1] * groups:
        raise RuntimeError(
            f"Given groups={groups}, weight of size {size}, expected input{list(shape)} to have "
            f"{size[1] * groups} channels, but got {c} channels instead"
        )
    acc = acc_dtype(dtype)
    if weight.dtype is not dtype and weight.dtype is not acc:
        raise RuntimeError(
            f"Input type ({_type_name(dtype)}) and weight type ({_type_name(weight.dtype)}) should be the "
            "same"
        )
    device(weight, on)
    if bias is not None:
        if bias.dim() != 1 or bias.shape[0] != size[0]:
            raise RuntimeError(
                f"Given weight of size {size}, expected bias to be 1-dimensional with {size[0]} elements, "
                f"but got bias of size {list(bias.shape)} instead"
            )
        if bias.dtype is not dtype and bias.dtype is not acc:
            raise RuntimeError(
                f"Input type ({_type_name(dtype)}) and bias type ({_type_name(bias.dtype)}) should be the "
                "same"
            )
        device(bias, on)
    extent = (dilation[0] * (size[2] - 1) + 1, dilation[1] * (size[3] - 1) + 1)
    padded = (h + 2 * padding[0], w + 2 * padding[1])
    if padded[0] < extent[0] or padded[1] < extent[1]:
        raise RuntimeError(
            f"Calculated padded input size per channel: ({padded[0]} x {padded[1]}). Kernel size: "
            f"({extent[0]} x {extent[1]}). Kernel size can't be greater than actual input size"
        )
    if n != 0 and (c == 0 or h == 0 or w == 0):
        raise RuntimeError(f"Only zero batch inputs are supported, but got input shape: {list(shape)}")
    return (
        n,
        size[0],
        convolution_output_size(h, size[2], stride[0], padding[0], dilation[0]),
        convolution_output_size(w, size[3], stride[1], padding[1], dilation[1]),
    )


def same_size(a: tuple[int, ...], b: tuple[int, ...]) -> None:
    """The operands of an addition have one shape (no broadcasting)."""
    if len(a) != len(b):
        raise RuntimeError(f"expected tensors of one size, but got {list(a)} and {list(b)}")
    for d, (i, j) in enumerate(zip(a, b, strict=True)):
        if i != j:
            raise RuntimeError(
                f"The size of tensor a ({i}) must match the size of tensor b ({j}) at non-singleton "
                f"dimension {d}"
            )


def addend(t: Tensor, name: str, shape: tuple[int, ...], dtype: torch.dtype, on: torch.device) -> None:
    """t can be added to an activation of the given shape, dtype and device."""
    same_size(shape, t.shape)
    if t.dtype is not dtype:
        raise RuntimeError(
            f"Input type ({_type_name(dtype)}) and {name} type ({_type_name(t.dtype)}) should be the same"
        )
    device(t, on)


def acc_operand(t: Tensor, name: str, shapes: tuple[tuple[int, ...], ...], x: Tensor) -> None:
    """t is a small acc-dtype operand of one of the given shapes."""
    if tuple(t.shape) not in shapes:
        sizes = " or ".join(str(list(s)) for s in shapes)
        raise RuntimeError(f"{name} should be of size {sizes}, but got {list(t.shape)}")
    if t.dtype is not acc_dtype(x.dtype):
        raise RuntimeError(
            f"expected {name} of type {_type_name(acc_dtype(x.dtype))}, but got {_type_name(t.dtype)}"
        )
    device(t, x.device)


def max_pool(x: Tensor, kernel_size, stride, padding) -> tuple[int, int, int, int]:
    """Max pooling of x; returns the shape of its output."""
    activation(x, "max_pool2d")
    (r, s), (dh, dw), (ph, pw) = kernel_size, stride, padding
    if dh == 0 or dw == 0:
        raise RuntimeError("stride should not be zero")
    if ph < 0 or pw < 0:
        raise RuntimeError(f"pad must be non-negative, but got pad: {min(ph, pw)}")
    if r < 1 or s < 1:
        raise RuntimeError(f"kernel size should be greater than zero, but got kH: {r} kW: {s}")
    if dh < 0 or dw < 0:
        raise RuntimeError(f"stride should be greater than zero, but got dH: {dh} dW: {dw}")
    for pad, kernel in ((ph, r), (pw, s)):
        if pad > kernel // 2:
            raise RuntimeError(
                f"pad should be at most half of effective kernel size, but got pad={pad}, "
                f"kernel_size={kernel} and dilation=1"
            )
    if r * s > MOST_POSITIONS:
        raise RuntimeError(
            f"expected kernel_size of at most {MOST_POSITIONS} positions, but got {tuple(kernel_size)}: a "
            "position is kept as a byte"
        )
    n, c, h, w = x.shape
    if c == 0 or h == 0 or w == 0:
        raise RuntimeError(
            "Expected 3D or 4D (batch mode) tensor with optional 0 dim batch size for input, but got:"
            f"{list(x.shape)}"
        )
    size = pool_output_shape(x.shape, kernel_size, stride, padding)
    if size[2] < 1 or size[3] < 1:
        raise RuntimeError(
            f"Given input size: ({c}x{h}x{w}). Calculated output size: ({c}x{max(size[2], 0)}x"
            f"{max(size[3], 0)}). Output size is too small"
        )
    return size
