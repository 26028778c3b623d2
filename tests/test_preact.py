"""torch.ops.resnet_fused.preact and functional.preact: BatchNorm -> (Leaky)ReLU (-> global average
pool) alone."""

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

pools = pytest.mark.parametrize("pool", [False, True], ids=["", "pool"])


def make(shape, *, training=True, affine=True, running=True, dtype=torch.float32, parameters=None, format=CL):
    """x, gamma, beta, running mean and variance; the first three require grad."""
    parameters, c = parameters or dtype, shape[1]
    x = (torch.randn(shape) * 2 + 1).to(dtype).contiguous(memory_format=format).requires_grad_()
    gamma = (torch.rand(c) + 0.5).to(parameters).requires_grad_() if affine else None
    beta = torch.randn(c).to(parameters).requires_grad_() if affine else None
    statistics = (torch.randn(c).to(parameters), torch.rand(c).to(parameters) + 0.5) if running else (None, None)
    return x, gamma, beta, *statistics


def plain(
    x, gamma, beta, mean, var, *, training, momentum=0.1, eps=1e-5, negative_slope=0.0, global_avg_pool=False
):
    z = F.batch_norm(x, mean, var, gamma, beta, training or mean is None, momentum, eps)
    a = F.leaky_relu(z, negative_slope) if negative_slope else F.relu(z)
    return F.adaptive_avg_pool2d(a, 1) if global_avg_pool else a


def out_shape(shape, pool):
    return (*shape[:2], 1, 1) if pool else shape


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
@pools
def test_against_plain(pool, shape, training, slope, dtype):
    masters = torch.float32 if dtype is torch.bfloat16 else dtype
    given, dout = make(shape, dtype=dtype, parameters=masters), torch.randn(out_shape(shape, pool))
    options = {"training": training, "negative_slope": slope, "global_avg_pool": pool}
    yardstick = run(plain, given, dout, **options)
    oracle = run(plain, [t.detach().double().requires_grad_(t.requires_grad) for t in given], dout, **options)

    def check(backend):
        for name, value in run(preact, given, dout, **options).items():
            assert value.dtype == yardstick[name].dtype, name
            assert value.stride() == yardstick[name].stride(), name
            terms = 0.0
            if name in ("dgamma", "dbeta"):  # sums of few terms: see SUM_EPS; a mean's terms add up to dout
                terms = dout.abs().sum((0, 2, 3)) * 4
            assert_trusted(value, yardstick[name], oracle[name], name, terms)

    on_every_backend(check)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("running", [True, False])
@pools
def test_without_parameters(pool, affine, running):
    shape = (3, 5, 4, 6)
    given = make(shape, affine=affine, running=running, dtype=torch.float64)
    dout = torch.randn(out_shape(shape, pool))
    expected = run(plain, given, dout, training=False, global_avg_pool=pool)
    for name, value in run(preact, given, dout, training=False, global_avg_pool=pool).items():
        torch.testing.assert_close(value, expected[name])


@pools
def test_given_statistics(backend, pool):
    x, *rest = make((2, 8, 5, 5))
    stats = torch.ops.resnet_fused.channel_stats(x.detach())
    with rf.record_dispatch() as log:
        out = preact(x, *rest, training=True, x_stats=stats, global_avg_pool=pool)
        out.sum().backward()
    forward = "bn_act_pool_forward" if pool else "bn_act_forward"
    ran = [record.primitive for record in log]
    assert ran[:3] == ["finalize_forward", forward, "update_running_stats"]
    assert ran[3:] == [forward.replace("forward", "backward"), "finalize_backward", "preact_apply"]
    other = [x, rest[0], rest[1], rest[2].clone(), rest[3].clone()]
    expected = preact(*other, training=True, global_avg_pool=pool)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


@pools
@pytest.mark.parametrize("format", [CL, torch.contiguous_format], ids=str)
def test_saves_x_and_small_tensors(pool, format):
    """Not the activation; x is that of the caller, with no copy."""
    given, saved = make((2, 16, 9, 8), format=format), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        preact(*given, training=True, global_avg_pool=pool)
    assert [t.data_ptr() for t in saved if t.dim() == 4] == [given[0].data_ptr()]
    assert sorted(tuple(t.shape) for t in saved if t.dim() != 4) == [(4, 16), (16,), (16,)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("expanded", [True, False])
def test_gradient_of_means_in_another_format(expanded, dtype):
    """As a linear layer, a sum and a mean give it; what backward was given it does not write to."""
    x, gamma, beta, *_ = make((3, 20, 5, 4), dtype=dtype, parameters=torch.float32)
    out = preact(x, gamma, beta, None, None, global_avg_pool=True)
    dout = torch.randn(1, 1, 1, 1) if expanded else torch.randn(20, 3, 1, 1).transpose(0, 1)
    dout = dout.to(dtype).expand(out.shape)
    kept = dout.clone()
    results = torch.autograd.grad(out, (x, gamma, beta), dout, retain_graph=True)
    assert torch.equal(dout, kept)
    dense = dout.contiguous(memory_format=CL)
    expected = torch.autograd.grad(out, (x, gamma, beta), dense, retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))
    with rf.record_dispatch():  # one primitive after another
        expected = torch.autograd.grad(out, (x, gamma, beta), dout)
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("format", [CL, torch.contiguous_format], ids=str)
@pools
def test_opcheck(pool, training, format):
    x, gamma, beta, mean, var = make((2, 3, 4, 5), format=format)
    torch.library.opcheck(OP, (x, None, gamma, beta, mean, var, training, 1e-5, 0.1, pool))
    bn, dout = torch.rand(4, 3), torch.randn(out_shape(x.shape, pool)).contiguous(memory_format=format)
    arguments = (dout, x.detach(), bn, gamma.detach(), beta.detach(), training, 1e-5, 0.0, pool)
    torch.library.opcheck(BACKWARD_OP, arguments)


