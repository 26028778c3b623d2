"""preact_conv_forward: y = conv(act(bn(x))) + bias + residual as one implicit matrix product, with the
statistics of y.

Rows are output pixels, columns output channels, the reduction runs over input channels and taps. The
activation is the left operand: its tile is normalised, activated and rounded on the way from memory to the
matrix unit, so it can stay in registers (wgmma), and is never stored. The epilogue holds the finished tile in
registers: bias, residual, one rounding, statistics."""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .activation import activate, kind, operand
from .geometry import Convolution, ceil_div, channel_unit
from .launch import PLANS, Launch, Target, on_device_of, precision, target
from .reduction import MergeStats, tile_stats
from .weights import packed


@triton.jit
def _finish_tile(
    acc, m, in_m, rows, k, in_k, channels, tile_m, bias_ptr, residual_ptr, y_ptr, partial_ptr,
    BIAS: tl.constexpr, RESIDUAL: tl.constexpr, STATS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Bias, residual, rounding, store, and the tile's statistics."""
    if BIAS:
        acc += tl.load(bias_ptr + k, mask=in_k, other=0.0).to(tl.float32)[None, :]
    row = m.to(tl.int64) if WIDE else m
    at = row[:, None] * channels + k[None, :]
    mask = in_m[:, None] & in_k[None, :]
    if RESIDUAL:
        acc += tl.load(residual_ptr + at, mask=mask, other=0.0).to(tl.float32)
    y = acc.to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + at, y, mask=mask)
    if STATS:
        EXACT: tl.constexpr = y_ptr.dtype.element_ty == tl.float32
        mean, m2 = tile_stats(y.to(tl.float32), in_m, tl.cast(rows, tl.float32), EXACT)
        partial = partial_ptr + tl.cast(tile_m, tl.int64) * (2 * channels) + k
        tl.store(partial, mean, mask=in_k)
        tl.store(partial + channels, m2, mask=in_k)


