"""The primitives without a convolution, on every backend and SIMD level, against the float64 oracle; and all of them
from run to run.

The oracle is the reference given float64 inputs, the yardstick of the trust rule the reference in the same
dtype. The reference itself is held against torch.nn.functional. Convolutions: test_primitive_convolutions.py.
"""

import pytest
import torch
import torch.nn.functional as F
from conftest import BACKENDS, on_every_backend
from primitive_cases import (
    DTYPES,
    ELEMENTWISE_SHAPES,
    Shape,
    acc,
    activation,
    bn_rows,
    check_activation,
    check_stats,
    check_sums,
    name_of,
    wide,
)
from tolerances import assert_trusted

from resnet_fused import primitives
from resnet_fused.primitives import reference


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