def test_pool_is_an_option_of_the_operator():
    """Those who call it with the arguments that it had are served."""
    x, gamma, beta, mean, var = (t.detach() for t in make((2, 3, 4, 5)))
    out, _, bn = OP(x, None, gamma, beta, mean, var, True, 1e-5, 0.0)
    assert out.shape == x.shape
    assert BACKWARD_OP(out, x, bn, gamma, beta, True, 1e-5, 0.0)[0].shape == x.shape


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("slope", [0.0, 0.1])
@pools
def test_gradcheck(pool, training, slope):
    x, gamma, beta, mean, var = make((2, 3, 3, 2), dtype=torch.float64)
    options = {"training": training, "negative_slope": slope, "global_avg_pool": pool}

    def function(x, gamma, beta):
        return preact(x, gamma, beta, mean.clone(), var.clone(), **options)

    torch.autograd.gradcheck(function, (x, gamma, beta), **GRADCHECK)
    torch.autograd.gradgradcheck(function, (x, gamma, beta), **GRADCHECK)


@pools
def test_empty_batch(backend, pool):
    x, gamma, beta, mean, var = make((0, 4, 3, 3))
    before = mean.clone(), var.clone()
    out = preact(x, gamma, beta, mean, var, training=True, global_avg_pool=pool)
    assert out.shape == out_shape(x.shape, pool)
    out.sum().backward()
    assert x.grad.shape == x.shape and not gamma.grad.any() and not beta.grad.any()
    assert torch.equal(mean, before[0]) and torch.equal(var, before[1])


@pools
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_leaves_dtypes_alone(pool, dtype):
    given = make((2, 4, 3, 3), dtype=dtype, parameters=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert preact(*given, training=True, global_avg_pool=pool).dtype is dtype


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
    for format in (CL, torch.contiguous_format):
        for shape in ((2, 4, 0, 3), (0, 4, 3, 0)):
            message = f"expected input to have non-zero spatial size for global_avg_pool.*sizes {list(shape)}"
            empty = torch.zeros(shape).to(memory_format=format)
            with pytest.raises(RuntimeError, match=message.replace("[", r"\[")):
                preact(empty, gamma, beta, mean, var, global_avg_pool=True)


@pytest.mark.usefixtures("cpu_library")
@pytest.mark.parametrize("into", [False, True])
def test_bad_input_of_the_raw_operators(into):
    """The C++ operators check what they are given, too."""
    ops, x, bn = torch.ops.resnet_fused_cpu, torch.zeros(2, 3, 5, 4).to(memory_format=CL), torch.ones(4, 3)
    none = torch.zeros(2, 3, 0, 4).to(memory_format=CL)
    message = "non-zero spatial size for its mean, but got 0x4"
    with pytest.raises(RuntimeError, match=message):
        ops.bn_act_pool_forward(none, bn, 0.0)
    with pytest.raises(RuntimeError, match=message):
        ops.bn_act_pool_backward(torch.zeros(2, 3, 1, 1), none, bn, 0.0)
    with pytest.raises(RuntimeError, match="means of the input"):
        ops.bn_act_pool_backward(x, x, bn, 0.0)
    with pytest.raises(RuntimeError, match="means of the input"):
        ops.preact_backward(x, x, bn, True, 0.0, True, into, into)
    with pytest.raises(RuntimeError, match="da"):
        ops.preact_backward(torch.zeros(2, 3, 1, 1), x, bn, True, 0.0, False, into, into)


@pools
def test_compiled_in_one_graph(pool):
    given = make((2, 4, 3, 3))
    other = [t.detach().clone().requires_grad_(t.requires_grad) for t in given]
    compiled = torch.compile(preact, fullgraph=True, backend="aot_eager")
    options = {"training": True, "global_avg_pool": pool}
    results = compiled(*given, **options), preact(*other, **options)
    torch.testing.assert_close(*results)
    torch.testing.assert_close(given[3], other[3])
    dout = torch.randn_like(results[0])
    for out in results:
        out.backward(dout)
    for a, b in zip(given[:3], other[:3], strict=True):
        torch.testing.assert_close(a.grad, b.grad)


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
    dx, sums = backward(dout, x, bn, True, 0.0, False, False, False)
    assert torch.equal(dout, kept) and dx.data_ptr() != dout.data_ptr()
    over, sums_over = backward(dout, x, bn, True, 0.0, False, True, False)
    assert torch.equal(over, dx) and torch.equal(sums_over, sums)
    assert (over.data_ptr() == dout.data_ptr()) == in_place


@pytest.mark.usefixtures("cpu_library")
def test_means_gradient_is_not_written_over():
    """It is smaller than what would be written."""
    x, dy, bn = torch.randn(2, 16, 3, 3).to(memory_format=CL), torch.randn(2, 16, 1, 1), torch.rand(4, 16)
    kept = dy.clone()
    backward = torch.ops.resnet_fused_cpu.preact_backward
    results = [backward(dy, x, bn, True, 0.0, True, into, False) for into in (False, True)]
    assert torch.equal(dy, kept)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True)) and results[0][0].shape == x.shape
