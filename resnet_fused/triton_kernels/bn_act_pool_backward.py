"""bn_act_pool_backward: the gradient of each image's mean spread over its pixels, dz = dy / pixels * act'(z),
and BatchNorm's two sums."""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activation import LEAKY, RELU, is_active, pre_activation
from .bn_act_pool_forward import tile
from .geometry import ceil_div, channel_unit
from .launch import PLANS, Launch, Target, on_device_of, target
from .reduction import OrderedSum


@triton.jit(do_not_specialize=["slope", "pixels", "c_units"])
def bn_act_pool_backward_kernel(
    dy_ptr, x_ptr, bn_ptr, dz_ptr,
    partial_ptr,  # [images, 2, channels]
    slope, pixels, c_units,
    ACTIVATION: tl.constexpr, C_UNIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    channels = c_units * C_UNIT
    image = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_c = c < channels
    mean = tl.load(bn_ptr + c, mask=in_c, other=0.0)
    scale = tl.load(bn_ptr + 2 * channels + c, mask=in_c, other=0.0)
    shift = tl.load(bn_ptr + 3 * channels + c, mask=in_c, other=0.0)
    # The mean's gradient is the same at every pixel, so dz has two values, and their sum is a matter of
    # counting: adding up one number many times would round the same way each time. Of what is stored, since
    # preact_apply reads what is stored.
    dy = tl.load(dy_ptr + image * channels + c, mask=in_c, other=0.0).to(tl.float32) / pixels
    high = dy.to(dz_ptr.dtype.element_ty).to(tl.float32)
    if ACTIVATION == 1:
        low = tl.zeros_like(high)
    else:
        low = (dy * slope).to(dz_ptr.dtype.element_ty).to(tl.float32)
    row = tl.arange(0, BLOCK_M)
    at = row[:, None] * channels + c[None, :]
    x_ptr += image * pixels * channels
    dz_ptr += image * pixels * channels
    count = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    sum_dz_xhat = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    for first in range(0, pixels, BLOCK_M):
        in_m = (row < pixels - first)[:, None]
        mask = in_m & in_c[None, :]
        x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
        active = is_active(pre_activation(x, scale[None, :], shift[None, :]), ACTIVATION)
        dz = tl.where(active, high[None, :], low[None, :])
        tl.store(dz_ptr + at, dz.to(dz_ptr.dtype.element_ty), mask=mask)
        count += tl.where(in_m & active, 1.0, 0.0)
        sum_dz_xhat += tl.where(in_m, dz * (x - mean[None, :]), 0.0)
        x_ptr += BLOCK_M * channels  # the pointers move: an image's offsets may need 64 bits
        dz_ptr += BLOCK_M * channels
    n = tl.sum(count, 0)
    sum_dz = tl.where(n > 0, high * n, 0.0) + tl.where(n < pixels, low * (pixels - n), 0.0)
    invstd = tl.load(bn_ptr + channels + c, mask=in_c, other=0.0)
    partial = partial_ptr + image * (2 * channels) + c
    tl.store(partial, sum_dz, mask=in_c)
    tl.store(partial + channels, tl.sum(sum_dz_xhat, 0) * invstd, mask=in_c)


class Plan:
    """The launches of one problem."""

    def __init__(self, on: Target, dtype: torch.dtype, shape: tuple[int, ...], slope: float):
        n, channels, h, w = shape
        rows, columns = tile(h * w, channels)
        unit, acc = channel_unit(channels), torch.float32
        self.main = Launch(
            bn_act_pool_backward_kernel,
            (n, ceil_div(channels, columns)),
            (dtype, dtype, acc, dtype, acc),
            (slope, h * w, channels // unit),
            (RELU if slope == 0 else LEAKY, unit, rows, columns),
            num_warps=4,
        )
        self.sum = OrderedSum(n, 2 * channels)
        self.size = (n, 2, channels)

    def launches(self) -> list[Launch]:
        return [self.main, *self.sum.launches()]

    def __call__(self, dy, x, bn, dz) -> Tensor:
        partial = torch.empty(self.size, dtype=torch.float32, device=x.device)
        sums = torch.empty(self.size[1:], dtype=torch.float32, device=x.device)
        self.main(dy, x, bn, dz, partial)
        self.sum(partial, sums)
        return sums


@functools.lru_cache(maxsize=PLANS)
def _plan(device, *rest) -> Plan:
    return Plan(target(device), *rest)


def bn_act_pool_backward(dy: Tensor, x: Tensor, bn: Tensor, slope: float) -> tuple[Tensor, Tensor]:
    """See ``primitives.bn_act_pool_backward``."""
    dz = torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    if x.numel() == 0:
        return dz, torch.zeros(2, x.shape[1], dtype=torch.float32, device=x.device)
    with on_device_of(x):
        return dz, _plan(x.device, x.dtype, x.shape, float(slope))(dy, x, bn, dz)
