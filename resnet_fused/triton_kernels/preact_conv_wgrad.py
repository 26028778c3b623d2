"""preact_conv_wgrad: the gradients of weight and bias, with the activation recomputed from x.

A matrix product with a tiny output and a huge reduction: rows are (tap, input channel), columns output
    channels, the reduction runs over output pixels. It is split over programs; each split writes a partial
    dweight, and a second kernel adds the splits in order. The activation, transposed as it is read, is the
    left operand."""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .activation import activate, kind, operand
from .geometry import Convolution, ceil_div, channel_unit, magic_divisor
from .launch import PLANS, Launch, Target, on_device_of, precision, target
from .reduction import OrderedSum

#: A split is at least this many reduction steps.
_MIN_STEPS = 4
#: Partial dweights take at most this many bytes.
_PARTIAL_BYTES = 64 << 20


@triton.jit
def _divide(n, magic, shift):
    """n // divisor for 0 <= n < 2**31, see geometry.magic_divisor."""
    n = n.to(tl.uint32)
    return ((tl.umulhi(n, magic.to(tl.uint32, bitcast=True)) + n) >> shift.to(tl.uint32)).to(tl.int32)


@triton.jit(
    do_not_specialize=[
        "slope", "pixels", "h", "w", "plane", "plane_magic", "plane_shift", "q", "q_magic", "q_shift",
        "steps", "c_units", "k_units",
    ]
)  # fmt: skip
def conv_wgrad_kernel(
    dy_ptr, x_ptr, bn_ptr, partial_ptr,  # [splits, K, R * S, C]
    slope,
    pixels,  # N * P * Q
    h, w,
    plane, plane_magic, plane_shift,  # P * Q
    q, q_magic, q_shift,
    steps,  # per split
    c_units, k_units,
    R: tl.constexpr, S: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr, PAD_W: tl.constexpr, DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
    C_UNIT: tl.constexpr, K_UNIT: tl.constexpr,
    EVEN_ROWS: tl.constexpr, EVEN_K: tl.constexpr,  # no tile hangs over the last row, the last column
    ONE_TAP: tl.constexpr,  # a tile's rows are of one tap; else rows are taps x channels without a gap
    ACTIVATION: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """One tile of dweight, transposed, over one split of the pixels per program."""
    POINTWISE: tl.constexpr = R * S * STRIDE_H * STRIDE_W == 1 and PAD_H + PAD_W == 0
    PADDED: tl.constexpr = PAD_H + PAD_W > 0
    channels_in = c_units * C_UNIT
    channels = k_units * K_UNIT
    tiles_k = tl.cdiv(channels, BLOCK_K)
    tile = tl.program_id(0) // tiles_k
    k = (tl.program_id(0) % tiles_k) * BLOCK_K + tl.arange(0, BLOCK_K)
    in_k = k < channels
    if ONE_TAP:
        tap = tile % (R * S)
        c = (tile // (R * S)) * BLOCK_C + tl.arange(0, BLOCK_C)
        in_c = c < channels_in
    else:
        row = tile * BLOCK_C + tl.arange(0, BLOCK_C)
        in_c = row < R * S * channels_in
        tap = row // channels_in
        c = row % channels_in
    dh = (tap // S) * DILATION_H - PAD_H
    dw = (tap % S) * DILATION_W - PAD_W
    x_at = x_ptr + ((dh * w + dw) * channels_in + c)[:, None]
    dy_at = dy_ptr + k[None, :]
    if ACTIVATION != 0:
        scale = tl.load(bn_ptr + 2 * channels_in + c, mask=in_c, other=0.0)[:, None]
        shift = tl.load(bn_ptr + 3 * channels_in + c, mask=in_c, other=0.0)[:, None]

    first = tl.program_id(1) * steps
    last = tl.minimum(first + steps, tl.cdiv(pixels, BLOCK_M))
    acc = tl.zeros([BLOCK_C, BLOCK_K], tl.float32)
    # No split is empty. As in the forward kernel: a path past the loop would serialise the wgmma.
    tl.assume(last > first)
    for step in range(first, last):
        m = step * BLOCK_M + tl.arange(0, BLOCK_M)
        in_m = m < pixels
        m = tl.where(in_m, m, 0)
        if POINTWISE:
            origin = m
            inside = in_m[None, :]
        else:
            image = _divide(m, plane_magic, plane_shift)
            rest = m - image * plane
            i = _divide(rest, q_magic, q_shift)
            top = i * STRIDE_H
            left = (rest - i * q) * STRIDE_W
            origin = (image * h + top) * w + left
            if PADDED:
                # Of the tile's one tap [pixels], or of every row's tap [rows, pixels].
                if ONE_TAP:
                    top += dh
                    left += dw
                    inside = (in_m & (top >= 0) & (top < h) & (left >= 0) & (left < w))[None, :]
                else:
                    top = top[None, :] + dh[:, None]
                    left = left[None, :] + dw[:, None]
                    inside = in_m[None, :] & (top >= 0) & (top < h) & (left >= 0) & (left < w)
            else:
                inside = in_m[None, :]
        if WIDE:
            origin = origin.to(tl.int64)
            m = m.to(tl.int64)
        dy_mask = in_m[:, None] if EVEN_K else in_m[:, None] & in_k[None, :]
        dy = tl.load(dy_at + m[:, None] * channels, mask=dy_mask, other=0.0)
        x_mask = inside if EVEN_ROWS else inside & in_c[:, None]
        x = tl.load(x_at + (origin * channels_in)[None, :], mask=x_mask, other=0.0)
        if ACTIVATION != 0:
            x = activate(x, scale, shift, slope, ACTIVATION)
            # Padding comes after the activation; pixels past the end must not bring a NaN or inf of shift
            # into the sum.
            x = tl.where(inside, x, 0.0)
        acc = tl.dot(operand(x, PRECISION), operand(dy, PRECISION), acc, input_precision=PRECISION)

    columns = R * S * channels_in
    row = tap * channels_in + c
    at = partial_ptr + tl.program_id(1).to(tl.int64) * channels * columns
    tl.store(at + k[None, :] * columns + row[:, None], acc, mask=in_c[:, None] & in_k[None, :])


@triton.jit(do_not_specialize=["pixels", "k_units", "steps"])
def bias_gradient_kernel(
    dy_ptr,
    partial_ptr,
    pixels,
    k_units,
    steps,
    K_UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Sums of dy over `steps` blocks of pixels: [splits, K]."""
    channels = k_units * K_UNIT
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    in_k = k < channels
    first = tl.program_id(1) * steps
    total = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    for step in range(first, tl.minimum(first + steps, tl.cdiv(pixels, BLOCK_M))):
        m = step * BLOCK_M + tl.arange(0, BLOCK_M)
        at = dy_ptr + m.to(tl.int64)[:, None] * channels + k[None, :]
        total += tl.load(at, mask=(m < pixels)[:, None] & in_k[None, :], other=0.0).to(tl.float32)
    tl.store(partial_ptr + tl.program_id(1) * channels + k, tl.sum(total, 0), mask=in_k)


class BiasGradient:
    """dbias of dy [N, K, P, Q]: one more read of dy, for the few convolutions that have a bias beside a
    BatchNorm."""

    _ROWS, _COLUMNS = 32, 64

    def __init__(self, on: Target, dtype: torch.dtype, g: Convolution, out: torch.dtype):
        blocks, columns = ceil_div(g.out_pixels, self._ROWS), ceil_div(g.k, self._COLUMNS)
        steps = max(4, ceil_div(blocks * columns, 4 * on.multiprocessors))
        splits = ceil_div(blocks, steps)
        unit = channel_unit(g.k)
        self.size = (splits, g.k)
        self.main = Launch(
            bias_gradient_kernel,
            (columns, splits),
            (dtype, torch.float32),
            (g.out_pixels, g.k // unit, steps),
            (unit, self._ROWS, self._COLUMNS),
            num_warps=4,
        )
        self.sum = OrderedSum(splits, g.k, out)

    def launches(self) -> list[Launch]:
        return [self.main, *self.sum.launches()]

    def __call__(self, dy: Tensor, dbias: Tensor) -> None:
        partial = torch.empty(self.size, dtype=torch.float32, device=dy.device)
        self.main(dy, partial)
        self.sum(partial, dbias)


class Plan:
    """The launches of one problem. ``strides``: those of the weight, in K, C, R, S order, or None if it is
    dense channels_last."""

    def __init__(
        self,
        on: Target,
        dtype: torch.dtype,
        g: Convolution,
        weight_dtype: torch.dtype,
        strides: tuple[int, ...] | None,
        activation: int,
        slope: float,
        bias: bool,
        product: str,
    ):
        columns = g.taps * g.c
        sizes = {
            "rows": columns,
            "columns": g.k,
            "depth": g.out_pixels,
            "aligned": configs.aligned(product, g.c, g.k),
        }
        config = configs.select(on, "preact_conv_wgrad", product, "split", **sizes)
        one_tap = g.c >= config.rows
        tiles = g.taps * ceil_div(g.c, config.rows) if one_tap else ceil_div(columns, config.rows)
        tiles *= ceil_div(g.k, config.columns)
        blocks = ceil_div(g.out_pixels, config.depth)
        splits = min(
            max(1, config.programs * on.multiprocessors // tiles),
            max(1, blocks // _MIN_STEPS),
            max(1, _PARTIAL_BYTES // (4 * g.k * columns)),
        )
        steps = ceil_div(blocks, splits)
        splits = ceil_div(blocks, steps)
        units = channel_unit(g.c), channel_unit(g.k)
        plane = g.p * g.q
        self.main = Launch(
            conv_wgrad_kernel,
            (tiles, splits),
            (dtype, dtype, torch.float32 if activation else None, torch.float32),
            (
                *(slope, g.out_pixels, g.h, g.w, plane, *magic_divisor(plane), g.q, *magic_divisor(g.q)),
                *(steps, g.c // units[0], g.k // units[1]),
            ),
            (
                *g.constants,
                *units,
                g.c % config.rows == 0 if one_tap else columns % config.rows == 0,
                g.k % config.columns == 0,
                one_tap,
                activation,
                g.wide,
                "ieee" if product == "16bit" else product,
                config.rows,
                config.columns,
                config.depth,
            ),
            **config.options,
        )
        self.size = (splits, g.k, columns)
        scatter = None if strides is None else (g.r, g.s, g.c, strides)
        self.sum = OrderedSum(splits, g.k * columns, weight_dtype, scatter)
        self.bias = BiasGradient(on, dtype, g, weight_dtype) if bias else None

    def launches(self) -> list[Launch]:
        return [self.main, *self.sum.launches(), *(self.bias.launches() if self.bias else ())]

    def __call__(self, dy, x, bn, dweight, dbias) -> None:
        partial = torch.empty(self.size, dtype=torch.float32, device=x.device)
        self.main(dy, x, bn, partial)
        self.sum(partial, dweight)
        if self.bias is not None:
            self.bias(dy, dbias)


@functools.lru_cache(maxsize=PLANS)
def _plan(device, dtype, x_shape, weight_shape, stride, padding, dilation, *rest) -> Plan:
    return Plan(
        target(device), dtype, Convolution.of(x_shape, weight_shape, stride, padding, dilation), *rest
    )


def preact_conv_wgrad(
    dy: Tensor,
    x: Tensor,
    bn: Tensor | None,
    weight: Tensor,
    slope: float,
    stride,
    padding,
    dilation,
    groups: int,
    want_bias: bool,
) -> tuple[Tensor, Tensor]:
    """See ``primitives.preact_conv_wgrad``. groups must be 1 (``support.declines``)."""
    if x.numel() == 0 or dy.numel() == 0:
        return torch.zeros_like(weight), weight.new_zeros(weight.shape[0] if want_bias else 0)
    dweight = torch.empty_like(weight)
    dbias = weight.new_empty(weight.shape[0] if want_bias else 0)
    plan = _plan(
        x.device,
        x.dtype,
        x.shape,
        weight.shape,
        tuple(stride),
        tuple(padding),
        tuple(dilation),
        weight.dtype,
        None if dweight.is_contiguous(memory_format=torch.channels_last) else dweight.stride(),
        kind(bn, slope),
        float(slope),
        want_bias,
        precision(x.dtype),
    )
    with on_device_of(x):
        plan(dy, x, bn, dweight, dbias)
    return dweight, dbias
