"""The Triton convolution kernels against the float64 oracle. Collected by test_triton_kernels.py: on a GPU as
they are, elsewhere in a process of its own under Triton's interpreter (whose bf16 matrix product is wrong,
hence fp32 and fp16 there)."""

import functools
import os
from types import SimpleNamespace

import pytest
import torch
from primitive_cases import (
    CL,
    Shape,
    bn_rows,
    check_activation,
    check_stats,
    check_sums,
    name_of,
    to_tf32,
    wide,
)
from tolerances import assert_trusted

from resnet_fused.primitives import reference
from resnet_fused.primitives.dispatch import ConvGeometry
from resnet_fused.primitives.layout import convolution_output_shape
from resnet_fused.triton_kernels import configs, launch, support
from resnet_fused.triton_kernels.geometry import magic_divisor
from resnet_fused.triton_kernels.preact_conv_backward_1x1 import preact_conv_backward_1x1
from resnet_fused.triton_kernels.preact_conv_dgrad import preact_conv_dgrad
from resnet_fused.triton_kernels.preact_conv_forward import preact_conv_forward
from resnet_fused.triton_kernels.preact_conv_wgrad import preact_conv_wgrad
from resnet_fused.triton_kernels.reduction import MergeStats, OrderedSum

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
#: Activations and parameters.
DTYPES = [(torch.float32, torch.float32), (torch.float16, torch.float16)]
#: Autocast's: float32 master weights.
MASTERS = [(torch.float16, torch.float32)]
if not INTERPRETED:
    DTYPES.append((torch.bfloat16, torch.bfloat16))
    MASTERS.append((torch.bfloat16, torch.float32))

SPATIAL = Shape(1, 16, 8, 9, 17, (3, 3), padding=(1, 1))
STRIDED = Shape(2, 16, 7, 9, 35, (3, 3), (2, 2), (1, 1))
ODD = Shape(1, 35, 7, 5, 65)
POINTWISE = [
    Shape(1, 1, 1, 1, 1),
    Shape(3, 3, 5, 4, 17),
    Shape(2, 17, 9, 8, 35),
    ODD,
    Shape(2, 64, 6, 6, 16),
    Shape(1, 65, 4, 3, 3),
    Shape(1, 136, 5, 6, 64),
]
SHAPES = [
    *POINTWISE,
    Shape(1, 272, 5, 5, 17),
    Shape(1, 1, 5, 7, 1, (3, 3), padding=(1, 1)),
    Shape(2, 3, 9, 7, 16, (3, 3), padding=(1, 1)),
    SPATIAL,
    STRIDED,
    Shape(2, 17, 11, 5, 8, (1, 1), (2, 2)),
    Shape(1, 35, 6, 7, 65, (3, 3), padding=(1, 1)),
    Shape(1, 65, 6, 6, 16, (3, 3), (2, 2), (1, 1)),
    Shape(1, 64, 4, 4, 33, (3, 3)),
    Shape(1, 8, 9, 8, 8, (5, 5), padding=(2, 2)),
    Shape(1, 3, 12, 10, 8, (5, 3), (2, 1), (2, 0)),
    Shape(1, 8, 9, 10, 8, (3, 3), padding=(2, 2), dilation=(2, 2)),
    Shape(1, 16, 3, 4, 8, (3, 3), (3, 3), (3, 3)),
    Shape(1, 8, 2, 1, 8, (1, 1), (3, 3)),
    Shape(1, 3, 15, 13, 8, (7, 7), (2, 2), (3, 3)),
]


@pytest.fixture(autouse=True)
def exact_float32():
    """The oracle's yardstick is float32, not TF32."""
    before = torch.backends.cudnn.conv.fp32_precision
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    yield
    torch.backends.cudnn.conv.fp32_precision = before


def random(*size, dtype):
    return torch.randn(size).to(dtype).contiguous(memory_format=CL)


def to_device(*args):
    return tuple(a.to(DEVICE) if isinstance(a, torch.Tensor) else a for a in args)


