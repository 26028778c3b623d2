"""Every primitive, on every backend and SIMD level, against the float64 oracle.

The oracle is the reference given float64 inputs, the yardstick of the trust rule the reference in the same
dtype. The reference itself is held against torch.nn.functional.
"""

import os
import re
import subprocess
import sys
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from conftest import BACKENDS, on_every_backend
from tolerances import STATS_EPS, assert_trusted

import resnet_fused as rf
from resnet_fused import primitives
from resnet_fused.primitives import dispatch, reference
from resnet_fused.primitives.layout import convolution_output_shape

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
CL = torch.channels_last


class Shape(NamedTuple):
    n: int
    c: int
    h: int
    w: int
    k: int
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    @property
    def geometry(self):
        return self.stride, self.padding, self.dilation, self.groups


SHAPES = [
    Shape(1, 1, 1, 1, 1),
    Shape(1, 1, 5, 7, 1, (3, 3), padding=(1, 1)),
    Shape(2, 3, 9, 7, 16, (3, 3), padding=(1, 1)),
    Shape(3, 8, 6, 5, 17),
    Shape(2, 16, 8, 8, 16, (3, 3), padding=(1, 1)),
    Shape(2, 16, 7, 9, 35, (3, 3), (2, 2), (1, 1)),
    Shape(2, 17, 11, 5, 8, (1, 1), (2, 2)),
    Shape(1, 35, 13, 13, 65, (3, 3), padding=(1, 1)),
    Shape(2, 64, 9, 8, 64),
    Shape(1, 64, 10, 6, 64, (3, 3), padding=(1, 1)),
    Shape(2, 65, 5, 5, 130, (1, 1), (2, 2)),
    Shape(2, 65, 6, 6, 64, (3, 3), (2, 2), (1, 1)),
    Shape(5, 16, 4, 4, 16, (5, 5), padding=(2, 2)),
    Shape(2, 3, 12, 10, 8, (5, 3), (2, 1), (2, 0)),
    Shape(2, 8, 11, 12, 8, (3, 3), padding=(2, 2), dilation=(2, 2)),
    Shape(1, 8, 12, 14, 16, (2, 4), (1, 2), (1, 3), (3, 1)),
    Shape(1, 16, 3, 3, 16, (3, 3)),
    Shape(1, 16, 3, 4, 8, (3, 3), (3, 3), (3, 3)),
    Shape(2, 130, 33, 4, 16),
    Shape(4, 16, 32, 32, 16, (3, 3), padding=(1, 1)),
    Shape(2, 16, 7, 7, 32, (3, 3), padding=(1, 1), groups=4),
    Shape(2, 12, 5, 6, 12, (3, 3), (2, 2), (1, 1), groups=12),
]
ELEMENTWISE_SHAPES = [
    (1, 1, 1, 2),
    (2, 3, 5, 7),
    (1, 8, 4, 4),
    (3, 17, 9, 5),
    (2, 35, 3, 3),
    (2, 64, 16, 15),
    (1, 65, 7, 1),
]


def name_of(value):
    if isinstance(value, Shape):
        extra = f"g{value.groups}" if value.groups > 1 else ""
        return (
            f"{value.n}x{value.c}x{value.h}x{value.w}-k{value.k}-{value.kernel[0]}x{value.kernel[1]}"
            f"s{value.stride[0]}{value.stride[1]}p{value.padding[0]}{value.padding[1]}"
            f"d{value.dilation[0]}{value.dilation[1]}{extra}"
        )
    if isinstance(value, tuple):
        return "x".join(map(str, value))
    return str(value).removeprefix("torch.")


