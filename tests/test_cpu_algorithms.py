"""The ways in which the C++ kernels cut a convolution up that small shapes do not meet: weights that outnumber the
pixels, or tiles of Winograd's (the weight gradient as one matrix product, output channels in groups), few input
channels (the weight gradient with output channels as lanes), both gradients of a 1x1 in one pass, and weights of
every layout. Small integers have exact sums, so one wrong index shows."""

import pytest
import torch
import torch.nn.functional as F
from conftest import BACKENDS, backend_in_force, on_every_backend
from primitive_cases import CL, Shape, acc, identity_bn, name_of, tensors
from tolerances import assert_trusted

from resnet_fused import primitives
from resnet_fused.primitives import dispatch, reference
from resnet_fused.primitives.preact_conv_backward_1x1 import has_kernel

CPU = [b for b in BACKENDS if b.startswith("cpu")]
DTYPES = [torch.float32, torch.float64, torch.bfloat16]
FEW_PIXELS = [  # at least 64 K weights
    Shape(1, 257, 3, 5, 260),  # an odd number of pixels, partial vectors on both sides
    Shape(2, 40, 4, 4, 1700),  # several groups of output channels, forward
    Shape(3, 1700, 3, 3, 40),  # and in the input gradient
    Shape(2, 72, 7, 5, 104, (3, 3), (2, 2), (1, 1)),
    Shape(2, 96, 5, 4, 80, (3, 3), (1, 1), (2, 2), (2, 2)),
    Shape(1, 90, 4, 9, 85, (3, 3), (2, 1), (0, 3)),
    Shape(9, 330, 5, 7, 260),  # more pixels than one pass takes
    Shape(1, 512, 2, 3, 520),  # a weight gradient of more than 1 MiB: float32 masters' is written past the caches
    Shape(5, 176, 3, 4, 336, (3, 3), (1, 1), (2, 2), (2, 2)),  # the same with several taps, in channels_last
    Shape(3, 160, 5, 6, 352, (3, 3), (2, 2), (1, 1)),
]
# Weights that do not stay in a cache from image to image: several images to a task, whose numbers differ, and groups of blocks.
MANY_WEIGHTS = [
    Shape(21, 192, 5, 4, 128, (5, 5), (1, 1), (2, 2)),
    Shape(37, 208, 7, 6, 144, (3, 3), (2, 2), (1, 1)),
    Shape(3, 144, 6, 5, 323, (3, 3), (1, 1), (2, 2), (2, 2)),
    Shape(3, 520, 6, 5, 512, (1, 1), (2, 2)),  # of groups of channels, pixels that no output reads
]
FEW_TILES = [  # the weight gradient by Winograd's filtering as one product: at least 16 tiles, and 32 weights to a tile
    Shape(16, 176, 4, 4, 184, (3, 3), (1, 1), (1, 1)),  # float32: 64 tiles; float32 masters of bfloat16 past the caches
    Shape(66, 72, 4, 3, 104, (3, 3), (1, 1), (1, 1)),  # bfloat16, where pairs are multiplied too
    Shape(5, 90, 9, 10, 100, (3, 3), (1, 1), (1, 1)),  # partial tiles, partial vectors, an odd number of them
    Shape(2, 73, 7, 8, 57, (3, 3), (1, 1), (2, 0)),
]
# The same of five images, then of four.
SOME_AFTER_OTHERS = [Shape(9, 16, 16, 16, 2048, (3, 3), (1, 1), (1, 1))]
FEW_CHANNELS = [  # odd and even widths, whole and partial vectors of output channels, one or several tiles of the window
    Shape(2, 3, 9, 8, 16, (3, 3), (1, 1), (1, 1)),
    Shape(1, 1, 7, 7, 5, (3, 3), (1, 1), (1, 1)),
    Shape(3, 2, 6, 5, 33, (3, 3), (2, 2)),
    Shape(2, 3, 21, 23, 20, (7, 7), (2, 2), (3, 3)),
    Shape(1, 4, 9, 12, 32, (5, 5), (1, 1), (2, 2)),
    Shape(1, 4, 5, 5, 8, (3, 3), (1, 1), (4, 5)),  # outputs that see padding only
    Shape(2, 3, 9, 9, 17, (3, 3), (1, 2), (1, 0), (2, 1)),
    Shape(2, 3, 6, 38, 16, (2, 19), (1, 1), (1, 9)),  # a kernel row of several tiles
    Shape(2, 15, 7, 7, 48, (3, 3), (2, 2), (1, 1)),
    Shape(1, 3, 4, 4, 16, (1, 1), (2, 2)),
    Shape(9, 3, 3, 3, 16, (3, 3), (1, 1), (1, 1)),  # several images to a unit of work
    Shape(2, 3, 40, 40, 16, (3, 3), (1, 1), (1, 1)),  # several bands of an image
]
POINTWISE = [
    Shape(1, 1, 1, 1, 1),
    Shape(3, 8, 6, 5, 17),
    Shape(2, 65, 9, 7, 33),
    Shape(4, 64, 33, 32, 16),
    Shape(1, 257, 3, 5, 260),
    Shape(1, 64, 21, 21, 16),  # a run and an odd rest, of whole groups of 32 channels
    Shape(1, 16, 23, 19, 64),  # and of 16 channels, two pixels to a vector
    Shape(1, 96, 1, 13, 34),
    Shape(1, 32, 1, 7, 4),
    Shape(1, 32, 1, 1, 2),
    Shape(1, 16, 1, 3, 6),
    Shape(1, 16, 1, 1, 2),
    Shape(2, 64, 5, 5, 17),  # an odd number of outputs: no pairs
    Shape(1, 32, 5, 5, 514),  # gradients of neighbouring pixels far apart
]


