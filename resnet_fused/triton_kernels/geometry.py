"""The shape of one convolution, as the kernels' launchers use it."""

import functools
from typing import NamedTuple


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def next_power_of_two(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def channel_unit(channels: int) -> int:
    """The largest power of two up to 16 that divides a channel count: what the compiler may know about it.
    With 8 a row of 16-bit values can be read 16 bytes at a time."""
    return min(16, channels & -channels)


def magic_divisor(divisor: int) -> tuple[int, int]:
    """(magic, shift) such that n // divisor == (umulhi(n, magic) + n) >> shift for 0 <= n < 2**31 (Granlund
    and Montgomery 1994, "Division by Invariant Integers using Multiplication", figure 4.1). magic is returned
    as a signed 32-bit integer."""
    shift = (divisor - 1).bit_length()
    magic = ((1 << 32) * ((1 << shift) - divisor)) // divisor + 1
    return (magic - (1 << 32) if magic >= 1 << 31 else magic), shift


class Convolution(NamedTuple):
    """x [n, c, h, w], weight [k, c, r, s], y [n, k, p, q]; groups is 1."""

    n: int
    c: int
    h: int
    w: int
    k: int
    r: int
    s: int
    p: int
    q: int
    stride_h: int
    stride_w: int
    pad_h: int
    pad_w: int
    dilation_h: int
    dilation_w: int

    @staticmethod
    def of(x_shape, weight_shape, stride, padding, dilation) -> "Convolution":
        n, c, h, w = x_shape
        k, _, r, s = weight_shape
        p = (h + 2 * padding[0] - dilation[0] * (r - 1) - 1) // stride[0] + 1
        q = (w + 2 * padding[1] - dilation[1] * (s - 1) - 1) // stride[1] + 1
        return Convolution(n, c, h, w, k, r, s, p, q, *stride, *padding, *dilation)

    @property
    def y_shape(self) -> tuple[int, int, int, int]:
        return self.n, self.k, self.p, self.q

    @property
    def taps(self) -> int:
        return self.r * self.s

    @property
    def in_pixels(self) -> int:
        return self.n * self.h * self.w

    @property
    def out_pixels(self) -> int:
        return self.n * self.p * self.q

    @property
    def padded(self) -> bool:
        return self.pad_h > 0 or self.pad_w > 0

    @property
    def pointwise(self) -> bool:
        """1x1, stride 1, no padding: a plain matrix product over pixels."""
        return self.taps == 1 and self.stride_h == self.stride_w == 1 and not self.padded

    @property
    def wide(self) -> bool:
        """Whether an offset into x or y can pass 2**31 (with a margin for tiles that hang over the end)."""
        return max(self.in_pixels * self.c, self.out_pixels * self.k) >= 2**31 - 2**24

    @property
    def constants(self) -> tuple[int, ...]:
        """R, S, STRIDE_H, STRIDE_W, PAD_H, PAD_W, DILATION_H, DILATION_W: constexprs of every convolution
        kernel."""
        return (
            self.r,
            self.s,
            self.stride_h,
            self.stride_w,
            self.pad_h,
            self.pad_w,
            self.dilation_h,
            self.dilation_w,
        )


@functools.lru_cache(maxsize=4096)
def window_geometry(shape, kernel_size, stride, padding) -> Convolution:
    """The windows of a pooling of x: those of a convolution that keeps the channels."""
    return Convolution.of(shape, (shape[1], shape[1], *kernel_size), stride, padding, (1, 1))
