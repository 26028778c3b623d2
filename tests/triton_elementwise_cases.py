"""The Triton kernels beside the convolutions against the float64 oracle: elementwise, statistics, finalize.
Collected by test_triton_kernels.py, like triton_cases.py."""

import importlib

import pytest
import torch
from primitive_cases import (
    CL,
    ELEMENTWISE_SHAPES,
    SPECIAL,
    activation,
    bn_rows,
    check_activation,
    check_stats,
    check_sums,
    name_of,
    wide,
)
from tolerances import STATS_EPS, assert_trusted
from triton_cases import DEVICE, INTERPRETED, to_device

from resnet_fused.primitives import reference
from resnet_fused.triton_kernels import elementwise, launch
from resnet_fused.triton_kernels.bn_act_backward import bn_act_backward
from resnet_fused.triton_kernels.bn_act_forward import bn_act_forward
from resnet_fused.triton_kernels.bn_act_pool_backward import bn_act_pool_backward
from resnet_fused.triton_kernels.bn_act_pool_forward import bn_act_pool_forward
from resnet_fused.triton_kernels.channel_stats import channel_stats
from resnet_fused.triton_kernels.finalize_backward import finalize_backward
from resnet_fused.triton_kernels.finalize_forward import finalize_forward
from resnet_fused.triton_kernels.max_pool_backward import max_pool_backward
from resnet_fused.triton_kernels.max_pool_forward import max_pool_forward
from resnet_fused.triton_kernels.preact_apply import preact_apply
from resnet_fused.triton_kernels.preact_conv_forward import preact_conv_forward
from resnet_fused.triton_kernels.residual_add import residual_add
from resnet_fused.triton_kernels.update_running_stats import update_running_stats

DTYPES = [torch.float32, torch.float16, *(() if INTERPRETED else (torch.bfloat16,))]
#: Several programs with several tiles each, the last ones not full; more channels than the widest tile.
SHAPES = [*ELEMENTWISE_SHAPES, (2, 35, 19, 23), (1, 300, 3, 5)]
EPS = torch.finfo(torch.float32).eps


def run(function, *args):
    """function on the device, its results back on the CPU."""
    result = function(*to_device(*args))
    return result.cpu() if isinstance(result, torch.Tensor) else tuple(t.cpu() for t in result)