def bn_rows(c, dtype):
    return torch.stack((torch.randn(c) * 0.3, torch.rand(c) + 0.5, torch.randn(c), torch.randn(c))).to(acc(dtype))


def sparse_integers(*size):
    return torch.randint(-1, 2, size) * (torch.rand(size) < 0.1)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("shape", FEW_PIXELS + MANY_WEIGHTS + FEW_TILES, ids=name_of)
def test_integers_of_few_pixels_are_exact(shape, dtype):
    x, weight, dy = tensors(shape, dtype, sparse_integers)
    identity = identity_bn(shape.c, dtype)
    a = x.double().clamp_min(0)
    y = F.conv2d(a, weight.double(), None, *shape.geometry)
    da, dw, _ = torch.ops.aten.convolution_backward(
        dy.double(), a, weight.double(), None, *shape.geometry[:3], False, [0, 0], 1, [True, True, False]
    )
    dz = torch.where(x > 0, da, 0.0)
    assert max(t.abs().max() for t in (y, dz, dw)) <= 256  # what bfloat16 holds exactly
    deviations = y - y.mean((0, 2, 3), keepdim=True)
    moments = torch.stack((y.mean((0, 2, 3)), deviations.square().sum((0, 2, 3))))
    magnitudes = torch.stack((y.abs().mean((0, 2, 3)), moments[1]))

    def check(backend):
        out, stats = primitives.preact_conv_forward(x, identity, weight, None, None, 0.0, *shape.geometry, True)
        assert torch.equal(out.double(), y)
        assert ((stats.double() - moments).abs() <= 1e-5 * magnitudes).all()
        out, sums = primitives.preact_conv_dgrad(dy, weight, x, identity, None, 0.0, *shape.geometry)
        assert torch.equal(out.double(), dz)
        assert torch.equal(sums.double(), torch.stack((dz.sum((0, 2, 3)), (dz * x.double()).sum((0, 2, 3)))))
        masters = weight.to(acc(dtype))
        for like in (weight, masters, masters.contiguous(memory_format=CL)):
            out, dbias = primitives.preact_conv_wgrad(dy, x, identity, like, 0.0, *shape.geometry, True)
            assert torch.equal(out.double(), dw)
            assert torch.equal(dbias.double(), dy.double().sum((0, 2, 3)))

    on_every_backend(check)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("shape", SOME_AFTER_OTHERS, ids=name_of)
