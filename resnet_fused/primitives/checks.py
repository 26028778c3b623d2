"""Checks of the registered primitives, ``torch.ops.resnet_fused.*``, which anyone can call: a kernel reads
what it was not given without noticing. The functions of this package skip them: the operators in ops/ have
checked their arguments once. The wording is that of the C++ operators."""

import torch
from torch import Tensor

from .layout import acc_dtype, convolution_output_shape, pool_output_shape

#: Positions of a pooling's window: one is kept as a byte.
MOST_POSITIONS = 256


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _on_device_of(t: Tensor, name: str, x: Tensor) -> None:
    if t.device != x.device:
        raise RuntimeError(f"expected {name} to be on {x.device}, but it is on {t.device}")


def activation(x: Tensor, name: str = "x") -> None:
    """x is 4-D and of a floating dtype."""
    if x.dim() != 4:
        raise RuntimeError(f"expected 4D {name} (got {x.dim()}D {name})")
    if not x.is_floating_point():
        raise RuntimeError(f"expected {name} to have a floating dtype, but got {_name(x.dtype)}")


def pooled(x: Tensor) -> None:
    """x is an activation whose images have a mean."""
    activation(x)
    if min(x.shape[2:]) < 1:
        raise RuntimeError(
            f"expected x with non-zero spatial size for its mean, but got {x.shape[2]}x{x.shape[3]}"
        )


def like(t: Tensor | None, name: str, x: Tensor, size=None, of: str = "x") -> None:
    """t, if given, has the dtype and device of the activation x, and its size or the given one."""
    if t is None:
        return
    _on_device_of(t, name, x)
    if t.dtype != x.dtype:
        raise RuntimeError(
            f"expected {name} to have the dtype of {of}, {_name(x.dtype)}, but got {_name(t.dtype)}"
        )
    size = tuple(x.shape if size is None else size)
    if t.shape != size:
        raise RuntimeError(f"expected {name} of size {list(size)} ({of}), but got {list(t.shape)}")


def rows(t: Tensor | None, name: str, count: int, columns: int, x: Tensor) -> Tensor | None:
    """t, if given, is [count, columns] in the acc dtype of x and on its device; returns it contiguous."""
    if t is None:
        return None
    _on_device_of(t, name, x)
    if t.dtype != acc_dtype(x.dtype):
        raise RuntimeError(
            f"expected {name} to have dtype {_name(acc_dtype(x.dtype))}, but got {_name(t.dtype)}"
        )
    if t.shape != (count, columns):
        raise RuntimeError(f"expected {name} of size [{count}, {columns}], but got {list(t.shape)}")
    return t.contiguous()


def vector(t: Tensor | None, name: str, length: int, x: Tensor) -> None:
    """t, if given, is [length], of a floating dtype and on x's device."""
    if t is None:
        return
    _on_device_of(t, name, x)
    if t.shape != (length,) or not t.is_floating_point():
        raise RuntimeError(
            f"expected {name} of size [{length}] and a floating dtype, but got {list(t.shape)} and "
            f"{_name(t.dtype)}"
        )


def convolution(x: Tensor, weight: Tensor, stride, padding, dilation, groups: int) -> tuple[int, ...]:
    """x, the weight and the geometry fit; returns the size of y."""
    activation(x)
    _on_device_of(weight, "weight", x)
    if weight.dim() != 4:
        raise RuntimeError(f"expected 4D weight (got {weight.dim()}D weight)")
    dtypes = dict.fromkeys((x.dtype, acc_dtype(x.dtype)))
    if weight.dtype not in dtypes:
        raise RuntimeError(
            f"expected weight to have dtype {' or '.join(map(_name, dtypes))}, but got {_name(weight.dtype)}"
        )
    if groups < 1 or weight.shape[0] % groups or weight.shape[1] * groups != x.shape[1]:
        raise RuntimeError(
            f"Given groups={groups}, weight of size {list(weight.shape)}, expected input{list(x.shape)} to "
            f"have {weight.shape[1] * groups} channels, but got {x.shape[1]} channels instead"
        )
    if min(stride) < 1:
        raise RuntimeError("non-positive stride is not supported")
    if min(padding) < 0:
        raise RuntimeError("negative padding is not supported")
    if min(dilation) < 1:
        raise RuntimeError("dilation should be greater than zero")
    size = convolution_output_shape(x.shape, weight.shape, stride, padding, dilation)
    if min(size[2:]) < 1:
        padded = " x ".join(str(e + 2 * p) for e, p in zip(x.shape[2:], padding, strict=True))
        kernel = (d * (k - 1) + 1 for k, d in zip(weight.shape[2:], dilation, strict=True))
        raise RuntimeError(
            f"Calculated padded input size per channel: ({padded}). Kernel size: "
            f"({' x '.join(map(str, kernel))}). Kernel size can't be greater than actual input size"
        )
    return size


def pool_geometry(shape, kernel_size, stride, padding) -> tuple[int, int, int, int]:
    """Windows fit an input of the given shape; returns the size of y."""
    (r, s), (dh, dw), (ph, pw) = kernel_size, stride, padding
    if min(r, s) < 1 or r * s > MOST_POSITIONS:
        raise RuntimeError(
            f"expected kernel_size of 1 to {MOST_POSITIONS} positions, but got {tuple(kernel_size)}"
        )
    if min(dh, dw) < 1:
        raise RuntimeError(f"stride should be greater than zero, but got dH: {dh} dW: {dw}")
    if min(ph, pw) < 0 or ph > r // 2 or pw > s // 2:
        raise RuntimeError(
            f"padding should be from 0 to half of the kernel size, but got padding {tuple(padding)} and "
            f"kernel_size {tuple(kernel_size)}"
        )
    size = pool_output_shape(shape, kernel_size, stride, padding)
    if min(size[2:]) < 1:
        c, h, w = shape[1:]
        raise RuntimeError(
            f"Given input size: ({c}x{h}x{w}). Calculated output size: ({c}x{max(size[2], 0)}x"
            f"{max(size[3], 0)}). Output size is too small"
        )
    return size


def pool(x: Tensor, kernel_size, stride, padding) -> tuple[int, int, int, int]:
    """x and the windows of a pooling fit; returns the size of y."""
    activation(x)
    return pool_geometry(x.shape, kernel_size, stride, padding)


def offsets(t: Tensor, size, x: Tensor) -> None:
    """t is what a pooling of that output size keeps, on x's device."""
    _on_device_of(t, "offsets", x)
    if t.dtype != torch.uint8:
        raise RuntimeError(f"expected offsets to have dtype uint8, but got {_name(t.dtype)}")
    if t.shape != size:
        raise RuntimeError(f"expected offsets of size {list(size)} (y), but got {list(t.shape)}")
