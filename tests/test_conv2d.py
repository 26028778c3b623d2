"""functional.conv2d and conv2d_stats: a plain convolution, and one with the statistics of its output."""

import pickle

import pytest
import torch
import torch.nn.functional as F
from fuse_cases import CifarBlock
from tolerances import GRADCHECK, STATS_EPS, assert_trusted
from torch import nn

import resnet_fused as rf
from resnet_fused.functional import conv2d, conv2d_stats

CL = torch.channels_last
#: (x, weight, options): stems of CIFAR and ImageNet nets, the first convolution of a bottleneck, dilation.
CASES = {
    "cifar": ((3, 3, 9, 8), (16, 3, 3, 3), {"padding": 1}),
    "imagenet": ((2, 3, 20, 23), (20, 3, 7, 7), {"stride": 2, "padding": 3}),
    "bottleneck": ((2, 40, 6, 5), (24, 40, 1, 1), {}),
    "strided 1x1": ((2, 20, 7, 7), (24, 20, 1, 1), {"stride": (2, 2)}),
    "classifier": ((6, 40, 1, 1), (35, 40, 1, 1), {}),
    "dilated": ((2, 17, 9, 9), (5, 17, 3, 3), {"padding": 2, "dilation": 2}),
}
pytestmark = pytest.mark.usefixtures("cpu_library")


def make(case, dtype, format=CL):
    size, weight, options = CASES[case]
    x = (torch.randn(size) + 1).to(dtype).contiguous(memory_format=format).requires_grad_()
    return x, torch.randn(weight).to(dtype).contiguous(memory_format=format).requires_grad_(), options


def primitives(function):
    with rf.record_dispatch() as log:
        result = function()
    return result, [record.primitive for record in log]


