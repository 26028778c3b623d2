"""residual_add: act(x + alpha * gate * (affine[0] * y + affine[1])), with the statistics of the result."""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activation import LEAKY, NONE, RELU, pre_activation, rectify
from .elementwise import tiling
from .launch import PLANS, Launch, Target, on_device_of, target
from .reduction import MergeStats, add_to_stats, store_stats

#: Values of the constexpr GATE.
_NO_GATE, _OF_IMAGE, _OF_CHANNEL = 0, 1, 2


@triton.jit(do_not_specialize=["alpha", "slope", "plane", "pixels", "steps", "c_units"])
def residual_add_kernel(
    x_ptr, y_ptr,
    affine_ptr,  # [2, channels]
    gate_ptr,  # [N, 1] or [N, channels]
    out_ptr,
    partial_ptr,  # [programs, 2, channels]
    alpha, slope,
    plane,  # H * W
    pixels, steps, c_units,
    AFFINE: tl.constexpr, GATE: tl.constexpr, SCALED: tl.constexpr, ACTIVATION: tl.constexpr,
    STATS: tl.constexpr,
    C_UNIT: tl.constexpr, WIDE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    channels = c_units * C_UNIT
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_c = c < channels
    if AFFINE:
        scale = tl.load(affine_ptr + c, mask=in_c, other=0.0)
        shift = tl.load(affine_ptr + channels + c, mask=in_c, other=0.0)
    if STATS:
        count = tl.zeros([BLOCK_M], tl.float32)
        mean = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
        m2 = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    first = tl.program_id(0) * steps
    for step in range(first, tl.minimum(first + steps, tl.cdiv(pixels, BLOCK_M))):
        m = step * BLOCK_M + tl.arange(0, BLOCK_M)
        in_m = m < pixels
        row = m.to(tl.int64) if WIDE else m
        at = row[:, None] * channels + c[None, :]
        mask = in_m[:, None] & in_c[None, :]
        branch = tl.load(y_ptr + at, mask=mask, other=0.0).to(tl.float32)
        if AFFINE:
            branch = pre_activation(branch, scale[None, :], shift[None, :])
        if GATE == 1:
            branch *= tl.load(gate_ptr + m // plane, mask=in_m, other=0.0)[:, None]
        elif GATE == 2:
            image = (m // plane).to(tl.int64)
            branch *= tl.load(gate_ptr + image[:, None] * channels + c[None, :], mask=mask, other=0.0)
        if SCALED:
            branch *= alpha
        total = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32) + branch
        out = rectify(total, slope, ACTIVATION).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + at, out, mask=mask)
        if STATS:
            count, mean, m2 = add_to_stats(out.to(tl.float32), in_m, count, mean, m2)
    if STATS:
        store_stats(count, mean, m2, partial_ptr, tl.program_id(0), channels, c, in_c)


class Plan:
    """The launches of one problem."""

    def __init__(
        self,
        on: Target,
        dtype: torch.dtype,
        shape: tuple[int, ...],
        affine: bool,
        gate: int | None,
        alpha: float,
        slope: float | None,
        stats: bool,
    ):
        n, channels, h, w = shape
        t = tiling(on, "residual_add", dtype, shape, reduces=stats)
        acc = torch.float32
        # With one channel both kinds of gate are the same.
        kind = _NO_GATE if gate is None else _OF_IMAGE if gate == 1 else _OF_CHANNEL
        self.main = Launch(
            residual_add_kernel,
            t.grid,
            (dtype, dtype, acc if affine else None, acc if kind else None, dtype, acc if stats else None),
            (alpha, slope or 0.0, h * w, *t.scalars),
            (
                affine,
                kind,
                alpha != 1,
                NONE if slope is None else RELU if slope == 0 else LEAKY,
                stats,
                *t.constants,
            ),
            **t.options,
        )
        self.merge = MergeStats(t.groups, channels, t.rows_per_program, t.scalars[0]) if stats else None
        self.size = (t.groups, 2, channels)

    def launches(self) -> list[Launch]:
        return [self.main, *(self.merge.launches() if self.merge else ())]

    def __call__(self, x, y, affine, gate, out) -> Tensor:
        if self.merge is None:
            self.main(x, y, affine, gate, out, None)
            return torch.empty(0, dtype=torch.float32, device=x.device)
        partial = torch.empty(self.size, dtype=torch.float32, device=x.device)
        stats = torch.empty(2, self.size[2], dtype=torch.float32, device=x.device)
        self.main(x, y, affine, gate, out, partial)
        self.merge(partial, stats)
        return stats


@functools.lru_cache(maxsize=PLANS)
def _plan(device, *rest) -> Plan:
    return Plan(target(device), *rest)


def residual_add(
    x: Tensor,
    y: Tensor,
    affine: Tensor | None,
    gate: Tensor | None,
    alpha: float,
    slope: float | None,
    want_stats: bool,
) -> tuple[Tensor, Tensor]:
    """See ``primitives.residual_add``."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    if x.numel() == 0:
        size = (2, x.shape[1]) if want_stats else 0
        return out, torch.zeros(size, dtype=torch.float32, device=x.device)
    affine = None if affine is None else affine.contiguous()
    gate = None if gate is None else gate.contiguous()
    plan = _plan(
        x.device,
        x.dtype,
        x.shape,
        affine is not None,
        None if gate is None else gate.shape[1],
        float(alpha),
        None if slope is None else float(slope),
        want_stats,
    )
    with on_device_of(x):
        return out, plan(x, y, affine, gate, out)
