"""Partial results merged in a fixed order: statistics by Chan's formula, sums by addition.

Kernels write one partial result per tile; what is here reduces [groups, ...] to one, in two steps where there
are many groups. The order depends on the number of groups alone, so the result is the same from run to run.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .geometry import ceil_div, next_power_of_two
from .launch import Launch

#: Above this many groups, a first step reduces them to at most _SECOND.
ONE_STEP = 512
_SECOND = 64


@triton.jit
def tile_stats(value, in_tile, count, EXACT: tl.constexpr):
    """(mean, M2) over the rows of a float32 tile [rows, columns] for which in_tile [rows] holds; count is
    their number.

    EXACT: corrected two-pass (Chan, Golub and LeVeque 1983, eq. 1.7): the second term removes the rounding error
    of the mean. Values rounded to 16 bits need none: it is far below their resolution."""
    rows = in_tile[:, None]
    each = 1.0 / count
    mean = tl.sum(tl.where(rows, value, 0.0), 0) * each
    deviation = tl.where(rows, value - mean[None, :], 0.0)
    m2 = tl.sum(deviation * deviation, 0)
    if EXACT:
        residue = tl.sum(deviation, 0) * each
        mean += residue
        m2 = _without_residue(m2, residue, count)
    return mean, m2


@triton.jit
def _without_residue(m2, residue, count):
    """M2 without what the rounding error of the mean added. Where the squares overflow, this may too, and
    inf - inf is no number: M2 stays inf, so that 1/sqrt(var) is 0."""
    corrected = tl.maximum(m2 - residue * residue * count, 0.0, propagate_nan=tl.PropagateNan.ALL)
    return tl.where(m2 == float("inf"), m2, corrected)


@triton.jit
def add_to_stats(value, in_m, count, mean, m2):
    """One float32 tile [rows, columns] into the running statistics of every element of the tile: count
    [rows], mean and M2 [rows, columns]. Welford 1962; elementwise, so a loop over tiles has no reduction in
    it."""
    count += tl.where(in_m, 1.0, 0.0)
    weight = tl.where(in_m, 1.0 / tl.maximum(count, 1.0), 0.0)
    deviation = value - mean
    mean = tl.where(in_m[:, None], mean + deviation * weight[:, None], mean)
    m2 = tl.where(in_m[:, None], m2 + deviation * (value - mean), m2)
    return count, mean, m2


@triton.jit
def store_stats(count, mean, m2, partial_ptr, group, channels, c, in_c):
    """Merge what add_to_stats has gathered over the rows (Chan, Golub and LeVeque 1983, eq. 2.1, all at
    once), and store it as a group of [groups, 2, channels]."""
    n = count[:, None]
    total = tl.sum(count, 0)
    of_all = tl.sum(mean * n, 0) / total
    deviation = tl.where(n > 0, mean - of_all[None, :], 0.0)
    residue = tl.sum(deviation * n, 0) / total
    between = _without_residue(tl.sum(deviation * deviation * n, 0), residue, total)
    partial = partial_ptr + tl.cast(group, tl.int64) * (2 * channels) + c
    tl.store(partial, of_all + residue, mask=in_c)
    tl.store(partial + channels, tl.sum(m2, 0) + between, mask=in_c)


@triton.jit(do_not_specialize=["groups", "channels", "total", "rows_per_group", "groups_per_program"])
def merge_stats_kernel(
    partial_ptr,  # [groups, 2, channels]: mean, M2 of rows_per_group rows, the last of what is left of total
    out_ptr,  # [programs, 2, channels]
    groups,
    channels,
    total,
    rows_per_group,
    groups_per_program,
    BLOCK_G: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_c = c < channels
    first = tl.program_id(1) * groups_per_program
    last = tl.minimum(first + groups_per_program, groups)
    count = 0.0
    mean = tl.zeros([BLOCK_C], tl.float32)
    m2 = tl.zeros([BLOCK_C], tl.float32)
    for start in range(first, last, BLOCK_G):
        group = start + tl.arange(0, BLOCK_G)
        in_g = group < last
        n = tl.minimum(total - tl.where(in_g, group, 0) * rows_per_group, rows_per_group)
        n = tl.where(in_g, n, 0).to(tl.float32)
        at = partial_ptr + group.to(tl.int64)[:, None] * (2 * channels) + c[None, :]
        mask = in_g[:, None] & in_c[None, :]
        group_mean = tl.load(at, mask=mask, other=0.0)
        group_m2 = tl.load(at + channels, mask=mask, other=0.0)
        block_n = tl.sum(n, 0)
        block_mean = tl.sum(group_mean * n[:, None], 0) / block_n
        d = tl.where(in_g[:, None], group_mean - block_mean[None, :], 0.0)
        block_m2 = tl.sum(group_m2, 0) + tl.sum(d * d * n[:, None], 0)
        # Chan, Golub and LeVeque 1983, eq. 2.1.
        new_count = count + block_n
        delta = block_mean - mean
        mean = tl.where(count == 0.0, block_mean, mean + delta * (block_n / new_count))
        m2 = tl.where(count == 0.0, block_m2, m2 + block_m2 + delta * delta * (count * block_n / new_count))
        count = new_count
    out = out_ptr + tl.program_id(1).to(tl.int64) * (2 * channels) + c
    tl.store(out, mean, mask=in_c)
    tl.store(out + channels, m2, mask=in_c)


@triton.jit(
    do_not_specialize=[
        "groups", "columns", "groups_per_program", "channels", "stride_k", "stride_c", "stride_r", "stride_s"
    ]
)  # fmt: skip
def ordered_sum_kernel(
    partial_ptr,  # [groups, columns]
    out_ptr,  # [programs, columns], or a weight
    groups,
    columns,
    groups_per_program,
    channels,
    stride_k,
    stride_c,
    stride_r,
    stride_s,
    R: tl.constexpr,
    S: tl.constexpr,
    FLAT: tl.constexpr,  # else a column is an element of a weight [K, R, S, channels], stored by strides
    BLOCK_G: tl.constexpr,
    BLOCK: tl.constexpr,
):
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    in_c = column < columns
    first = tl.program_id(1) * groups_per_program
    last = tl.minimum(first + groups_per_program, groups)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(first, last, BLOCK_G):
        group = start + tl.arange(0, BLOCK_G)
        at = partial_ptr + group.to(tl.int64)[:, None] * columns + column[None, :]
        total += tl.sum(tl.load(at, mask=(group < last)[:, None] & in_c[None, :], other=0.0), 0)
    if FLAT:
        out = out_ptr + tl.program_id(1).to(tl.int64) * columns + column
    else:
        tap = column // channels
        k = tap // (R * S)
        tap = tap % (R * S)
        out = (
            out_ptr
            + k * stride_k
            + (column % channels) * stride_c
            + (tap // S) * stride_r
            + (tap % S) * stride_s
        )
    tl.store(out, total.to(out_ptr.dtype.element_ty), mask=in_c)


class _TwoSteps:
    """The launches of a reduction over groups, and the buffer between them."""

    __slots__ = ("first", "last", "size")

    def __init__(self, groups: int, make, size: tuple[int, ...]):
        self.first = None
        if groups > ONE_STEP:
            per_program = ceil_div(groups, _SECOND)
            programs = ceil_div(groups, per_program)
            self.first = make(groups, per_program, programs, False)
            self.size = (programs, *size)
            self.last = make(programs, programs, 1, True)
        else:
            self.last = make(groups, groups, 1, True)

    def __call__(self, partial: Tensor, out: Tensor) -> None:
        if self.first is not None:
            between = torch.empty(self.size, dtype=torch.float32, device=partial.device)
            self.first(partial, between)
            partial = between
        self.last(partial, out)

    def launches(self) -> list[Launch]:
        return [launch for launch in (self.first, self.last) if launch is not None]


class MergeStats(_TwoSteps):
    """[groups, 2, channels] of (mean, M2) -> [2, channels]. Every group is of ``rows`` rows, the last of what
    is left of ``total``."""

    def __init__(self, groups: int, channels: int, rows: int, total: int):
        def make(groups_now, per_program, programs, last):
            rows_now = rows if groups_now == groups else rows * ceil_div(groups, _SECOND)
            block_g = min(64, next_power_of_two(per_program))
            return Launch(
                merge_stats_kernel,
                (ceil_div(channels, 16), programs),
                (torch.float32, torch.float32),
                (groups_now, channels, total, rows_now, per_program),
                (block_g, 16),
                num_warps=4,
            )

        super().__init__(groups, make, (2, channels))


class OrderedSum(_TwoSteps):
    """[groups, columns] -> columns, in out's dtype.

    Args:
        weight: None, or (R, S, channels, strides): the columns are the elements of a weight [K, R, S,
            channels], and out is that weight, NCHW-shaped with these four strides.
    """

    def __init__(self, groups: int, columns: int, dtype: torch.dtype = torch.float32, weight=None):
        r, s, channels, strides = weight or (1, 1, 1, (1, 1, 1, 1))

        def make(groups_now, per_program, programs, last):
            block_g = min(16, next_power_of_two(per_program))
            block = 128 if block_g > 4 else 256
            return Launch(
                ordered_sum_kernel,
                (ceil_div(columns, block), programs),
                (torch.float32, dtype if last else torch.float32),
                (groups_now, columns, per_program, channels, *strides),
                (r, s, weight is None or not last, block_g, block),
                num_warps=4,
            )

        super().__init__(groups, make, (columns,))
