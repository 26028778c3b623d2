"""preact_conv_backward_1x1: both gradients of a 1x1 convolution (stride 1, no padding) in one kernel, which
reads dy and x once.

By preact_conv_dgrad and preact_conv_wgrad dy and x are read twice. Here a program has a block of input
channels and all output channels: it keeps that block's weights and dweight [K, block] and loops over tiles of
pixels: dz = dy W with mask and sums, dweight += dy^T act(bn(x)). That needs all of K in one tile, so it is
for narrow outputs (``support.declines``). Programs of different channel blocks work on the same pixels side
by side, so that what they share of dy comes from L2."""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .activation import LEAKY, RELU, activate, operand
from .geometry import Convolution, ceil_div, channel_unit, next_power_of_two
from .launch import PLANS, Launch, Target, on_device_of, precision, target
from .preact_conv_dgrad import finish_gradient
from .preact_conv_wgrad import BiasGradient
from .reduction import OrderedSum
from .weights import packed


@triton.jit(do_not_specialize=["slope", "pixels", "c_units", "k_units"])
def backward_1x1_kernel(
    dy_ptr, weight_ptr, x_ptr, bn_ptr, dz_in_ptr, dz_ptr,
    sums_ptr, dweight_ptr,  # [tiles, 2, C], [programs, K, C]
    slope,
    pixels,
    c_units, k_units,
    C_UNIT: tl.constexpr, K_UNIT: tl.constexpr,
    EVEN_C: tl.constexpr, EVEN_K: tl.constexpr,  # C is a multiple of BLOCK_C, K is BLOCK_K
    ACTIVATION: tl.constexpr, DZ_IN: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    channels = c_units * C_UNIT
    channels_out = k_units * K_UNIT
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    k = tl.arange(0, BLOCK_K)
    in_c = c < channels
    in_k = k < channels_out
    weight_at = k[:, None] * channels + c[None, :]
    weight_mask = in_k[:, None] & in_c[None, :]
    weight = operand(tl.load(weight_ptr + weight_at, mask=weight_mask, other=0.0), PRECISION)
    mean = tl.load(bn_ptr + c, mask=in_c, other=0.0)
    invstd = tl.load(bn_ptr + channels + c, mask=in_c, other=0.0)
    scale = tl.load(bn_ptr + 2 * channels + c, mask=in_c, other=0.0)
    shift = tl.load(bn_ptr + 3 * channels + c, mask=in_c, other=0.0)
    dweight = tl.zeros([BLOCK_K, BLOCK_C], tl.float32)
    for tile in range(tl.program_id(1), tl.cdiv(pixels, BLOCK_M), tl.num_programs(1)):
        m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        in_m = m < pixels
        row = tl.where(in_m, m, 0)
        if WIDE:
            row = row.to(tl.int64)
        at = row[:, None] * channels + c[None, :]
        dy_mask = in_m[:, None] if EVEN_K else in_m[:, None] & in_k[None, :]
        dy = tl.load(dy_ptr + row[:, None] * channels_out + k[None, :], mask=dy_mask, other=0.0)
        x_mask = in_m[:, None] if EVEN_C else in_m[:, None] & in_c[None, :]
        x = tl.load(x_ptr + at, mask=x_mask, other=0.0)
        a = activate(x, scale[None, :], shift[None, :], slope, ACTIVATION)
        a = operand(tl.where(in_m[:, None], a, 0.0), PRECISION)
        dy = operand(dy, PRECISION)
        dweight = tl.dot(tl.trans(dy), a, dweight, input_precision=PRECISION)
        da = tl.dot(dy, weight, input_precision=PRECISION)
        finish_gradient(
            da, x, mean, invstd, scale, shift, at, in_m[:, None] & in_c[None, :], in_m, c, in_c, channels, tile,
            dz_in_ptr, dz_ptr, sums_ptr, slope, ACTIVATION, DZ_IN,
        )  # fmt: skip
    partial = dweight_ptr + tl.program_id(1).to(tl.int64) * (channels * channels_out)
    tl.store(partial + weight_at, dweight, mask=weight_mask)


class Plan:
    """The launches of one problem. ``strides``: as in preact_conv_wgrad."""

    def __init__(
        self,
        on: Target,
        dtype: torch.dtype,
        g: Convolution,
        weight_dtype: torch.dtype,
        strides: tuple[int, ...] | None,
        slope: float,
        dz_in: bool,
        bias: bool,
        product: str,
    ):
        name = "preact_conv_backward_1x1"
        # Exact float32 products are declined: they have no matrix unit, and would only be right, slowly.
        table = "tf32" if product == "ieee" else product
        # Classes by K, which is the kernel's depth in one product and its rows in the other.
        config = configs.select(on, name, table, "persistent", rows=g.out_pixels, columns=g.k, depth=g.k)
        block_c, block_k = (max(configs.MIN_DEPTH, next_power_of_two(n)) for n in (g.c, g.k))
        block_c = min(block_c, config.columns)
        tiles, tiles_c = ceil_div(g.out_pixels, config.rows), ceil_div(g.c, block_c)
        programs = min(tiles, max(1, config.programs * on.multiprocessors // tiles_c))
        units = channel_unit(g.c), channel_unit(g.k)
        acc = torch.float32
        self.main = Launch(
            backward_1x1_kernel,
            (tiles_c, programs),
            (dtype, dtype, dtype, acc, dtype if dz_in else None, dtype, acc, acc),
            (slope, g.out_pixels, g.c // units[0], g.k // units[1]),
            (
                *units,
                g.c % block_c == 0,
                g.k == block_k,
                RELU if slope == 0 else LEAKY,
                dz_in,
                g.wide,
                "ieee" if product == "16bit" else product,
                config.rows,
                block_c,
                block_k,
            ),
            **config.options,
        )
        self.sums_size, self.dweight_size = (tiles, 2, g.c), (programs, g.k, g.c)
        self.sum = OrderedSum(tiles, 2 * g.c)
        self.weight = OrderedSum(programs, g.k * g.c, weight_dtype, strides and (1, 1, g.c, strides))
        self.bias = BiasGradient(on, dtype, g, weight_dtype) if bias else None

    def launches(self) -> list[Launch]:
        others = self.bias.launches() if self.bias else ()
        return [self.main, *self.sum.launches(), *self.weight.launches(), *others]

    def __call__(self, dy, weight, x, bn, dz_in, dweight, dbias) -> tuple[Tensor, Tensor]:
        dz = torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
        sums = torch.empty(2, x.shape[1], dtype=torch.float32, device=x.device)
        partial = torch.empty(self.sums_size, dtype=torch.float32, device=x.device)
        splits = torch.empty(self.dweight_size, dtype=torch.float32, device=x.device)
        self.main(dy, weight, x, bn, dz_in, dz, partial, splits)
        self.sum(partial, sums)
        self.weight(splits, dweight)
        if self.bias is not None:
            self.bias(dy, dbias)
        return dz, sums


@functools.lru_cache(maxsize=PLANS)
def _plan(device, dtype, x_shape, weight_shape, *rest) -> Plan:
    return Plan(target(device), dtype, Convolution.of(x_shape, weight_shape, (1, 1), (0, 0), (1, 1)), *rest)


def preact_conv_backward_1x1(
    dy: Tensor, weight: Tensor, x: Tensor, bn: Tensor, dz_in: Tensor | None, slope: float, want_bias: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dz, sums) of ``preact_conv_dgrad`` and (dweight, dbias) of ``preact_conv_wgrad``, for a 1x1
    convolution with stride 1, no padding and groups 1 (``support.declines("preact_conv_backward_1x1", ...)``
    says whether the kernel takes it)."""
    dweight = torch.empty_like(weight)
    dbias = weight.new_empty(weight.shape[0] if want_bias else 0)
    if x.numel() == 0:
        dz = torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
        sums = torch.zeros(2, x.shape[1], dtype=torch.float32, device=x.device)
        return dz, sums, dweight.zero_(), dbias.zero_()
    plan = _plan(
        x.device,
        x.dtype,
        x.shape,
        weight.shape,
        weight.dtype,
        None if dweight.is_contiguous(memory_format=torch.channels_last) else dweight.stride(),
        float(slope),
        dz_in is not None,
        want_bias,
        precision(x.dtype),
    )
    with on_device_of(x):
        dz, sums = plan(dy, packed(weight, x.dtype), x, bn, dz_in, dweight, dbias)
    return dz, sums, dweight, dbias
