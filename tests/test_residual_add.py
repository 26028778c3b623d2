"""torch.ops.resnet_fused.residual_add and functional.residual_add."""

import pytest
import torch
import torch.nn.functional as F
from conftest import on_every_backend
from tolerances import GRADCHECK, assert_trusted

import resnet_fused as rf
from resnet_fused.functional import residual_add

CL = torch.channels_last
OP = torch.ops.resnet_fused.residual_add.default
BACKWARD_OP = torch.ops.resnet_fused.residual_add_backward.default


def plain(x, y, affine=None, gate=None, alpha=1.0, slope=None):
    branch = y
    if affine is not None:
        branch = affine[0].view(1, -1, 1, 1) * branch + affine[1].view(1, -1, 1, 1)
    if gate is not None:
        branch = gate[:, :, None, None] * branch
    out = (x + alpha * branch).to(x.dtype)
    return out if slope is None else F.leaky_relu(out, slope) if slope else F.relu(out)


def make(n=2, c=5, h=4, w=3, dtype=torch.float32, affine=False, gate=None):
    small = torch.float64 if dtype == torch.float64 else torch.float32
    x, y = (torch.randn(n, c, h, w).to(dtype).contiguous(memory_format=CL).requires_grad_() for _ in range(2))
    rows = torch.randn(2, c, dtype=small, requires_grad=True) if affine else None
    g = (
        None
        if gate is None
        else torch.randn(n, c if gate == "channels" else 1, dtype=small, requires_grad=True)
    )
    return x, y, rows, g