def run(function, *args):
    """function on the device, its tensors back on the CPU."""
    return tuple(t.cpu() for t in function(*to_device(*args)))


@functools.lru_cache(maxsize=4)
def case(shape, dtype, parameters):
    torch.manual_seed(0)
    c = SimpleNamespace()
    c.x = random(shape.n, shape.c, shape.h, shape.w, dtype=dtype)
    fan_in = shape.c * shape.kernel[0] * shape.kernel[1]
    c.weight = (torch.randn(shape.k, shape.c, *shape.kernel) / fan_in**0.5).to(parameters)
    c.bias = torch.randn(shape.k).to(parameters)
    c.bn = bn_rows(shape.c, dtype)
    size = convolution_output_shape(c.x.shape, c.weight.shape, *shape.geometry[:3])
    c.dy, c.residual = random(*size, dtype=dtype), random(*size, dtype=dtype)
    c.dz_in = random(*c.x.shape, dtype=dtype)
    return c


def sum_terms(c, bn, slope, shape):
    """The sums of |a| |dy| behind each element of dweight, and of |dy| behind dbias."""
    a = c.x if bn is None else reference.bn_act_forward(c.x, bn, slope)
    return reference.preact_conv_wgrad(
        c.dy.double().abs(), a.double().abs(), None, c.weight.double(), 0.0, *shape.geometry, True
    )


def check_parameters(results, plain, oracle, terms, weight):
    for r, p, o, t, name in zip(results, plain, oracle, terms, ("dweight", "dbias"), strict=True):
        assert r.dtype == weight.dtype, name
        assert r.stride() == p.stride(), name
        assert_trusted(r, p, o, name, t if r.numel() else 0.0)


@pytest.mark.parametrize(
    ("shape", "dtype", "parameters"),
    [(s, *d) for s in SHAPES for d in DTYPES] + [(s, *d) for s in (ODD, STRIDED, SPATIAL) for d in MASTERS],
    ids=name_of,
)
class TestConvolutions:
    @pytest.mark.parametrize("variant", ["bn", "bn+bias+residual", "plain"])
    def test_forward(self, shape, dtype, parameters, variant):
        c = case(shape, dtype, parameters)
        bn = None if variant == "plain" else c.bn
        extras = (c.bias, c.residual) if variant.endswith("residual") else (None, None)
        slope = 0.1 if variant.endswith("residual") else 0.0
        args = (c.x, bn, c.weight, *extras, slope, *shape.geometry)
        plain = reference.preact_conv_forward(*args, False)[0]
        oracle = reference.preact_conv_forward(*wide(*args), False)[0]
        y, stats = run(preact_conv_forward, *args, True)
        check_activation("y", y, plain, oracle)
        check_stats(stats, y)
        if variant == "bn":
            again, none = run(preact_conv_forward, *args, False)
            assert torch.equal(y, again) and none.shape == (0,)

    @pytest.mark.parametrize("joined", [False, True], ids=["relu", "leaky+dz_in"])
    def test_dgrad(self, shape, dtype, parameters, joined):
        c = case(shape, dtype, parameters)
        dz_in, slope = (c.dz_in, 0.1) if joined else (None, 0.0)
        args = (c.dy, c.weight, c.x, c.bn, dz_in, slope, *shape.geometry)
        plain, oracle = reference.preact_conv_dgrad(*args)[0], reference.preact_conv_dgrad(*wide(*args))[0]
        dz, sums = run(preact_conv_dgrad, *args)
        check_activation("dz", dz, plain, oracle)
        check_sums(sums, dz, c.x, c.bn)

    @pytest.mark.parametrize("variant", ["bn+bias", "plain", "channels_last"])
    def test_wgrad(self, shape, dtype, parameters, variant):
        c = case(shape, dtype, parameters)
        bn = None if variant == "plain" else c.bn
        weight = c.weight.contiguous(memory_format=CL) if variant == "channels_last" else c.weight
        args = (c.dy, c.x, bn, weight, 0.0, *shape.geometry, variant.endswith("bias"))
        plain, oracle = reference.preact_conv_wgrad(*args), reference.preact_conv_wgrad(*wide(*args))
        results = run(preact_conv_wgrad, *args)
        check_parameters(results, plain, oracle, sum_terms(c, bn, 0.0, shape), weight)