def acc(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def activation(*size, dtype):
    return torch.randn(size).to(dtype).contiguous(memory_format=CL)


def bn_rows(c, dtype):
    """A BatchNorm's coefficients, some scales negative."""
    mean, var = torch.randn(c).double() * 0.3, torch.rand(c).double() + 0.5
    return reference.finalize_forward(None, 0, mean, var, torch.randn(c), torch.randn(c), 1e-5).to(acc(dtype))


def wide(*tensors):
    return tuple(t.double() if isinstance(t, torch.Tensor) else t for t in tensors)


def check_activation(name, result, yardstick, oracle, terms=0.0):
    """One activation-sized output: dtype, layout and the trust rule. terms: of its sums, in float64
    (SUM_EPS).
    """
    assert result.dtype == yardstick.dtype, name
    assert result.stride() == torch.empty(result.shape, memory_format=CL).stride(), name
    assert_trusted(result, yardstick, oracle, name, terms if result.dtype == torch.float64 else 0.0)


def check_stats(stats, y):
    """stats are those of y as rounded."""
    oracle, count = reference.channel_stats(y.double()), y.numel() // y.shape[1]
    assert stats.dtype == acc(y.dtype) and stats.shape == oracle.shape
    eps = torch.finfo(stats.dtype).eps
    spread = (oracle[1] / count).sqrt() + oracle[0].abs()
    assert ((stats[0] - oracle[0]).abs() <= STATS_EPS * eps * spread).all(), "mean"
    # Each deviation carries the rounding of x - mean.
    assert ((stats[1] - oracle[1]).abs() <= STATS_EPS * eps * (oracle[1] + spread**2)).all(), "M2"


def check_sums(sums, dz, x, bn):
    """sums are those of dz as rounded."""
    d, xhat = dz.double(), (x.double() - bn[0].double().view(1, -1, 1, 1)) * bn[1].double().view(1, -1, 1, 1)
    terms = torch.stack((d.abs().sum((0, 2, 3)), (d * xhat).abs().sum((0, 2, 3))))
    oracle = torch.stack((d.sum((0, 2, 3)), (d * xhat).sum((0, 2, 3))))
    same = dz.to(sums.dtype)
    plain_xhat = (x.to(sums.dtype) - bn[0].view(1, -1, 1, 1)) * bn[1].view(1, -1, 1, 1)
    plain = torch.stack((same.sum((0, 2, 3)), (same * plain_xhat).sum((0, 2, 3))))
    assert_trusted(sums, plain, oracle, "sums", terms)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("size", ELEMENTWISE_SHAPES, ids=name_of)
class TestElementwise:
    def test_channel_stats(self, dtype, size):
        x = activation(*size, dtype=dtype) * 3 + 1
        on_every_backend(lambda backend: check_stats(primitives.channel_stats(x), x))

    @pytest.mark.parametrize("slope", [0.0, 0.1])
    def test_bn_act_forward(self, dtype, size, slope):
        args = (activation(*size, dtype=dtype), bn_rows(size[1], dtype), slope)
        plain, oracle = reference.bn_act_forward(*args), reference.bn_act_forward(*wide(*args))
        on_every_backend(
            lambda backend: check_activation("a", primitives.bn_act_forward(*args), plain, oracle)
        )

    @pytest.mark.parametrize("joined", [False, True], ids=["", "dz_in"])
    def test_bn_act_backward(self, dtype, size, joined):
        da, x, dz_in = (activation(*size, dtype=dtype) for _ in range(3))
        bn = bn_rows(size[1], dtype)
        args = (da, x, bn, dz_in if joined else None, 0.1)
        plain, oracle = reference.bn_act_backward(*args)[0], reference.bn_act_backward(*wide(*args))[0]

        def check(backend):
            dz, sums = primitives.bn_act_backward(*args)
            check_activation("dz", dz, plain, oracle)
            check_sums(sums, dz, x, bn)

        on_every_backend(check)

    @pytest.mark.parametrize("slope", [0.0, 0.1])
    def test_bn_act_pool(self, dtype, size, slope):
        x, dy = activation(*size, dtype=dtype), activation(*size[:2], 1, 1, dtype=dtype)
        bn = bn_rows(size[1], dtype)
        args = (dy, x, bn, slope)
        y_plain, y_oracle = (reference.bn_act_pool_forward(*a[1:]) for a in (args, wide(*args)))
        plain, oracle = (reference.bn_act_pool_backward(*a)[0] for a in (args, wide(*args)))

        def check(backend):
            check_activation("y", primitives.bn_act_pool_forward(x, bn, slope), y_plain, y_oracle)
            dz, sums = primitives.bn_act_pool_backward(*args)
            check_activation("dz", dz, plain, oracle)
            check_sums(sums, dz, x, bn)

        on_every_backend(check)

    @pytest.mark.parametrize("skip", [False, True], ids=["", "dskip"])
    def test_preact_apply(self, dtype, size, skip):
        dz, x, dskip = (activation(*size, dtype=dtype) for _ in range(3))
        args = (dz, x, torch.randn(4, size[1]).to(acc(dtype)), dskip if skip else None)
        plain, oracle = reference.preact_apply(*args), reference.preact_apply(*wide(*args))
        on_every_backend(
            lambda backend: check_activation("dx", primitives.preact_apply(*args), plain, oracle)
        )

    @pytest.mark.parametrize("slope", [None, 0.0, 0.2])
    @pytest.mark.parametrize(
        ("affine", "gated"), [(False, None), (True, None), (False, "channels"), (True, "one")]
    )
    def test_residual_add(self, dtype, size, affine, gated, slope):
        n, c = size[:2]
        x, y = activation(*size, dtype=dtype), activation(*size, dtype=dtype)
        gate = None if gated is None else torch.randn(n, c if gated == "channels" else 1).to(acc(dtype))
        rows = torch.randn(2, c).to(acc(dtype)) if affine else None
        args = (x, y, rows, gate, 0.5 if affine else 1.0, slope, False)
        plain, oracle = reference.residual_add(*args)[0], reference.residual_add(*wide(*args))[0]

        def check(backend):
            out, none = primitives.residual_add(*args)
            assert none.shape == (0,)
            assert_trusted(out, plain, oracle, "out")
            out, stats = primitives.residual_add(*args[:-1], True)
            assert_trusted(out, plain, oracle, "out with stats")
            check_stats(stats, out)

        on_every_backend(check)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=name_of)
@pytest.mark.parametrize(
    "size",
    [(2, 16, 96, 90), (1, 64, 112, 112), (3, 35, 40, 41), (1, 600, 21, 20), (5, 520, 1, 1)],
    ids=name_of,
)
def test_means_of_large_images(size, dtype):
    """Several tiles of an image, the last one not full, and several groups of channels; a mean of many
    thousand terms of one sign keeps its digits."""
    x, dy = activation(*size, dtype=dtype), activation(*size[:2], 1, 1, dtype=dtype)
    bn = bn_rows(size[1], dtype)
    bn[3] += 2
    args = (dy, x, bn, 0.0)
    y_plain, y_oracle = (reference.bn_act_pool_forward(*a[1:]) for a in (args, wide(*args)))
    plain, oracle = (reference.bn_act_pool_backward(*a)[0] for a in (args, wide(*args)))

    def check(backend):
        check_activation("y", primitives.bn_act_pool_forward(*args[1:]), y_plain, y_oracle)
        dz, sums = primitives.bn_act_pool_backward(*args)
        check_activation("dz", dz, plain, oracle)
        check_sums(sums, dz, x, bn)

    on_every_backend(check)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("slope", [0.0, 0.1])
def test_means_not_finite(slope, dtype):
    """NaN and inf come out where plain PyTorch has them, and nowhere else; ReLU(-inf) is 0."""
    x, bn = activation(2, 37, 4, 3, dtype=dtype), bn_rows(37, acc(dtype))
    bn[2], bn[:, 5] = bn[2].abs(), 1.0
    x[0, 0, 1, 1], x[0, 1, 2, 2], x[1, 2, 0, 0], x[1, 36, 3, 2] = torch.nan, torch.inf, -torch.inf, torch.nan
    y_plain, y_oracle = (reference.bn_act_pool_forward(*a) for a in ((x, bn, slope), wide(x, bn, slope)))
    spoilt = [[0, 0], [0, 1], *([[1, 2]] if slope else []), [1, 36]]
    assert (~y_plain.isfinite()).nonzero()[:, :2].tolist() == spoilt
    # LeakyReLU's derivative at NaN is not PyTorch's in the C++ kernels: without.
    at = x.clone() if slope == 0 else x.nan_to_num(0.5)
    dy = activation(2, 37, 1, 1, dtype=dtype)
    dy[1, 3], dy[0, 4], dy[0, 36] = torch.nan, torch.inf, -torch.inf
    at[:, 5], dy[0, 5] = -2.0, torch.inf  # nowhere active: 0 * inf would be NaN
    args = (dy, at, bn, slope)
    plain, oracle = (reference.bn_act_pool_backward(*a) for a in (args, wide(*args)))
    assert bool(plain[0][:, 5].isfinite().all()) == (slope == 0)

    def check(backend):
        check_activation("y", primitives.bn_act_pool_forward(x, bn, slope), y_plain, y_oracle)
        dz, sums = primitives.bn_act_pool_backward(*args)
        check_activation("dz", dz, plain[0], oracle[0])
        for got, want in zip(sums.unbind(), plain[1].unbind(), strict=True):
            assert torch.equal(got.isnan(), want.isnan()) and torch.equal(got.isfinite(), want.isfinite())
        below = primitives.bn_act_pool_forward(torch.full_like(x, -torch.inf), torch.ones_like(bn), 0.0)
        assert torch.equal(below, torch.zeros_like(dy))

    on_every_backend(check)


