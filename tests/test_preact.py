"""torch.ops.resnet_fused.preact and functional.preact: BatchNorm -> (Leaky)ReLU alone."""

import copy

import pytest
import torch
import torch.nn.functional as F
from conftest import on_every_backend
from tolerances import GRADCHECK, assert_trusted

import resnet_fused as rf
from resnet_fused.functional import preact

CL = torch.channels_last
OP = torch.ops.resnet_fused.preact.default
BACKWARD_OP = torch.ops.resnet_fused.preact_backward.default
SHAPES = [(2, 3, 5, 7), (4, 16, 8, 8), (1, 35, 3, 3), (3, 8, 1, 6)]


def make(shape, *, training=True, affine=True, running=True, dtype=torch.float32, parameters=None, format=CL):
    """x, gamma, beta, running mean and variance; the first three require grad."""
    parameters, c = parameters or dtype, shape[1]
    x = (torch.randn(shape) * 2 + 1).to(dtype).contiguous(memory_format=format).requires_grad_()
    gamma = (torch.rand(c) + 0.5).to(parameters).requires_grad_() if affine else None
    beta = torch.randn(c).to(parameters).requires_grad_() if affine else None
    statistics = (torch.randn(c).to(parameters), torch.rand(c).to(parameters) + 0.5) if running else (None, None)
    return x, gamma, beta, *statistics


def plain(x, gamma, beta, mean, var, *, training, momentum=0.1, eps=1e-5, negative_slope=0.0):
    z = F.batch_norm(x, mean, var, gamma, beta, training or mean is None, momentum, eps)
    return F.leaky_relu(z, negative_slope) if negative_slope else F.relu(z)


def run(function, given, dout, **options):
    """Output, gradients and running statistics, by name."""
    tensors = [None if t is None else t.detach().clone().requires_grad_(t.requires_grad) for t in given]
    out = function(*tensors, **options)
    leaves = {n: t for n, t in zip(("x", "gamma", "beta"), tensors, strict=False) if t is not None}
    gradients = torch.autograd.grad(out, list(leaves.values()), dout.to(out.dtype))
    results = {"out": out.detach(), **{f"d{n}": g for n, g in zip(leaves, gradients, strict=True)}}
    if tensors[3] is not None:
        results |= {"running_mean": tensors[3], "running_var": tensors[4]}
    return results


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("slope", [0.0, 0.1])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_plain(shape, training, slope, dtype):
    masters = torch.float32 if dtype is torch.bfloat16 else dtype
    given, dout = make(shape, dtype=dtype, parameters=masters), torch.randn(shape)
    options = {"training": training, "negative_slope": slope}
    yardstick = run(plain, given, dout, **options)
    oracle = run(plain, [t.detach().double().requires_grad_(t.requires_grad) for t in given], dout, **options)

    def check(backend):
        for name, value in run(preact, given, dout, **options).items():
            assert value.dtype == yardstick[name].dtype, name
            assert value.stride() == yardstick[name].stride(), name
            terms = 0.0
            if name in ("dgamma", "dbeta"):  # sums of few terms: see SUM_EPS
                terms = dout.abs().sum((0, 2, 3)) * 4
            assert_trusted(value, yardstick[name], oracle[name], name, terms)

    on_every_backend(check)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("running", [True, False])
def test_without_parameters(affine, running):
    given, dout = make((3, 5, 4, 6), affine=affine, running=running, dtype=torch.float64), torch.randn(3, 5, 4, 6)
    expected = run(plain, given, dout, training=False)
    for name, value in run(preact, given, dout, training=False).items():
        torch.testing.assert_close(value, expected[name])


