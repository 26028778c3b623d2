"""The CUDA kernels and their wrappers, from the same source files, on the emulator (tests/cuda_emulator): every
block, warp and lane, barrier, asynchronous copy, ldmatrix and mma.sync is carried out on the CPU. What is left to
a GPU is the hardware itself: that the instructions do what the PTX manual says, and speed.

The trust rule is that of every other backend. TF32 rounds the operands of float32 convolutions; its yardstick is
plain PyTorch with operands rounded so.
"""

import itertools
import random
import subprocess
import sys
from typing import NamedTuple

import pytest
import torch
from cuda_emulation import ROOT, OnDevice, check_memory, library
from primitive_cases import ELEMENTWISE_SHAPES, activation, bn_rows, check_stats, check_sums, to_tf32, wide
from tolerances import assert_trusted

from resnet_fused import cuda_kernels
from resnet_fused.primitives import reference
from resnet_fused.primitives.dispatch import ConvGeometry

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CL = torch.channels_last


@pytest.fixture(scope="module")
def cuda():
    return library()


@pytest.fixture(autouse=True)
def memory_is_whole(cuda):
    yield
    check_memory()


def name_of(value):
    if isinstance(value, tuple):
        return "x".join(map(str, value))
    return str(value).removeprefix("torch.")


class Shape(NamedTuple):
    n: int
    c: int
    h: int
    w: int
    k: int
    kernel: int = 1
    stride: int = 1
    padding: int = 0
    dilation: int = 1

    @property
    def geometry(self):
        return [self.stride] * 2, [self.padding] * 2, [self.dilation] * 2, 1

    @property
    def out(self):
        span = [size + 2 * self.padding - self.dilation * (self.kernel - 1) - 1 for size in (self.h, self.w)]
        return self.n, self.k, *(s // self.stride + 1 for s in span)


#: Every width of tile, one and several tiles of rows and columns, channels off the tile, several steps and splits.
SHAPES = [
    Shape(1, 8, 1, 1, 8),
    Shape(3, 16, 6, 5, 24),
    Shape(2, 64, 16, 9, 64),
    Shape(1, 256, 9, 5, 136),
    Shape(2, 16, 8, 8, 16, 3, 1, 1),
    Shape(1, 64, 12, 11, 64, 3, 1, 1),
    Shape(1, 40, 7, 9, 200, 3, 1, 1),
    Shape(2, 24, 9, 7, 40, 1, 2),
    Shape(2, 72, 9, 8, 32, 3, 2, 1),
    Shape(1, 16, 13, 3, 16, 3, 2, 0),
    Shape(2, 8, 5, 6, 16, 3, 1, 2),
    Shape(1, 24, 11, 9, 8, 3, 1, 2, 2),
    Shape(2, 8, 4, 5, 8, 1, 2, 1),
]

#: By halo tiles: tiles of one and two images, one and several blocks of channels, a last block of one chunk, every
#: padding, images that are no multiple of the tile.
HALO_SHAPES = [
    Shape(2, 8, 8, 7, 16, 3, 1, 1),
    Shape(1, 64, 16, 16, 64, 3, 1, 1),
    Shape(1, 72, 15, 16, 136, 3, 1, 1),
    Shape(3, 40, 14, 15, 24, 3, 1, 1),
    Shape(2, 136, 8, 8, 32, 3, 1, 1),
    Shape(1, 16, 18, 17, 8, 3, 1, 0),
    Shape(2, 24, 14, 14, 40, 3, 1, 2),
]
SHAPES += HALO_SHAPES


class Case:
    """One convolution with everything on: leaky activation, bias, residual, a second gradient."""

    def __init__(self, shape, dtype, slope=0.1, integers=False, weight_dtype=None):
        n, c, h, w, k = shape[:5]
        draw = (lambda *s: torch.randint(-2, 3, s).float()) if integers else torch.randn

        def make(*size):
            return draw(*size).to(dtype).contiguous(memory_format=CL)

        self.shape, self.slope = shape, slope
        self.x, self.residual, self.dy, self.dz_in = (
            make(n, c, h, w), make(*shape.out), make(*shape.out), make(n, c, h, w),
        )  # fmt: skip
        scale = 1.0 if integers else (c * shape.kernel**2) ** -0.5
        self.weight = (draw(k, c, shape.kernel, shape.kernel) * scale).to(weight_dtype or dtype)
        self.bias = draw(k).to(weight_dtype or dtype)
        self.bn = bn_rows(c, dtype)
        if integers:
            self.bn = torch.stack((draw(c), torch.ones(c), draw(c), draw(c)))

    def forward(self, run, extras=True, want_stats=True):
        extra = (self.bias, self.residual) if extras else (None, None)
        return run(self.x, self.bn, self.weight, *extra, self.slope, *self.shape.geometry, want_stats)

    def dgrad(self, run, extras=True):
        dz_in = self.dz_in if extras else None
        return run(self.dy, self.weight, self.x, self.bn, dz_in, self.slope, *self.shape.geometry)

    def wgrad(self, run, want_bias=True):
        return run(self.dy, self.x, self.bn, self.weight, self.slope, *self.shape.geometry, want_bias)

    def backward_1x1(self, run):
        """(dz, sums, dweight, dbias)"""
        return run(self.dy, self.weight, self.x, self.bn, self.dz_in, self.slope, True)

    def plain(self):
        """(y, dz, dweight, dbias) in plain PyTorch in the same dtype, with TF32 where it applies, and in float64."""
        x, bn, weight, dy, dz_in, g = self.x, self.bn, self.weight, self.dy, self.dz_in, self.shape.geometry
        oracle = (
            self.forward(lambda *args: reference.preact_conv_forward(*wide(*args)))[0],
            self.dgrad(lambda *args: reference.preact_conv_dgrad(*wide(*args)))[0],
            *self.wgrad(lambda *args: reference.preact_conv_wgrad(*wide(*args))),
        )
        if x.dtype is torch.float32:
            a, weight, dy = to_tf32(reference.bn_act_forward(x, bn, self.slope)), to_tf32(weight), to_tf32(dy)
        else:
            a = reference.bn_act_forward(x, bn, self.slope)
        plain = (
            reference.preact_conv_forward(a, None, weight, self.bias, self.residual, 0.0, *g, False)[0],
            reference.preact_conv_dgrad(dy, weight, x, bn, dz_in, self.slope, *g)[0],
            reference.preact_conv_wgrad(dy, a, None, weight, 0.0, *g, False)[0],
            reference.bias_gradient(self.dy, weight),
        )
        return plain, oracle


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("shape", SHAPES, ids=name_of)
class TestConvolutions:
    def test_trust_rule(self, cuda, shape, dtype):
        case = Case(shape, dtype)
        plain, oracle = case.plain()
        y, stats = case.forward(cuda.preact_conv_forward)
        dz, sums = case.dgrad(cuda.preact_conv_dgrad)
        dweight, dbias = case.wgrad(cuda.preact_conv_wgrad)
        for name, value, *rest in zip(
            ("y", "dz", "dweight", "dbias"), (y, dz, dweight, dbias), plain, oracle, strict=True
        ):
            assert value.dtype == rest[0].dtype, name
            terms = case.dy.double().abs().sum((0, 2, 3)) if name == "dbias" else 0.0
            assert_trusted(value, *rest, name, terms)
        check_stats(stats, y)
        check_sums(sums, dz, case.x, case.bn)
        assert y.is_contiguous(memory_format=CL) and dz.is_contiguous(memory_format=CL)
        assert dweight.stride() == case.weight.stride()

    def test_without_what_is_optional(self, cuda, shape, dtype):
        case = Case(shape, dtype, slope=0.0)
        y, stats = case.forward(cuda.preact_conv_forward, extras=False, want_stats=False)
        assert stats.shape == (0,)
        dweight, dbias = case.wgrad(cuda.preact_conv_wgrad, want_bias=False)
        assert dbias.shape == (0,) and dbias.dtype == dtype
        with_stats, stats = case.forward(cuda.preact_conv_forward, extras=False)
        assert torch.equal(y, with_stats)
        check_stats(stats, y)
        assert torch.equal(dweight, case.wgrad(cuda.preact_conv_wgrad)[0])
        dz, sums = case.dgrad(cuda.preact_conv_dgrad, extras=False)
        check_sums(sums, dz, case.x, case.bn)
        # bn None: a plain convolution, of an x that is already activated.
        case.x, case.bn = reference.bn_act_forward(case.x, case.bn, 0.0), None
        assert torch.equal(y, case.forward(cuda.preact_conv_forward, extras=False, want_stats=False)[0])
        assert torch.equal(dweight, case.wgrad(cuda.preact_conv_wgrad, want_bias=False)[0])

    def test_same_in_every_order_and_however_late_copies_are(self, cuda, shape, dtype):
        case = Case(shape, dtype)
        results = []
        try:
            for order, late in ((0, False), (1, True), (2, True), (3, False)):
                cuda.set_schedule(order, late)
                results.append(
                    (
                        *case.forward(cuda.preact_conv_forward),
                        *case.dgrad(cuda.preact_conv_dgrad),
                        *case.wgrad(cuda.preact_conv_wgrad),
                    )
                )
        finally:
            cuda.set_schedule(0, False)
        for other in results[1:]:
            assert all(map(torch.equal, results[0], other))


def integer_shapes(count):
    """Random geometries of what conv_supported takes."""
    draw = random.Random(0)
    while count:
        kernel, stride = draw.choice((1, 3)), draw.choice((1, 2))
        shape = Shape(
            draw.randint(1, 3), 8 * draw.randint(1, 9), draw.randint(1, 11), draw.randint(1, 11),
            8 * draw.choice((1, 2, 3, 4, 5, 8, 9, 17)), kernel, stride, draw.choice((0, kernel // 2, kernel // 2, 2)),
            draw.choice((1, 1, 1, 2)),
        )  # fmt: skip
        if min(shape.out) > 0 and shape.c * shape.k * shape.kernel**2 * shape.out[2] * shape.out[3] < 1e6:
            count -= 1
            yield shape


@pytest.mark.parametrize("part", range(12))
def test_small_integers_are_exact(cuda, part):
    """300 geometries; sums of these products are exact in float32, so every result has one right value."""
    for i, shape in enumerate(itertools.islice(integer_shapes(300), part, None, 12)):
        torch.manual_seed(i)
        case = Case(shape, DTYPES[(i + part) % 3], slope=0.0, integers=True, weight_dtype=torch.float32)
        cuda.set_multiprocessors(1 + i % 7)
        y, stats = case.forward(cuda.preact_conv_forward)
        dz, sums = case.dgrad(cuda.preact_conv_dgrad)
        gradients = case.wgrad(cuda.preact_conv_wgrad)
        assert torch.equal(y, case.forward(reference.preact_conv_forward)[0]), shape
        expected = case.dgrad(reference.preact_conv_dgrad)
        assert torch.equal(dz, expected[0]) and torch.equal(sums, expected[1]), shape
        assert all(map(torch.equal, gradients, case.wgrad(reference.preact_conv_wgrad))), shape
        check_stats(stats, y)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
class TestBothGradientsOf1x1:
    SHAPES = (Shape(2, 64, 9, 8, 64), Shape(1, 8, 1, 1, 8), Shape(3, 72, 11, 10, 40), Shape(1, 136, 7, 9, 16))

    @pytest.mark.parametrize("shape", SHAPES, ids=name_of)
    def test_trust_rule(self, cuda, shape, dtype):
        case = Case(shape, dtype)
        plain, oracle = (results[1:] for results in case.plain())
        dz, sums, dweight, dbias = case.backward_1x1(cuda.preact_conv_backward_1x1)
        terms = case.dy.double().abs().sum((0, 2, 3))
        assert_trusted(dz, plain[0], oracle[0], "dz")
        assert_trusted(dweight, plain[1], oracle[1], "dweight")
        assert_trusted(dbias, plain[2], oracle[2], "dbias", terms)
        check_sums(sums, dz, case.x, case.bn)

    @pytest.mark.parametrize("shape", SHAPES, ids=name_of)
    def test_same_in_every_order_and_however_late_copies_are(self, cuda, shape, dtype):
        case, results = Case(shape, dtype), []
        try:
            for order, late in ((0, False), (1, True), (2, True), (3, False)):
                cuda.set_schedule(order, late)
                results.append(case.backward_1x1(cuda.preact_conv_backward_1x1))
        finally:
            cuda.set_schedule(0, False)
        for other in results[1:]:
            assert all(map(torch.equal, results[0], other))

    def test_small_integers_are_exact(self, cuda, dtype):
        draw = random.Random(1)
        for i in range(40):
            shape = Shape(
                draw.randint(1, 4), 8 * draw.randint(1, 18), draw.randint(1, 13), draw.randint(1, 13),
                8 * draw.randint(1, 8),
            )  # fmt: skip
            case = Case(shape, dtype, integers=True, slope=0.0, weight_dtype=torch.float32)
            cuda.set_multiprocessors(1 + i % 5)
            found = case.backward_1x1(cuda.preact_conv_backward_1x1)
            expected = *case.dgrad(reference.preact_conv_dgrad), *case.wgrad(reference.preact_conv_wgrad)
            assert all(map(torch.equal, found, expected)), shape

    def test_what_is_optional_and_empty(self, cuda, dtype):
        case = Case(self.SHAPES[2], dtype)
        case.dz_in = None
        dz, sums, dweight, dbias = cuda.preact_conv_backward_1x1(
            case.dy, case.weight, case.x, case.bn, None, 0.0, False
        )
        assert dbias.shape == (0,)
        case.slope = 0.0
        torch.testing.assert_close(dz, case.dgrad(cuda.preact_conv_dgrad)[0])
        check_sums(sums, dz, case.x, case.bn)
        case.bn[3, 1] = torch.inf  # rows past the last must not bring act(shift) into the sum
        case.x[:, 1] = -torch.inf
        case.bn[2, 1] = 1.0
        dweight = case.backward_1x1(cuda.preact_conv_backward_1x1)[2]
        assert dweight[:, 2:].isfinite().all()
        none = Case(Shape(0, 8, 5, 5, 16), dtype)
        before = cuda.launches()
        dz, sums, dweight, dbias = none.backward_1x1(cuda.preact_conv_backward_1x1)
        assert dz.shape == none.x.shape and not (sums.any() or dweight.any() or dbias.any())
        assert cuda.launches() == before
        wide = Case(Shape(1, 8, 2, 2, 72), dtype)
        with pytest.raises(RuntimeError, match="at most 64 output channels"):
            wide.backward_1x1(cuda.preact_conv_backward_1x1)


def halo_shapes(count):
    draw = random.Random(2)
    while count:
        shape = Shape(
            draw.randint(1, 3), 8 * draw.randint(1, 18), draw.randint(6, 18), draw.randint(6, 18),
            8 * draw.choice((1, 2, 4, 5, 8, 9, 17)), 3, 1, draw.choice((0, 1, 1, 2)),
        )  # fmt: skip
        takes = [
            library().uses_halo(shape.n, shape.h, shape.w, shape.padding, forward)
            for forward in (True, False)
        ]
        if all(takes) and shape.c * shape.k * 9 * shape.out[2] * shape.out[3] < 3e6:
            count -= 1
            yield shape


def test_which_convolutions_go_by_halo_tiles(cuda):
    """On a device Python says it, as the library would."""
    for case in itertools.product((1, 2, 3), range(1, 35), (1, 7, 8, 14, 17, 33), (0, 1, 2), (True, False)):
        n, h, w, padding, forward = case
        if min(h, w) + 2 * padding > 2:
            assert OnDevice.uses_halo(*case) == cuda.uses_halo(*case), case


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_small_integers_are_exact_by_halo_tiles(cuda, dtype):
    for shape in HALO_SHAPES:
        assert cuda.uses_halo(shape.n, shape.h, shape.w, shape.padding, True), shape
    for shape in halo_shapes(25):
        case = Case(shape, dtype, slope=0.0, integers=True, weight_dtype=torch.float32)
        y, stats = case.forward(cuda.preact_conv_forward)
        dz, sums = case.dgrad(cuda.preact_conv_dgrad)
        assert torch.equal(y, case.forward(reference.preact_conv_forward)[0]), shape
        expected = case.dgrad(reference.preact_conv_dgrad)
        assert torch.equal(dz, expected[0]) and torch.equal(sums, expected[1]), shape
        check_stats(stats, y)


@pytest.mark.parametrize("shape", [Shape(9, 8, 96, 80, 8), Shape(9, 8, 97, 83, 8, 3, 1, 1)], ids=name_of)
def test_many_tiles_are_merged_in_two_steps(cuda, shape):
    # More than 512 tiles of 128 rows, in a line and of a rectangle: by segments, or by two launches of their own.
    case = Case(shape, torch.bfloat16)
    for tree_groups in (4096, 500):
        if not isinstance(cuda, OnDevice):
            cuda.set_tree_groups(tree_groups)
        try:
            y, stats = case.forward(cuda.preact_conv_forward, extras=False)
            dz, sums = case.dgrad(cuda.preact_conv_dgrad)
        finally:
            if not isinstance(cuda, OnDevice):
                cuda.set_tree_groups(4096)
        check_stats(stats, y)
        check_sums(sums, dz, case.x, case.bn)


def test_more_groups_than_a_grid_is_high(cuda):
    groups = 65536 * 128 + 1  # by blocks of 128 of them, of which 65535 fit into the second dimension
    assert cuda.merge_ones(groups) == groups


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_padding_comes_after_the_activation_and_nan_stays(cuda, dtype):
    shape = Shape(1, 16, 5, 6, 16, 3, 1, 1)
    case = Case(shape, dtype, slope=0.0)
    # A padded pixel taken for act(shift) = inf would make NaN of the first row's -inf.
    case.bn[3, 4] = torch.inf
    case.weight[:, 4, 0] = 1.0
    case.weight[:, 4, 1:] = -1.0
    y = case.forward(cuda.preact_conv_forward, extras=False)[0]
    assert (y[:, :, 0] == -torch.inf).all() and y[:, :, 1:].isnan().all()
    dweight = case.wgrad(cuda.preact_conv_wgrad, want_bias=False)[0]
    expected = case.wgrad(reference.preact_conv_wgrad, want_bias=False)[0]
    assert torch.equal(dweight.isnan(), expected.isnan()) and torch.equal(dweight.isinf(), expected.isinf())

    case = Case(shape, dtype, slope=0.0)
    case.x[0, 3, 2, 2] = torch.nan
    case.x[0, 5, 0, 0] = -torch.inf
    case.bn[2, 5] = 1.0
    y = case.forward(cuda.preact_conv_forward, extras=False)[0]
    touched = torch.zeros(5, 6, dtype=torch.bool)
    touched[1:4, 1:4] = True
    assert torch.equal(y.isnan(), touched.expand_as(y))
    dz, sums = case.dgrad(cuda.preact_conv_dgrad, extras=False)
    assert dz.isfinite().all() and dz[0, 3, 2, 2] == 0  # z is NaN there: not above 0
    assert sums[0].isfinite().all() and sums[1, 3].isnan() and sums[1, :3].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize(
    "size", ELEMENTWISE_SHAPES + [(5, 16, 9, 33), (1, 320, 3, 5), (2, 2048, 2, 1)], ids=name_of
)
class TestElementwise:
    def test_all(self, cuda, size, dtype):
        n, c = size[:2]
        x, y, da, dz_in = (activation(*size, dtype=dtype) for _ in range(4))
        bn, coefficients = bn_rows(c, dtype), torch.randn(4, c)
        check_stats(cuda.channel_stats(x * 3 + 1), x * 3 + 1)

        def trusted(name, args, pick=lambda value: value):
            formula = getattr(reference, name)
            value = getattr(cuda, name)(*args)
            assert_trusted(pick(value), pick(formula(*args)), pick(formula(*wide(*args))), name)
            return value

        def first(value):
            return value[0]

        for slope in (0.0, 0.1):
            trusted("bn_act_forward", (x, bn, slope))
        for joined in (None, dz_in):
            dz, sums = trusted("bn_act_backward", (da, x, bn, joined, 0.1), first)
            check_sums(sums, dz, x, bn)
            trusted("preact_apply", (da, x, coefficients, joined))
        for affine, gate, slope in (
            (None, None, None),
            (torch.randn(2, c), torch.randn(n, c), 0.0),
            (None, torch.randn(n, 1), 0.2),
        ):
            out, stats = trusted("residual_add", (x, y, affine, gate, 0.5, slope, True), first)
            check_stats(stats, out)
            again, none = cuda.residual_add(x, y, affine, gate, 0.5, slope, False)
            assert torch.equal(out, again) and none.shape == (0,)

    def test_same_in_every_order(self, cuda, size, dtype):
        x = activation(*size, dtype=dtype)
        bn, results = bn_rows(size[1], dtype), []
        try:
            for order in range(3):
                cuda.set_schedule(order, False)
                results.append((cuda.channel_stats(x), *cuda.bn_act_backward(x, x, bn, None, 0.0)))
        finally:
            cuda.set_schedule(0, False)
        for other in results[1:]:
            assert all(map(torch.equal, results[0], other))


def test_statistics_at_a_large_mean(cuda):
    for mean in (1e4, 1e6):
        x = (activation(4, 16, 17, 19, dtype=torch.float32) + mean).contiguous(memory_format=CL)
        check_stats(cuda.channel_stats(x), x)
    x = torch.full((2, 8, 5, 7), 1e30).contiguous(memory_format=CL)
    stats = cuda.channel_stats(x)
    assert torch.equal(stats[0], x[0, :, 0, 0]) and (stats[1] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_finalize(cuda, dtype):
    c, count = 35, 77
    stats = torch.stack((torch.randn(c), torch.rand(c) * count))
    weight, bias = torch.randn(c).to(dtype), torch.randn(2 * c)[::2].to(dtype)
    mean, var = torch.randn(c).to(dtype), (torch.rand(c) + 0.5).to(dtype)
    for args in (
        (stats, count, None, None, weight, bias, 1e-5),
        (stats, count, None, None, None, None, 1e-3),
        (None, 0, mean, var, weight, None, 1e-5),
    ):
        oracle = reference.finalize_forward(*wide(*args))
        plain = reference.finalize_forward(*args)
        assert_trusted(cuda.finalize_forward(*args), plain, oracle, "bn")
    sums, bn = torch.randn(2, c), reference.finalize_forward(*args).float()
    for training in (True, False):
        args = (sums, bn, count, training)
        assert_trusted(
            cuda.finalize_backward(*args),
            reference.finalize_backward(*args),
            reference.finalize_backward(*wide(*args)),
        )
    expected = mean.clone(), var.clone()
    oracle = mean.double(), var.double()
    cuda.update_running_stats(mean, var, stats, count, 0.1)
    reference.update_running_stats(*expected, stats, count, 0.1)
    reference.update_running_stats(*oracle, stats.double(), count, 0.1)
    assert_trusted(mean, expected[0], oracle[0], "running_mean")
    assert_trusted(var, expected[1], oracle[1], "running_var")


def test_unaligned_views(cuda):
    """Data that does not begin at a multiple of 16 bytes."""
    shape = Shape(2, 16, 5, 4, 24, 3, 1, 1)
    case = Case(shape, torch.bfloat16)

    def moved(t):
        flat = torch.empty(t.numel() + 1, dtype=t.dtype)[1:]
        view = flat.as_strided(t.shape, t.stride(), flat.storage_offset())
        assert view.copy_(t).data_ptr() % 16 != 0
        return view

    def results():
        return (
            case.forward(cuda.preact_conv_forward),
            case.dgrad(cuda.preact_conv_dgrad),
            case.wgrad(cuda.preact_conv_wgrad),
        )

    expected = results()
    stats = cuda.channel_stats(case.x)
    for name in ("x", "residual", "dy", "dz_in", "weight", "bn"):
        setattr(case, name, moved(getattr(case, name)))
    for a, b in zip(expected, results(), strict=True):
        assert all(map(torch.equal, a, b))
    torch.testing.assert_close(cuda.channel_stats(case.x), stats)


@pytest.mark.parametrize("format", [torch.contiguous_format, CL], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16], ids=name_of)
def test_weights_of_any_layout_and_float32_masters(cuda, format, weight_dtype):
    case = Case(Shape(2, 16, 6, 5, 24, 3, 1, 1), torch.bfloat16, integers=True, weight_dtype=weight_dtype)
    case.weight = case.weight.contiguous(memory_format=format)
    assert torch.equal(
        case.forward(cuda.preact_conv_forward)[0], case.forward(reference.preact_conv_forward)[0]
    )
    assert torch.equal(case.dgrad(cuda.preact_conv_dgrad)[0], case.dgrad(reference.preact_conv_dgrad)[0])
    dweight, dbias = case.wgrad(cuda.preact_conv_wgrad)
    assert dweight.dtype == dbias.dtype == weight_dtype and dweight.stride() == case.weight.stride()
    assert torch.equal(dweight, case.wgrad(reference.preact_conv_wgrad)[0])


def test_empty_batches_launch_nothing(cuda):
    case = Case(Shape(0, 8, 5, 5, 16, 3, 1, 1), torch.bfloat16)
    before = cuda.launches()
    y, stats = case.forward(cuda.preact_conv_forward)
    assert y.shape == (0, 16, 5, 5) and stats.shape == (2, 16) and not stats.any()
    dz, sums = case.dgrad(cuda.preact_conv_dgrad)
    assert dz.shape == case.x.shape and not sums.any()
    dweight, dbias = case.wgrad(cuda.preact_conv_wgrad)
    assert not dweight.any() and not dbias.any() and dbias.shape == (16,)
    assert not cuda.channel_stats(case.x).any()
    assert cuda.residual_add(case.x, case.x, None, None, 1.0, None, True)[0].shape == case.x.shape
    cuda.update_running_stats(torch.ones(8), torch.ones(8), torch.zeros(2, 8), 0, 0.1)
    assert cuda.launches() == before


def test_launches(cuda):
    """What docs/design.md says of the number of launches."""
    case = Case(Shape(2, 16, 8, 8, 16, 3, 1, 1), torch.bfloat16)
    case.weight = case.weight.contiguous(memory_format=CL)

    def launches(run):
        before = cuda.launches()
        run()
        return cuda.launches() - before

    assert launches(lambda: case.forward(cuda.preact_conv_forward)) == 2  # with the merge of the statistics
    assert launches(lambda: case.forward(cuda.preact_conv_forward, want_stats=False)) == 1
    assert launches(lambda: case.dgrad(cuda.preact_conv_dgrad)) == 2
    assert launches(lambda: case.wgrad(cuda.preact_conv_wgrad, want_bias=False)) == 2
    assert launches(lambda: cuda.preact_apply(case.x, case.x, case.bn, None)) == 1
    assert launches(lambda: cuda.residual_add(case.x, case.x, None, None, 1.0, None, True)) == 2
    assert launches(lambda: cuda.finalize_forward(torch.ones(2, 16), 4, None, None, None, None, 1e-5)) == 1
    narrow = Case(Shape(2, 16, 8, 8, 16), torch.bfloat16)
    backward = cuda.preact_conv_backward_1x1
    arguments = (narrow.dy, narrow.weight, narrow.x, narrow.bn, None, 0.0, False)
    assert launches(lambda: backward(*arguments)) == 3
    case.weight = case.weight.float()
    assert launches(lambda: case.forward(cuda.preact_conv_forward)) == 3  # and the rounding of the weight


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=name_of)
@pytest.mark.parametrize(
    "shape",
    [*SHAPES, Shape(1, 200, 3, 3, 72), Shape(1, 48, 3, 3, 72, 3, 2, 1), Shape(1, 16, 5, 5, 8, 3, 2, 2, 2)],
    ids=name_of,
)
def test_shared_memory(cuda, shape, dtype):
    """What dispatch compares with the device's, so that nothing is launched that cannot be."""
    case, g = Case(shape, dtype), shape.geometry
    geometry = ConvGeometry(tuple(shape[:4]), tuple(case.weight.shape), *map(tuple, g[:3]), 1)
    runs = {"forward": case.forward, "dgrad": case.dgrad, "wgrad": case.wgrad}
    if shape.kernel == shape.stride == 1 and shape.k <= 64:
        runs["backward_1x1"] = case.backward_1x1
    for name, run in runs.items():
        cuda.largest_shared()
        run(getattr(cuda, f"preact_conv_{name}"))
        found, expected = cuda.largest_shared(), cuda_kernels.shared_bytes(f"preact_conv_{name}", dtype, geometry)
        by_halo = shape.kernel == 3 and shape.stride == shape.dilation == 1 and name in ("forward", "dgrad")
        # Whether halo tiles fit depends on the images too; it says the larger one of both ways.
        assert found <= expected if by_halo else found == expected, name


def test_errors(cuda):
    case = Case(Shape(2, 16, 6, 5, 24, 3, 1, 1), torch.bfloat16)
    x, bn, weight = case.x, case.bn, case.weight
    g = case.shape.geometry

    def forward(x=x, bn=bn, weight=weight, bias=None, residual=None, geometry=g):
        return cuda.preact_conv_forward(x, bn, weight, bias, residual, 0.0, *geometry, False)

    for arguments, message in (
        ({"x": x[0]}, r"expected 4D input \(got 3D input\)"),
        ({"x": x.double()}, "expected input to have dtype float32, bfloat16 or float16, but got float64"),
        ({"x": x.contiguous()}, "to be dense in channels_last memory format"),
        ({"bn": bn[:3]}, r"expected bn of size \[4, 16\], but got \[3, 16\]"),
        ({"bn": bn.bfloat16()}, "expected bn to have dtype float32, but got bfloat16"),
        ({"weight": weight[:, :8]}, r"to have 8 channels, but got 16 channels instead"),
        ({"weight": weight.half()}, "expected weight to have dtype bfloat16 or float32, but got float16"),
        ({"weight": weight[:23]}, "channels are multiples of 8"),
        (
            {"weight": torch.ones(8, 16, 5, 5).bfloat16(), "geometry": ([1, 1], [2, 2], [1, 1], 1)},
            "take 1x1 and 3x3",
        ),
        ({"geometry": ([3, 3], [1, 1], [1, 1], 1)}, "stride 1 or 2"),
        ({"geometry": ([1, 1], [1, 1], [1, 1], 2)}, "expected groups to be 1, but got 2"),
        ({"geometry": ([1], [1, 1], [1, 1], 1)}, r"expected stride to be 2 integers|Expected"),
        ({"geometry": ([1, 1], [-1, 0], [1, 1], 1)}, "negative padding is not supported"),
        ({"bias": torch.ones(5)}, "expected bias to be 1-dimensional with 24 elements"),
        ({"residual": x}, "expected residual of size"),
    ):
        with pytest.raises((RuntimeError, ValueError), match=message):
            forward(**arguments)
    with pytest.raises(
        RuntimeError, match="Expected more than 1 value per channel when training, got count 1"
    ):
        cuda.update_running_stats(torch.ones(8), torch.ones(8), torch.ones(2, 8), 1, 0.1)


def test_index_arithmetic(cuda):
    """Division, swizzle, tiles, taps and phases of forward and input gradient, splits: hundreds of geometries against
    their definitions, sizes near 2^31 pixels among them."""
    assert cuda.check_indices() == ""


GUARDED = """
import ctypes, itertools, mmap, sys
import torch
sys.path.insert(0, "tests")
from cuda_emulation import library, check_memory
from test_cuda_kernels import CL, SHAPES, Case

cuda, libc, kept = library(), ctypes.CDLL(None, use_errno=True), []

def guarded(t, at_end):
    "A copy of t between two pages that cannot be touched, up against one of them."
    page, bytes = mmap.PAGESIZE, t.numel() * t.element_size()
    room = -(-bytes // page) * page
    area = mmap.mmap(-1, room + 2 * page)
    kept.append(area)
    start = ctypes.addressof(ctypes.c_char.from_buffer(area))
    first = start + page + (room - bytes if at_end else 0)
    flat = torch.frombuffer((ctypes.c_char * bytes).from_address(first), dtype=t.dtype)
    view = flat.as_strided(t.shape, t.stride()).copy_(t)
    for edge in (start, start + page + room):
        assert libc.mprotect(ctypes.c_void_p(edge), page, 0) == 0
    return view

for shape, dtype, at_end in itertools.product(SHAPES, (torch.float32, torch.bfloat16), (False, True)):
    case = Case(shape, dtype)
    case.weight = case.weight.contiguous(memory_format=CL)
    for name in ("x", "residual", "dy", "dz_in", "weight", "bias", "bn"):
        setattr(case, name, guarded(getattr(case, name), at_end))
    case.forward(cuda.preact_conv_forward)
    case.dgrad(cuda.preact_conv_dgrad)
    case.wgrad(cuda.preact_conv_wgrad)
    if shape.kernel == shape.stride == 1 and shape.k <= 64:
        case.backward_1x1(cuda.preact_conv_backward_1x1)
    cuda.channel_stats(case.x), cuda.bn_act_forward(case.x, case.bn, 0.0)
    cuda.bn_act_backward(case.dz_in, case.x, case.bn, case.dz_in, 0.0)
    cuda.preact_apply(case.dz_in, case.x, case.bn, case.dz_in)
    cuda.residual_add(case.x, case.dz_in, case.bn[:2], None, 1.0, None, True)
check_memory()
print("nothing outside was touched")
"""


def test_nothing_is_read_outside_of_the_inputs():
    result = subprocess.run([sys.executable, "-c", GUARDED], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, (
        f"exit status {result.returncode} (-11: a read outside)\n{result.stderr[-2000:]}"
    )
    assert "nothing outside was touched" in result.stdout
