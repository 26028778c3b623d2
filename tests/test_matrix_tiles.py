"""bfloat16 where runs of pixels meet the borders of matrix tiles (16 slots of a row, 32 channels, 16 pairs of pixels):
small integers have exact sums, so one wrong slot shows; and what is not finite spreads to no other result than in
PyTorch's own convolution, though tiles multiply slots and channels that belong to no pixel.
"""

import pytest
import torch
import torch.nn.functional as F
from conftest import BACKENDS, backend_in_force, on_every_backend
from primitive_cases import Shape, gradients, identity_bn, name_of, tensors

from resnet_fused import primitives
from resnet_fused.primitives import reference

CPU = [b for b in BACKENDS if b.startswith("cpu")]
ODD = [  # channels that fill no tile, a width that fills no pair
    Shape(2, 48, 5, 7, 40, (3, 3), (1, 1), (1, 1)),
    Shape(3, 24, 4, 4, 17, (3, 3), (1, 1), (1, 1)),
    Shape(1, 80, 3, 9, 72, (3, 3), (1, 1), (0, 1)),
    Shape(2, 35, 6, 5, 33),
    Shape(1, 64, 5, 7, 96),
    Shape(2, 40, 7, 8, 24, (3, 3), (2, 2), (1, 1)),
    Shape(2, 18, 6, 5, 50, (3, 3), (1, 1), (2, 2), (2, 2)),
]
WIDTHS = [Shape(2, 16, 5, width, 32, (3, 3), (1, 1), (1, 1)) for width in (1, 2, 3, 8, 13, 15, 16, 17, 31, 32, 33, 47)]
KERNELS = [
    Shape(1, 16, 9, 11, 16, (1, 5), (1, 1), (0, 2)),
    Shape(1, 16, 9, 11, 16, (5, 2), (1, 1), (2, 0)),
    Shape(2, 32, 9, 10, 16, (3, 3), (1, 1), (1, 1), (1, 3)),
    Shape(5, 16, 6, 6, 20, (3, 3), (1, 1), (2, 2)),
    Shape(40, 16, 2, 2, 16, (3, 3), (1, 1), (1, 1)),  # many images to a unit of work
    Shape(1, 64, 33, 31, 64),  # runs with a rest
]
# Positions of each residue are a plane of the weight gradient's: odd sizes, residues without a tap, many images. (Images 1 and 2
# wide, in which PyTorch's library has wrong results with AMX: README.)
STRIDES = [
    *(Shape(2, 16, 9, width, 32, (3, 3), (2, 2), (1, 1)) for width in (3, 9, 16, 31, 34, 63)),
    Shape(9, 40, 8, 8, 24, (3, 3), (2, 2), (1, 1)),
    Shape(2, 24, 11, 13, 16, (3, 3), (2, 1), (1, 1)),
    Shape(2, 24, 11, 13, 16, (3, 3), (1, 2), (0, 2)),
    Shape(1, 16, 14, 15, 16, (5, 5), (3, 2), (2, 2)),
    Shape(2, 16, 13, 12, 16, (2, 2), (3, 3), (0, 1)),
    Shape(1, 16, 17, 19, 16, (3, 3), (2, 2), (2, 2), (2, 2)),  # taps in one plane only
    Shape(1, 16, 17, 19, 16, (3, 3), (2, 2), (3, 3), (3, 3)),
    Shape(2, 16, 9, 12, 16, (1, 3), (2, 2), (0, 1)),
    Shape(1, 16, 40, 40, 16, (3, 3), (2, 2), (1, 1)),
]


@pytest.mark.parametrize("shape", ODD + WIDTHS + KERNELS + STRIDES, ids=name_of)
def test_integers_are_exact(shape):
    x, weight, dy = tensors(shape, torch.bfloat16, lambda *size: torch.randint(-1, 2, size) * (torch.rand(size) < 0.2))
    identity, a = identity_bn(shape.c), x.double().clamp_min(0)
    y = F.conv2d(a, weight.double(), None, *shape.geometry)
    da, dw = gradients(dy.double(), a, weight.double(), shape)
    dz = torch.where(x > 0, da, 0.0)
    assert dw.any() and max(t.abs().max() for t in (y, dz, dw)) <= 256  # what bfloat16 holds exactly

    def check(backend):
        out, stats = primitives.preact_conv_forward(x, identity, weight, None, None, 0.0, *shape.geometry, True)
        assert torch.equal(out.double(), y)
        torch.testing.assert_close(stats[0].double(), y.mean((0, 2, 3)), rtol=1e-5, atol=1e-5)
        out, sums = primitives.preact_conv_dgrad(dy, weight, x, identity, None, 0.0, *shape.geometry)
        assert torch.equal(out.double(), dz)
        assert torch.equal(sums.double(), torch.stack((dz.sum((0, 2, 3)), (dz * x.double()).sum((0, 2, 3)))))
        out, dbias = primitives.preact_conv_wgrad(dy, x, identity, weight.float(), 0.0, *shape.geometry, True)
        assert torch.equal(out.double(), dw) and torch.equal(dbias.double(), dy.double().sum((0, 2, 3)))
        if shape.kernel == shape.stride == (1, 1):
            out, sums, both, _ = primitives.preact_conv_backward_1x1(dy, weight, x, identity, None, 0.0, True)
            assert torch.equal(out.double(), dz) and torch.equal(both.double(), dw)

    on_every_backend(check)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("spoiled", ["x", "dy", "weight"])
@pytest.mark.parametrize("shape", ODD + WIDTHS[2:6] + STRIDES[1:3], ids=name_of)
def test_what_is_not_finite(shape, spoiled, value):
    """In the corners, where runs of slots go over the border, and in the last channel, beside which tiles are padded."""
    for at in ((0, 0, 0, 0), (-1, -1, 0, -1), (0, -1, -1, -1)):
        x, weight, dy = tensors(shape, torch.bfloat16, lambda *size: torch.rand(size) + 0.5)
        {"x": x, "dy": dy, "weight": weight}[spoiled][at] = value
        identity = identity_bn(shape.c)
        wide = [t.double() for t in (x, weight, dy)]
        expected = [
            F.conv2d(*wide[:2], None, *shape.geometry),
            reference.preact_conv_dgrad(wide[2], wide[1], wide[0], identity.double(), None, 1.0, *shape.geometry)[0],
            reference.preact_conv_wgrad(wide[2], wide[0], None, wide[1], 0.0, *shape.geometry, False)[0],
        ]
        for backend in CPU:
            with backend_in_force(backend):
                results = [
                    primitives.preact_conv_forward(x, None, weight, None, None, 0.0, *shape.geometry, False)[0],
                    primitives.preact_conv_dgrad(dy, weight, x, identity, None, 1.0, *shape.geometry)[0],
                    primitives.preact_conv_wgrad(dy, x, None, weight, 0.0, *shape.geometry, False)[0],
                ]
            if spoiled == "weight" and backend == CPU[0]:
                expected[1] = results[1]  # padding is multiplied as zeros here, in float64's own dx not at all
            for name, got, want in zip(("y", "dx", "dweight"), results, expected, strict=True):
                assert torch.equal(got.isnan(), want.isnan()), (backend, name, at)
                assert torch.equal(got.isinf(), want.isinf()), (backend, name, at)