def test_given_statistics(backend):
    x, *rest = make((2, 8, 5, 5))
    stats = torch.ops.resnet_fused.channel_stats(x.detach())
    with rf.record_dispatch() as log:
        out = preact(x, *rest, training=True, x_stats=stats)
    assert "channel_stats" not in [record.primitive for record in log]
    other = [x, rest[0], rest[1], rest[2].clone(), rest[3].clone()]
    torch.testing.assert_close(out, preact(*other, training=True), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("format", [CL, torch.contiguous_format], ids=str)
def test_opcheck(training, format):
    x, gamma, beta, mean, var = make((2, 3, 4, 5), format=format)
    torch.library.opcheck(OP, (x, None, gamma, beta, mean, var, training, 1e-5, 0.1))
    bn = torch.rand(4, 3)
    arguments = (torch.randn_like(x), x.detach(), bn, gamma.detach(), beta.detach(), training, 1e-5, 0.0)
    torch.library.opcheck(BACKWARD_OP, arguments)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("slope", [0.0, 0.1])
def test_gradcheck(training, slope):
    x, gamma, beta, mean, var = make((2, 3, 3, 2), dtype=torch.float64)

    def function(x, gamma, beta):
        return preact(x, gamma, beta, mean.clone(), var.clone(), training=training, negative_slope=slope)

    torch.autograd.gradcheck(function, (x, gamma, beta), **GRADCHECK)
    torch.autograd.gradgradcheck(function, (x, gamma, beta), **GRADCHECK)


def test_empty_batch(backend):
    x, gamma, beta, mean, var = make((0, 4, 3, 3))
    before = mean.clone(), var.clone()
    preact(x, gamma, beta, mean, var, training=True).sum().backward()
    assert x.grad.shape == x.shape and not gamma.grad.any() and not beta.grad.any()
    assert torch.equal(mean, before[0]) and torch.equal(var, before[1])


def test_autocast_leaves_dtypes_alone():
    given = make((2, 4, 3, 3))
    with torch.autocast("cpu", torch.bfloat16):
        assert preact(*given, training=True).dtype is torch.float32


def test_bad_input():
    x, gamma, beta, mean, var = make((2, 4, 3, 3))
    with pytest.raises(ValueError, match=r"expected 4D input \(got 3D input\)"):
        preact(x[0], gamma, beta, mean, var)
    with pytest.raises(RuntimeError, match="weight should contain 4 elements not 3"):
        preact(x, gamma[:3], beta, mean, var)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        preact(x[:1, :, :1, :1], gamma, beta, mean, var, training=True)
    with pytest.raises(ValueError, match="eps must be positive"):
        preact(x, gamma, beta, mean, var, training=True, eps=0.0)


def test_compiled_in_one_graph():
    given = make((2, 4, 3, 3))
    other = copy.deepcopy([t.detach() for t in given])
    compiled = torch.compile(preact, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*given, training=True), preact(*other, training=True))
    torch.testing.assert_close(given[3], other[3])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("channels", [7, 16, 20, 48])
@pytest.mark.parametrize("slope", [0.0, 0.2])
def test_gradient_in_another_format(channels, slope, dtype):
    """What backward copies, because it is expanded or NCHW, it may overwrite; what it was given it may not."""
    x = torch.randn(3, channels, 5, 4).to(dtype).contiguous(memory_format=CL).requires_grad_()
    parameters = torch.float64 if dtype is torch.float64 else torch.float32
    gamma, beta = torch.rand(channels, dtype=parameters) + 0.5, torch.randn(channels, dtype=parameters)
    leaves = [x, gamma.requires_grad_(), beta.requires_grad_()]
    out = preact(x, gamma, beta, None, None, training=True, negative_slope=slope)
    dout = torch.randn(3, channels, 1, 1).to(dtype)
    given = [dout.expand(out.shape), dout.expand(out.shape).contiguous()]
    given.append(given[0].contiguous(memory_format=CL))
    kept = [g.clone() for g in given]
    results = [torch.autograd.grad(out, leaves, g, retain_graph=True) for g in given]
    assert all(torch.equal(g, k) for g, k in zip(given, kept, strict=True))
    with rf.record_dispatch():  # one primitive after another
        results.append(torch.autograd.grad(out, leaves, given[0], retain_graph=True))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.usefixtures("cpu_library")
@pytest.mark.parametrize("channels, in_place", [(16, True), (20, False)])
def test_writes_over_a_gradient_of_its_own(channels, in_place):
    x, dout = (torch.randn(2, channels, 3, 3).contiguous(memory_format=CL) for _ in range(2))
    stats = torch.ops.resnet_fused.channel_stats(x)
    bn = torch.ops.resnet_fused.finalize_forward(stats, 18, None, None, None, None, 1e-5)
    backward = torch.ops.resnet_fused_cpu.preact_backward
    kept = dout.clone()
    dx, sums = backward(dout, x, bn, True, 0.0, False)
    assert torch.equal(dout, kept) and dx.data_ptr() != dout.data_ptr()
    over, sums_over = backward(dout, x, bn, True, 0.0, True)
    assert torch.equal(over, dx) and torch.equal(sums_over, sums)
    assert (over.data_ptr() == dout.data_ptr()) == in_place
