"""Outputs written past the caches (stream_bytes) and through them, with their lines asked for before: the same bits."""

import os
import subprocess
import sys

import pytest
import torch
from conftest import BACKENDS, backend_in_force
from primitive_cases import CL, Shape, activation, bn_rows, name_of

import resnet_fused as rf
from resnet_fused import primitives
from resnet_fused.primitives.preact_conv_backward_1x1 import has_kernel

OPS = torch.ops.resnet_fused_cpu
CPU = [b for b in BACKENDS if b.startswith("cpu")]
pytestmark = pytest.mark.skipif(not CPU, reason="the C++ library is not built")
SHAPES = [  # whole lines, and such as cannot be written past the caches
    Shape(3, 16, 12, 9, 64),
    Shape(2, 64, 17, 13, 16),
    Shape(5, 32, 9, 11, 48),
    Shape(2, 64, 33, 32, 32, (1, 1), (2, 2)),  # several parts, pixels of x that no output reads
    Shape(3, 32, 11, 9, 64, (1, 1), (2, 3)),
    Shape(2, 32, 40, 36, 32, (3, 3), (1, 1), (1, 1)),  # Winograd's filtering where there is one, several bands
    Shape(2, 64, 12, 10, 32, (3, 3), (2, 2), (1, 1)),
    Shape(2, 17, 8, 8, 33, (3, 3), (1, 1), (1, 1)),
]


@pytest.fixture
def written():
    """written(function): its results with every output written past the caches, and with none."""

    def both(function):
        results = []
        for limit in (0, 1 << 60):
            assert OPS.set_stream_bytes(limit) == OPS.stream_bytes() == limit
            results.append(function())
        return results

    yield both
    OPS.set_stream_bytes(-1)


def same_bits(some, others):
    for one, other in zip(some, others, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("shape", SHAPES, ids=name_of)
@pytest.mark.parametrize("backend", CPU)
def test_same_bits(backend, shape, dtype, written):
    torch.manual_seed(0)
    x = activation(shape.n, shape.c, shape.h, shape.w, dtype=dtype)
    bn = bn_rows(shape.c, dtype)
    weight = torch.randn(shape.k, shape.c, *shape.kernel).to(dtype)

    def forward(residual):
        return primitives.preact_conv_forward(x, bn, weight, None, residual, 0.0, *shape.geometry, True)

    with backend_in_force(backend):
        y = forward(None)[0]
        dy, residual = torch.randn_like(y), torch.randn_like(y)
        same_bits(*written(lambda: forward(None)))
        same_bits(*written(lambda: forward(residual)))
        for dz_in in (None, torch.randn_like(x)):
            same_bits(*written(lambda: primitives.preact_conv_dgrad(dy, weight, x, bn, dz_in, 0.1, *shape.geometry)))
            if has_kernel(x, weight, *shape.geometry):
                same_bits(
                    *written(lambda: primitives.preact_conv_backward_1x1(dy, weight, x, bn, dz_in, 0.0, False)[:3])
                )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
def test_units_in_training(dtype, written):
    torch.manual_seed(0)
    unit = rf.nn.PreActBottleneck(64, 32, stride=2).to(memory_format=CL)
    x = torch.randn(4, 64, 16, 16).to(memory_format=CL)

    def step():
        leaf = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            out = unit(leaf)
        return [out, *torch.autograd.grad(out.float().square().sum(), [leaf, *unit.parameters()])]

    same_bits(*written(step))


def test_automatic():
    """A quarter of the last cache, but no less than 8 MB, or RESNET_FUSED_CPU_STREAM_MB."""
    program = "import torch, resnet_fused; print(torch.ops.resnet_fused_cpu.stream_bytes())"
    found = subprocess.run(["getconf", "LEVEL3_CACHE_SIZE"], capture_output=True, text=True).stdout.strip()
    cache = int(found) if found.isdigit() else 0
    root = os.path.dirname(os.path.dirname(rf.__file__))
    for megabytes, expected in (("0", 0), ("13", 13 << 20), ("", max(cache // 4, 8 << 20))):
        environment = os.environ | {"PYTHONPATH": root, "RESNET_FUSED_CPU_STREAM_MB": megabytes}
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
        assert done.stdout.strip() == str(expected), done.stderr


def test_negative_size_raises():
    with pytest.raises(RuntimeError, match="expected a number of bytes, or -1 \\(automatic\\), but got -2"):
        OPS.set_stream_bytes(-2)
