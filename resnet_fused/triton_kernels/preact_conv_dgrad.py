"""preact_conv_dgrad: dz = conv_transpose(dy, weight) * act'(z) (+ dz_in), with BatchNorm's two sums.

An implicit matrix product over dy: rows are input pixels, columns input channels, the reduction runs over
    output channels and taps. With stride, input pixels of one residue modulo the stride (a *phase*) are
    reached by the same taps: every phase is a convolution with stride 1 of its own, given by a program id,
    and no product with an inserted zero is made. The epilogue reads x, recomputes z for the mask, and reduces
    the finished tile."""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .activation import LEAKY, RELU, activation_gradient, operand, pre_activation
from .geometry import Convolution, ceil_div, channel_unit
from .launch import PLANS, Launch, Target, on_device_of, precision, target
from .reduction import OrderedSum
from .weights import packed


@triton.jit
def finish_gradient(
    acc, x, mean, invstd, scale, shift, at, mask, in_m, c, in_c, channels, tile, dz_in_ptr, dz_ptr, partial_ptr, slope,
    ACTIVATION: tl.constexpr, DZ_IN: tl.constexpr,
):  # fmt: skip
    """Mask, dz_in, rounding, store, and the tile's sum(dz) and sum(dz * xhat), of x and the rows of bn."""
    x = x.to(tl.float32)
    acc = activation_gradient(pre_activation(x, scale[None, :], shift[None, :]), acc, slope, ACTIVATION)
    if DZ_IN:
        acc += tl.load(dz_in_ptr + at, mask=mask, other=0.0).to(tl.float32)
    dz = acc.to(dz_ptr.dtype.element_ty)
    tl.store(dz_ptr + at, dz, mask=mask)
    # Of what is stored, since preact_apply reads what is stored.
    d = tl.where(in_m[:, None], dz.to(tl.float32), 0.0)
    deviation = tl.where(in_m[:, None], x - mean[None, :], 0.0)
    partial = partial_ptr + tl.cast(tile, tl.int64) * (2 * channels) + c
    tl.store(partial, tl.sum(d, 0), mask=in_c)
    tl.store(partial + channels, tl.sum(d * deviation, 0) * invstd, mask=in_c)


