"""channel_stats: mean and sum of squared deviations per channel in one read of x.

A program gathers the statistics of its run of pixels in registers, and their merger follows in a fixed
order."""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from .elementwise import tiling
from .launch import PLANS, Launch, Target, on_device_of, target
from .reduction import MergeStats, add_to_stats, store_stats


@triton.jit(do_not_specialize=["pixels", "steps", "c_units"])
def channel_stats_kernel(
    x_ptr,
    partial_ptr,  # [programs, 2, channels]
    pixels, steps, c_units,
    C_UNIT: tl.constexpr, WIDE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    channels = c_units * C_UNIT
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_c = c < channels
    count = tl.zeros([BLOCK_M], tl.float32)
    mean = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    m2 = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    first = tl.program_id(0) * steps
    for step in range(first, tl.minimum(first + steps, tl.cdiv(pixels, BLOCK_M))):
        m = step * BLOCK_M + tl.arange(0, BLOCK_M)
        in_m = m < pixels
        row = m.to(tl.int64) if WIDE else m
        at = row[:, None] * channels + c[None, :]
        x = tl.load(x_ptr + at, mask=in_m[:, None] & in_c[None, :], other=0.0).to(tl.float32)
        count, mean, m2 = add_to_stats(x, in_m, count, mean, m2)
    store_stats(count, mean, m2, partial_ptr, tl.program_id(0), channels, c, in_c)


class Plan:
    """The launches of one problem."""

    def __init__(self, on: Target, dtype: torch.dtype, shape: tuple[int, ...]):
        t = tiling(on, "channel_stats", dtype, shape, reduces=True)
        dtypes = (dtype, torch.float32)
        self.main = Launch(channel_stats_kernel, t.grid, dtypes, t.scalars, t.constants, **t.options)
        self.merge = MergeStats(t.groups, shape[1], t.rows_per_program, t.scalars[0])
        self.size = (t.groups, 2, shape[1])

    def launches(self) -> list[Launch]:
        return [self.main, *self.merge.launches()]

    def __call__(self, x: Tensor) -> Tensor:
        partial = torch.empty(self.size, dtype=torch.float32, device=x.device)
        stats = torch.empty(2, self.size[2], dtype=torch.float32, device=x.device)
        self.main(x, partial)
        self.merge(partial, stats)
        return stats


@functools.lru_cache(maxsize=PLANS)
def _plan(device, *rest) -> Plan:
    return Plan(target(device), *rest)


def channel_stats(x: Tensor) -> Tensor:
    """See ``primitives.channel_stats``."""
    if x.numel() == 0:
        return torch.zeros(2, x.shape[1], dtype=torch.float32, device=x.device)
    with on_device_of(x):
        return _plan(x.device, x.dtype, x.shape)(x)
