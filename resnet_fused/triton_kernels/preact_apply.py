"""preact_apply: dx = dskip + A*dz + B*(x - mean) + C, BatchNorm's input gradient and the skip's addition in
one pass."""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from .elementwise import tiling
from .launch import PLANS, Launch, Target, on_device_of, target


@triton.jit(do_not_specialize=["pixels", "steps", "c_units"])
def preact_apply_kernel(
    dz_ptr, x_ptr,
    coefficients_ptr,  # [4, channels]: A, B, C, mean
    dskip_ptr, dx_ptr,
    pixels, steps, c_units,
    DSKIP: tl.constexpr,
    C_UNIT: tl.constexpr, WIDE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    channels = c_units * C_UNIT
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_c = c < channels
    of_dz = tl.load(coefficients_ptr + c, mask=in_c, other=0.0)
    of_x = tl.load(coefficients_ptr + channels + c, mask=in_c, other=0.0)
    constant = tl.load(coefficients_ptr + 2 * channels + c, mask=in_c, other=0.0)
    mean = tl.load(coefficients_ptr + 3 * channels + c, mask=in_c, other=0.0)
    first = tl.program_id(0) * steps
    for step in range(first, tl.minimum(first + steps, tl.cdiv(pixels, BLOCK_M))):
        m = step * BLOCK_M + tl.arange(0, BLOCK_M)
        row = m.to(tl.int64) if WIDE else m
        at = row[:, None] * channels + c[None, :]
        mask = (m < pixels)[:, None] & in_c[None, :]
        dz = tl.load(dz_ptr + at, mask=mask, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
        dx = of_dz[None, :] * dz + constant[None, :] + of_x[None, :] * (x - mean[None, :])
        if DSKIP:
            dx += tl.load(dskip_ptr + at, mask=mask, other=0.0).to(tl.float32)
        tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=mask)


class Plan:
    """The launch of one problem."""

    def __init__(self, on: Target, dtype: torch.dtype, shape: tuple[int, ...], dskip: bool):
        t = tiling(on, "preact_apply", dtype, shape, reduces=False)
        self.main = Launch(
            preact_apply_kernel,
            t.grid,
            (dtype, dtype, torch.float32, dtype if dskip else None, dtype),
            t.scalars,
            (dskip, *t.constants),
            **t.options,
        )

    def launches(self) -> list[Launch]:
        return [self.main]


@functools.lru_cache(maxsize=PLANS)
def _plan(device, *rest) -> Plan:
    return Plan(target(device), *rest)


def preact_apply(dz: Tensor, x: Tensor, coefficients: Tensor, dskip: Tensor | None) -> Tensor:
    """See ``primitives.preact_apply``."""
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    if x.numel() != 0:
        with on_device_of(x):
            plan = _plan(x.device, x.dtype, x.shape, dskip is not None)
            plan.main(dz, x, coefficients, dskip, dx)
    return dx