CONVOLUTION_DTYPES = [(d, d) for d in DTYPES] + [
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float32),
]


class Plain:
    """The convolution primitives as plain PyTorch composes them in one dtype, rounding after each step: the
    yardstick of the unfused path in half precision."""

    @staticmethod
    def forward(x, bn, weight, bias, residual, slope, *geometry):
        a = x if bn is None else reference.bn_act_forward(x, bn, slope)
        y = F.conv2d(a, weight.to(x.dtype), None if bias is None else bias.to(x.dtype), *geometry)
        return y if residual is None else y + residual

    @staticmethod
    def _gradient(dy, x, weight, stride, padding, dilation, groups, mask):
        return torch.ops.aten.convolution_backward(
            dy, x, weight.to(x.dtype), None, stride, padding, dilation, False, [0, 0], groups, mask
        )

    @staticmethod
    def dgrad(dy, weight, x, bn, dz_in, slope, *geometry):
        da = Plain._gradient(dy, x, weight, *geometry, [True, False, False])[0]
        return reference.bn_act_backward(da, x, bn, dz_in, slope)[0]

    @staticmethod
    def wgrad(dy, x, bn, weight, slope, *geometry):
        a = x if bn is None else reference.bn_act_forward(x, bn, slope)
        return Plain._gradient(dy, a, weight, *geometry, [False, True, False])[1].to(weight.dtype)


