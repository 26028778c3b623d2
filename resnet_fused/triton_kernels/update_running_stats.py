"""update_running_stats: the exponential moving average of batch statistics, in place. One launch."""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from .geometry import ceil_div
from .launch import PLANS, Launch, on_device_of

BLOCK = 128


@triton.jit
def _average(running_ptr, new, c, in_c, keep, momentum):
    before = tl.load(running_ptr + c, mask=in_c, other=0.0).to(tl.float32)
    tl.store(running_ptr + c, (before * keep + new * momentum).to(running_ptr.dtype.element_ty), mask=in_c)


@triton.jit(do_not_specialize=["channels", "freedom", "keep", "momentum"])
def update_running_stats_kernel(
    mean_ptr, var_ptr,
    stats_ptr,  # [2, channels]
    channels,
    freedom,  # count - 1
    keep,  # 1 - momentum
    momentum,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_c = c < channels
    mean = tl.load(stats_ptr + c, mask=in_c, other=0.0)
    var = tl.div_rn(tl.load(stats_ptr + channels + c, mask=in_c, other=0.0), freedom)
    _average(mean_ptr, mean, c, in_c, keep, momentum)
    _average(var_ptr, var, c, in_c, keep, momentum)


@functools.lru_cache(maxsize=PLANS)
def plan(device, channels: int, dtypes, count: int, momentum: float) -> Launch:
    """The launch for a running mean and variance of these dtypes on a device, which is only part of the
    key."""
    return Launch(
        update_running_stats_kernel,
        (ceil_div(channels, BLOCK),),
        (*dtypes, torch.float32),
        (channels, float(count - 1), 1 - momentum, momentum),
        (BLOCK,),
        num_warps=4,
    )


def update_running_stats(
    running_mean: Tensor, running_var: Tensor, stats: Tensor, count: int, momentum: float
) -> None:
    """See ``primitives.update_running_stats``. Running statistics in any dtype and of any stride."""
    if count == 0 or running_mean.numel() == 0:
        return
    mean, var = running_mean.contiguous(), running_var.contiguous()
    launch = plan(stats.device, mean.numel(), (mean.dtype, var.dtype), count, float(momentum))
    with on_device_of(stats):
        launch(mean, var, stats.contiguous())
    # contiguous() copied what was not.
    for running, new in ((running_mean, mean), (running_var, var)):
        if new is not running:
            running.copy_(new)
