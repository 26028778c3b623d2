"""max_pool2d: primitives, operator, module, and fuse; bit for bit against torch.nn.functional.max_pool2d."""

import copy
import io
import pickle

import fuse_cases as cases
import pytest
import torch
import torch.nn.functional as F
from conftest import on_every_backend
from tolerances import GRADCHECK, assert_trusted
from torch import nn

import resnet_fused as rf
from resnet_fused import primitives
from resnet_fused.functional import max_pool2d

pytestmark = pytest.mark.usefixtures("one_thread")

CL = torch.channels_last
OP = torch.ops.resnet_fused.max_pool2d.default
BACKWARD_OP = torch.ops.resnet_fused.max_pool2d_backward.default

#: kernel_size, stride, padding.
WINDOWS = [
    (2, 2, 0),
    (3, 2, 1),
    (3, 1, 1),
    ((5, 4), None, (2, 1)),
    ((5, 4), (2, 3), (1, 2)),
    ((1, 3), (2, 1), (0, 1)),
    (2, 3, 0),  # windows apart: some inputs are in none
    (1, 1, 0),
    (7, 2, 3),
]
SIZES = [(2, 1, 7, 7), (1, 3, 8, 13), (2, 17, 9, 8), (1, 64, 11, 10), (1, 70, 7, 9)]


