"""finalize_forward: from statistics and affine parameters to mean, invstd, scale and shift. One launch."""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from .geometry import ceil_div
from .launch import PLANS, Launch, on_device_of

BLOCK = 128


@triton.jit(do_not_specialize=["channels", "count", "eps"])
def finalize_forward_kernel(
    mean_ptr,  # with BATCH stats [2, channels], else the running mean
    var_ptr,  # None, or the running variance
    weight_ptr, bias_ptr,
    bn_ptr,  # [4, channels]
    channels, count, eps,
    BATCH: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_c = c < channels
    mean = tl.load(mean_ptr + c, mask=in_c, other=0.0).to(tl.float32)
    if BATCH:
        var = tl.div_rn(tl.load(mean_ptr + channels + c, mask=in_c, other=0.0), count)
    else:
        var = tl.load(var_ptr + c, mask=in_c, other=0.0).to(tl.float32)
    invstd = tl.div_rn(1.0, tl.sqrt_rn(var + eps))
    if WEIGHT:
        scale = tl.load(weight_ptr + c, mask=in_c, other=0.0).to(tl.float32) * invstd
    else:
        scale = invstd
    if BIAS:
        shift = tl.fma(-mean, scale, tl.load(bias_ptr + c, mask=in_c, other=0.0).to(tl.float32))
    else:
        shift = -mean * scale
    tl.store(bn_ptr + c, mean, mask=in_c)
    tl.store(bn_ptr + channels + c, invstd, mask=in_c)
    tl.store(bn_ptr + 2 * channels + c, scale, mask=in_c)
    tl.store(bn_ptr + 3 * channels + c, shift, mask=in_c)


@functools.lru_cache(maxsize=PLANS)
def plan(device, channels: int, dtypes, batch: bool, count: int, eps: float) -> Launch:
    """The launch for mean, var, weight and bias of these dtypes (None: not given) on a device, which is only
    part of the key."""
    weight, bias = dtypes[2] is not None, dtypes[3] is not None
    return Launch(
        finalize_forward_kernel,
        (ceil_div(channels, BLOCK),),
        (*dtypes, torch.float32),
        (channels, float(count), eps),
        (batch, weight, bias, BLOCK),
        num_warps=4,
    )


def finalize_forward(
    stats: Tensor | None,
    count: int,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> Tensor:
    """See ``primitives.finalize_forward``. Parameters and running statistics in any dtype."""
    batch = stats is not None
    given = (stats if batch else running_mean, None if batch else running_var, weight, bias)
    given = tuple(None if t is None else t.contiguous() for t in given)
    mean = given[0]
    channels = mean.shape[-1]
    bn = torch.empty(4, channels, dtype=torch.float32, device=mean.device)
    if channels != 0:
        dtypes = tuple(None if t is None else t.dtype for t in given)
        with on_device_of(mean):
            plan(mean.device, channels, dtypes, batch, count if batch else 1, float(eps))(*given, bn)
    return bn
