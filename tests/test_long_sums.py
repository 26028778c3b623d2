"""Sums as long as users' nets have them, up to 4,608 terms in one direct sum: the trust rule in float32, at every SIMD level,
against whichever convolution PyTorch chooses for the shape (one image takes another library than two). Small
integers show that no term is lost where one part of a sum ends and the next begins.
"""

import pytest
import torch
import torch.nn.functional as F
from conftest import BACKENDS, on_every_backend
from primitive_cases import Shape, gradients, identity_bn, name_of, tensors
from tolerances import assert_trusted

from resnet_fused import primitives

SHAPES = [
    Shape(1, 2048, 7, 7, 512),  # ResNetV2-50's last stage at 224 pixels
    Shape(2, 512, 7, 7, 2048),
    Shape(2, 1024, 14, 14, 256),
    Shape(1, 1024, 14, 14, 2048, (1, 1), (2, 2)),
    Shape(1, 256, 14, 14, 256, (3, 3), (2, 2), (1, 1)),
    Shape(2, 512, 14, 14, 512, (3, 3), (2, 2), (1, 1)),
    Shape(1, 512, 7, 7, 512, (3, 3), (1, 1), (1, 1)),
    Shape(1, 640, 8, 8, 640, (3, 3), (1, 1), (1, 1)),  # Wide ResNet's
    Shape(2, 320, 16, 16, 640, (3, 3), (2, 2), (1, 1)),
    Shape(2, 3, 64, 64, 64, (7, 7), (2, 2), (3, 3)),  # a stem
    Shape(1, 2048, 1, 1, 1000),  # a classifier
    Shape(1, 96, 9, 9, 96, (3, 3), (1, 1), (2, 2), (2, 2)),
    Shape(6, 512, 4, 4, 2048),  # weight gradients that the library sums image by image
    Shape(3, 512, 14, 14, 1024, (1, 1), (2, 2)),
]
# Parts that end within a tap, between taps, and blocks of channels that are not whole.
PARTS = [
    Shape(1, 256, 3, 3, 257),
    Shape(2, 257, 3, 3, 256),
    Shape(1, 511, 2, 5, 513),
    Shape(1, 37, 6, 5, 43, (5, 5), (1, 1), (2, 2)),
    Shape(1, 64, 6, 6, 48, (2, 2), (2, 2)),
    Shape(2, 70, 7, 5, 75, (3, 3), (2, 1), (1, 1)),
    Shape(1, 29, 9, 9, 31, (3, 3), (1, 1), (2, 2), (2, 2)),
]


def ours(x, weight, dy, shape):
    """Without BatchNorm and, for the input gradient, which always has one, with the identity."""
    return (
        primitives.preact_conv_forward(x, None, weight, None, None, 0.0, *shape.geometry, False)[0],
        primitives.preact_conv_dgrad(dy, weight, x, identity_bn(shape.c), None, 1.0, *shape.geometry)[0],
        primitives.preact_conv_wgrad(dy, x, None, weight, 0.0, *shape.geometry, False)[0],
    )


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("shape", SHAPES, ids=name_of)
def test_trusted(shape):
    x, weight, dy = tensors(shape, torch.float32, torch.randn)
    plain = (F.conv2d(x, weight, None, *shape.geometry), *gradients(dy, x, weight, shape))
    wide = [t.double() for t in (x, weight, dy)]
    oracle = (F.conv2d(*wide[:2], None, *shape.geometry), *gradients(wide[2], *wide[:2], shape))

    def check(backend):
        results = ours(x, weight, dy, shape)
        for name, *values in zip(("y", "dx", "dweight"), results, plain, oracle, strict=True):
            assert_trusted(*values, name)

    on_every_backend(check)


@pytest.mark.parametrize("shape", PARTS, ids=name_of)
def test_integers_are_exact(shape):
    x, weight, dy = tensors(shape, torch.float32, lambda *size: torch.randint(-3, 4, size))
    wide = [t.double() for t in (x, weight, dy)]
    exact = (F.conv2d(*wide[:2], None, *shape.geometry), *gradients(wide[2], *wide[:2], shape))

    def check(backend):
        for value, expected in zip(ours(x, weight, dy, shape), exact, strict=True):
            assert torch.equal(value.double(), expected)

    assert any(b.startswith("cpu") for b in BACKENDS)
    on_every_backend(check)