def inputs(size, dtype, memory_format=CL, special=True):
    """Many ties; NaN, inf and windows of -inf."""
    x = torch.randint(-4, 5, size).to(dtype)
    if special:
        flat = x.view(-1)
        flat[torch.randperm(flat.numel())[: flat.numel() // 30 + 1]] = torch.nan
        flat[torch.randperm(flat.numel())[: flat.numel() // 30 + 1]] = torch.inf
        x[0, 0] = -torch.inf
        x[-1, -1, :5] = -torch.inf
        x[0, 0, 2, 2] = torch.nan
    return x.contiguous(memory_format=memory_format)


def same(a, b):
    """Bits, but for which NaN it is; -0 is not 0."""
    assert a.dtype == b.dtype and a.shape == b.shape
    equal = (a == b) & (a.signbit() == b.signbit()) | (a.isnan() & b.isnan())
    assert equal.all(), f"{(~equal).sum()} of {a.numel()} differ"


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("windows", WINDOWS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_bitwise_against_pytorch(size, windows, dtype):
    x = inputs(size, dtype).requires_grad_()
    y = F.max_pool2d(x, *windows)
    dy = torch.randn(y.shape).to(dtype)
    dy.view(-1)[::7] = -0.0
    (dx,) = torch.autograd.grad(y, x, dy)

    def check(backend):
        result = max_pool2d(x, *windows)
        same(result, y)
        assert result.stride() == y.stride()
        (gradient,) = torch.autograd.grad(result, x, dy)
        same(gradient, dx)

    on_every_backend(check)


@pytest.mark.parametrize("channels", range(1, 71))
def test_every_number_of_channels(channels):
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        x = inputs((1, channels, 6, 7), dtype)
        y, indices = F.max_pool2d(x, 3, 2, 1, return_indices=True)
        dy = torch.randn(y.shape, dtype=dtype).contiguous(memory_format=CL)
        wide = torch.ops.aten.max_pool2d_with_indices_backward(
            dy.double(), x.double(), 3, 2, 1, 1, False, indices
        )

        def check(backend, x=x, y=y, dy=dy, wide=wide, dtype=dtype):
            result, offsets = primitives.max_pool_forward(x, (3, 3), (2, 2), (1, 1))
            same(result, y)
            dx = primitives.max_pool_backward(dy, offsets, (6, 7), (3, 3), (2, 2), (1, 1))
            torch.testing.assert_close(dx.double(), wide, rtol=torch.finfo(dtype).eps, atol=1e-6)

        on_every_backend(check)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("windows", WINDOWS, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(size, windows, dtype):
    """Values are exact; a sum of gradients is rounded once, where PyTorch's may be after every addition."""
    x = inputs(size, dtype).requires_grad_()
    y = F.max_pool2d(x, *windows)
    dy = torch.randn(y.shape).to(dtype)
    (plain,) = torch.autograd.grad(y, x, dy)
    wide = x.detach().double().requires_grad_()
    (oracle,) = torch.autograd.grad(F.max_pool2d(wide, *windows), wide, dy.double())

    def check(backend):
        result = max_pool2d(x, *windows)
        same(result, y)
        (dx,) = torch.autograd.grad(result, x, dy)
        assert dx.dtype == dtype
        assert_trusted(dx, plain, oracle, "dx")

    on_every_backend(check)


def test_offsets_name_the_position(backend):
    x = inputs((2, 5, 9, 8), torch.float32)
    windows = (5, 4), (2, 3), (2, 1)
    y, offsets = primitives.max_pool_forward(x, *windows)
    _, indices = F.max_pool2d(x, *windows, return_indices=True)
    assert offsets.dtype == torch.uint8 and offsets.shape == y.shape
    assert offsets.is_contiguous(memory_format=CL)
    p, q = torch.arange(y.shape[2])[:, None], torch.arange(y.shape[3])
    rows, columns = p * 2 - 2 + offsets // 4, q * 3 - 1 + offsets % 4
    assert torch.equal(rows * 8 + columns, indices)


def test_largest_window(backend):
    x = inputs((1, 3, 33, 32), torch.float32, special=False)
    x[0, :, 15, 15] = x[0, :, 31, 31] = 9  # the last position of two windows: offset 255
    x = x.requires_grad_()
    y = max_pool2d(x, 16)
    same(y, F.max_pool2d(x, 16))
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(dx[0, :, 15, 15], torch.ones(3)) and dx.sum() == y.numel()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided", "expanded"])
def test_memory_formats(layout):
    x = torch.randn(2, 6, 9, 8)
    if layout == "channels_last":
        x = x.contiguous(memory_format=CL)
    elif layout == "strided":
        x = torch.randn(2, 12, 9, 16)[:, ::2, :, ::2]
    elif layout == "expanded":
        x = x[:1].expand(3, -1, -1, -1)
    x = x.detach().requires_grad_()
    y, plain = max_pool2d(x, 3, 2, 1), F.max_pool2d(x, 3, 2, 1)
    same(y, plain)
    assert y.is_contiguous(memory_format=CL) == plain.is_contiguous(memory_format=CL)
    for dy in (torch.randn_like(y), torch.randn(y.shape).transpose(2, 3).contiguous().transpose(2, 3)):
        (dx,), (expected,) = (torch.autograd.grad(out, x, dy, retain_graph=True) for out in (y, plain))
        same(dx, expected)
    (dx,) = torch.autograd.grad(y, x, torch.ones(()).expand(y.shape))
    same(dx, torch.autograd.grad(plain.sum(), x)[0])


def test_empty_batch(backend):
    x = torch.randn(0, 3, 8, 8, requires_grad=True)
    y = max_pool2d(x, 3, 2, 1)
    assert y.shape == (0, 3, 4, 4)
    (dx,) = torch.autograd.grad(y, x, y)
    assert dx.shape == x.shape


def test_saves_one_byte_per_output():
    x = torch.randn(2, 8, 9, 9).contiguous(memory_format=CL).requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = max_pool2d(x, 3, 2, 1)
    assert [(t.dtype, t.shape) for t in saved] == [(torch.uint8, y.shape)]
    assert saved[0].untyped_storage().nbytes() == y.numel()
    with torch.no_grad():
        x.zero_()  # nothing of it is needed
    y.sum().backward()


def test_any_number_of_threads(threads, backend):
    """Enough rows for several tasks."""
    x = inputs((3, 64, 40, 33), torch.float32)

    def both():
        y, offsets = primitives.max_pool_forward(x, (3, 3), (2, 2), (1, 1))
        dy = y.nan_to_num()
        return y, offsets, primitives.max_pool_backward(dy, offsets, (40, 33), (3, 3), (2, 2), (1, 1))

    threads(1)
    one = both()
    for count in (2, 3):
        threads(count)
        for a, b in zip(both(), one, strict=True):
            same(a, b)


class TestDerivatives:
    #: No two elements within gradcheck's step of each other.
    @staticmethod
    def distinct(n, c, h, w):
        return torch.randperm(n * c * h * w).view(n, c, h, w).double().requires_grad_()

    @pytest.mark.parametrize("windows", [(2, 2, 0), (3, 2, 1), ((3, 2), (1, 2), (1, 0))], ids=str)
    def test_gradcheck(self, windows, backend):
        x = self.distinct(2, 3, 5, 4)
        assert torch.autograd.gradcheck(lambda x: max_pool2d(x, *windows), (x,), **GRADCHECK)
        assert torch.autograd.gradgradcheck(lambda x: max_pool2d(x, *windows), (x,), **GRADCHECK)

    def test_second_derivative_is_pytorchs(self):
        x, results = self.distinct(2, 3, 7, 6), []
        for function in (max_pool2d, F.max_pool2d):
            (dx,) = torch.autograd.grad(function(x, 3, 2, 1).square().sum(), x, create_graph=True)
            results.append(torch.autograd.grad(dx.pow(3).sum(), x)[0])
        torch.testing.assert_close(*results, rtol=1e-12, atol=0)

    @pytest.mark.parametrize("memory_format", [torch.contiguous_format, CL], ids=str)
    def test_opcheck(self, memory_format):
        x = torch.randn(2, 3, 7, 6).contiguous(memory_format=memory_format).requires_grad_()
        torch.library.opcheck(OP, (x, [3, 2], [2, 2], [1, 1]))
        y, offsets = OP(x.detach(), [3, 2], [2, 2], [1, 1])
        dy = torch.randn_like(y).requires_grad_()
        channels_last = memory_format is CL
        torch.library.opcheck(BACKWARD_OP, (dy, offsets, [7, 6], channels_last, [3, 2], [2, 2], [1, 1]))


@pytest.mark.parametrize(
    "arguments",
    [
        {"kernel_size": 0, "stride": 1},
        {"kernel_size": (1, 2, 3)},
        {"kernel_size": ()},
        {"kernel_size": 2, "stride": 0},
        {"kernel_size": 2, "stride": -1},
        {"kernel_size": 2, "stride": (1, 2, 3)},
        {"kernel_size": 3, "padding": 2},
        {"kernel_size": 3, "padding": -1},
        {"kernel_size": (3, 1), "padding": 1},
        {"kernel_size": 3, "padding": (1, 1, 1)},
        {"kernel_size": 9},
        {"kernel_size": (9, 3)},
        {"kernel_size": 2.5},
    ],
    ids=str,
)
def test_errors_are_pytorchs(arguments):
    x = torch.randn(2, 3, 5, 5)
    with pytest.raises((RuntimeError, TypeError)) as expected:
        F.max_pool2d(x, **arguments)
    with pytest.raises(expected.type) as raised:
        max_pool2d(x, **arguments)
    assert str(raised.value).replace("' must", "' (position 2) must") == str(expected.value)


def test_other_errors():
    with pytest.raises(ValueError, match=r"expected 4D input \(got 3D input\)"):
        max_pool2d(torch.randn(3, 8, 8), 2)
    with pytest.raises(NotImplementedError, match="\"max_pool2d\" not implemented for 'int64'"):
        max_pool2d(torch.zeros(1, 1, 4, 4, dtype=torch.long), 2)
    with pytest.raises(RuntimeError, match=r"at most 256 positions, but got \(16, 17\)"):
        max_pool2d(torch.randn(1, 1, 40, 40), (16, 17))
    with pytest.raises(RuntimeError, match=r"for input, but got:\[2, 0, 5, 5\]"):
        max_pool2d(torch.randn(2, 0, 5, 5), 2)


def test_stride_is_the_window_by_default():
    x = torch.randn(1, 2, 7, 7)
    for arguments in ((3,), (3, None), (3, []), ((3,), (2,))):
        same(max_pool2d(x, *arguments), F.max_pool2d(x, *arguments))


def test_autocast_leaves_dtypes_alone():
    x = torch.randn(1, 2, 6, 6, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = max_pool2d(x, 2)
        assert y.dtype == OP(x, [2, 2], [2, 2], [0, 0])[0].dtype == torch.float32
        assert max_pool2d(x.bfloat16(), 2).dtype == torch.bfloat16
        (dx,) = torch.autograd.grad(y.sum(), x)
    assert dx.dtype == torch.float32


def test_compile_and_export():
    x = torch.randn(2, 3, 9, 8).contiguous(memory_format=CL).requires_grad_()
    compiled = torch.compile(
        lambda x: max_pool2d(x, 3, 2, 1), fullgraph=True, backend="aot_eager", dynamic=True
    )
    for size in (9, 12):
        x = torch.randn(2, 3, size, 8).contiguous(memory_format=CL).requires_grad_()
        y, expected = compiled(x), max_pool2d(x, 3, 2, 1)
        assert torch.equal(y, expected) and y.stride() == expected.stride()
        dy = torch.randn_like(y)
        assert torch.equal(torch.autograd.grad(y, x, dy)[0], torch.autograd.grad(expected, x, dy)[0])
    exported = torch.export.export(rf.nn.MaxPool2d(3, 2, 1), (x.detach(),))
    assert torch.equal(exported.module()(x.detach()), expected)


def pools_run(call):
    """How many max pools a call runs by the operator."""
    with rf.record_dispatch() as log:
        call()
    return sum(record.primitive == "max_pool_forward" for record in log)


class TestModule:
    @pytest.mark.parametrize("grad", [True, False])
    def test_is_pytorchs(self, grad):
        ours, plain = rf.nn.MaxPool2d(3, stride=2, padding=1), nn.MaxPool2d(3, stride=2, padding=1)
        assert isinstance(ours, nn.MaxPool2d) and repr(ours) == repr(plain) and not ours.state_dict()
        x = torch.randn(2, 5, 9, 9, requires_grad=grad)
        same(ours(x), plain(x))
        assert pools_run(lambda: ours(x)) == 1

    @pytest.mark.parametrize(
        ("options", "x"),
        [
            ({"ceil_mode": True}, torch.randn(1, 2, 8, 8)),
            ({"dilation": 2}, torch.randn(1, 2, 8, 8)),
            ({"return_indices": True}, torch.randn(1, 2, 8, 8)),
            ({}, torch.randn(2, 8, 8)),
            ({}, torch.randint(9, (1, 2, 8, 8))),
            ({"kernel_size": 17}, torch.randn(1, 2, 18, 18)),
        ],
        ids=["ceil_mode", "dilation", "return_indices", "3-D", "int64", "large"],
    )
    def test_pytorchs_own_elsewhere(self, options, x):
        options = {"kernel_size": 3, "stride": 2, **options}
        ours, plain = rf.nn.MaxPool2d(**options), nn.MaxPool2d(**options)
        assert pools_run(lambda: ours(x)) == 0
        for a, b in zip(*(y if isinstance(y, tuple) else (y,) for y in (ours(x), plain(x))), strict=True):
            assert torch.equal(a, b)

    def test_functional_transforms(self):
        ours, plain = rf.nn.MaxPool2d(3, 2), nn.MaxPool2d(3, 2)
        x = torch.randn(4, 1, 2, 7, 7)
        for transform in (
            lambda pool: torch.vmap(pool)(x),
            lambda pool: torch.func.vmap(torch.func.grad(lambda v: pool(v).square().sum()))(x),
            lambda pool: torch.func.jvp(pool, (x[0],), (torch.ones_like(x[0]),))[1],
        ):
            torch.testing.assert_close(transform(ours), transform(plain))

    def test_wrong_arguments(self):
        with pytest.raises(RuntimeError, match="max_pool2d: kernel_size must either be a single int"):
            rf.nn.MaxPool2d((1, 2, 3))(torch.randn(1, 1, 4, 4))


class Stem(nn.Module):
    """A unit with a pool inside, and one in the stem."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, 2, 1, bias=False)
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.layers = nn.Sequential(cases.CifarBlock(8, 8), cases.CifarBlock(8, 8), PooledUnit())

    def forward(self, x):
        return self.layers(self.pool(self.conv(x)))


class PooledUnit(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.conv, self.pool = nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, padding=1), nn.MaxPool2d(2)

    def forward(self, x):
        return self.pool(self.conv(F.relu(self.norm(x)))) + self.pool(x)


class TestFuse:
    def test_same_results(self):
        fused, plain = cases.pair_of(Stem())
        x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
        for training in (True, False):
            fused.train(training), plain.train(training)
            cases.assert_same(fused, plain, x)
        assert pools_run(lambda: fused(x)) == 3
        assert pools_run(lambda: plain(x)) == 0

    def test_sequential(self):
        net = nn.Sequential(nn.MaxPool2d(2), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1))
        plain = copy.deepcopy(net)
        x = torch.randn(2, 4, 8, 8)
        assert pools_run(lambda: rf.fuse(net)(x)) == 1
        torch.testing.assert_close(copy.deepcopy(net)(x), copy.deepcopy(plain)(x))
        kinds = [type(m) for m in plain.modules()]
        assert [type(m) for m in net.modules()] != kinds and repr(net) == repr(plain)
        assert isinstance(net[0], nn.MaxPool2d) and net.state_dict().keys() == plain.state_dict().keys()
        rf.fuse(net)
        assert [type(m) for m in rf.unfuse(net).modules()] == kinds

    def test_nothing_else_to_fuse(self):
        net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2))
        kinds = [type(m) for m in net.modules()]
        assert [type(m) for m in rf.fuse(net).modules()] == kinds

    def test_filter_fn(self):
        net = rf.fuse(Stem(), filter_fn=lambda name, module: name != "pool")
        assert type(net.pool) is nn.MaxPool2d and type(net.layers[2].pool) is not nn.MaxPool2d
        assert pools_run(lambda: net(torch.randn(2, 3, 16, 16))) == 2

    def test_fused_anew_without_units(self):
        net = rf.fuse(Stem())
        rf.fuse(net, filter_fn=lambda name, module: False)
        assert type(net.pool) is nn.MaxPool2d

    def test_a_forward_of_the_users(self):
        class Mine(nn.MaxPool2d):
            def forward(self, x):
                return super().forward(x) * 2

        net = Stem()
        net.pool = Mine(3, 2, 1)
        net.layers[2].pool.forward = lambda x: x[..., ::2, ::2]
        assert pools_run(lambda: rf.fuse(net)(torch.randn(2, 3, 16, 16))) == 0

    def test_subclasses_and_hooks(self):
        class Bare(nn.MaxPool2d):
            pass

        net, seen = Stem(), []
        net.pool = Bare(3, 2, 1)
        rf.fuse(net)
        assert isinstance(net.pool, Bare) and type(net.pool) is not Bare
        net.pool.register_forward_hook(lambda module, args, out: seen.append(out.shape))
        assert pools_run(lambda: net(torch.randn(2, 3, 16, 16))) == 3
        assert seen == [(2, 8, 4, 4)]

    def test_settings_are_read_at_call_time(self):
        net = rf.fuse(Stem())
        plain = rf.unfuse(copy.deepcopy(net))
        for model in (net, plain):
            model.pool.kernel_size, model.layers[2].pool.ceil_mode = 2, True
        x = torch.randn(2, 3, 16, 16)
        torch.testing.assert_close(net(x), plain(x))
        net.pool.dilation = 2
        assert pools_run(lambda: net(torch.randn(2, 3, 16, 16))) == 0

    def test_copies_and_pickles(self):
        net, x = rf.fuse(Stem()).eval(), torch.randn(2, 3, 16, 16)
        expected = net(x)
        saved = io.BytesIO()
        torch.save(net, saved)
        saved.seek(0)
        for again in (
            copy.deepcopy(net),
            pickle.loads(pickle.dumps(net)),
            torch.load(saved, weights_only=False),
        ):
            assert type(again.pool) is type(net.pool)
            assert torch.equal(again(x), expected) and pools_run(lambda net=again: net(x)) == 3
            assert type(rf.unfuse(again).pool) is nn.MaxPool2d

    def test_the_original_forward_where_pytorch_looks(self):
        net, x = rf.fuse(Stem()).eval(), torch.randn(2, 3, 16, 16)
        expected = net(x)
        with torch.no_grad():
            traced = torch.jit.trace(net, x, check_trace=False)
        assert pools_run(lambda: torch.testing.assert_close(traced(x), expected)) == 0
        compiled = torch.compile(net, backend="eager", fullgraph=True)
        assert pools_run(lambda: torch.testing.assert_close(compiled(x), expected)) == 0
        graph = torch.fx.symbolic_trace(net.pool)
        assert [node.op for node in graph.graph.nodes] == ["placeholder", "call_function", "output"]

    def test_resnetv2(self):
        timm = pytest.importorskip("timm", reason="timm is not installed")
        plain = timm.create_model("resnetv2_50", num_classes=10)
        fused = rf.fuse(copy.deepcopy(plain))
        x = torch.randn(2, 3, 64, 64).contiguous(memory_format=CL)
        assert pools_run(lambda: fused.eval()(x)) == 1
        cases.assert_same(fused.double().train(), plain.double().train(), x.double(), rtol=1e-7)
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            fused(x.double())
        assert [t.shape for t in saved if t.dtype == torch.uint8] == [(2, 64, 16, 16)]
        assert not any(t.dtype == torch.int64 for t in saved)
        assert all(type(m).forward is not nn.MaxPool2d.forward for m in fused.modules())


@pytest.mark.parametrize("name", ["preact_resnet50", "resnet18", "densenet121"])
def test_nets_of_this_package(name):
    nets = [rf.models.create_model(name, num_classes=3, fused=fused) for fused in (True, False)]
    assert nets[0].state_dict().keys() == nets[1].state_dict().keys()
    nets[0].load_state_dict(nets[1].state_dict())
    x = torch.randn(2, 3, 64, 64)
    assert [pools_run(lambda net=net: net.eval()(x)) for net in nets] == [1, 0]
    cases.assert_same(*(net.double().eval() for net in nets), x.double(), rtol=1e-7)