VARIANTS = [(False, None), (True, None), (False, "channels"), (True, "channels"), (True, "one")]


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("affine", "gate"), VARIANTS)
@pytest.mark.parametrize(("alpha", "slope"), [(1.0, None), (0.5, 0.0), (-2.0, 0.1)])
def test_against_plain(dtype, affine, gate, alpha, slope):
    arguments = make(2, 17, 6, 7, dtype, affine, gate)
    leaves = [t for t in arguments if t is not None]
    wide = [None if t is None else t.detach().double().requires_grad_() for t in arguments]
    oracle, yardstick = plain(*wide, alpha, slope), plain(*arguments, alpha, slope)
    dout = torch.randn(oracle.shape).to(dtype)
    oracle_gradients = torch.autograd.grad(oracle, [t for t in wide if t is not None], dout.double())
    yardstick_gradients = torch.autograd.grad(yardstick, leaves, dout)
    terms = oracle.numel() * 8.0

    def check(backend):
        x, y, rows, g = arguments
        out, stats = residual_add(
            x, y, affine=rows, gate=g, alpha=alpha, negative_slope=slope, return_stats=True
        )
        assert out.dtype == dtype and out.stride() == x.stride() and not stats.requires_grad
        assert_trusted(out, yardstick, oracle, "out")
        torch.testing.assert_close(stats[0], out.float().mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
        gradients = torch.autograd.grad(out, leaves, dout)
        for r, p, o in zip(gradients, yardstick_gradients, oracle_gradients, strict=True):
            assert r.dtype == p.dtype
            assert_trusted(r, p, o, f"gradient of size {tuple(r.shape)}", 0.0 if r.dim() == 4 else terms)

    on_every_backend(check)


@pytest.mark.parametrize(("affine", "gate"), VARIANTS)
@pytest.mark.parametrize("slope", [None, 0.1])
class TestDerivatives:
    def test_gradcheck(self, affine, gate, slope):
        inputs = make(2, 3, 2, 2, torch.float64, affine, gate)

        def function(*leaves):
            present = iter(leaves)
            return OP(*(None if t is None else next(present) for t in inputs), 0.7, slope, True)[0]

        leaves = tuple(t for t in inputs if t is not None)
        assert torch.autograd.gradcheck(function, leaves, **GRADCHECK)
        assert torch.autograd.gradgradcheck(function, leaves, **GRADCHECK)

    def test_opcheck(self, affine, gate, slope):
        torch.library.opcheck(OP, (*make(affine=affine, gate=gate), 0.5, slope, True))


@pytest.mark.parametrize("mask", [[True] * 4, [False, True, False, False]], ids=str)
def test_opcheck_backward(mask):
    x, y, rows, gate = make(affine=True, gate="channels")
    torch.library.opcheck(BACKWARD_OP, (torch.randn_like(x), x, y, rows, gate, 0.5, 0.1, mask))


def test_plain_addition_saves_nothing():
    x, y, _, _ = make()
    out = residual_add(x, y)
    with rf.record_dispatch() as log:
        dx, dy = torch.autograd.grad(out, (x, y), torch.ones_like(out))
    assert not log and torch.equal(dx, torch.ones_like(x)) and torch.equal(dy, dx)
    with torch.no_grad():
        x.add_(1)
    residual_add(x, y).sum().backward()


@pytest.mark.parametrize("x_format", [torch.contiguous_format, CL], ids=["x contiguous", "x channels_last"])
@pytest.mark.parametrize("y_format", [torch.contiguous_format, CL], ids=["y contiguous", "y channels_last"])
@pytest.mark.parametrize("size", [(2, 3, 4, 5), (2, 3, 1, 1), (2, 1, 4, 5)], ids=str)
def test_layout_follows_x(x_format, y_format, size):
    x = torch.empty(size, memory_format=x_format).normal_().requires_grad_()
    y = torch.empty(size, memory_format=y_format).normal_().requires_grad_()
    out = residual_add(x, y)
    assert out.stride() == x.stride()
    torch.testing.assert_close(out, x + y, rtol=0, atol=0)
    torch.library.opcheck(
        OP, (x, y, None, None, 1.0, 0.0, True), test_utils=("test_schema", "test_faketensor")
    )


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("slope", [None, 0.0, 0.1])
def test_not_finite(backend, value, slope):
    x, y, _, _ = (None if t is None else t.detach() for t in make())
    x[0, 1, 2, 2] = value
    y[1, 4, 0, 0] = value
    expected = plain(x, y, slope=slope)
    torch.testing.assert_close(residual_add(x, y, negative_slope=slope), expected, equal_nan=True)


def test_gate_shapes():
    x, y, _, _ = make()
    for gate in (torch.randn(2, 5), torch.randn(2, 1), torch.randn(2, 5, 1, 1), torch.randn(2, 1, 1, 1)):
        torch.testing.assert_close(residual_add(x, y, gate=gate), x + gate.reshape(2, -1, 1, 1) * y)


@pytest.mark.parametrize("autocast", [False, True])
def test_mixed_dtypes_are_promoted(autocast):
    x, y, _, _ = make()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = residual_add(x, y.bfloat16())
        assert out.dtype == torch.float32 and torch.equal(out, x + y.bfloat16())
        assert residual_add(x.bfloat16(), y.bfloat16()).dtype == torch.bfloat16
        if autocast:
            assert OP(x, y.bfloat16(), None, None, 1.0, None, False)[0].dtype == torch.float32


def test_empty_batch(backend):
    x, y, rows, gate = make(0, affine=True, gate="one")
    out, stats = residual_add(x, y, affine=rows, gate=gate, negative_slope=0.0, return_stats=True)
    assert out.shape == x.shape and torch.equal(stats, torch.zeros(2, 5))
    dx, drows, dgate = torch.autograd.grad(out, (x, rows, gate), out)
    assert dx.shape == x.shape and torch.equal(drows, torch.zeros(2, 5)) and dgate.shape == (0, 1)


def test_compile():
    x, y, rows, gate = make(affine=True, gate="one")
    function = torch.compile(residual_add, fullgraph=True, backend="aot_eager")
    out = function(x, y, affine=rows, gate=gate, negative_slope=0.0)
    expected = residual_add(x, y, affine=rows, gate=gate, negative_slope=0.0)
    assert torch.equal(out, expected)
    for a, b in zip(
        *(torch.autograd.grad(o.sum(), (x, y, rows, gate)) for o in (out, expected)), strict=True
    ):
        assert torch.equal(a, b)