@triton.jit(do_not_specialize=["slope", "pixels", "h", "w", "p", "q", "c_units", "k_units", "steps"])
def conv_forward_kernel(
    x_ptr, bn_ptr, weight_ptr, bias_ptr, residual_ptr, y_ptr, partial_ptr,
    slope,
    pixels,  # N * P * Q
    h, w, p, q,
    c_units, k_units,
    steps,  # of the reduction: blocks of input channels x taps
    R: tl.constexpr, S: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr, PAD_W: tl.constexpr, DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
    C_UNIT: tl.constexpr, K_UNIT: tl.constexpr,
    EVEN_C: tl.constexpr,  # C is a multiple of BLOCK_C
    ACTIVATION: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr, STATS: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One tile of BLOCK_M pixels x BLOCK_K output channels per program; neighbouring programs share their
    pixels."""
    POINTWISE: tl.constexpr = R * S * STRIDE_H * STRIDE_W == 1 and PAD_H + PAD_W == 0
    PADDED: tl.constexpr = PAD_H + PAD_W > 0
    channels_in = c_units * C_UNIT
    channels = k_units * K_UNIT
    tiles_k = tl.cdiv(channels, BLOCK_K)
    tile_m = tl.program_id(0) // tiles_k
    k = (tl.program_id(0) % tiles_k) * BLOCK_K + tl.arange(0, BLOCK_K)
    in_k = k < channels
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    in_m = m < pixels
    # Rows and columns past the end compute on row and column 0 and are not stored: no mask in the loop.
    row = tl.where(in_m, m, 0)
    column = tl.where(in_k, k, 0)

    if POINTWISE:
        origin = row
        top, left = row, row  # unused
    else:
        image = row // (p * q)
        row = row % (p * q)
        top = (row // q) * STRIDE_H - PAD_H
        left = (row % q) * STRIDE_W - PAD_W
        origin = (image * h + top) * w + left
    if WIDE:
        origin = origin.to(tl.int64)
    lane = tl.arange(0, BLOCK_C)
    x_at = x_ptr + origin[:, None] * channels_in + lane[None, :]
    weight_at = weight_ptr + column[None, :] * (R * S * channels_in) + lane[:, None]

    acc = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    # Else a path past the loop joins its accumulator behind it, and ptxas serialises the wgmma (C7515).
    tl.assume(steps > 0)
    for step in range(steps):
        c = (step // (R * S)) * BLOCK_C
        tap = step % (R * S)
        dh = (tap // S) * DILATION_H
        dw = (tap % S) * DILATION_W
        x_step = x_at + ((dh * w + dw) * channels_in + c)
        weight_step = weight_at + (tap * channels_in + c)
        if PADDED:
            inside = (top + dh >= 0) & (top + dh < h) & (left + dw >= 0) & (left + dw < w)
        if EVEN_C:
            weight = tl.load(weight_step)
            if PADDED:
                x = tl.load(x_step, mask=inside[:, None], other=0.0)
            else:
                x = tl.load(x_step)
        else:
            in_c = lane < channels_in - c
            weight = tl.load(weight_step, mask=in_c[:, None], other=0.0)
            if PADDED:
                x = tl.load(x_step, mask=inside[:, None] & in_c[None, :], other=0.0)
            else:
                x = tl.load(x_step, mask=in_c[None, :], other=0.0)
        if ACTIVATION != 0:
            rows_at = bn_ptr + (2 * channels_in + c) + lane
            if EVEN_C:
                scale = tl.load(rows_at)
                shift = tl.load(rows_at + channels_in)
            else:
                scale = tl.load(rows_at, mask=in_c, other=0.0)
                shift = tl.load(rows_at + channels_in, mask=in_c, other=0.0)
            x = activate(x, scale[None, :], shift[None, :], slope, ACTIVATION)
            if PADDED:
                # Padding comes after the activation: 0, not act(shift).
                x = tl.where(inside[:, None], x, 0.0)
        x = operand(x, PRECISION)
        acc = tl.dot(x, operand(weight, PRECISION), acc, input_precision=PRECISION)

    _finish_tile(
        acc, m, in_m, tl.minimum(pixels - tile_m * BLOCK_M, BLOCK_M), k, in_k, channels, tile_m,
        bias_ptr, residual_ptr, y_ptr, partial_ptr, BIAS, RESIDUAL, STATS, WIDE,
    )  # fmt: skip


@triton.jit(do_not_specialize=["slope", "pixels", "c_units", "k_units"])
def pointwise_forward_kernel(
    x_ptr, bn_ptr, weight_ptr, bias_ptr, residual_ptr, y_ptr, partial_ptr,
    slope,
    pixels,
    c_units, k_units,
    C_UNIT: tl.constexpr, K_UNIT: tl.constexpr,
    EVEN_C: tl.constexpr,  # C is BLOCK_C
    ACTIVATION: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr, STATS: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """A 1x1 convolution whose input channels are one reduction step: nothing to pipeline within a tile, so a
    program keeps the weights and loops over tiles of pixels."""
    channels_in = c_units * C_UNIT
    channels = k_units * K_UNIT
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    in_k = k < channels
    c = tl.arange(0, BLOCK_C)
    in_c = c < channels_in
    column = tl.where(in_k, k, 0)
    weight_at = weight_ptr + column[None, :] * channels_in + c[:, None]
    if EVEN_C:
        weight = tl.load(weight_at)
    else:
        weight = tl.load(weight_at, mask=in_c[:, None], other=0.0)
    weight = operand(weight, PRECISION)
    if ACTIVATION != 0:
        scale = tl.load(bn_ptr + 2 * channels_in + c, mask=in_c, other=0.0)
        shift = tl.load(bn_ptr + 3 * channels_in + c, mask=in_c, other=0.0)
    for tile_m in range(tl.program_id(0), tl.cdiv(pixels, BLOCK_M), tl.num_programs(0)):
        m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
        in_m = m < pixels
        row = tl.where(in_m, m, 0)
        if WIDE:
            row = row.to(tl.int64)
        x_at = x_ptr + row[:, None] * channels_in + c[None, :]
        if EVEN_C:
            x = tl.load(x_at)
        else:
            x = tl.load(x_at, mask=in_c[None, :], other=0.0)
        if ACTIVATION != 0:
            x = activate(x, scale[None, :], shift[None, :], slope, ACTIVATION)
        acc = tl.dot(operand(x, PRECISION), weight, input_precision=PRECISION)
        _finish_tile(
            acc, m, in_m, tl.minimum(pixels - tile_m * BLOCK_M, BLOCK_M), k, in_k, channels, tile_m, bias_ptr,
            residual_ptr, y_ptr, partial_ptr, BIAS, RESIDUAL, STATS, WIDE,
        )  # fmt: skip


class Plan:
    """The launches of one problem."""

    def __init__(
        self,
        on: Target,
        dtype: torch.dtype,
        g: Convolution,
        activation: int,
        slope: float,
        bias: torch.dtype | None,
        residual: bool,
        stats: bool,
        product: str,
    ):
        name = "preact_conv_forward"
        acc = torch.float32
        dtypes = (
            dtype,
            acc if activation else None,
            dtype,
            bias,
            dtype if residual else None,
            dtype,
            acc if stats else None,
        )
        units = channel_unit(g.c), channel_unit(g.k)
        flags = (
            activation,
            bias is not None,
            residual,
            stats,
            g.wide,
            "ieee" if product == "16bit" else product,
        )
        sizes = {"rows": g.out_pixels, "columns": g.k, "depth": g.c, "aligned": configs.aligned(product, g.c)}
        config = configs.select(on, name, product, "persistent", **sizes) if g.pointwise else None
        if config is not None:
            tiles, tiles_k = ceil_div(g.out_pixels, config.rows), ceil_div(g.k, config.columns)
            programs = min(tiles, max(1, config.programs * on.multiprocessors // tiles_k))
            self.main = Launch(
                pointwise_forward_kernel,
                (programs, tiles_k),
                dtypes,
                (slope, g.out_pixels, g.c // units[0], g.k // units[1]),
                (*units, g.c == config.depth, *flags, config.rows, config.columns, config.depth),
                **config.options,
            )
        else:
            config = configs.select(on, name, product, "pointwise" if g.pointwise else "tiled", **sizes)
            tiles, tiles_k = ceil_div(g.out_pixels, config.rows), ceil_div(g.k, config.columns)
            steps = ceil_div(g.c, config.depth) * g.taps
            self.main = Launch(
                conv_forward_kernel,
                (tiles * tiles_k,),
                dtypes,
                (slope, g.out_pixels, g.h, g.w, g.p, g.q, g.c // units[0], g.k // units[1], steps),
                (
                    *g.constants,
                    *units,
                    g.c % config.depth == 0,
                    *flags,
                    config.rows,
                    config.columns,
                    config.depth,
                ),
                **config.options,
            )
        self.g = g
        self.merge = MergeStats(tiles, g.k, config.rows, g.out_pixels) if stats else None
        self.partial_size = (tiles, 2, g.k)

    def launches(self) -> list[Launch]:
        return [self.main, *(self.merge.launches() if self.merge else ())]

    def __call__(self, x, bn, weight, bias, residual) -> tuple[Tensor, Tensor]:
        y = torch.empty(self.g.y_shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
        if self.merge is None:
            self.main(x, bn, weight, bias, residual, y, None)
            return y, torch.empty(0, dtype=torch.float32, device=x.device)
        partial = torch.empty(self.partial_size, dtype=torch.float32, device=x.device)
        stats = torch.empty(2, self.g.k, dtype=torch.float32, device=x.device)
        self.main(x, bn, weight, bias, residual, y, partial)
        self.merge(partial, stats)
        return y, stats


@functools.lru_cache(maxsize=PLANS)
def _plan(device, dtype, x_shape, weight_shape, stride, padding, dilation, *rest) -> Plan:
    return Plan(
        target(device), dtype, Convolution.of(x_shape, weight_shape, stride, padding, dilation), *rest
    )


def preact_conv_forward(
    x: Tensor,
    bn: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    slope: float,
    stride,
    padding,
    dilation,
    groups: int,
    want_stats: bool,
) -> tuple[Tensor, Tensor]:
    """See ``primitives.preact_conv_forward``. groups must be 1 (``support.declines``)."""
    g = (tuple(stride), tuple(padding), tuple(dilation))
    shape = Convolution.of(x.shape, weight.shape, *g)
    if 0 in shape.y_shape or x.numel() == 0:
        y = torch.empty(shape.y_shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
        stats = torch.zeros((2, shape.k) if want_stats else 0, dtype=torch.float32, device=x.device)
        return y, stats
    plan = _plan(
        x.device,
        x.dtype,
        x.shape,
        weight.shape,
        *g,
        kind(bn, slope),
        float(slope),
        None if bias is None else bias.dtype,
        residual is not None,
        want_stats,
        precision(x.dtype),
    )
    bias = None if bias is None else bias.contiguous()
    with on_device_of(x):
        return plan(x, bn, packed(weight, x.dtype), bias, residual)
