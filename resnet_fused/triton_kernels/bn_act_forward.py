"""bn_act_forward: a = act(x * scale + shift), the elementwise half of the unfused forward path."""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activation import LEAKY, RELU, activate
from .elementwise import tiling
from .launch import PLANS, Launch, Target, on_device_of, target


@triton.jit(do_not_specialize=["slope", "pixels", "steps", "c_units"])
def bn_act_forward_kernel(
    x_ptr, bn_ptr, a_ptr,
    slope, pixels, steps, c_units,
    ACTIVATION: tl.constexpr,
    C_UNIT: tl.constexpr, WIDE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    channels = c_units * C_UNIT
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_c = c < channels
    scale = tl.load(bn_ptr + 2 * channels + c, mask=in_c, other=0.0)
    shift = tl.load(bn_ptr + 3 * channels + c, mask=in_c, other=0.0)
    first = tl.program_id(0) * steps
    for step in range(first, tl.minimum(first + steps, tl.cdiv(pixels, BLOCK_M))):
        m = step * BLOCK_M + tl.arange(0, BLOCK_M)
        row = m.to(tl.int64) if WIDE else m
        at = row[:, None] * channels + c[None, :]
        mask = (m < pixels)[:, None] & in_c[None, :]
        x = tl.load(x_ptr + at, mask=mask, other=0.0)
        tl.store(a_ptr + at, activate(x, scale[None, :], shift[None, :], slope, ACTIVATION), mask=mask)


class Plan:
    """The launch of one problem."""

    def __init__(self, on: Target, dtype: torch.dtype, shape: tuple[int, ...], slope: float):
        t = tiling(on, "bn_act_forward", dtype, shape, reduces=False)
        self.main = Launch(
            bn_act_forward_kernel,
            t.grid,
            (dtype, torch.float32, dtype),
            (slope, *t.scalars),
            (RELU if slope == 0 else LEAKY, *t.constants),
            **t.options,
        )

    def launches(self) -> list[Launch]:
        return [self.main]


@functools.lru_cache(maxsize=PLANS)
def _plan(device, *rest) -> Plan:
    return Plan(target(device), *rest)


def bn_act_forward(x: Tensor, bn: Tensor, slope: float) -> Tensor:
    """See ``primitives.bn_act_forward``."""
    a = torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    if x.numel() != 0:
        with on_device_of(x):
            _plan(x.device, x.dtype, x.shape, float(slope)).main(x, bn, a)
    return a