def check_bn_act_pool(dtype, size, slope):
    x, dy = activation(*size, dtype=dtype), activation(*size[:2], 1, 1, dtype=dtype)
    bn = bn_rows(size[1], dtype)
    args = (x, bn, slope)
    plain, oracle = reference.bn_act_pool_forward(*args), reference.bn_act_pool_forward(*wide(*args))
    check_activation("y", run(bn_act_pool_forward, *args), plain, oracle)
    args = (dy, x, bn, slope)
    plain, oracle = reference.bn_act_pool_backward(*args)[0], reference.bn_act_pool_backward(*wide(*args))[0]
    dz, sums = run(bn_act_pool_backward, *args)
    check_activation("dz", dz, plain, oracle)
    check_sums(sums, dz, x, bn)
    assert torch.equal(sums, run(bn_act_pool_backward, *args)[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("size", [(2, 16, 61, 47), (3, 70, 23, 29)], ids=name_of)
def test_means_of_large_images(dtype, size):
    """Several tiles of an image, the last one not full, by ReLU and LeakyReLU."""
    for slope in (0.0, 0.1):
        check_bn_act_pool(dtype, size, slope)


@pytest.mark.parametrize(
    ("size", "dtype"),
    # The interpreter takes its time: half of the shapes in 16 bits, the largest among them.
    [(s, d) for i, s in enumerate(SHAPES) for d in (DTYPES if i % 2 or not INTERPRETED else DTYPES[:1])],
    ids=name_of,
)
class TestElementwise:
    def test_channel_stats(self, dtype, size):
        x = activation(*size, dtype=dtype) * 3 + 1
        stats = run(channel_stats, x)
        check_stats(stats, x)
        assert torch.equal(stats, run(channel_stats, x))

    @pytest.mark.parametrize("slope", [0.0, 0.1])
    def test_bn_act_forward(self, dtype, size, slope):
        args = (activation(*size, dtype=dtype), bn_rows(size[1], dtype), slope)
        plain, oracle = reference.bn_act_forward(*args), reference.bn_act_forward(*wide(*args))
        check_activation("a", run(bn_act_forward, *args), plain, oracle)

    @pytest.mark.parametrize("joined", [False, True], ids=["relu", "leaky+dz_in"])
    def test_bn_act_backward(self, dtype, size, joined):
        da, x, dz_in = (activation(*size, dtype=dtype) for _ in range(3))
        bn = bn_rows(size[1], dtype)
        args = (da, x, bn, dz_in, 0.1) if joined else (da, x, bn, None, 0.0)
        plain, oracle = reference.bn_act_backward(*args)[0], reference.bn_act_backward(*wide(*args))[0]
        dz, sums = run(bn_act_backward, *args)
        check_activation("dz", dz, plain, oracle)
        check_sums(sums, dz, x, bn)
        assert torch.equal(sums, run(bn_act_backward, *args)[1])

    @pytest.mark.parametrize("slope", [0.0, 0.1])
    def test_bn_act_pool(self, dtype, size, slope):
        check_bn_act_pool(dtype, size, slope)

    @pytest.mark.parametrize("skip", [False, True], ids=["", "dskip"])
    def test_preact_apply(self, dtype, size, skip):
        dz, x, dskip = (activation(*size, dtype=dtype) for _ in range(3))
        args = (dz, x, torch.randn(4, size[1]), dskip if skip else None)
        plain, oracle = reference.preact_apply(*args), reference.preact_apply(*wide(*args))
        check_activation("dx", run(preact_apply, *args), plain, oracle)

    @pytest.mark.parametrize(
        ("affine", "gated", "slope"),
        [(False, None, None), (True, None, 0.0), (False, "channels", 0.2), (True, "one", None)],
    )
    def test_residual_add(self, dtype, size, affine, gated, slope):
        n, c = size[:2]
        x, y = activation(*size, dtype=dtype), activation(*size, dtype=dtype)
        gate = None if gated is None else torch.randn(n, c if gated == "channels" else 1)
        rows = torch.randn(2, c) if affine else None
        args = (x, y, rows, gate, 0.5 if affine else 1.0, slope)
        plain = reference.residual_add(*args, False)[0]
        oracle = reference.residual_add(*wide(*args), False)[0]
        out, none = run(residual_add, *args, False)
        assert none.shape == (0,)
        check_activation("out", out, plain, oracle)
        again, stats = run(residual_add, *args, True)
        assert torch.equal(out, again)
        check_stats(stats, out)


@pytest.mark.parametrize("case", SPECIAL)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_special_values_in_statistics(case, dtype):
    x = SPECIAL[case](torch.randn(2, 8, 37, 31)).to(dtype).contiguous(memory_format=CL)
    stats, plain = run(channel_stats, x), reference.channel_stats(x)
    finite = plain.isfinite().all(0)
    assert torch.equal(stats.isfinite().all(0), finite)
    # M2 of finite values is inf where it overflows, never NaN: 1/sqrt(var) is then 0, as in plain PyTorch.
    assert torch.equal(stats[1].isposinf(), plain[1].isposinf()) or not x.isfinite().all()
    # The kernel merges means that are rounded to float32: M2 carries 2 * sum(deviation) * that rounding.
    oracle, count = reference.channel_stats(x.double()), x.numel() // x.shape[1]
    tiny = torch.finfo(torch.float32).smallest_normal
    mean_allowed = STATS_EPS * EPS * ((oracle[1] / count).sqrt() + oracle[0].abs() + tiny)
    m2_allowed = STATS_EPS * EPS * (oracle[1] + oracle[0].abs() * oracle[1].sqrt()) + tiny
    m2_allowed += STATS_EPS * count * (EPS * oracle[0]).square()
    assert ((stats[0] - oracle[0]).abs() <= mean_allowed)[finite].all()
    assert ((stats[1] - oracle[1]).abs() <= m2_allowed)[finite].all()


def test_statistics_of_outputs_overflow_to_inf():
    """Where the squares overflow, M2 of a convolution's or an addition's output is inf, not NaN."""
    x = (torch.randn(2, 16, 9, 7) * 1e30).contiguous(memory_format=CL)
    eye = torch.eye(16).view(16, 16, 1, 1)
    _, stats = run(preact_conv_forward, x, None, eye, None, None, 0.0, (1, 1), (0, 0), (1, 1), 1, True)
    assert stats[0].isfinite().all() and stats[1].isposinf().all()
    _, stats = run(residual_add, x, torch.zeros_like(x), None, None, 1.0, None, True)
    assert stats[0].isfinite().all() and stats[1].isposinf().all()
    bn = run(finalize_forward, stats, 126, None, None, None, None, 1e-5)
    assert bn.isfinite().all() and not bn[1].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize(
    ("size", "windows"),
    [
        ((2, 35, 19, 12), ((3, 3), (2, 2), (1, 1))),
        ((2, 3, 9, 7), ((3, 3), (1, 1), (1, 1))),
        ((1, 64, 6, 8), ((2, 2), (2, 2), (0, 0))),
        ((2, 17, 11, 9), ((5, 4), (2, 3), (1, 2))),
        ((1, 130, 7, 5), ((2, 2), (3, 3), (0, 0))),
        ((2, 1, 17, 17), ((16, 16), (1, 1), (8, 8))),
    ],
    ids=str,
)
def test_max_pool(dtype, size, windows):
    """Ties, NaN, inf and windows of -inf; gradients of float32 to the bit, as both add in one order."""
    x = torch.randint(-4, 5, size).to(dtype).contiguous(memory_format=CL)
    x[0, 0, 1, 1], x[0, 0, 2, 3], x[-1, -1] = torch.nan, torch.inf, -torch.inf
    y, offsets = run(max_pool_forward, x, *windows)
    expected, positions = reference.max_pool_forward(x, *windows)
    torch.testing.assert_close(y, expected, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(offsets, positions) and y.stride() == expected.stride() == offsets.stride()
    args = (torch.randn(y.shape).to(dtype).contiguous(memory_format=CL), offsets, size[2:], *windows)
    dx, plain = run(max_pool_backward, *args), reference.max_pool_backward(*args)
    if dtype == torch.float32:
        assert torch.equal(dx, plain)
    else:
        check_activation("dx", dx, plain, reference.max_pool_backward(args[0].double(), *args[1:]))


@pytest.mark.parametrize("slope", [0.0, 0.1])
def test_elementwise_not_finite(slope):
    """NaN and inf come out where plain PyTorch has them, and ReLU(-inf) is 0."""
    x, y, dz_in = (activation(2, 5, 4, 3, dtype=torch.float32) for _ in range(3))
    x[0, 0, 1, 1], x[0, 1, 2, 2], x[1, 2, 0, 0] = torch.nan, torch.inf, -torch.inf
    y[1, 3, 3, 2] = torch.nan
    bn = bn_rows(5, torch.float32)
    dy = activation(2, 5, 1, 1, dtype=torch.float32)
    dy[1], dy[0, 4] = torch.nan, torch.inf
    cases = [
        (bn_act_forward, reference.bn_act_forward, (x, bn, slope)),
        (bn_act_backward, reference.bn_act_backward, (y, x, bn, dz_in, slope)),
        (bn_act_pool_forward, reference.bn_act_pool_forward, (x, bn, slope)),
        (bn_act_pool_backward, reference.bn_act_pool_backward, (dy, x, bn, slope)),
        (preact_apply, reference.preact_apply, (y, x, bn, dz_in)),
        (residual_add, reference.residual_add, (x, y, bn[:2], None, 0.5, slope, False)),
    ]
    for function, plain, args in cases:
        results, plains = run(function, *args), plain(*args)
        result, expected = (t[0] if isinstance(t, tuple) else t for t in (results, plains))
        oracle = plain(*wide(*args))
        oracle = oracle[0] if isinstance(oracle, tuple) else oracle
        assert expected.isnan().any()
        assert_trusted(result, expected, oracle, function.__name__)
    a = run(bn_act_forward, torch.full((1, 1, 1, 2), -torch.inf), torch.ones(4, 1), 0.0)
    assert torch.equal(a, torch.zeros(1, 1, 1, 2))
    # A gradient that is not finite, of a mean whose pixels are all inactive. The other image has one active.
    x, below = torch.full((2, 1, 2, 2), -2.0).contiguous(memory_format=CL), torch.ones(4, 1)
    x[1, 0, 0, 0] = 3.0
    dy = torch.tensor([torch.inf, 4.0]).view(2, 1, 1, 1)
    dz, sums = run(bn_act_pool_backward, dy, x, below, 0.0)
    assert torch.equal(dz.flatten(), torch.tensor([0.0, 0, 0, 0, 1, 0, 0, 0]))
    assert sums.tolist() == [[1.0], [2.0]]
    # A mean that is not finite spoils its own channel's sums only.
    bn[0, 1] = torch.inf
    ones = torch.ones(1, 5, 3, 3)
    for function, args in (
        (bn_act_backward, (ones, ones, bn, None, slope)),
        (bn_act_pool_backward, (torch.ones(1, 5, 1, 1), ones, bn, slope)),
    ):
        _, sums = run(function, *args)
        assert torch.equal(sums.isfinite().all(0), torch.tensor([True, False, True, True, True]))


class TestFinalize:
    @pytest.mark.parametrize("parameters", [None, torch.float32, *DTYPES[1:], torch.bfloat16], ids=name_of)
    @pytest.mark.parametrize("training", [True, False])
    @pytest.mark.parametrize("c", [1, 35, 129])
    def test_forward(self, c, parameters, training):
        count, eps = 24, 1e-3
        stats = torch.stack((torch.randn(c), torch.rand(c) * count))
        weight, bias, mean, var = (torch.rand(c).to(parameters or torch.float32) + 0.1 for _ in range(4))
        if parameters is None:
            weight = bias = None
        bn = run(finalize_forward, stats if training else None, count, mean, var, weight, bias, eps)
        args = (stats.double() if training else None, count, mean, var, weight, bias, eps)
        oracle = reference.finalize_forward(*wide(*args))
        assert bn.dtype == torch.float32
        # Four correctly rounded operations.
        torch.testing.assert_close(bn.double(), oracle, rtol=4 * EPS, atol=4 * EPS)

    @pytest.mark.parametrize("training", [True, False])
    @pytest.mark.parametrize("c", [1, 35, 129])
    def test_backward(self, c, training):
        sums, bn = torch.randn(2, c), torch.randn(4, c)
        got = run(finalize_backward, sums, bn, 30, training)
        oracle = reference.finalize_backward(sums.double(), bn.double(), 30, training)
        torch.testing.assert_close(got.double(), oracle, rtol=4 * EPS, atol=0.0)

    @pytest.mark.parametrize("running", [torch.float32, torch.bfloat16], ids=name_of)
    @pytest.mark.parametrize("strided", [False, True])
    def test_running_stats(self, running, strided):
        c, count, momentum = 35, 30, 0.3
        stats = torch.stack((torch.randn(c), torch.rand(c) * count))
        mean, var = torch.randn(c).to(running), torch.rand(c).to(running)
        expected = mean.double(), var.double()
        reference.update_running_stats(*expected, stats.double(), count, momentum)
        buffers = torch.zeros(c, 2, dtype=running, device=DEVICE) if strided else torch.zeros(2, c).t()
        buffers = buffers.to(running).to(DEVICE)
        on_device = buffers[:, 0].copy_(mean), buffers[:, 1].copy_(var)
        assert on_device[0].is_contiguous() != strided
        eps = torch.finfo(running).eps
        update_running_stats(*on_device, stats.to(DEVICE), count, momentum)
        for got, want in zip(on_device, expected, strict=True):
            torch.testing.assert_close(got.cpu().double(), want, rtol=2 * eps, atol=2 * eps)
        before = buffers.clone()
        update_running_stats(*on_device, stats.to(DEVICE), 0, momentum)
        assert torch.equal(buffers, before)

    def test_one_value_per_channel(self):
        """The unbiased variance of one value is 0/0, as in the reference."""
        running = torch.ones(2, 3, device=DEVICE)
        update_running_stats(running[0], running[1], torch.zeros(2, 3, device=DEVICE), 1, 0.1)
        assert running[1].isnan().all() and torch.allclose(running[0], torch.tensor(0.9, device=DEVICE))


def test_elementwise_empty():
    x, bn = torch.empty(0, 4, 5, 5, device=DEVICE), torch.ones(4, 4, device=DEVICE)
    assert torch.equal(channel_stats(x).cpu(), torch.zeros(2, 4))
    assert bn_act_forward(x, bn, 0.0).shape == preact_apply(x, x, bn, x).shape == x.shape
    dz, sums = bn_act_backward(x, x, bn, x, 0.0)
    assert dz.shape == x.shape and torch.equal(sums.cpu(), torch.zeros(2, 4))
    y = bn_act_pool_forward(x, bn, 0.0)
    dz, sums = bn_act_pool_backward(y, x, bn, 0.0)
    assert y.shape == (0, 4, 1, 1) and dz.shape == x.shape and torch.equal(sums.cpu(), torch.zeros(2, 4))
    out, stats = residual_add(x, x, None, None, 1.0, None, True)
    assert out.shape == x.shape and torch.equal(stats.cpu(), torch.zeros(2, 4))
    assert residual_add(x, x, None, None, 1.0, None, False)[1].shape == (0,)
    windows = (3, 3), (2, 2), (1, 1)
    y, offsets = max_pool_forward(x, *windows)
    assert y.shape == offsets.shape == (0, 4, 3, 3)
    assert max_pool_backward(y, offsets, (5, 5), *windows).shape == x.shape


def test_elementwise_offsets_of_64_bits(monkeypatch):
    """The kernels' 64-bit variant, on a shape that would not need it."""
    tiling = elementwise.tiling

    def with_wide_offsets(*args, **kwargs):
        t = tiling(*args, **kwargs)
        unit, _, rows, columns = t.constants
        return t._replace(constants=(unit, True, rows, columns))

    tests, size = TestElementwise(), (1, 6, 5, 7)
    for name in ("channel_stats", "bn_act_forward", "bn_act_backward", "preact_apply", "residual_add",
                 "max_pool_forward", "max_pool_backward"):  # fmt: skip
        monkeypatch.setattr(f"resnet_fused.triton_kernels.{name}.tiling", with_wide_offsets)
    tests.test_channel_stats(torch.float32, size)
    tests.test_bn_act_forward(torch.float16, size, 0.1)
    tests.test_bn_act_backward(torch.float32, size, True)
    tests.test_preact_apply(torch.float16, size, True)
    tests.test_residual_add(torch.float32, size, True, "channels", 0.2)
    for kernel in (max_pool_forward, max_pool_backward):
        importlib.import_module(kernel.__module__)._plan.cache_clear()
    test_max_pool(torch.float32, (2, 6, 9, 7), ((3, 3), (2, 2), (1, 1)))


def test_tilings():
    for arch, dtype in ((80, torch.float32), (90, torch.bfloat16), (120, torch.float16)):
        on = launch.Target(arch, 132)
        shapes = [(1, 1, 1, 1), (128, 16, 32, 32), (256, 2048, 7, 7), (3, 35, 9, 5), (2, 5, 2**14, 2**14)]
        for shape in shapes:
            for reduces in (False, True):
                t = elementwise.tiling(on, "channel_stats", dtype, shape, reduces)
                pixels, steps, units = t.scalars
                unit, is_wide, rows, columns = t.constants
                assert units * unit == shape[1] and rows * t.steps == t.rows_per_program
                assert (t.groups - 1) * t.rows_per_program < pixels <= t.groups * t.rows_per_program
                assert t.grid[1] * columns >= shape[1] and (t.groups <= 512 or not reduces)
                assert is_wide == (pixels * shape[1] >= 2**31 - 2**24)
    with pytest.raises(RuntimeError, match="counts pixels in 32 bits"):
        elementwise.tiling(on, "channel_stats", torch.float16, (2**20, 1, 64, 64), True)