def yardstick(function, *activations):
    """function(*activations), with a batch of one doubled and halved again. A batch of one takes PyTorch's
    native convolution, whose sums (MKL's) are more accurate than those of oneDNN, which serves all others.
    """
    if activations[0].shape[0] > 1:
        return function(*activations)
    twice = (None if t is None else torch.cat((t, t)).contiguous(memory_format=CL) for t in activations)
    return function(*twice)[:1]


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    ("dtype", "parameters"),
    CONVOLUTION_DTYPES,
    ids=["fp32", "fp64", "bf16", "fp16", "bf16-masters", "fp16-masters"],
)
@pytest.mark.parametrize("shape", SHAPES, ids=name_of)
class TestConvolutions:
    @pytest.fixture(autouse=True)
    def arguments(self, shape, dtype, parameters):
        self.x = activation(shape.n, shape.c, shape.h, shape.w, dtype=dtype)
        fan_in = shape.c // shape.groups * shape.kernel[0] * shape.kernel[1]
        self.weight = (torch.randn(shape.k, shape.c // shape.groups, *shape.kernel) / fan_in**0.5).to(
            parameters
        )
        self.bias = torch.randn(shape.k).to(parameters)
        self.bn = bn_rows(shape.c, dtype)
        size = convolution_output_shape(self.x.shape, self.weight.shape, *shape.geometry[:3])
        self.dy, self.residual = activation(*size, dtype=dtype), activation(*size, dtype=dtype)
        # What the cpu kernels and the reference round once, the unfused path rounds after each step.
        self.rounds_once = lambda backend: (
            backend == "reference"
            or (backend.startswith("cpu") and dtype != torch.float16 and shape.groups == 1)
        )

    @pytest.mark.parametrize("variant", ["bn", "bn+bias+residual", "plain"])
    def test_forward(self, shape, variant):
        bn = None if variant == "plain" else self.bn
        extras = (self.bias, self.residual) if variant.endswith("residual") else (None, None)
        args = (self.x, bn, self.weight, *extras, 0.0, *shape.geometry)
        oracle = reference.preact_conv_forward(*wide(*args), False)[0]
        once = yardstick(
            lambda x, r: reference.preact_conv_forward(x, *args[1:4], r, *args[5:], False)[0],
            self.x,
            extras[1],
        )
        stepwise = Plain.forward(*args)
        terms = reference.preact_conv_forward(
            *(
                None if t is None else t.double().abs()
                for t in (
                    self.x if bn is None else reference.bn_act_forward(self.x, bn, 0.0),
                    None,
                    self.weight,
                    *extras,
                )
            ),
            0.0,
            *shape.geometry,
            False,
        )[0]

        def check(backend):
            y, none = primitives.preact_conv_forward(*args, False)
            assert none.shape == (0,)
            check_activation("y", y, once if self.rounds_once(backend) else stepwise, oracle, terms)
            again, stats = primitives.preact_conv_forward(*args, True)
            assert torch.equal(y, again)
            check_stats(stats, y)

        on_every_backend(check)

    @pytest.mark.parametrize("joined", [False, True], ids=["", "dz_in"])
    def test_dgrad(self, shape, joined):
        dz_in = torch.randn_like(self.x) if joined else None
        args = (self.dy, self.weight, self.x, self.bn, dz_in, 0.1, *shape.geometry)
        oracle = reference.preact_conv_dgrad(*wide(*args))[0]
        once = yardstick(
            lambda dy, x, d: reference.preact_conv_dgrad(dy, self.weight, x, self.bn, d, *args[5:])[0],
            self.dy,
            self.x,
            dz_in,
        )
        stepwise = Plain.dgrad(*args)
        terms = Plain._gradient(
            self.dy.double().abs(),
            self.x.double(),
            self.weight.double().abs(),
            *shape.geometry,
            [True, False, False],
        )[0]

        def check(backend):
            dz, sums = primitives.preact_conv_dgrad(*args)
            check_activation("dz", dz, once if self.rounds_once(backend) else stepwise, oracle, terms)
            check_sums(sums, dz, self.x, self.bn)

        on_every_backend(check)

    def test_dgrad_with_the_sums_of_dz_in(self, shape):
        """They save work; what comes out is the same, the sums but for their rounding."""
        dz_in = torch.randn_like(self.x)
        args = (self.dy, self.weight, self.x, self.bn, dz_in, 0.1, *shape.geometry)
        known = reference.bn_act_backward(dz_in, self.x, self.bn, None, 1.0)[1]

        def check(backend):
            kept = dz_in.clone()
            dz, sums = primitives.preact_conv_dgrad(*args, known)
            assert torch.equal(dz_in, kept)
            assert torch.equal(dz, primitives.preact_conv_dgrad(*args)[0])
            check_sums(sums, dz, self.x, self.bn)

        on_every_backend(check)

    @pytest.mark.parametrize("variant", ["bn+bias", "plain"])
    def test_wgrad(self, shape, variant):
        bn = None if variant == "plain" else self.bn
        args = (self.dy, self.x, bn, self.weight, 0.0, *shape.geometry)
        oracle = reference.preact_conv_wgrad(*wide(*args), True)
        once = reference.preact_conv_wgrad(*args, True)
        stepwise = Plain.wgrad(*args)
        # The sums of |a| |dy| behind each element of dweight, and of |dy| behind dbias.
        a = self.x if bn is None else reference.bn_act_forward(self.x, bn, 0.0)
        terms = reference.preact_conv_wgrad(
            self.dy.double().abs(), a.double().abs(), None, self.weight.double(), 0.0, *shape.geometry, True
        )

        def check(backend):
            dweight, dbias = primitives.preact_conv_wgrad(*args, True)
            assert dweight.dtype == dbias.dtype == self.weight.dtype
            assert dweight.stride() == self.weight.stride()
            assert_trusted(
                dweight, once[0] if self.rounds_once(backend) else stepwise, oracle[0], "dweight", terms[0]
            )
            assert_trusted(dbias, once[1], oracle[1], "dbias", terms[1])
            again, none = primitives.preact_conv_wgrad(*args, False)
            assert torch.equal(dweight, again) and none.shape == (0,)

        on_every_backend(check)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("shape", [SHAPES[2], SHAPES[3], SHAPES[-2]], ids=name_of)
def test_weight_of_any_strides(shape, dtype):
    x, bn = activation(shape.n, shape.c, shape.h, shape.w, dtype=dtype), bn_rows(shape.c, dtype)
    weight = torch.randn(shape.k, shape.c // shape.groups, *shape.kernel).to(dtype)
    spaced = torch.empty(*weight.shape, 2, dtype=dtype)[..., 0].copy_(weight)

    def check(backend):
        y, _ = primitives.preact_conv_forward(x, bn, weight, None, None, 0.0, *shape.geometry, False)
        dz, _ = primitives.preact_conv_dgrad(y, weight, x, bn, None, 0.0, *shape.geometry)
        dweight, _ = primitives.preact_conv_wgrad(y, x, bn, weight, 0.0, *shape.geometry, False)
        for other in (weight.contiguous(memory_format=CL), spaced, weight.flip(2).flip(2)):
            args = (x, bn, other, None, None, 0.0, *shape.geometry, False)
            assert torch.equal(primitives.preact_conv_forward(*args)[0], y)
            assert torch.equal(
                primitives.preact_conv_dgrad(y, other, x, bn, None, 0.0, *shape.geometry)[0], dz
            )
            other_dweight, _ = primitives.preact_conv_wgrad(y, x, bn, other, 0.0, *shape.geometry, False)
            assert torch.equal(other_dweight, dweight)
            assert other_dweight.stride() == torch.empty_like(other).stride()

    on_every_backend(check)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=name_of)
def test_dgrad_beside_infinite_sums(dtype):
    """dz_in_sums of inf: sums as those of dz, not inf - inf."""
    x, dz_in = activation(2, 17, 6, 5, dtype=dtype), activation(2, 17, 6, 5, dtype=dtype)
    bn, dy = bn_rows(17, dtype), activation(2, 4, 3, 3, dtype=dtype)
    dz_in[0, 3, 2, 2] = dz_in[1, 5, 1, 1] = torch.inf  # read by the convolution, and not
    x[0, 3, 2, 2] = x[1, 5, 1, 1] = bn[0].max() + 1  # away from the mean: 0 * inf is no number
    known = reference.bn_act_backward(dz_in, x, bn, None, 1.0)[1]
    args = (dy, torch.randn(4, 17, 1, 1, dtype=dtype), x, bn, dz_in, 0.0, (2, 2), (0, 0), (1, 1), 1)

    def check(backend):
        dz, sums = primitives.preact_conv_dgrad(*args, known)
        expected = reference.bn_act_backward(dz, x, bn, None, 1.0)[1]
        assert torch.equal(sums.isnan(), expected.isnan()) and sums[0, 3].isinf() and sums[0, 5].isinf()
        assert torch.equal(sums.isfinite(), expected.isfinite())
        torch.testing.assert_close(sums[:, :3], expected[:, :3], rtol=1e-4, atol=1e-4)

    on_every_backend(check)


class TestFinalize:
    """The per-channel steps, against nn.BatchNorm2d's formulas in float64."""

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=name_of)
    @pytest.mark.parametrize("parameters", ["same", "none", "bfloat16"])
    @pytest.mark.parametrize("training", [True, False])
    def test_forward(self, backend, dtype, parameters, training):
        c, count, eps = 17, 24, 1e-3
        stats = torch.stack((torch.randn(c), torch.rand(c) * count)).to(dtype)
        of = torch.bfloat16 if parameters == "bfloat16" and dtype == torch.float32 else dtype
        weight, bias, mean, var = (torch.rand(c).to(of) + 0.1 for _ in range(4))
        if parameters == "none":
            weight = bias = None
        bn = primitives.finalize_forward(stats if training else None, count, mean, var, weight, bias, eps)
        mean, var = (stats[0], stats[1] / count) if training else (mean, var)
        invstd = 1 / (var.double() + eps).sqrt()
        scale = invstd if weight is None else invstd * weight.double()
        shift = (0 if bias is None else bias.double()) - mean.double() * scale
        assert bn.dtype == dtype
        oracle = torch.stack((mean.double(), invstd, scale, shift))
        # Four correctly rounded operations.
        torch.testing.assert_close(
            bn.double(), oracle, rtol=4 * torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps
        )

    @pytest.mark.parametrize("running", [torch.float32, torch.float64, torch.bfloat16], ids=name_of)
    def test_running_stats(self, backend, running):
        c, count, momentum = 9, 30, 0.3
        x = torch.randn(count, c, dtype=torch.float64)
        mean, var = torch.randn(c).to(running), torch.rand(c).to(running)
        bn = torch.nn.BatchNorm1d(c, momentum=momentum).double()
        bn.running_mean.copy_(mean)
        bn.running_var.copy_(var)
        bn(x)
        stats = reference.channel_stats(x[:, :, None, None]).to(acc(running))
        versions = mean._version, var._version
        primitives.update_running_stats(mean, var, stats, count, momentum)
        eps = torch.finfo(running).eps
        torch.testing.assert_close(mean.double(), bn.running_mean, rtol=2 * eps, atol=2 * eps)
        torch.testing.assert_close(var.double(), bn.running_var, rtol=2 * eps, atol=2 * eps)
        before = mean.clone(), var.clone()
        primitives.update_running_stats(mean, var, stats, 0, momentum)
        assert torch.equal(mean, before[0]) and torch.equal(var, before[1])
        torch.ops.resnet_fused.update_running_stats(mean, var, stats, count, momentum)
        assert mean._version > versions[0] and var._version > versions[1]

    @pytest.mark.parametrize("training", [True, False])
    def test_backward(self, backend, training):
        c, count = 5, 12
        sums, bn = torch.randn(2, c, dtype=torch.float64), torch.randn(4, c, dtype=torch.float64)
        coefficients = primitives.finalize_backward(sums, bn, count, training)
        mean, invstd, scale, _ = bn
        expected = [scale, -scale * invstd * sums[1] / count, -scale * sums[0] / count, mean]
        if not training:
            expected[1:3] = torch.zeros(c), torch.zeros(c)
        torch.testing.assert_close(coefficients, torch.stack(expected).double(), rtol=1e-14, atol=1e-14)