# Exact float32 is declined; compiled it spills. The interpreter takes it, for its small yardstick.
@pytest.mark.parametrize(
    ("dtype", "parameters"),
    [d for d in DTYPES + MASTERS[:1] if INTERPRETED or d[0] is not torch.float32],
    ids=name_of,
)
@pytest.mark.parametrize("shape", [*POINTWISE, Shape(2, 16, 11, 13, 64)], ids=name_of)
@pytest.mark.parametrize("joined", [False, True], ids=["relu", "leaky+dz_in+bias"])
def test_backward_1x1(shape, dtype, parameters, joined):
    c = case(shape, dtype, parameters)
    dz_in, slope = (c.dz_in, 0.1) if joined else (None, 0.0)
    dz, sums, *gradients = run(preact_conv_backward_1x1, c.dy, c.weight, c.x, c.bn, dz_in, slope, joined)
    args = (c.dy, c.weight, c.x, c.bn, dz_in, slope, *shape.geometry)
    plain, oracle = reference.preact_conv_dgrad(*args)[0], reference.preact_conv_dgrad(*wide(*args))[0]
    check_activation("dz", dz, plain, oracle)
    check_sums(sums, dz, c.x, c.bn)
    args = (c.dy, c.x, c.bn, c.weight, slope, *shape.geometry, joined)
    plain, oracle = reference.preact_conv_wgrad(*args), reference.preact_conv_wgrad(*wide(*args))
    check_parameters(gradients, plain, oracle, sum_terms(c, c.bn, slope, shape), c.weight)


@pytest.fixture
def tf32(exact_float32):
    torch.backends.cudnn.conv.fp32_precision = "tf32"