def test_integers_of_some_images_after_others_are_exact(shape, dtype):
    x, weight, dy = tensors(shape, dtype, sparse_integers)
    like = weight.to(acc(dtype)).contiguous(memory_format=CL)
    _, dw, _ = torch.ops.aten.convolution_backward(
        dy.double(), x.double(), weight.double(), None, *shape.geometry[:3], False, [0, 0], 1, [False, True, False]
    )

    def check(backend):
        out, dbias = primitives.preact_conv_wgrad(dy, x, None, like, 0.0, *shape.geometry, True)
        assert torch.equal(out.double(), dw) and torch.equal(dbias.double(), dy.double().sum((0, 2, 3)))

    on_every_backend(check)


@pytest.mark.parametrize("masters", [False, True], ids=["", "masters"])
@pytest.mark.parametrize("normalised", [False, True], ids=["", "bn"])
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("shape", FEW_CHANNELS, ids=name_of)
def test_integers_of_few_channels_are_exact(shape, dtype, normalised, masters):
    x, weight, dy = tensors(shape, dtype, lambda *size: torch.randint(-1, 2, size) * (torch.rand(size) < 0.3))
    weight = weight.to(acc(dtype)) if masters else weight
    bn, a = None, x.double()
    if normalised:  # act(x + 1): what is outside the image is 0, not 1
        bn = torch.tensor([0.0, 1.0, 1.0, 1.0], dtype=acc(dtype)).view(4, 1).expand(4, shape.c).contiguous()
        a = (a + 1).clamp_min(0)
    _, dw, _ = torch.ops.aten.convolution_backward(
        dy.double(), a, weight.double(), None, *shape.geometry[:3], False, [0, 0], 1, [False, True, False]
    )
    db = dy.double().sum((0, 2, 3))
    layouts = [weight, weight.contiguous(memory_format=CL)]
    layouts.append(weight.permute(2, 3, 1, 0).contiguous().permute(3, 2, 0, 1))  # output channels next to each other
    assert dw.any() and max(dw.abs().max(), db.abs().max()) <= 256

    def check(backend):
        for like in layouts:
            out, dbias = primitives.preact_conv_wgrad(dy, x, bn, like, 0.0, *shape.geometry, True)
            assert torch.equal(out.double(), dw) and torch.equal(dbias.double(), db)
            assert out.dtype == like.dtype
        out, _ = primitives.preact_conv_wgrad(dy, x, bn, weight, 0.0, *shape.geometry, False)
        assert torch.equal(out.double(), dw)

    on_every_backend(check)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("shape", FEW_CHANNELS[:4], ids=name_of)
