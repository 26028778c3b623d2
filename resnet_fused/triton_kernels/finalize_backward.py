"""finalize_backward: from BatchNorm's two sums to the coefficients of preact_apply. One launch."""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from .geometry import ceil_div
from .launch import PLANS, Launch, on_device_of

BLOCK = 128


@triton.jit(do_not_specialize=["channels", "count"])
def finalize_backward_kernel(
    sums_ptr,  # [2, channels]
    bn_ptr,  # [4, channels]
    coefficients_ptr,  # [4, channels]
    channels, count,
    TRAINING: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_c = c < channels
    mean = tl.load(bn_ptr + c, mask=in_c, other=0.0)
    scale = tl.load(bn_ptr + 2 * channels + c, mask=in_c, other=0.0)
    if TRAINING:
        invstd = tl.load(bn_ptr + channels + c, mask=in_c, other=0.0)
        sum_dz = tl.load(sums_ptr + c, mask=in_c, other=0.0)
        sum_dz_xhat = tl.load(sums_ptr + channels + c, mask=in_c, other=0.0)
        of_x = tl.div_rn(-scale * invstd * sum_dz_xhat, count)
        constant = tl.div_rn(-scale * sum_dz, count)
    else:
        of_x = tl.zeros([BLOCK_C], tl.float32)
        constant = of_x
    tl.store(coefficients_ptr + c, scale, mask=in_c)
    tl.store(coefficients_ptr + channels + c, of_x, mask=in_c)
    tl.store(coefficients_ptr + 2 * channels + c, constant, mask=in_c)
    tl.store(coefficients_ptr + 3 * channels + c, mean, mask=in_c)


@functools.lru_cache(maxsize=PLANS)
def plan(device, channels: int, count: int, training: bool) -> Launch:
    """The launch for a device, which is only part of the key."""
    return Launch(
        finalize_backward_kernel,
        (ceil_div(channels, BLOCK),),
        (torch.float32,) * 3,
        (channels, float(count)),
        (training, BLOCK),
        num_warps=4,
    )


def finalize_backward(sums: Tensor, bn: Tensor, count: int, training: bool) -> Tensor:
    """See ``primitives.finalize_backward``."""
    sums, bn = sums.contiguous(), bn.contiguous()
    coefficients = torch.empty_like(bn)
    if bn.numel() != 0:
        with on_device_of(bn):
            plan(bn.device, bn.shape[1], count, training)(sums, bn, coefficients)
    return coefficients