@triton.jit(do_not_specialize=["slope", "n", "h", "w", "p", "q", "tiles_m", "c_units", "k_units"])
def conv_dgrad_kernel(
    dy_ptr, weight_ptr, x_ptr, bn_ptr, dz_in_ptr, dz_ptr, partial_ptr,
    slope,
    n, h, w, p, q,
    tiles_m,  # of the largest phase
    c_units, k_units,
    R: tl.constexpr, S: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr, PAD_W: tl.constexpr, DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
    C_UNIT: tl.constexpr, K_UNIT: tl.constexpr,
    EVEN_K: tl.constexpr,  # K is a multiple of BLOCK_K
    EVEN_C: tl.constexpr,  # C is a multiple of BLOCK_C
    ACTIVATION: tl.constexpr, DZ_IN: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile of BLOCK_M input pixels of one phase x BLOCK_C input channels per program."""
    STRIDED: tl.constexpr = STRIDE_H * STRIDE_W > 1
    # A 1x1 kernel without padding reaches no pixel outside of dy.
    PADDED: tl.constexpr = R * S > 1 or PAD_H + PAD_W > 0
    channels = c_units * C_UNIT
    channels_out = k_units * K_UNIT
    tiles_c = tl.cdiv(channels, BLOCK_C)
    tile_m = tl.program_id(0) // tiles_c
    c = (tl.program_id(0) % tiles_c) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_c = c < channels
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)

    # Rows h = phase_h + STRIDE_H * i; they are reached by the taps r = first_r + STRIDE_H * t, from p = i +
    # shift_h - t.
    if STRIDED:
        phase = tl.program_id(1)
        phase_h = phase // STRIDE_W
        phase_w = phase % STRIDE_W
        rows_h = (h - phase_h + STRIDE_H - 1) // STRIDE_H
        rows_w = (w - phase_w + STRIDE_W - 1) // STRIDE_W
        first_r = (phase_h + PAD_H) % STRIDE_H
        first_s = (phase_w + PAD_W) % STRIDE_W
        taps_w = (S + STRIDE_W - 1 - first_s) // STRIDE_W
        taps = (R + STRIDE_H - 1 - first_r) // STRIDE_H * taps_w
        shift_h = (phase_h + PAD_H) // STRIDE_H
        shift_w = (phase_w + PAD_W) // STRIDE_W
        pixels = n * rows_h * rows_w
        tile = phase * tiles_m + tile_m
    else:
        rows_h = h
        rows_w = w
        pixels = n * h * w
        tile = tile_m
    in_m = m < pixels
    row = tl.where(in_m, m, 0)

    if PADDED or STRIDED:
        plane = tl.maximum(rows_h * rows_w, 1)  # a phase can be empty
        image = row // plane
        i = row % plane // tl.maximum(rows_w, 1)
        j = row % plane % tl.maximum(rows_w, 1)
        if STRIDED:
            top = i + shift_h
            left = j + shift_w
            x_row = (image * h + phase_h + STRIDE_H * i) * w + phase_w + STRIDE_W * j
        else:
            top = i + PAD_H
            left = j + PAD_W
            x_row = row
        origin = (image * p + top) * q + left
    else:
        origin = row
        top, left, x_row = row, row, row
    if WIDE:
        origin = origin.to(tl.int64)
        x_row = x_row.to(tl.int64)
    lane = tl.arange(0, BLOCK_K)
    dy_at = dy_ptr + origin[:, None] * channels_out + lane[None, :]
    weight_at = weight_ptr + lane[:, None] * (R * S * channels) + c[None, :]

    acc = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    if STRIDED:
        steps = tl.cdiv(channels_out, BLOCK_K) * taps
        # Divisors: the pipeliner takes the first step's divisions out of the loop, also where no tap reaches.
        taps = tl.maximum(taps, 1)
        taps_w = tl.maximum(taps_w, 1)
    else:
        steps = tl.cdiv(channels_out, BLOCK_K) * (R * S)
    for step in range(steps):
        if STRIDED:
            k = (step // taps) * BLOCK_K
            dh = step % taps // taps_w
            dw = step % taps % taps_w
            tap = (first_r + STRIDE_H * dh) * S + first_s + STRIDE_W * dw
        else:
            k = (step // (R * S)) * BLOCK_K
            tap = step % (R * S)
            dh = (tap // S) * DILATION_H
            dw = (tap % S) * DILATION_W
        dy_step = dy_at - ((dh * q + dw) * channels_out - k)
        weight_step = weight_at + (k * (R * S) + tap) * channels
        if PADDED:
            inside = (top - dh >= 0) & (top - dh < p) & (left - dw >= 0) & (left - dw < q)
        if EVEN_K:
            if EVEN_C:
                weight = tl.load(weight_step)
            else:
                weight = tl.load(weight_step, mask=in_c[None, :], other=0.0)
            if PADDED:
                dy = tl.load(dy_step, mask=inside[:, None], other=0.0)
            else:
                dy = tl.load(dy_step)
        else:
            in_k = lane < channels_out - k
            weight = tl.load(weight_step, mask=in_k[:, None] & in_c[None, :], other=0.0)
            if PADDED:
                dy = tl.load(dy_step, mask=inside[:, None] & in_k[None, :], other=0.0)
            else:
                dy = tl.load(dy_step, mask=in_k[None, :], other=0.0)
        dy = operand(dy, PRECISION)
        acc = tl.dot(dy, operand(weight, PRECISION), acc, input_precision=PRECISION)

    at = x_row[:, None] * channels + c[None, :]
    mask = in_m[:, None] & in_c[None, :]
    mean = tl.load(bn_ptr + c, mask=in_c, other=0.0)
    invstd = tl.load(bn_ptr + channels + c, mask=in_c, other=0.0)
    scale = tl.load(bn_ptr + 2 * channels + c, mask=in_c, other=0.0)
    shift = tl.load(bn_ptr + 3 * channels + c, mask=in_c, other=0.0)
    x = tl.load(x_ptr + at, mask=mask, other=0.0)
    finish_gradient(
        acc, x, mean, invstd, scale, shift, at, mask, in_m, c, in_c, channels, tile, dz_in_ptr, dz_ptr, partial_ptr,
        slope, ACTIVATION, DZ_IN,
    )  # fmt: skip


class Plan:
    """The launches of one problem."""

    def __init__(
        self, on: Target, dtype: torch.dtype, g: Convolution, slope: float, dz_in: bool, product: str
    ):
        name = "preact_conv_dgrad"
        phases = g.stride_h * g.stride_w
        rows = g.n * ceil_div(g.h, g.stride_h) * ceil_div(g.w, g.stride_w)
        aligned = configs.aligned(product, g.c, g.k)
        config = configs.select(
            on, name, product, "tiled", rows=rows * phases, columns=g.c, depth=g.k, aligned=aligned
        )
        tiles, tiles_c = ceil_div(rows, config.rows), ceil_div(g.c, config.columns)
        units = channel_unit(g.c), channel_unit(g.k)
        acc = torch.float32
        self.main = Launch(
            conv_dgrad_kernel,
            (tiles * tiles_c, phases),
            (dtype, dtype, dtype, acc, dtype if dz_in else None, dtype, acc),
            (slope, g.n, g.h, g.w, g.p, g.q, tiles, g.c // units[0], g.k // units[1]),
            (
                *g.constants,
                *units,
                g.k % config.depth == 0,
                g.c % config.columns == 0,
                RELU if slope == 0 else LEAKY,
                dz_in,
                g.wide,
                "ieee" if product == "16bit" else product,
                config.rows,
                config.columns,
                config.depth,
            ),
            **config.options,
        )
        self.partial_size = (tiles * phases, 2, g.c)
        self.sum = OrderedSum(tiles * phases, 2 * g.c)

    def launches(self) -> list[Launch]:
        return [self.main, *self.sum.launches()]

    def __call__(self, dy, weight, x, bn, dz_in) -> tuple[Tensor, Tensor]:
        dz = torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
        partial = torch.empty(self.partial_size, dtype=torch.float32, device=x.device)
        sums = torch.empty(2, x.shape[1], dtype=torch.float32, device=x.device)
        self.main(dy, weight, x, bn, dz_in, dz, partial)
        self.sum(partial, sums)
        return dz, sums


@functools.lru_cache(maxsize=PLANS)
def _plan(device, dtype, x_shape, weight_shape, stride, padding, dilation, *rest) -> Plan:
    return Plan(
        target(device), dtype, Convolution.of(x_shape, weight_shape, stride, padding, dilation), *rest
    )


def preact_conv_dgrad(
    dy: Tensor,
    weight: Tensor,
    x: Tensor,
    bn: Tensor,
    dz_in: Tensor | None,
    slope: float,
    stride,
    padding,
    dilation,
    groups: int,
) -> tuple[Tensor, Tensor]:
    """See ``primitives.preact_conv_dgrad``. groups must be 1, and stride or dilation 1
    (``support.declines``)."""
    if x.numel() == 0:
        dz = torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
        return dz, torch.zeros(2, x.shape[1], dtype=torch.float32, device=x.device)
    plan = _plan(
        x.device,
        x.dtype,
        x.shape,
        weight.shape,
        tuple(stride),
        tuple(padding),
        tuple(dilation),
        float(slope),
        dz_in is not None,
        precision(x.dtype),
    )
    with on_device_of(x):
        return plan(dy, packed(weight, x.dtype), x, bn, dz_in)