def test_what_is_not_finite_in_few_channels(shape, dtype):
    """NaN and inf, in the image's corners and at an odd row's end too, where PyTorch's own convolution has them; that
    is the one of float64, which multiplies padding as zeros."""
    for spoiled, value in (("x", torch.nan), ("x", torch.inf), ("dy", torch.nan), ("dy", -torch.inf)):
        for at in (0, -1):
            x, weight, dy = tensors(shape, dtype, lambda *size: torch.rand(size) + 0.5)
            (x if spoiled == "x" else dy)[0, 0, at, at] = value
            expected = reference.preact_conv_wgrad(
                dy.double(), x.double(), None, weight.double(), 0.0, *shape.geometry, True
            )
            unread = spoiled == "x" and at == -1 and shape.padding == (0, 0)
            assert unread or not expected[0].isfinite().all()

            for backend in CPU:
                with backend_in_force(backend):
                    results = primitives.preact_conv_wgrad(dy, x, None, weight, 0.0, *shape.geometry, True)
                for got, want in zip(results, expected, strict=True):
                    assert torch.equal(got.isnan(), want.isnan()) and torch.equal(got.isinf(), want.isinf()), backend


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("shape", FEW_PIXELS + FEW_TILES + FEW_CHANNELS, ids=name_of)
@pytest.mark.parametrize("backend", CPU, indirect=True)
def test_accuracy_of_weight_gradients(backend, shape, dtype):
    x, weight, dy = tensors(shape, dtype, torch.randn)
    bn = bn_rows(shape.c, dtype)
    args = (dy, x, bn, weight, 0.1, *shape.geometry, True)
    wide = [t.double() if isinstance(t, torch.Tensor) else t for t in args]
    terms = reference.preact_conv_wgrad(
        wide[0].abs(), reference.bn_act_forward(x, bn, 0.1).double().abs(), None, wide[3], 0.0, *args[5:]
    )
    results, plain = primitives.preact_conv_wgrad(*args), reference.preact_conv_wgrad(*args)
    oracle = reference.preact_conv_wgrad(*wide)
    for name, *values in zip(("dweight", "dbias"), results, plain, oracle, terms, strict=True):
        assert_trusted(*values[:3], name, values[3])


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("shape", [
    *FEW_PIXELS[:4], *FEW_PIXELS[-3:], *MANY_WEIGHTS, *FEW_TILES, *SOME_AFTER_OTHERS, *FEW_CHANNELS, *POINTWISE[3:7],
], ids=name_of)  # fmt: skip
@pytest.mark.parametrize("backend", CPU, indirect=True)
def test_same_bits_on_any_number_of_threads(backend, threads, shape, dtype):
    x, weight, dy = tensors(shape, dtype, torch.randn)
    bn = bn_rows(shape.c, dtype)

    def everything():
        results = [
            *primitives.preact_conv_forward(x, bn, weight, None, None, 0.0, *shape.geometry, True),
            *primitives.preact_conv_dgrad(dy, weight, x, bn, None, 0.0, *shape.geometry),
            *primitives.preact_conv_wgrad(dy, x, bn, weight, 0.0, *shape.geometry, True),
        ]
        if shape.kernel == shape.stride == (1, 1):
            results += primitives.preact_conv_backward_1x1(dy, weight, x, bn, None, 0.0, True)
        return results

    threads(2)
    first = everything()
    for count in (2, 1, 3):
        threads(count)
        for a, b in zip(first, everything(), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("masters", [False, True], ids=["", "masters"])
@pytest.mark.parametrize("joined", [False, True], ids=["", "dz_in"])
@pytest.mark.parametrize("slope", [0.0, 0.1])
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("shape", POINTWISE, ids=name_of)
@pytest.mark.parametrize("backend", CPU, indirect=True)
def test_both_gradients_of_1x1(backend, shape, dtype, slope, joined, masters):
    """What dgrad and wgrad give, bit for bit; the sums, added up in another order, to rounding."""
    x, weight, dy = tensors(shape, dtype, torch.randn)
    weight = weight.to(acc(dtype)) if masters else weight
    bn, dz_in = bn_rows(shape.c, dtype), torch.randn_like(x) if joined else None
    assert dispatch.choose(
        "preact_conv_backward_1x1", "cpu", dtype,
        dispatch.ConvGeometry(tuple(x.shape), tuple(weight.shape), *shape.geometry),
    ).backend == "cpu"  # fmt: skip
    dz, sums, dweight, dbias = primitives.preact_conv_backward_1x1(dy, weight, x, bn, dz_in, slope, True)
    apart_dz, apart_sums = primitives.preact_conv_dgrad(dy, weight, x, bn, dz_in, slope, *shape.geometry)
    apart_dweight, apart_dbias = primitives.preact_conv_wgrad(dy, x, bn, weight, slope, *shape.geometry, True)
    assert torch.equal(dz, apart_dz)
    assert torch.equal(dweight, apart_dweight) and dweight.dtype == weight.dtype
    assert torch.equal(dbias, apart_dbias) and dbias.dtype == weight.dtype
    oracle = dz.double(), (x.double() - bn[0].view(1, -1, 1, 1)) * bn[1].view(1, -1, 1, 1)
    both = torch.stack((oracle[0].sum((0, 2, 3)), (oracle[0] * oracle[1]).sum((0, 2, 3))))
    terms = torch.stack((oracle[0].abs().sum((0, 2, 3)), (oracle[0] * oracle[1]).abs().sum((0, 2, 3))))
    assert_trusted(sums, apart_sums, both, "sums", terms)


@pytest.mark.parametrize("joined", [False, True], ids=["", "dz_in"])
@pytest.mark.parametrize("slope", [0.0, 0.1])
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("c, k", [(16, 64), (64, 16)])
@pytest.mark.parametrize("backend", CPU, indirect=True)
def test_both_gradients_of_1x1_keep_what_is_not_finite(backend, c, k, dtype, slope, joined):
    """Infinities and NaNs reach the same elements as in dgrad and wgrad, and the mask is that of max(z, 0)."""
    x, weight, dy = tensors(Shape(1, c, 5, 5, k), dtype, torch.randn)
    x[0, 1, 2, 2], x[0, 3, 1, 0], x[0, 5, 4, 4] = torch.nan, torch.inf, -torch.inf
    dy[0, 2, 0, 3] = torch.inf
    bn, dz_in = bn_rows(c, dtype), torch.randn_like(x) if joined else None
    dz, sums, dweight, dbias = primitives.preact_conv_backward_1x1(dy, weight, x, bn, dz_in, slope, True)
    apart_dz, apart_sums = primitives.preact_conv_dgrad(dy, weight, x, bn, dz_in, slope, (1, 1), (0, 0), (1, 1), 1)
    apart = primitives.preact_conv_wgrad(dy, x, bn, weight, slope, (1, 1), (0, 0), (1, 1), 1, True)
    assert not apart_dz.isfinite().all() and not apart[0].isfinite().all()
    for result, expected in zip((dz, dweight, dbias), (apart_dz, *apart), strict=True):
        torch.testing.assert_close(result, expected, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(sums.isnan(), apart_sums.isnan())


@pytest.mark.parametrize("joined", [False, True], ids=["", "dz_in"])
@pytest.mark.parametrize("kernel, stride, c, k", [
    (1, 1, 64, 16), (1, 1, 64, 17), (3, 1, 64, 16), (3, 1, 48, 16), (3, 2, 64, 16), (3, 2, 48, 16),
])  # fmt: skip
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("backend", CPU, indirect=True)
def test_outputs_past_the_caches(backend, dtype, kernel, stride, c, k, joined):
    """From 8 MiB on they are written past the caches: the same bits as image by image, where they are not."""
    geometry = ((stride, stride), (kernel // 2,) * 2, (1, 1), 1)
    images = -(-(8 << 20) // (c * 91 * 91 * dtype.itemsize))
    x, weight, dy = tensors(Shape(images, c, 91, 91, k, (kernel, kernel), *geometry[:2]), dtype, torch.randn)
    small, back = torch.randn(images, k, 91 * stride, 91 * stride), torch.randn(c, k, kernel, kernel)
    small, back = small.to(dtype).contiguous(memory_format=CL), back.to(dtype)
    assert x.nbytes >= 8 << 20 > x[:1].nbytes
    bn, narrow = bn_rows(c, dtype), bn_rows(k, dtype)
    beside = torch.randn_like(x) if joined else None

    def outputs(at):
        given = None if beside is None else beside[at]
        y, stats = primitives.preact_conv_forward(small[at], narrow, back, None, given, 0.0, *geometry, True)
        assert y.shape[1:] == x.shape[1:]
        dz, sums = primitives.preact_conv_dgrad(dy[at], weight, x[at], bn, given, 0.0, *geometry)
        if kernel > 1:
            return (y, dz), (stats, sums)
        both = primitives.preact_conv_backward_1x1(dy[at], weight, x[at], bn, given, 0.0, False)
        return (y, dz, both[0]), (stats, sums, both[1])

    whole, reduced = outputs(slice(None))
    for i in range(len(x)):
        for result, part in zip(whole, outputs(slice(i, i + 1))[0], strict=True):
            assert torch.equal(result[i : i + 1], part)

    y, dz = whole[0].double(), whole[1].double()
    x_hat = (x.double() - bn[0].view(1, -1, 1, 1)) * bn[1].view(1, -1, 1, 1)
    deviations = y - y.mean((0, 2, 3), keepdim=True)
    tolerance = 1e-5 if acc(dtype) == torch.float32 else 1e-13  # of the sum of the magnitudes
    pixels = y.numel() / c
    for got, terms, count in (
        (reduced[0][0], y, pixels), (reduced[0][1], deviations.square(), 1),
        *((sums[i], t, 1) for sums in reduced[1:] for i, t in enumerate((dz, dz * x_hat))),
    ):  # fmt: skip
        error = got.double() - terms.sum((0, 2, 3)) / count
        assert (error.abs() <= tolerance * terms.abs().sum((0, 2, 3)) / count).all()


def test_both_gradients_of_1x1_where_there_is_no_kernel():
    x = torch.randn(1, 8, 4, 4).contiguous(memory_format=CL)
    assert not has_kernel(x, torch.randn(4, 8, 1, 1), (2, 2), (0, 0), (1, 1), 1)
    assert not has_kernel(x, torch.randn(4, 8, 1, 1), (1, 1), (1, 1), (1, 1), 1)
    assert not has_kernel(x, torch.randn(4, 8, 3, 1), (1, 1), (0, 0), (1, 1), 1)


@pytest.mark.parametrize("dtype, parameters", [
    (torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32), (torch.float32, torch.float32),
], ids=name_of)  # fmt: skip
@pytest.mark.parametrize("c, k", [(37, 75), (64, 32), (33, 48)])
@pytest.mark.parametrize("kernel", [(1, 1), (3, 3), (1, 3), (2, 2), (5, 5), (7, 5)], ids=str)
@pytest.mark.parametrize("backend", CPU, indirect=True)
def test_weights_of_every_layout(backend, kernel, c, k, dtype, parameters):
    """Packed from any layout the weights are the same, and so are the gradients, direct (stride 2) and by Winograd's
    filtering (stride 1)."""
    x = torch.randn(3, c, 6, 6).to(dtype).contiguous(memory_format=CL)
    weight, bn = torch.randn(k, c, *kernel).to(parameters), bn_rows(c, dtype)
    weight.view(-1)[::11] *= 1e-39  # denormals
    layouts = [weight, weight.contiguous(memory_format=CL), weight.transpose(0, 1).contiguous().transpose(0, 1)]
    layouts.append(weight.permute(2, 3, 1, 0).contiguous().permute(3, 2, 0, 1))  # output channels next to each other
    for step in (2, 3, 70):  # of channels none are neighbours; taps nearly are, or not at all
        spaced = weight.new_full((k, 2 * c, kernel[0], step * kernel[1]), torch.nan)[:, ::2, :, ::step]
        layouts.append(spaced.copy_(weight))
    for stride in (1, 2):
        geometry = ((stride, stride), (kernel[0] // 2, kernel[1] // 2), (1, 1), 1)

        def results(weight, geometry=geometry):
            y, _ = primitives.preact_conv_forward(x, bn, weight, None, None, 0.0, *geometry, False)
            dz, _ = primitives.preact_conv_dgrad(y, weight, x, bn, None, 0.0, *geometry)
            return y, dz, *primitives.preact_conv_wgrad(y, x, bn, weight, 0.0, *geometry, True)

        expected = results(layouts[-1])
        assert all(t.isfinite().all() for t in expected)
        for other in layouts[:-1]:
            got = results(other)
            assert all(map(torch.equal, got, expected)) and got[2].stride() == torch.empty_like(other).stride()


@pytest.mark.parametrize("shape", [MANY_WEIGHTS[0], FEW_TILES[0], FEW_PIXELS[3]], ids=name_of)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("backend", CPU, indirect=True)
def test_expanded_weights(backend, shape, dtype):
    """Taps that are one value in memory."""
    x, weight, dy = tensors(shape, dtype, torch.randn)
    bn = bn_rows(shape.c, dtype)
    expanded = torch.stack((weight, weight), dim=2)[:, :, 0, :1, :1].expand_as(weight)
    results = [
        (*primitives.preact_conv_forward(x, bn, w, None, None, 0.0, *shape.geometry, True),
         *primitives.preact_conv_dgrad(dy, w, x, bn, None, 0.0, *shape.geometry))
        for w in (expanded, expanded.contiguous())
    ]  # fmt: skip
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("backend", CPU, indirect=True)
def test_no_images_and_many_weights(backend, dtype):
    x, weight, dy = tensors(Shape(0, 192, 5, 4, 256, (5, 5), (1, 1), (2, 2)), dtype, torch.randn)
    bn, geometry = bn_rows(192, dtype), ((1, 1), (2, 2), (1, 1), 1)
    y, _ = primitives.preact_conv_forward(x, bn, weight, None, None, 0.0, *geometry, True)
    dz, sums = primitives.preact_conv_dgrad(dy, weight, x, bn, None, 0.0, *geometry)
    dweight, _ = primitives.preact_conv_wgrad(dy, x, bn, weight, 0.0, *geometry, True)
    assert y.shape == (0, 256, 5, 4) and dz.shape == x.shape and not sums.any() and not dweight.any()