class TestReference:
    """The oracle, against torch.nn.functional and autograd, in float64."""

    @pytest.mark.parametrize("training", [True, False])
    @pytest.mark.parametrize("slope", [0.0, 0.1])
    def test_unit_of_primitives(self, training, slope):
        x = torch.randn(3, 4, 6, 5, dtype=torch.float64, requires_grad=True)
        gamma, beta = (torch.randn(4, dtype=torch.float64, requires_grad=True) for _ in range(2))
        weight = torch.randn(6, 4, 3, 3, dtype=torch.float64, requires_grad=True)
        bias = torch.randn(6, dtype=torch.float64, requires_grad=True)
        mean, var = torch.randn(4, dtype=torch.float64), torch.rand(4, dtype=torch.float64) + 0.5
        z = F.batch_norm(x, mean.clone(), var.clone(), gamma, beta, training, eps=1e-3)
        y = F.conv2d(F.leaky_relu(z, slope), weight, bias, 2, 1)
        dy = torch.randn_like(y)
        expected = torch.autograd.grad(y, (x, gamma, beta, weight, bias), dy)
        geometry = ((2, 2), (1, 1), (1, 1), 1)
        with torch.no_grad():
            stats = reference.channel_stats(x) if training else None
            bn = reference.finalize_forward(stats, 90, mean, var, gamma, beta, 1e-3)
            out, out_stats = reference.preact_conv_forward(x, bn, weight, bias, None, slope, *geometry, True)
            dweight, dbias = reference.preact_conv_wgrad(dy, x, bn, weight, slope, *geometry, True)
            dz, sums = reference.preact_conv_dgrad(dy, weight, x, bn, None, slope, *geometry)
            dx = reference.preact_apply(dz, x, reference.finalize_backward(sums, bn, 90, training), None)
        torch.testing.assert_close(out, y)
        torch.testing.assert_close(out_stats[0], y.mean((0, 2, 3)))
        torch.testing.assert_close(out_stats[1], y.var((0, 2, 3), correction=0) * y[:, 0].numel())
        for got, want in zip((dx, sums[1], sums[0], dweight, dbias), expected, strict=True):
            torch.testing.assert_close(got, want)


def with_value(n, c, h, w, value):
    def put(x):
        x = x.clone()
        x[n, c, h, w] = value
        return x

    return put


