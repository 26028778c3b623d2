"""3x3 convolutions with stride 1, which the C++ kernels compute by Winograd's filtering: what distinguishes it from the
direct convolution. Its tiles of 2x2 or 4x4 outputs at odd borders, in several bands and pieces of rows; an Inf or a NaN,
which a transform would spread over a tile; values that overflow in a transform alone; sums that are 0.
"""

from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from conftest import on_every_backend
from primitive_cases import identity_bn
from tolerances import assert_trusted, library_has_kernels

from resnet_fused import primitives

CL = torch.channels_last
GEOMETRY = ((1, 1), (1, 1))  # stride, dilation


class Shape(NamedTuple):
    n: int
    c: int
    h: int
    w: int
    k: int
    padding: int = 1


SHAPES = [
    Shape(2, 16, 8, 8, 16),
    Shape(12, 17, 7, 9, 40),
    Shape(3, 8, 7, 5, 9),
    Shape(2, 17, 6, 9, 40, 0),
    Shape(2, 48, 5, 4, 24, 2),
    Shape(70, 16, 2, 2, 16),  # several images to a unit of work
    Shape(2, 64, 41, 64, 16),  # several bands of rows
    Shape(2, 8, 5, 139, 8),  # several pieces of a row of tiles
    Shape(3, 24, 8, 8, 168),  # several groups of output channels, forward
    Shape(9, 168, 8, 8, 40),  # and in the input gradient, of several parts
]
DTYPES = [torch.float32, torch.bfloat16]
ids = ["x".join(map(str, shape)) for shape in SHAPES]


def tensors(shape, make, dtype):
    """x, dy and the weight."""
    n, c, h, w, k, padding = shape
    p, q = h + 2 * padding - 2, w + 2 * padding - 2
    x, dy = (make(*size).to(dtype).contiguous(memory_format=CL) for size in ((n, c, h, w), (n, k, p, q)))
    return x, dy, make(k, c, 3, 3).to(dtype)


def all_three(x, dy, weight, padding):
    """y of the plain convolution (bn None), dz and dweight of it after a ReLU."""
    stride, dilation = GEOMETRY
    at = (stride, (padding, padding), dilation, 1)
    bn = identity_bn(x.shape[1])
    y, _ = primitives.preact_conv_forward(x, None, weight, None, None, 0.0, *at, False)
    dz, _ = primitives.preact_conv_dgrad(dy, weight, x, bn, None, 0.0, *at)
    dweight, _ = primitives.preact_conv_wgrad(dy, x, bn, weight, 0.0, *at, False)
    return {"y": y, "dz": dz, "dweight": dweight}


def plain_three(x, dy, weight, padding):
    """The same from PyTorch."""
    a = x.relu()
    da, dweight, _ = torch.ops.aten.convolution_backward(
        dy, a, weight, None, [1, 1], [padding] * 2, [1, 1], False, [0, 0], 1, [True, True, False]
    )
    return {"y": F.conv2d(x, weight, None, 1, padding), "dz": torch.where(x <= 0, 0.0, da), "dweight": dweight}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=ids)
def test_against_the_oracle(shape, dtype):
    given = tensors(shape, torch.randn, dtype)
    plain = plain_three(*given, shape.padding)
    oracle = plain_three(*(t.double() for t in given), shape.padding)

    def check(backend):
        for name, value in all_three(*given, shape.padding).items():
            assert_trusted(value, plain[name], oracle[name], name)

    on_every_backend(check)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=ids)