@pytest.mark.usefixtures("tf32")
class TestTF32:
    """float32 where PyTorch's default is in force: operands are rounded to TF32, as are the yardstick's."""

    @staticmethod
    def gradients(c, weight, dy, shape):
        """(dz, dweight), and those of the one kernel for both where there is one."""
        dz, _ = run(preact_conv_dgrad, dy, weight, c.x, c.bn, None, 0.0, *shape.geometry)
        dweight, _ = run(preact_conv_wgrad, dy, c.x, c.bn, weight, 0.0, *shape.geometry, False)
        if shape.kernel != (1, 1) or shape.stride != (1, 1):
            return [(dz, dweight)]
        both = run(preact_conv_backward_1x1, dy, weight, c.x, c.bn, None, 0.0, False)
        return [(dz, dweight), (both[0], both[2])]

    @pytest.mark.parametrize("shape", [*POINTWISE[1:], SPATIAL, STRIDED, SHAPES[-1]], ids=name_of)
    def test_trusted(self, shape):
        c = case(shape, torch.float32, torch.float32)
        a, weight, dy = to_tf32(reference.bn_act_forward(c.x, c.bn, 0.0)), to_tf32(c.weight), to_tf32(c.dy)
        plain = reference.preact_conv_forward(a, None, weight, c.bias, None, 0.0, *shape.geometry, False)[0]
        args = (c.x, c.bn, c.weight, c.bias, None, 0.0, *shape.geometry, False)
        oracle = reference.preact_conv_forward(*wide(*args))[0]
        check_activation("y", run(preact_conv_forward, *args)[0], plain, oracle)
        plain = (
            reference.preact_conv_dgrad(dy, weight, c.x, c.bn, None, 0.0, *shape.geometry)[0],
            reference.preact_conv_wgrad(dy, a, None, weight, 0.0, *shape.geometry, False)[0],
        )
        oracle = (
            reference.preact_conv_dgrad(*wide(c.dy, c.weight, c.x, c.bn, None, 0.0, *shape.geometry))[0],
            reference.preact_conv_wgrad(*wide(c.dy, c.x, c.bn, c.weight, 0.0, *shape.geometry), False)[0],
        )
        for results in self.gradients(c, c.weight, c.dy, shape):
            for name, *values in zip(("dz", "dweight"), results, plain, oracle, strict=True):
                assert_trusted(*values, name)

    @pytest.mark.parametrize("shape", [ODD, POINTWISE[-1], SPATIAL, STRIDED], ids=name_of)
    def test_operands_are_rounded(self, shape):
        """Rounded before, they give the same bits."""
        c = case(shape, torch.float32, torch.float32)
        args = (c.weight, None, None, 0.0, *shape.geometry, False)
        y = run(preact_conv_forward, c.x, None, *args)[0]
        args = (to_tf32(c.weight), *args[1:])
        assert torch.equal(y, run(preact_conv_forward, to_tf32(c.x), None, *args)[0])
        for results, rounded in zip(
            self.gradients(c, c.weight, c.dy, shape),
            self.gradients(c, to_tf32(c.weight), to_tf32(c.dy), shape),
            strict=True,
        ):
            assert all(map(torch.equal, results, rounded))

    def test_not_finite(self):
        """A NaN of ones, as GPUs make them, which would round to a number; inf, and what rounds to it."""
        x, weight = torch.zeros(1, 16, 4, 4).contiguous(memory_format=CL), torch.eye(16).view(16, 16, 1, 1)
        nan = torch.tensor([0x7FFFFFFF, -1], dtype=torch.int32).view(torch.float32)
        x[0, 0, 0, :2], x[0, 1, 1, :2] = nan, torch.tensor([torch.inf, -torch.inf])
        x[0, 2, 2, 0] = torch.finfo(torch.float32).max
        args = (weight, None, None, 0.0, *Shape(1, 16, 4, 4, 16).geometry, False)
        expected = reference.preact_conv_forward(to_tf32(x), None, *args)[0]
        assert expected[0, 0, 0, :2].isnan().all() and expected[0, 2, 2, 0] == torch.inf
        y = run(preact_conv_forward, x, None, *args)[0]
        torch.testing.assert_close(y, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(("dtype", "parameters"), DTYPES, ids=name_of)
@pytest.mark.parametrize("shape", [SPATIAL, ODD, Shape(2, 16, 20, 20, 16)], ids=name_of)
@pytest.mark.parametrize("mean", [100.0, 1e4])
def test_statistics_far_from_zero(shape, dtype, parameters, mean):
    """Of an output whose mean is large beside its spread; and one channel is constant."""
    c = case(shape, dtype, parameters)
    weight, bias = c.weight.clone(), torch.full_like(c.bias, mean)
    weight[1] = 0
    args = (c.x, c.bn, weight, bias, None, 0.0, *shape.geometry)
    y, stats = run(preact_conv_forward, *args, True)
    assert (y[:, 1] == bias[1]).all()
    check_stats(stats, y)


def test_weights_of_any_strides():
    """A transposed view, of which empty_like keeps the strides; and a sliced one, of which it does not."""
    c = case(ODD, torch.float16, torch.float16)
    wide_weight = torch.randn(ODD.k, ODD.c + 3, 1, 1).half()
    for weight in (c.weight.transpose(0, 1).contiguous().transpose(0, 1), wide_weight[:, 3:]):
        args = (c.x, c.bn, weight, None, None, 0.0, *ODD.geometry, False)
        same = (c.x, c.bn, weight.contiguous(), *args[3:])
        assert torch.equal(run(preact_conv_forward, *args)[0], run(preact_conv_forward, *same)[0])
        args = (c.dy, weight, c.x, c.bn, None, 0.0, True)
        same = (c.dy, weight.contiguous(), *args[2:])
        for value, expected in zip(
            run(preact_conv_backward_1x1, *args), run(preact_conv_backward_1x1, *same), strict=True
        ):
            assert torch.equal(value, expected)
        dweight, _ = preact_conv_wgrad(*to_device(c.dy, c.x, c.bn, weight, 0.0, *ODD.geometry, False))
        expected, _ = preact_conv_wgrad(
            *to_device(c.dy, c.x, c.bn, weight.contiguous(), 0.0, *ODD.geometry, False)
        )
        assert torch.equal(dweight, expected) and dweight.stride() == torch.empty_like(weight).stride()


def test_integers_are_exact():
    """Sums of small integers have no rounding: every product and every border must be right to the bit."""
    for shape in (SPATIAL, STRIDED, ODD):
        x, bn = torch.randint(-3, 4, (shape.n, shape.c, shape.h, shape.w)), torch.ones(4, shape.c)
        x, bn[0], bn[3] = x.half().contiguous(memory_format=CL), 0, 1
        weight = torch.randint(-2, 3, (shape.k, shape.c, *shape.kernel)).half()
        y = reference.preact_conv_forward(x, bn, weight, None, None, 0.0, *shape.geometry, False)[0]
        dy = torch.randint_like(y, -2, 3)
        args = (x, bn, weight, None, None, 0.0, *shape.geometry, False)
        assert torch.equal(run(preact_conv_forward, *args)[0], y)
        args = (dy, weight, x, bn, None, 0.0, *shape.geometry)
        for value, expected in zip(
            run(preact_conv_dgrad, *args), reference.preact_conv_dgrad(*args), strict=True
        ):
            assert torch.equal(value, expected)
        args = (dy, x, bn, weight, 0.0, *shape.geometry, True)
        for value, expected in zip(
            run(preact_conv_wgrad, *args), reference.preact_conv_wgrad(*args), strict=True
        ):
            assert torch.equal(value, expected)


@pytest.mark.parametrize("slope", [0.0, 0.1])
@pytest.mark.parametrize("shape", [ODD, SPATIAL, STRIDED], ids=name_of)
def test_not_finite(shape, slope):
    """NaN and inf in x and dy come out where plain PyTorch has them, and nowhere else."""
    c = case(shape, torch.float32, torch.float32)
    x, dy = c.x.clone(memory_format=CL), c.dy.clone(memory_format=CL)
    x[0, 0, 1, 1], x[0, 1, 2, 2], x[0, 2, 0, 0] = torch.nan, torch.inf, -torch.inf
    args = (x, c.bn, c.weight, None, None, slope, *shape.geometry, False)
    y = run(preact_conv_forward, *args)[0]
    assert y.isnan().any()
    assert_trusted(
        y, reference.preact_conv_forward(*args)[0], reference.preact_conv_forward(*wide(*args))[0], "y"
    )
    dy[0, 0, 0, 0] = torch.nan
    args = (dy, c.weight, x, c.bn, None, slope, *shape.geometry)
    assert_trusted(
        run(preact_conv_dgrad, *args)[0],
        reference.preact_conv_dgrad(*args)[0],
        reference.preact_conv_dgrad(*wide(*args))[0],
        "dz",
    )
    args = (c.dy, x, c.bn, c.weight, slope, *shape.geometry, False)
    got, plain = run(preact_conv_wgrad, *args)[0], reference.preact_conv_wgrad(*args)[0]
    assert torch.equal(got.isnan(), plain.isnan())


def test_padding_is_after_the_activation():
    """act(shift) is large, and must not enter at the border; nor an infinite shift in the weight gradient of
    whole tiles."""
    shape = Shape(1, 8, 5, 5, 8, (3, 3), padding=(1, 1))
    c = case(shape, torch.float32, torch.float32)
    bn = c.bn.clone()
    bn[3] = 100.0
    args = (c.x, bn, c.weight, None, None, 0.0, *shape.geometry, False)
    check_activation(
        "y",
        run(preact_conv_forward, *args)[0],
        reference.preact_conv_forward(*args)[0],
        reference.preact_conv_forward(*wide(*args))[0],
    )
    bn[3] = torch.inf
    got = run(preact_conv_wgrad, c.dy.abs() + 1, c.x, bn, c.weight, 0.0, *shape.geometry, False)[0]
    assert got.isposinf().all()


def test_empty():
    x, bn, weight = (
        torch.empty(0, 4, 5, 5, device=DEVICE),
        torch.ones(4, 4, device=DEVICE),
        torch.ones(6, 4, 1, 1),
    )
    weight, geometry = weight.to(DEVICE), ((1, 1), (0, 0), (1, 1), 1)
    y, stats = preact_conv_forward(x, bn, weight, None, None, 0.0, *geometry, True)
    assert y.shape == (0, 6, 5, 5) and torch.equal(stats.cpu(), torch.zeros(2, 6))
    dz, sums = preact_conv_dgrad(y, weight, x, bn, None, 0.0, *geometry)
    assert dz.shape == x.shape and torch.equal(sums.cpu(), torch.zeros(2, 4))
    dweight, dbias = preact_conv_wgrad(y, x, bn, weight, 0.0, *geometry, True)
    assert not dweight.any() and not dbias.any() and dbias.shape == (6,)
    dz, sums, dweight, dbias = preact_conv_backward_1x1(y, weight, x, bn, None, 0.0, True)
    assert dz.shape == x.shape and not sums.any() and not dweight.any() and not dbias.any()


@pytest.mark.parametrize("groups", [1, 7, 70, 600])
def test_reductions(groups):
    """Also in two steps, above 512 groups."""
    rows, channels = 5, 19
    total = groups * rows - 2
    x = torch.randn(total, channels) * 3 + 1
    partial = torch.stack(
        [
            torch.stack((part.mean(0), (part - part.mean(0)).square().sum(0)))
            for part in x.double().split(rows)
        ]
    ).float()
    out = torch.empty(2, channels, device=DEVICE)
    MergeStats(groups, channels, rows, total)(partial.to(DEVICE), out)
    check_stats(out.cpu(), x.t()[None, :, :, None])

    values = torch.randint(-9, 9, (groups, 3 * 2 * 35)).float()
    out = torch.empty(values.shape[1], device=DEVICE)
    OrderedSum(groups, values.shape[1])(values.to(DEVICE), out)
    assert torch.equal(out.cpu(), values.sum(0))
    weight = torch.empty(3, 35, 1, 2, dtype=torch.float16, device=DEVICE)
    OrderedSum(groups, values.shape[1], torch.float16, (1, 2, 35, weight.stride()))(values.to(DEVICE), weight)
    assert torch.equal(weight.cpu(), values.sum(0).view(3, 1, 2, 35).permute(0, 3, 1, 2).half())


def test_offsets_of_64_bits(monkeypatch):
    """The kernels' 64-bit variant, on a shape that would not need it."""
    from resnet_fused.triton_kernels.geometry import Convolution

    monkeypatch.setattr(Convolution, "wide", property(lambda self: True))
    for shape in (Shape(1, 3, 5, 4, 11), Shape(1, 5, 5, 6, 7, (3, 3), (2, 2), (1, 1))):
        for dtype, parameters in DTYPES[:2]:
            TestConvolutions().test_forward(shape, dtype, parameters, "bn+bias+residual")
            TestConvolutions().test_dgrad(shape, dtype, parameters, True)
            TestConvolutions().test_wgrad(shape, dtype, parameters, "bn+bias")
    test_backward_1x1(Shape(1, 3, 5, 4, 11), *DTYPES[1], True)


def test_magic_divisors():
    numbers = torch.tensor([0, 1, 2, 3, 5, 6, 7, 1023, 2**30, 2**31 - 2, 2**31 - 1], dtype=torch.int64)
    for divisor in (*range(1, 70), 1000, 3136, 65535, 65536, 65537, 2**30 + 1, 2**31 - 1):
        magic, shift = magic_divisor(divisor)
        assert -(2**31) <= magic < 2**31 and 0 <= shift < 32
        n = torch.cat(
            (numbers, numbers // divisor * divisor, (numbers // divisor * divisor - 1).clamp_min(0))
        )
        for value in n.tolist():
            assert (((magic % 2**32) * value >> 32) + value) >> shift == value // divisor


def test_declines():
    def geometry(groups=1, kernel=(3, 3), stride=(1, 1), dilation=(1, 1), n=2):
        return ConvGeometry((n, 16, 8, 8), (16, 16 // groups, *kernel), stride, (1, 1), dilation, groups)

    declines = support.declines
    assert declines("preact_conv_forward", torch.bfloat16, geometry()) is None
    assert declines("preact_conv_dgrad", torch.float32, geometry(stride=(2, 2))) is None
    assert declines("preact_conv_wgrad", torch.float32, geometry(stride=(2, 2), dilation=(2, 2))) is None
    assert "float64" in declines("channel_stats", torch.float64)
    assert "groups=4" in declines("preact_conv_forward", torch.float16, geometry(groups=4))
    assert "11x11" in declines("preact_conv_forward", torch.float16, geometry(kernel=(11, 11)))
    assert "dilation" in declines(
        "preact_conv_dgrad", torch.float16, geometry(stride=(2, 2), dilation=(2, 2))
    )
    assert "32 bits" in declines("preact_conv_forward", torch.float16, geometry(n=2**26))
    assert "1x1" in declines("preact_conv_backward_1x1", torch.float16, geometry())
    wide, narrow = (ConvGeometry((2, 512, 8, 8), (k, 512, 1, 1), (1, 1), (0, 0), (1, 1), 1) for k in (128, 64))
    assert "slower" in declines("preact_conv_backward_1x1", torch.float16, wide)
    assert declines("preact_conv_backward_1x1", torch.float16, narrow) is None


def test_configurations():
    for arch in (80, 86, 90, 100, 120):
        on = launch.Target(arch, 132)
        for dtype in ("16bit", "tf32", "ieee"):
            for primitive, kind in (
                ("preact_conv_forward", "tiled"),
                ("preact_conv_dgrad", "tiled"),
                ("preact_conv_wgrad", "split"),
                ("preact_conv_backward_1x1", "persistent"),
            ):
                for size in (1, 16, 35, 64, 2048):
                    if primitive.endswith("1x1") and (
                        dtype == "ieee" or size > (256 if dtype == "16bit" else 64)
                    ):
                        continue
                    for aligned in (True, False)[: 2 - primitive.endswith("1x1")]:
                        config = configs.select(
                            on, primitive, dtype, kind, rows=4096, columns=size, depth=size, aligned=aligned
                        )
                        assert 16 <= config.depth <= max(16, 2 * size)
    on = launch.Target(90, 132)
    many = configs.select(on, "preact_conv_forward", "16bit", "tiled", rows=10**6, columns=128, depth=128)
    few = configs.select(on, "preact_conv_forward", "16bit", "tiled", rows=1000, columns=128, depth=128)
    assert few.rows * few.columns < many.rows * many.columns
    sizes = {"columns": 256, "depth": 512}
    pointwise = configs.select(on, "preact_conv_forward", "16bit", "pointwise", rows=10**6, **sizes)
    limited = many._replace(registers=128)
    assert pointwise == (limited if configs.LIMITS else many)
    assert limited.options == {**many.options, "maxnreg": 128}
    for kind, default in (("tiled", many), ("pointwise", pointwise)):
        tried = configs.candidates(on, "preact_conv_forward", "16bit", kind, **sizes)
        assert tried[0] == default and many._replace(stages=4) in tried
    narrow = {"rows": 10**6, "columns": 64, "depth": 512}
    assert configs.select(on, "preact_conv_forward", "16bit", "pointwise", **narrow) == configs.select(
        on, "preact_conv_forward", "16bit", "tiled", **narrow
    )
    measured = many._replace(stages=2)
    configs.use_measured(lambda problem: measured if problem.rows == 77 else None)
    try:
        args = (on, "preact_conv_forward", "16bit", "tiled")
        assert configs.aligned("16bit", 16, 8) and not configs.aligned("16bit", 16, 12)
        assert configs.select(*args, rows=77, columns=64, depth=64) is measured
        assert configs.select(*args, rows=10**6, columns=128, depth=128) == many
    finally:
        configs.use_measured(None)