SPECIAL = {
    "mean 1e4": lambda x: x + 1e4,
    "mean 1e6": lambda x: x + 1e6,
    "1e30": lambda x: x * 1e30,
    "constant channel": lambda x: torch.where(torch.arange(x.shape[1]).view(1, -1, 1, 1) == 1, 2.5, x),
    "denormals": lambda x: x * 1e-39,
    "NaN inside": with_value(0, 2, 3, 3, torch.nan),
    "NaN in a corner": with_value(1, 0, 0, 0, torch.nan),
    "inf inside": with_value(0, 2, 3, 3, torch.inf),
    "-inf on the border": with_value(1, 1, 0, 4, -torch.inf),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("case", SPECIAL)
def test_special_values_in_statistics(backend, case, dtype):
    x = SPECIAL[case](torch.randn(2, 8, 7, 6)).to(dtype).contiguous(memory_format=CL)
    stats = primitives.channel_stats(x)
    oracle, plain = reference.channel_stats(x.double()), reference.channel_stats(x)
    # M2 of 1e30 overflows in float32, there and here; where a channel holds NaN or inf, neither number means
    # anything.
    finite = plain.isfinite().all(0)
    assert torch.equal(stats.isfinite().all(0), finite)
    eps, count = torch.finfo(torch.float32).eps, x.numel() // x.shape[1]
    spread = (oracle[1] / count).sqrt()
    # The mean to a few ulp of itself, the deviations to a few ulp of x: at mean 1e6, E[x^2] - E[x]^2 would
    # lose all digits. Below the smallest normal number there are no relative errors.
    tiny = torch.finfo(torch.float32).smallest_normal
    mean_allowed = STATS_EPS * eps * (spread + oracle[0].abs()) + STATS_EPS * eps * tiny
    m2_allowed = STATS_EPS * eps * oracle[1] + STATS_EPS * count * (eps * oracle[0]).square() + tiny
    assert ((stats[0] - oracle[0]).abs() <= mean_allowed)[finite].all()
    assert ((stats[1] - oracle[1]).abs() <= m2_allowed)[finite].all()


#: Changes of x [2, C, 9, 8] that make one-pass formulas lose digits, and what M2 is allowed in units of STATS_EPS * eps.
#: A kernel takes deviations from the mean of what came before: with a first pixel that is 10,000 deviations away,
#: these are large for some tiles, and so is what their squares are rounded by (measured 5e-6 of M2, 42 eps).
HARD = {
    "mean 1e4": (lambda x: x + 1e4, 1),
    "constant": (lambda x: torch.full_like(x, 2.5), 1),
    "rising": (lambda x: x + 100 * torch.arange(9.0).view(1, 1, 9, 1), 1),
    "other image far away": (lambda x: x + torch.tensor([0.0, 1e3]).view(2, 1, 1, 1), 1),
    "first pixel far away": (with_value(0, slice(None), 0, 0, 1e4), 4),
    "last pixel far away": (with_value(1, slice(None), 8, 7, 1e4), 1),
}


@pytest.mark.parametrize("channels", [8, 16, 32, 40, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("case", HARD)
def test_statistics_of_a_convolution(backend, case, dtype, channels):
    """Those that leave with the output; the convolution is the identity, so that the output is known."""
    change, factor = HARD[case]
    x = change(torch.randn(2, channels, 9, 8)).to(dtype).contiguous(memory_format=CL)
    weight = torch.eye(channels, dtype=dtype)[:, :, None, None]
    geometry = ((1, 1), (0, 0), (1, 1), 1)
    y, stats = primitives.preact_conv_forward(x, None, weight, None, None, 0.0, *geometry, True)
    torch.testing.assert_close(y, x, rtol=1e-6 if dtype is torch.float32 else 0, atol=0)
    oracle, count = reference.channel_stats(y.double()), y.numel() // channels
    eps = torch.finfo(torch.float32).eps
    spread = (oracle[1] / count).sqrt()
    mean_allowed = STATS_EPS * eps * (spread + oracle[0].abs())
    m2_allowed = factor * STATS_EPS * eps * oracle[1] + STATS_EPS * count * (eps * oracle[0]).square()
    # Tiles' means are rounded where they lie, and merging squares their differences (measured: 0.05 of this
    # without the factor, at mean 1e4; E[x^2] - E[x]^2 would be off by several times M2).
    m2_allowed += 0.25 * eps * oracle[0].abs() * (count * oracle[1]).sqrt()
    assert ((stats[0] - oracle[0]).abs() <= mean_allowed).all()
    assert ((stats[1] - oracle[1]).abs() <= m2_allowed).all() and (stats[1] >= 0).all()


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=name_of)
def test_small_integers_are_exact(dtype, kernel):
    """Products and sums of small integers are integers that the dtype holds: every backend gives the same
    bits.
    """
    c, k = 17, 19
    geometry = ((1, 1), (kernel // 2, kernel // 2), (1, 1), 1)
    # bfloat16 holds integers up to 256: sparse ternary weights keep the sums below.
    x = torch.randint(-2, 3, (2, c, 9, 7)).to(dtype).contiguous(memory_format=CL)
    weight = (torch.randint(-1, 2, (k, c, kernel, kernel)) * (torch.rand(k, c, kernel, kernel) < 0.3)).to(
        dtype
    )
    residual = torch.randint(-8, 9, (2, k, 9, 7)).to(dtype).contiguous(memory_format=CL)
    bias = torch.randint(-4, 5, (k,)).to(dtype)
    identity = torch.tensor([0.0, 1.0, 1.0, 0.0], dtype=acc(dtype)).view(4, 1).expand(4, c).contiguous()
    dy = torch.randint(-2, 3, (2, k, 9, 7)).to(dtype).contiguous(memory_format=CL)
    a = x.long().clamp_min(0).double()
    y = F.conv2d(a, weight.double(), bias.double(), 1, kernel // 2) + residual.double()
    da, dw, _ = torch.ops.aten.convolution_backward(
        dy.double(),
        a,
        weight.double(),
        None,
        [1, 1],
        [kernel // 2] * 2,
        [1, 1],
        False,
        [0, 0],
        1,
        [True, True, False],
    )
    dz = torch.where(x > 0, da, 0.0)
    assert y.abs().max() <= 256 and dw.abs().max() <= 256

    def check(backend):
        out, stats = primitives.preact_conv_forward(x, identity, weight, bias, residual, 0.0, *geometry, True)
        assert torch.equal(out.double(), y)
        out_dz, sums = primitives.preact_conv_dgrad(dy, weight, x, identity, None, 0.0, *geometry)
        assert torch.equal(out_dz.double(), dz)
        assert torch.equal(sums.double(), torch.stack((dz.sum((0, 2, 3)), (dz * x.double()).sum((0, 2, 3)))))
        dweight, dbias = primitives.preact_conv_wgrad(dy, x, identity, weight, 0.0, *geometry, True)
        assert torch.equal(dweight.double(), dw)
        assert torch.equal(dbias.double(), dy.double().sum((0, 2, 3)))
        assert torch.equal(primitives.residual_add(x, x, None, None, 1.0, 0.0, False)[0].double(), 2 * a)

    on_every_backend(check)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize(
    "shape", [Shape(4, 16, 32, 32, 16, (3, 3), padding=(1, 1)), Shape(2, 65, 17, 9, 130)], ids=name_of
)
@pytest.mark.parametrize("backend", [b for b in BACKENDS if b.startswith("cpu")], indirect=True)
def test_deterministic(backend, threads, shape, dtype):
    """The same bits from run to run and on 1, 2 and 3 threads. (PyTorch's own sums depend on its threads.)"""
    x, bn = activation(shape.n, shape.c, shape.h, shape.w, dtype=dtype), bn_rows(shape.c, dtype)
    weight = torch.randn(shape.k, shape.c, *shape.kernel).to(dtype)

    def everything():
        y, stats = primitives.preact_conv_forward(x, bn, weight, None, None, 0.0, *shape.geometry, True)
        dz, sums = primitives.preact_conv_dgrad(y, weight, x, bn, None, 0.0, *shape.geometry)
        dweight, dbias = primitives.preact_conv_wgrad(y, x, bn, weight, 0.0, *shape.geometry, True)
        out, out_stats = primitives.residual_add(x, x, None, None, 1.0, None, True)
        dx = primitives.preact_apply(dz, x, bn, None)
        means = primitives.bn_act_pool_forward(x, bn, 0.0)
        of_means = primitives.bn_act_pool_backward(means, x, bn, 0.0)
        results = (y, stats, dz, sums, dweight, dbias, out, out_stats, dx, primitives.channel_stats(x))
        return *results, means, *of_means

    threads(2)
    first = everything()
    for count in (2, 2, 1, 3):
        threads(count)
        for a, b in zip(first, everything(), strict=True):
            assert torch.equal(a, b)


class TestRegistered:
    """The primitives as torch.ops.resnet_fused.*."""

    #: primitive, which argument, what it is instead, the message.
    WRONG = [
        ("channel_stats", 0, torch.zeros(3, 4), "expected 4D x (got 2D x)"),
        ("channel_stats", 0, torch.zeros(1, 3, 2, 2, dtype=torch.long), "a floating dtype, but got int64"),
        ("bn_act_forward", 1, torch.zeros(3, 3), "expected bn of size [4, 3], but got [3, 3]"),
        ("bn_act_forward", 1, torch.zeros(4, 3).double(), "bn to have dtype float32, but got float64"),
        ("bn_act_backward", 0, torch.zeros(2, 3, 5, 3), "expected da of size [2, 3, 5, 4] (x)"),
        ("bn_act_backward", 3, torch.zeros(2, 3, 5, 4).half(), "dz_in to have the dtype of x, float32, but"),
        ("bn_act_pool_forward", 0, torch.zeros(3, 4), "expected 4D x (got 2D x)"),
        ("bn_act_pool_forward", 0, torch.zeros(2, 3, 0, 4), "spatial size for its mean, but got 0x4"),
        ("bn_act_pool_forward", 1, torch.zeros(3, 3), "expected bn of size [4, 3], but got [3, 3]"),
        ("bn_act_pool_backward", 0, torch.zeros(2, 3, 5, 4), "expected dy of size [2, 3, 1, 1] (y), but got"),
        ("bn_act_pool_backward", 0, torch.zeros(2, 3, 1, 1).half(), "dy to have the dtype of y, float32"),
        ("bn_act_pool_backward", 1, torch.zeros(2, 3, 0, 4), "non-zero spatial size for its mean"),
        ("bn_act_pool_backward", 2, torch.zeros(4, 3).double(), "bn to have dtype float32, but got float64"),
        ("preact_apply", 3, torch.zeros(2, 3, 4, 5), "expected dskip of size"),
        ("preact_apply", 2, torch.zeros(4, 4), "expected coefficients of size [4, 3]"),
        ("preact_conv_forward", 1, torch.zeros(2, 3), "expected bn of size"),
        ("preact_conv_forward", 2, torch.zeros(6, 2, 3, 3), "to have 2 channels, but got 3 channels instead"),
        ("preact_conv_forward", 2, torch.zeros(6, 3, 9, 3), "Kernel size can't be greater than actual input"),
        ("preact_conv_forward", 2, torch.zeros(6, 3, 3, 3).half(), "weight to have dtype float32, but got"),
        ("preact_conv_forward", 3, torch.zeros(5), "expected bias of size [6]"),
        ("preact_conv_forward", 4, torch.zeros(2, 6, 5, 4), "expected residual of size [2, 6, 3, 2] (y)"),
        ("preact_conv_forward", 6, [0, 1], "non-positive stride"),
        ("preact_conv_forward", 7, [-1, 1], "negative padding"),
        ("preact_conv_dgrad", 0, torch.zeros(2, 5, 3, 2), "expected dy of size [2, 6, 3, 2] (y)"),
        ("preact_conv_dgrad", 8, [0, 0], "dilation should be greater than zero"),
        ("preact_conv_wgrad", 0, torch.zeros(2, 6, 5, 4), "expected dy of size"),
        ("preact_conv_wgrad", 3, torch.zeros(6, 3), "expected 4D weight (got 2D weight)"),
        ("preact_conv_backward_1x1", 1, torch.zeros(6, 3, 3, 3), "expected weight to be of a 1x1 kernel"),
        ("max_pool_forward", 0, torch.zeros(3, 4), "expected 4D x (got 2D x)"),
        ("max_pool_forward", 1, [17, 16], "expected kernel_size of 1 to 256 positions, but got (17, 16)"),
        ("max_pool_forward", 2, [0, 1], "stride should be greater than zero"),
        ("max_pool_forward", 3, [2, 0], "padding should be from 0 to half of the kernel size"),
        ("max_pool_forward", 1, [9, 3], "Calculated output size: (3x0x2). Output size is too small"),
        ("max_pool_backward", 0, torch.zeros(2, 3, 2, 2), "expected dy of size [2, 3, 3, 2] (y)"),
        ("max_pool_backward", 1, torch.zeros(2, 3, 3, 2), "offsets to have dtype uint8, but got float32"),
        ("max_pool_backward", 1, torch.zeros(2, 3, 3, 3).byte(), "expected offsets of size [2, 3, 3, 2]"),
        ("finalize_forward", 0, None, "expected stats, or running_mean and running_var"),
        ("finalize_forward", 4, torch.zeros(4), "expected weight of size [3]"),
        ("finalize_backward", 0, torch.zeros(3, 3), "expected sums of size [2, 3]"),
        ("update_running_stats", 1, torch.zeros(4), "expected running_var of size [3]"),
    ]

    @pytest.mark.parametrize(("name", "at", "instead", "message"), WRONG)
    def test_wrong_arguments(self, name, at, instead, message):
        args = list(self.arguments()[name])
        args[at] = instead
        with pytest.raises(RuntimeError, match=re.escape(message)):
            getattr(torch.ops.resnet_fused, name)(*args)

    @pytest.mark.parametrize(
        ("name", "at"),
        [
            ("bn_act_forward", 1),
            ("bn_act_pool_forward", 1),
            ("bn_act_pool_backward", 2),
            ("preact_conv_forward", 1),
            ("preact_conv_wgrad", 2),
        ],
    )
    def test_coefficients_of_any_strides(self, name, at):
        args = list(self.arguments()[name])
        expected = getattr(torch.ops.resnet_fused, name)(*args)
        args[at] = args[at].t().contiguous().t()
        torch.testing.assert_close(getattr(torch.ops.resnet_fused, name)(*args), expected, rtol=0, atol=0)

    def arguments(self):
        x, dy, bn = torch.randn(2, 3, 5, 4), torch.randn(2, 6, 3, 2), bn_rows(3, torch.float32)
        weight, geometry = torch.randn(6, 3, 3, 3), ([2, 2], [1, 1], [1, 1], 1)
        stats = torch.rand(2, 3)
        windows = [3, 3], [2, 2], [1, 1]
        pooled, offsets = reference.max_pool_forward(x, *windows)
        return {
            "channel_stats": (x,),
            "finalize_forward": (stats, 40, None, None, torch.randn(3), None, 1e-5),
            "bn_act_forward": (x, bn, 0.0),
            "bn_act_backward": (x, x, bn, x, 0.1),
            "bn_act_pool_forward": (x, bn, 0.1),
            "bn_act_pool_backward": (torch.randn(2, 3, 1, 1), x, bn, 0.1),
            "max_pool_forward": (x, *windows),
            "max_pool_backward": (pooled, offsets, [5, 4], *windows),
            "preact_conv_forward": (x, bn, weight, torch.randn(6), dy, 0.0, *geometry, True),
            "preact_conv_dgrad": (dy, weight, x, bn, None, 0.0, *geometry),
            "preact_conv_backward_1x1": (torch.randn(2, 6, 5, 4), weight[..., :1, :1], x, bn, x, 0.1, True),
            "preact_conv_wgrad": (dy, x, bn, weight, 0.0, *geometry, True),
            "finalize_backward": (stats, bn, 40, True),
            "preact_apply": (x, x, bn, x),
            "update_running_stats": (torch.zeros(3), torch.ones(3), stats, 40, 0.1),
        }

    @pytest.mark.parametrize("name", [n for n in primitives.__all__ if n != "residual_add"])
    def test_opcheck(self, name):
        args = self.arguments()[name]
        tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
        torch.library.opcheck(getattr(torch.ops.resnet_fused, name).default, args, test_utils=tests)

    def test_no_derivative(self):
        x = torch.randn(2, 3, 5, 4, requires_grad=True)
        with pytest.raises(RuntimeError, match="channel_stats is a primitive and has no derivative"):
            torch.ops.resnet_fused.channel_stats(x).sum().backward()

    def test_autocast_leaves_them_alone(self):
        with torch.autocast("cpu", torch.bfloat16):
            y, _ = torch.ops.resnet_fused.preact_conv_forward(*self.arguments()["preact_conv_forward"])
        assert y.dtype == torch.float32


class TestDispatch:
    def test_unknown_name(self):
        with pytest.raises(ValueError, match="unknown backend 'gpu', expected one of auto, reference, cpu"):
            rf.use_backend("gpu")

    @pytest.mark.parametrize(
        "name", ["cuda", *(["triton"] if dispatch.unavailable("triton") is not None else [])]
    )
    def test_unavailable(self, name):
        if dispatch.unavailable(name) is None:
            pytest.skip(f"{name} is available here")
        with pytest.raises(RuntimeError, match=f"backend '{name}' is not available: "):
            rf.use_backend(name)
        assert dispatch.current_backend() == "auto"

    def test_setter_and_context_manager(self):
        rf.use_backend("reference")
        try:
            assert dispatch.current_backend() == "reference"
            with rf.use_backend("unfused"):
                assert dispatch.current_backend() == "unfused"
            assert dispatch.current_backend() == "reference"
        finally:
            rf.use_backend("auto")

    def test_environment(self):
        code = "import resnet_fused.primitives.dispatch as d; print(d.current_backend())"
        for value, out, error in (("reference", "reference", ""), ("fast", "", "unknown backend 'fast'")):
            env = {**os.environ, "RESNET_FUSED_BACKEND": value}
            run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
            assert run.stdout.strip() == out and error in run.stderr

    def test_record(self, cpu_library):
        x, bn = activation(1, 4, 3, 3, dtype=torch.float32), bn_rows(4, torch.float32)
        weight = torch.randn(4, 2, 1, 1)
        geometry = ((1, 1), (0, 0), (1, 1))
        with rf.record_dispatch() as log:
            primitives.channel_stats(x)
            primitives.preact_conv_forward(x, bn, weight, None, None, 0.0, *geometry, 2, False)
        assert [r.primitive for r in log] == ["channel_stats", "preact_conv_forward", "bn_act_forward"]
        assert [r.backend for r in log] == ["cpu", "unfused", "cpu"]
        assert log[1].reason == "the cpu kernels do not take groups=2" and log[1].shape == (1, 4, 3, 3)
        primitives.channel_stats(x)
        assert len(log) == 3

    def test_choose(self, cpu_library, monkeypatch):
        geometry = dispatch.ConvGeometry((2, 8, 4, 4), (8, 8, 1, 1), (1, 1), (0, 0), (1, 1), 1)
        choose = dispatch.choose
        assert choose("preact_conv_forward", "cpu", torch.float32, geometry).backend == "cpu"
        assert choose("preact_conv_forward", "cpu", torch.float16, geometry).backend == "unfused"
        assert choose("channel_stats", "cpu", torch.float16).backend == "reference"
        assert choose("channel_stats", "xpu", torch.float32) == ("reference", "no kernels for xpu")
        with rf.use_backend("cpu"), pytest.raises(RuntimeError, match="the tensors are on cuda"):
            choose("channel_stats", "cuda", torch.float32)
        monkeypatch.setattr(dispatch, "prefer_unfused", lambda *a: True)
        choice = choose("preact_conv_forward", "cpu", torch.float32, geometry)
        assert choice.backend == "unfused" and "measured" in choice.reason
        with rf.use_backend("cpu"):
            assert choose("preact_conv_forward", "cpu", torch.float32, geometry).backend == "cpu"
