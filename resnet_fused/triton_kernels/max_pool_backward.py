"""max_pool_backward: each input pixel gathers the gradients of the windows that took it."""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from .elementwise import tiling
from .geometry import Convolution, window_geometry
from .launch import PLANS, Launch, Target, on_device_of, target


@triton.jit(do_not_specialize=["h", "w", "p", "q", "pixels", "steps", "c_units"])
def max_pool_backward_kernel(
    dy_ptr, offsets_ptr, dx_ptr,
    h, w, p, q, pixels, steps, c_units,
    R: tl.constexpr, S: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    C_UNIT: tl.constexpr, WIDE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    channels = c_units * C_UNIT
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_c = c < channels
    # Windows over one input pixel, at most.
    ROWS: tl.constexpr = (R + STRIDE_H - 1) // STRIDE_H
    COLUMNS: tl.constexpr = (S + STRIDE_W - 1) // STRIDE_W
    first = tl.program_id(0) * steps
    for step in range(first, tl.minimum(first + steps, tl.cdiv(pixels, BLOCK_M))):
        m = step * BLOCK_M + tl.arange(0, BLOCK_M)  # inputs
        in_m = m < pixels
        line = m // w
        image = line // h
        row = line - image * h + PAD_H
        column = m - line * w + PAD_W
        first_p = tl.maximum(row - R + STRIDE_H, 0) // STRIDE_H
        first_q = tl.maximum(column - S + STRIDE_W, 0) // STRIDE_W
        total = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
        for window in range(ROWS * COLUMNS):  # in the order of (p, q)
            at_p = first_p + window // COLUMNS
            at_q = first_q + window % COLUMNS
            r = row - at_p * STRIDE_H
            s = column - at_q * STRIDE_W
            inside = in_m & (at_p < p) & (at_q < q) & (r >= 0) & (s >= 0)
            at = (image * p + at_p) * q + at_q
            at = at.to(tl.int64) if WIDE else at
            at = at[:, None] * channels + c[None, :]
            mask = inside[:, None] & in_c[None, :]
            taken = tl.load(offsets_ptr + at, mask=mask, other=0).to(tl.int32)
            gradient = tl.load(dy_ptr + at, mask=mask, other=0.0).to(tl.float32)
            total += tl.where(taken == (r * S + s)[:, None], gradient, 0.0)
        out = m.to(tl.int64) if WIDE else m
        mask = in_m[:, None] & in_c[None, :]
        tl.store(dx_ptr + out[:, None] * channels + c[None, :], total.to(dx_ptr.dtype.element_ty), mask=mask)


class Plan:
    """The launch of one problem."""

    def __init__(self, on: Target, dtype: torch.dtype, g: Convolution):
        t = tiling(on, "max_pool_backward", dtype, (g.n, g.c, g.h, g.w), reduces=False)
        unit, wide, *block = t.constants
        self.main = Launch(
            max_pool_backward_kernel,
            t.grid,
            (dtype, torch.uint8, dtype),
            (g.h, g.w, g.p, g.q, *t.scalars),
            (*g.constants[:6], unit, wide or g.wide, *block),
            **t.options,
        )

    def launches(self) -> list[Launch]:
        return [self.main]


@functools.lru_cache(maxsize=PLANS)
def _plan(device, dtype, *geometry) -> Plan:
    return Plan(target(device), dtype, window_geometry(*geometry))


def max_pool_backward(dy: Tensor, offsets: Tensor, input_size, kernel_size, stride, padding) -> Tensor:
    """See ``primitives.max_pool_backward``."""
    shape = (*dy.shape[:2], *input_size)
    dx = torch.empty(shape, dtype=dy.dtype, device=dy.device, memory_format=torch.channels_last)
    if dx.numel() != 0:
        windows = tuple(kernel_size), tuple(stride), tuple(padding)
        with on_device_of(dy):
            _plan(dy.device, dy.dtype, shape, *windows).main(dy, offsets, dx)
    return dx
