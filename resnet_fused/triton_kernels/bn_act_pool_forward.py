"""bn_act_pool_forward: the mean of act(x * scale + shift) over each image's pixels."""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activation import LEAKY, RELU, pre_activation, rectify
from .geometry import ceil_div, channel_unit, next_power_of_two
from .launch import PLANS, Launch, Target, on_device_of, target

#: A program's tile: elements, and channels at most. One program has a block of channels of one image.
TILE = 2048
CHANNELS = 64


def tile(pixels: int, channels: int) -> tuple[int, int]:
    """Rows and columns of a program's tile, for images of so many pixels."""
    columns = min(CHANNELS, next_power_of_two(channels))
    return min(TILE // columns, next_power_of_two(pixels)), columns


@triton.jit(do_not_specialize=["slope", "pixels", "c_units"])
def bn_act_pool_forward_kernel(
    x_ptr, bn_ptr, y_ptr,
    slope, pixels, c_units,
    ACTIVATION: tl.constexpr, C_UNIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    channels = c_units * C_UNIT
    image = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_c = c < channels
    scale = tl.load(bn_ptr + 2 * channels + c, mask=in_c, other=0.0)
    shift = tl.load(bn_ptr + 3 * channels + c, mask=in_c, other=0.0)
    row = tl.arange(0, BLOCK_M)
    at = row[:, None] * channels + c[None, :]
    x_ptr += image * pixels * channels
    total = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    for first in range(0, pixels, BLOCK_M):
        in_m = (row < pixels - first)[:, None]
        x = tl.load(x_ptr + at, mask=in_m & in_c[None, :], other=0.0)
        a = rectify(pre_activation(x, scale[None, :], shift[None, :]), slope, ACTIVATION)
        total += tl.where(in_m, a, 0.0)
        x_ptr += BLOCK_M * channels  # the pointer moves: an image's offsets may need 64 bits
    y = tl.sum(total, 0) / pixels
    tl.store(y_ptr + image * channels + c, y.to(y_ptr.dtype.element_ty), mask=in_c)


class Plan:
    """The launch of one problem."""

    def __init__(self, on: Target, dtype: torch.dtype, shape: tuple[int, ...], slope: float):
        n, channels, h, w = shape
        rows, columns = tile(h * w, channels)
        unit = channel_unit(channels)
        self.main = Launch(
            bn_act_pool_forward_kernel,
            (n, ceil_div(channels, columns)),
            (dtype, torch.float32, dtype),
            (slope, h * w, channels // unit),
            (RELU if slope == 0 else LEAKY, unit, rows, columns),
            num_warps=4,
        )

    def launches(self) -> list[Launch]:
        return [self.main]


@functools.lru_cache(maxsize=PLANS)
def _plan(device, *rest) -> Plan:
    return Plan(target(device), *rest)


def bn_act_pool_forward(x: Tensor, bn: Tensor, slope: float) -> Tensor:
    """See ``primitives.bn_act_pool_forward``."""
    size = (*x.shape[:2], 1, 1)
    y = torch.empty(size, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    if x.numel() != 0:
        with on_device_of(x):
            _plan(x.device, x.dtype, x.shape, float(slope)).main(x, bn, y)
    return y