def test_small_integers_are_exact(shape, dtype):
    """In float32 the constants are 0, 1, -1 and 1/2; in bfloat16 sums are rounded to a grid, and then to bfloat16."""
    given = tensors(shape, lambda *size: torch.randint(-3, 4, size), dtype)
    oracle = plain_three(*(t.double() for t in given), shape.padding)
    assert all((t == 0).any() for t in oracle.values())

    def check(backend):
        if backend == "unfused" and not library_has_kernels(dtype, given[0].device):
            return
        for name, value in all_three(*given, shape.padding).items():
            assert torch.equal(value.double(), oracle[name].to(dtype).double()), name

    on_every_backend(check)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("where", ["x", "dy", "weight"])
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")], ids=str)
@pytest.mark.parametrize("shape", [Shape(8, 16, 9, 10, 16), Shape(3, 72, 9, 10, 64)], ids=["", "few_tiles"])
def test_not_finite(shape, where, value, dtype):
    """One value that is not finite reaches the outputs that depend on it and no other."""
    x, dy, weight = given = tensors(shape, torch.randn, dtype)
    {"x": x[1, 5, 4], "dy": dy[1, 5, 4], "weight": weight[5, 3, 1]}[where][1] = value
    plain = plain_three(*given, shape.padding)
    oracle = plain_three(*(t.double() for t in given), shape.padding)

    def check(backend):
        for name, got in all_three(*given, shape.padding).items():
            reached = ~oracle[name].isfinite()
            assert torch.equal(got.isfinite(), oracle[name].isfinite()), name
            elsewhere = (torch.where(reached, 0, t[name]) for t in (plain, oracle))
            assert_trusted(torch.where(reached, 0, got), *elsewhere, name)

    assert any(not t.isfinite().all() for t in plain.values())
    on_every_backend(check)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("where", ["x", "dy"])
@pytest.mark.parametrize("shape", [Shape(16, 16, 8, 8, 16), Shape(4, 72, 8, 8, 64)], ids=["", "few_tiles"])
def test_overflow_inside_only(shape, where, dtype):
    """Sums of four inputs overflow in a transform where the convolution itself does not."""
    x, dy, weight = tensors(shape, torch.randn, dtype)
    weight *= 1e-6
    if where == "x":
        x = torch.full_like(x, 2e38)
        dy *= 1e-6
    else:
        dy = torch.full_like(dy, 2e38)
        x *= 1e-6
    given = (x, dy, weight)
    oracle = plain_three(*(t.double() for t in given), shape.padding)
    plain = plain_three(*given, shape.padding)

    def check(backend):
        for name, value in all_three(*given, shape.padding).items():
            assert value.isfinite().all(), name
            assert_trusted(value, plain[name], oracle[name], name)

    assert all((t.abs() < 1e38).all() for t in oracle.values())
    on_every_backend(check)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("factor", [100.0, 1e4, 1e6])
@pytest.mark.parametrize("where", ["image", "pixel"])
@pytest.mark.parametrize("shape", [Shape(8, 16, 4, 4, 16), Shape(4, 64, 8, 8, 64), Shape(2, 16, 19, 21, 32)], ids=str)
def test_large_values_elsewhere_cost_nothing(shape, where, factor, dtype):
    """What an output does not depend on, and no tile that it is computed in, does not take digits from it: other
    images, and pixels further away than a tile and its border. (Of dweight every value sees all pixels.)"""
    x, dy, weight = given = tensors(shape, torch.randn, dtype)
    for t in (x, dy):
        (t[0] if where == "image" else t[0, :, 1, 1]).mul_(factor)
    far = torch.ones(shape.n, 1, x.shape[2], x.shape[3], dtype=torch.bool)
    far[0, :, :8, :8] = False  # tiles of 4x4 that read x[0, :, 1, 1], and those around
    if where == "image":
        far[0] = False
    plain = plain_three(*given, shape.padding)
    oracle = plain_three(*(t.double() for t in given), shape.padding)

    def check(backend):
        if backend == "unfused" and not library_has_kernels(dtype, x.device):
            return
        for name, value in all_three(*given, shape.padding).items():
            if name != "dweight":
                assert_trusted(*(torch.where(far, t[name], 0) for t in ({name: value}, plain, oracle)), name)

    on_every_backend(check)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_with_any_number_of_threads(cpu_library, threads, dtype):
    given = tensors(Shape(70, 16, 4, 6, 40), torch.randn, dtype)
    results = []
    for count in (1, 2, 5, 2):
        threads(count)
        results.append(all_three(*given, 1))
    for other in results[1:]:
        for name, value in other.items():
            assert torch.equal(value, results[0][name]), name