def gradients(y, leaves, dy):
    return torch.autograd.grad(y, leaves, dy.to(y.dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_against_conv2d(case, dtype):
    x, weight, options = make(case, dtype)
    (y, stats), ran = primitives(lambda: conv2d_stats(x, weight, **options))
    assert ran == ["preact_conv_forward"] and y.requires_grad and not stats.requires_grad
    plain = F.conv2d(x, weight, **options)
    assert y.dtype == plain.dtype and y.stride() == plain.stride()
    exact = [t.detach().double().requires_grad_() for t in (x, weight)]
    oracle = F.conv2d(*exact, **options)
    assert_trusted(y.detach(), plain.detach(), oracle.detach(), "y")
    variance, mean = torch.var_mean(y.detach().double(), (0, 2, 3), correction=0)
    eps = STATS_EPS * torch.finfo(stats.dtype).eps
    assert ((stats[0] - mean).abs() <= eps * (variance.sqrt() + mean.abs())).all()
    m2 = variance * y.numel() / y.shape[1]
    assert ((stats[1] - m2).abs() <= eps * m2).all()
    dy = torch.randn_like(y)
    for name, *values in zip(
        ("dx", "dweight"),
        gradients(y, (x, weight), dy),
        gradients(plain, (x, weight), dy),
        gradients(oracle, exact, dy),
        strict=True,
    ):
        assert values[0].dtype == values[1].dtype
        assert_trusted(*values, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_conv2d_with_a_bias(case, dtype):
    """The input's gradient of a 1x1 without stride is by our kernels, too."""
    x, weight, options = make(case, dtype)
    bias = torch.randn(weight.shape[0]).to(dtype).requires_grad_()
    y, ran = primitives(lambda: conv2d(x, weight, bias, **options))
    assert ran == ["preact_conv_forward"]
    plain = F.conv2d(x, weight, bias, **options)
    assert y.dtype == plain.dtype and y.stride() == plain.stride()
    exact = [t.detach().double().requires_grad_() for t in (x, weight, bias)]
    oracle = F.conv2d(*exact, **options)
    assert_trusted(y.detach(), plain.detach(), oracle.detach(), "y")
    dy = torch.randn_like(y)
    mine, ran = primitives(lambda: gradients(y, (x, weight, bias), dy))
    assert ran.count("preact_conv_forward") == (case in ("classifier", "bottleneck"))
    others = gradients(plain, (x, weight, bias), dy), gradients(oracle, exact, dy)
    for name, *values in zip(("dx", "dweight", "dbias"), mine, *others, strict=True):
        assert values[0].dtype == values[1].dtype and values[0].shape == values[1].shape
        assert_trusted(*values, name)


@pytest.mark.parametrize("needed", [(0,), (1,), (2,), (0, 2), (1, 2)], ids=str)
@pytest.mark.parametrize("case", ["cifar", "bottleneck"])
def test_some_gradients_of_conv2d(case, needed):
    x, weight, options = make(case, torch.float32)
    leaves = [x, weight, torch.randn(weight.shape[0]).requires_grad_()]
    y = conv2d(*leaves, **options)
    dy = torch.randn_like(y)
    everything = gradients(y, leaves, dy)
    given = [t if i in needed else t.detach() for i, t in enumerate(leaves)]
    some = gradients(conv2d(*given, **options), [leaves[i] for i in needed], dy)
    for i, gradient in zip(needed, some, strict=True):
        torch.testing.assert_close(gradient, everything[i])


def test_conv2d_under_autocast():
    """Master weights and a float32 bias, as nn.Conv2d has them."""
    x, weight, _ = make("bottleneck", torch.float32)
    bias = torch.randn(weight.shape[0], requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y, ran = primitives(lambda: conv2d(x, weight, bias))
        plain = F.conv2d(x, weight, bias)
    assert ran == ["preact_conv_forward"] and y.dtype is torch.bfloat16
    exact = [t.detach().bfloat16().double().requires_grad_() for t in (x, weight, bias)]
    oracle, dy = F.conv2d(*exact), torch.randn(y.shape, dtype=y.dtype)
    results = [gradients(t, ts, dy) for t, ts in ((y, (x, weight, bias)), (plain, (x, weight, bias)), (oracle, exact))]
    assert_trusted(y.detach(), plain.detach(), oracle.detach(), "y")
    for name, *values in zip(("dx", "dweight", "dbias"), *results, strict=True):
        assert values[0].dtype is torch.float32
        assert_trusted(*values, name)


@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize(
    "size", [(16, 16, 1, 1), (5, 16, 3, 3), (16, 3, 3, 3), (20, 3, 7, 7), (16, 3, 1, 1), (15, 3, 3, 3)]
)
def test_whose_weight_gradient(size, dilation):
    """The kernel's, but for few channels in 1x1, with few outputs or dilated."""
    x = torch.randn(2, size[1], 14, 14).contiguous(memory_format=CL)
    weight = torch.randn(size).contiguous(memory_format=CL).requires_grad_()
    y, _ = conv2d_stats(x, weight, dilation=dilation)
    _, ran = primitives(lambda: y.sum().backward())
    kernel = size[1] >= 16 or (size[0] >= 16 and size[2] > 1 and dilation == 1)
    assert ran == ["preact_conv_wgrad"] * kernel


@pytest.mark.parametrize("channels, stride, kernel", [(7, 2, True), (2, (1, 3), True), (8, 2, False), (7, 1, False)])
def test_where_the_library_writes_past_its_end(channels, stride, kernel):
    """A 1x1 with a stride and less than 8 input channels, on CPUs with AVX2 alone."""
    x = torch.randn(2, channels, 16, 16).contiguous(memory_format=CL)
    weight = torch.randn(6, channels, 1, 1, requires_grad=True)
    y = conv2d(x, weight, stride=stride)
    dy = torch.randn_like(y)
    (dweight,), ran = primitives(lambda: torch.autograd.grad(y, weight, dy))
    assert ran == ["preact_conv_wgrad"] * kernel
    exact = weight.detach().double().requires_grad_()
    F.conv2d(x.double(), exact, stride=stride).backward(dy.double())
    # Sums of 512 products in float32: the library's own are off by up to 3e-5 where it adds up with AVX-512.
    torch.testing.assert_close(dweight.double(), exact.grad, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("case", ["cifar", "bottleneck"])
def test_under_autocast(case):
    x, weight, options = make(case, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        (y, _), ran = primitives(lambda: conv2d_stats(x, weight, **options))
        plain = F.conv2d(x, weight, **options)
    assert ran == ["preact_conv_forward"] and y.dtype is torch.bfloat16
    exact = [t.detach().bfloat16().double().requires_grad_() for t in (x, weight)]
    oracle, dy = F.conv2d(*exact, **options), torch.randn(y.shape, dtype=y.dtype)
    assert_trusted(y.detach(), plain.detach(), oracle.detach(), "y")
    graphs = ((y, (x, weight)), (plain, (x, weight)), (oracle, exact))
    results = [gradients(t, leaves, dy) for t, leaves in graphs]
    for name, *values in zip(("dx", "dweight"), *results, strict=True):
        assert values[0].dtype is torch.float32
        assert_trusted(*values, name)


@pytest.mark.parametrize("case", ["cifar", "bottleneck", "dilated"])
def test_gradcheck(case):
    size, weight, options = CASES[case]
    x = torch.randn(2, size[1], 4, 3, dtype=torch.float64).contiguous(memory_format=CL).requires_grad_()
    w = torch.randn(2, *weight[1:], dtype=torch.float64).contiguous(memory_format=CL).requires_grad_()

    def function(x, w):
        return conv2d_stats(x, w, **options)[0]

    torch.autograd.gradcheck(function, (x, w), **GRADCHECK)
    torch.autograd.gradgradcheck(function, (x, w), **GRADCHECK)
    bias = torch.randn(2, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda *args: conv2d(*args, **options), (x, w, bias), **GRADCHECK)
    torch.autograd.gradgradcheck(lambda *args: conv2d(*args, **options), (x, w, bias), **GRADCHECK)


def test_gradient_of_one_of_two():
    x, weight, options = make("bottleneck", torch.float32)
    both = gradients(conv2d_stats(x, weight, **options)[0], (x, weight), dy := torch.randn(2, 24, 6, 5))
    (dx,) = gradients(conv2d_stats(x, weight.detach(), **options)[0], (x,), dy)
    (dweight,) = gradients(conv2d_stats(x.detach(), weight, **options)[0], (weight,), dy)
    assert torch.equal(dx, both[0]) and torch.equal(dweight, both[1])
    with torch.no_grad():
        assert not conv2d_stats(x, weight, **options)[0].requires_grad


class Own(torch.Tensor):
    pass


LIBRARY = {
    "NCHW": lambda x, w: conv2d_stats(x.contiguous(), w.contiguous(), padding=1),
    "groups": lambda x, w: conv2d_stats(x, w[:15, :1], padding=1, groups=3),
    "padding='same'": lambda x, w: conv2d_stats(x, w, padding="same"),
    "an empty batch": lambda x, w: conv2d_stats(x[:0], w, padding=1),
    "float16": lambda x, w: conv2d_stats(x.half(), w.half(), padding=1),
    "a tensor subclass": lambda x, w: conv2d_stats(x.as_subclass(Own), w, padding=1),
    "vmap": lambda x, w: torch.func.vmap(lambda x: conv2d_stats(x, w, padding=1)[0])(x[None]),
    "another backend": lambda x, w: by_reference(x, w),
}


def by_reference(x, w):
    with rf.use_backend("reference"):
        return conv2d_stats(x, w, padding=1)


@pytest.mark.parametrize("case", LIBRARY)
def test_left_to_the_library(case):
    x, weight, _ = make("cifar", torch.float32)
    with torch.no_grad():
        result, ran = primitives(lambda: LIBRARY[case](x, weight))
    assert "preact_conv_forward" not in ran
    if case not in ("an empty batch", "groups", "vmap"):
        torch.testing.assert_close(result[0].float(), F.conv2d(x, weight, padding=1), rtol=1e-2, atol=2e-2)


def test_compiled_in_one_graph():
    x, weight, _ = make("cifar", torch.float32)
    compiled = torch.compile(lambda x, w: conv2d_stats(x, w, padding=1), fullgraph=True, backend="aot_eager")
    for one, other in zip(compiled(x, weight), conv2d_stats(x, weight, padding=1), strict=True):
        torch.testing.assert_close(one, other)


def test_errors_are_conv2ds():
    x, weight, _ = make("cifar", torch.float32)
    for arguments, options in [
        ((x, weight[:, :2]), {}), ((x, weight), {"stride": 0}), ((x, weight), {"padding": -1}),
        ((x, weight.double()), {}), ((x, weight), {"dilation": 9}), ((x, weight[0]), {}),
        ((x.bfloat16(), weight), {}), ((x, weight, torch.zeros(16).half()), {}), ((x, weight, torch.zeros(15)), {}),
    ]:  # fmt: skip
        with pytest.raises(RuntimeError) as expected:
            F.conv2d(*arguments, **options)
        with pytest.raises(RuntimeError) as raised:
            conv2d_stats(*arguments, **options)
        assert str(raised.value) == str(expected.value)
        with pytest.raises(RuntimeError) as raised:
            conv2d(*arguments, **options)
        assert str(raised.value) == str(expected.value)


class Unit(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(16, 16, 1, bias=False), nn.BatchNorm2d(16)
        self.conv2, self.bn2 = nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)

    def forward(self, x):
        return torch.relu(x + self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))))


def test_first_convolution_of_a_fused_original_unit():
    """fuse: it gives the statistics of its output; a layer with a hook is still called."""
    plain = nn.Sequential(Unit()).to(memory_format=CL)
    fused = rf.fuse(nn.Sequential(Unit())).to(memory_format=CL)
    fused.load_state_dict(plain.state_dict())
    x = torch.randn(4, 16, 6, 6).contiguous(memory_format=CL)
    y, ran = primitives(lambda: fused(x))
    assert ran.count("preact_conv_forward") == 2 and "channel_stats" not in ran
    torch.testing.assert_close(y, plain(x), rtol=1e-4, atol=1e-5)
    for name, buffer in plain.named_buffers():
        torch.testing.assert_close(fused.get_buffer(name), buffer)
    called = []
    handle = fused[0].conv1.register_forward_hook(lambda *_: called.append(1))
    _, ran = primitives(lambda: fused(x))
    assert called == [1] and ran.count("preact_conv_forward") == 1
    handle.remove()
    fused(x)
    assert called == [1]
    fused.load_state_dict(plain.state_dict())
    fused.eval()
    assert primitives(lambda: fused(x))[1].count("preact_conv_forward") == 1
    torch.testing.assert_close(fused(x), plain.eval()(x), rtol=1e-4, atol=1e-5)


def stem_and_classifier(**options):
    """A net whose first and last layers are convolutions, as timm's resnetv2 has them."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, **options), nn.MaxPool2d(2), CifarBlock(16, 16), CifarBlock(16, 16),
        nn.AdaptiveAvgPool2d(1), nn.Conv2d(16, 5, 1), nn.Flatten(),
    )  # fmt: skip


def same_results(one, other, x):
    results = []
    for net in (one, other):
        net.zero_grad()
        y = net(x)
        y.square().sum().backward()
        results.append([y.detach(), *(p.grad for p in net.parameters()), *net.buffers()])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


class TestFuse:
    def test_stem_and_classifier(self):
        plain, fused = stem_and_classifier(), stem_and_classifier()
        fused.load_state_dict(plain.state_dict())
        kinds = [type(m) for m in fused.modules()]
        x = torch.randn(4, 3, 8, 8)
        _, ran = primitives(lambda: rf.fuse(fused)(x))
        assert ran.count("preact_conv_forward") == 6
        fused.load_state_dict(plain.state_dict())
        same_results(fused, plain, x)
        assert primitives(lambda: rf.fuse(fused)(x))[1].count("preact_conv_forward") == 6  # once more
        again = pickle.loads(pickle.dumps(fused))
        assert primitives(lambda: again(x))[1].count("preact_conv_forward") == 6
        rf.unfuse(fused)
        assert [type(m) for m in fused.modules()] == kinds
        assert primitives(lambda: fused(x))[1] == []

    def test_what_stays_plain(self):
        x = torch.randn(4, 3, 8, 8)

        def convolutions(net, **options):
            return primitives(lambda: rf.fuse(net, **options)(x))[1].count("preact_conv_forward")

        net = stem_and_classifier()
        net[0].register_forward_hook(lambda *_: None)
        assert convolutions(net) == 5
        assert convolutions(stem_and_classifier(padding_mode="circular")) == 5
        assert convolutions(stem_and_classifier(), filter_fn=lambda name, module: name != "5") == 5
        assert convolutions(nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU())) == 0  # nothing to fuse
        # Beside a norm that was left alone.
        assert convolutions(stem_and_classifier(), filter_fn=lambda name, module: name != "2") == 4

    def test_changed_later(self):
        """Hooks, a parametrization and another padding mode: as of the layer itself."""
        x = torch.randn(4, 3, 8, 8)
        plain, fused = stem_and_classifier(), stem_and_classifier()
        fused.load_state_dict(plain.state_dict())
        rf.fuse(fused)
        seen = []
        for net in (plain, fused):
            net[0].register_forward_hook(lambda module, args, y: seen.append(y.detach()))
            nn.utils.parametrizations.weight_norm(net[5])
            net[0].padding_mode = "circular"
            net[0]._reversed_padding_repeated_twice = [1, 1, 1, 1]
        same_results(fused, plain, x)
        torch.testing.assert_close(*seen)

    def test_captured(self):
        net, x = rf.fuse(stem_and_classifier()).eval(), torch.randn(4, 3, 8, 8)
        expected = net(x)
        traced = torch.compile(net, fullgraph=True, backend="aot_eager")(x)
        torch.testing.assert_close(traced, expected, rtol=1e-3, atol=1e-4)
        parameters = dict(net.named_parameters())
        mapped = torch.func.functional_call(net, parameters, (x,))
        torch.testing.assert_close(mapped, expected, rtol=1e-3, atol=1e-4)
