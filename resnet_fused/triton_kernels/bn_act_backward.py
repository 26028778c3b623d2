"""bn_act_backward: dz = da * act'(z) (+ dz_in) and BatchNorm's two sums, the elementwise half of the unfused
backward path."""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activation import LEAKY, RELU, activation_gradient, pre_activation
from .elementwise import tiling
from .launch import PLANS, Launch, Target, on_device_of, target
from .reduction import OrderedSum


@triton.jit(do_not_specialize=["slope", "pixels", "steps", "c_units"])
def bn_act_backward_kernel(
    da_ptr, x_ptr, bn_ptr, dz_in_ptr, dz_ptr,
    partial_ptr,  # [programs, 2, channels]
    slope, pixels, steps, c_units,
    ACTIVATION: tl.constexpr, DZ_IN: tl.constexpr,
    C_UNIT: tl.constexpr, WIDE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    channels = c_units * C_UNIT
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_c = c < channels
    mean = tl.load(bn_ptr + c, mask=in_c, other=0.0)
    scale = tl.load(bn_ptr + 2 * channels + c, mask=in_c, other=0.0)
    shift = tl.load(bn_ptr + 3 * channels + c, mask=in_c, other=0.0)
    sum_dz = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    sum_dz_xhat = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    first = tl.program_id(0) * steps
    for step in range(first, tl.minimum(first + steps, tl.cdiv(pixels, BLOCK_M))):
        m = step * BLOCK_M + tl.arange(0, BLOCK_M)
        in_m = m < pixels
        row = m.to(tl.int64) if WIDE else m
        at = row[:, None] * channels + c[None, :]
        mask = in_m[:, None] & in_c[None, :]
        x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
        da = tl.load(da_ptr + at, mask=mask, other=0.0).to(tl.float32)
        z = pre_activation(x, scale[None, :], shift[None, :])
        d = activation_gradient(z, da, slope, ACTIVATION)
        if DZ_IN:
            d += tl.load(dz_in_ptr + at, mask=mask, other=0.0).to(tl.float32)
        dz = d.to(dz_ptr.dtype.element_ty)
        tl.store(dz_ptr + at, dz, mask=mask)
        # Of what is stored, since preact_apply reads what is stored. Rows past the end have x = da = 0, but
        # 0 * (0 - mean) is NaN for a mean that is not finite, so they are left out by the mask.
        stored = dz.to(tl.float32)
        sum_dz += stored
        sum_dz_xhat += tl.where(in_m[:, None], stored * (x - mean[None, :]), 0.0)
    invstd = tl.load(bn_ptr + channels + c, mask=in_c, other=0.0)
    partial = partial_ptr + tl.program_id(0).to(tl.int64) * (2 * channels) + c
    tl.store(partial, tl.sum(sum_dz, 0), mask=in_c)
    tl.store(partial + channels, tl.sum(sum_dz_xhat, 0) * invstd, mask=in_c)


class Plan:
    """The launches of one problem."""

    def __init__(self, on: Target, dtype: torch.dtype, shape: tuple[int, ...], slope: float, dz_in: bool):
        t = tiling(on, "bn_act_backward", dtype, shape, reduces=True)
        acc = torch.float32
        self.main = Launch(
            bn_act_backward_kernel,
            t.grid,
            (dtype, dtype, acc, dtype if dz_in else None, dtype, acc),
            (slope, *t.scalars),
            (RELU if slope == 0 else LEAKY, dz_in, *t.constants),
            **t.options,
        )
        self.sum = OrderedSum(t.groups, 2 * shape[1])
        self.size = (t.groups, 2, shape[1])

    def launches(self) -> list[Launch]:
        return [self.main, *self.sum.launches()]

    def __call__(self, da, x, bn, dz_in, dz) -> Tensor:
        partial = torch.empty(self.size, dtype=torch.float32, device=x.device)
        sums = torch.empty(2, self.size[2], dtype=torch.float32, device=x.device)
        self.main(da, x, bn, dz_in, dz, partial)
        self.sum(partial, sums)
        return sums


@functools.lru_cache(maxsize=PLANS)
def _plan(device, *rest) -> Plan:
    return Plan(target(device), *rest)


def bn_act_backward(
    da: Tensor, x: Tensor, bn: Tensor, dz_in: Tensor | None, slope: float
) -> tuple[Tensor, Tensor]:
    """See ``primitives.bn_act_backward``."""
    dz = torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    if x.numel() == 0:
        return dz, torch.zeros(2, x.shape[1], dtype=torch.float32, device=x.device)
    with on_device_of(x):
        plan = _plan(x.device, x.dtype, x.shape, float(slope), dz_in is not None)
        return dz, plan(da, x, bn, dz_in, dz)
