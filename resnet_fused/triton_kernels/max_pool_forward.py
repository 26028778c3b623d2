"""max_pool_forward: the largest element of each window, and which position it had there, in a byte."""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from .elementwise import tiling
from .geometry import Convolution, window_geometry
from .launch import PLANS, Launch, Target, on_device_of, target


@triton.jit(do_not_specialize=["h", "w", "p", "q", "pixels", "steps", "c_units"])
def max_pool_forward_kernel(
    x_ptr, y_ptr, offsets_ptr,
    h, w, p, q, pixels, steps, c_units,
    R: tl.constexpr, S: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    C_UNIT: tl.constexpr, WIDE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    channels = c_units * C_UNIT
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_c = c < channels
    first = tl.program_id(0) * steps
    for step in range(first, tl.minimum(first + steps, tl.cdiv(pixels, BLOCK_M))):
        m = step * BLOCK_M + tl.arange(0, BLOCK_M)  # outputs
        in_m = m < pixels
        line = m // q
        image = line // p
        top = (line - image * p) * STRIDE_H - PAD_H
        left = (m - line * q) * STRIDE_W - PAD_W
        best = tl.full((BLOCK_M, BLOCK_C), float("-inf"), tl.float32)
        # The first position inside stands where no element is larger than -inf.
        outside = tl.maximum(-top, 0) * S + tl.maximum(-left, 0)
        taken = tl.broadcast_to(outside[:, None], (BLOCK_M, BLOCK_C))
        for tap in range(R * S):
            row = top + tap // S
            column = left + tap % S
            inside = in_m & (row >= 0) & (row < h) & (column >= 0) & (column < w)
            at = (image * h + row) * w + column
            at = at.to(tl.int64) if WIDE else at
            mask = inside[:, None] & in_c[None, :]
            value = tl.load(x_ptr + at[:, None] * channels + c[None, :], mask=mask, other=float("-inf"))
            value = value.to(tl.float32)
            larger = (value > best) | (value != value)
            best = tl.where(larger, value, best)
            taken = tl.where(larger, tap, taken)
        out = m.to(tl.int64) if WIDE else m
        out = out[:, None] * channels + c[None, :]
        mask = in_m[:, None] & in_c[None, :]
        tl.store(y_ptr + out, best.to(y_ptr.dtype.element_ty), mask=mask)
        tl.store(offsets_ptr + out, taken.to(tl.uint8), mask=mask)


class Plan:
    """The launch of one problem."""

    def __init__(self, on: Target, dtype: torch.dtype, g: Convolution):
        t = tiling(on, "max_pool_forward", dtype, g.y_shape, reduces=False)
        unit, wide, *block = t.constants
        self.main = Launch(
            max_pool_forward_kernel,
            t.grid,
            (dtype, dtype, torch.uint8),
            (g.h, g.w, g.p, g.q, *t.scalars),
            (*g.constants[:6], unit, wide or g.wide, *block),
            **t.options,
        )

    def launches(self) -> list[Launch]:
        return [self.main]


@functools.lru_cache(maxsize=PLANS)
def _plan(device, dtype, *geometry) -> Plan:
    return Plan(target(device), dtype, window_geometry(*geometry))


def max_pool_forward(x: Tensor, kernel_size, stride, padding) -> tuple[Tensor, Tensor]:
    """See ``primitives.max_pool_forward``."""
    windows = tuple(kernel_size), tuple(stride), tuple(padding)
    shape = window_geometry(x.shape, *windows).y_shape
    y, offsets = (
        torch.empty(shape, dtype=dtype, device=x.device, memory_format=torch.channels_last)
        for dtype in (x.dtype, torch.uint8)
    )
    if x.numel() != 0:
        with on_device_of(x):
            _plan(x.device, x.dtype, x.shape, *windows).main(x, y, offsets)
    return y, offsets
