"""The plain residual unit: every shortcut and activation order against formulas written out here."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import resnet_fused as rf
from resnet_fused.nn.reference import ORDERS, SHORTCUTS, ResidualUnit, ZeroPaddedIdentity

pytestmark = pytest.mark.usefixtures("one_thread")
PREACTIVATION = ("relu_only_preactivation", "full_preactivation")


def unit(*args, **options):
    """A unit in float64 whose norms do not hide that they ran."""
    made = ResidualUnit(*args, dtype=torch.float64, **options)
    for module in made.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
    return made


def image(channels, size=7):
    return torch.randn(3, channels, size, size, dtype=torch.float64)


def normed(x, bn):
    """With the statistics of the batch, from their definition."""
    mean, variance = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), unbiased=False, keepdim=True)
    z = (x - mean) / (variance + bn.eps).sqrt()
    return z * bn.weight.view(1, -1, 1, 1) + bn.bias.view(1, -1, 1, 1)


def conv(x, layer, stride=1):
    return F.conv2d(x, layer.weight, layer.bias, stride, layer.kernel_size[0] // 2)


def residual(u, x, order, stride=1):
    """F of two convolutions, as figure 4 draws it."""
    relu = torch.relu
    if order in ("original", "bn_after_addition", "relu_before_addition"):
        y = conv(relu(normed(conv(x, u.conv1, stride), u.bn1)), u.conv2)
        if order == "bn_after_addition":
            return y
        return normed(y, u.bn2) if order == "original" else relu(normed(y, u.bn2))
    if order == "relu_only_preactivation":
        return normed(conv(relu(normed(conv(relu(x), u.conv1, stride), u.bn1)), u.conv2), u.bn2)
    return conv(relu(normed(conv(relu(normed(x, u.bn1)), u.conv1, stride), u.bn2)), u.conv2)


def after(u, y, order):
    if order == "bn_after_addition":
        y = normed(y, u.bn2)
    return torch.relu(y) if order in ("original", "bn_after_addition") else y


@pytest.mark.parametrize("order", ORDERS)
def test_orders(order):
    u, x = unit(6, 6, order=order), image(6)
    torch.testing.assert_close(u(x), after(u, residual(u, x, order) + x, order))


@pytest.mark.parametrize("order", ["original", "full_preactivation"])
@pytest.mark.parametrize("scales", [(0.5, 0.5), (0.5, 1.0), (0.0, 1.0)])
def test_constant_scaling(order, scales):
    options = {"shortcut_scale": scales[0], "residual_scale": scales[1]}
    u, x = unit(6, 6, order=order, shortcut="constant_scaling", shortcut_options=options), image(6)
    expected = after(u, scales[0] * x + scales[1] * residual(u, x, order), order)
    torch.testing.assert_close(u(x), expected)


@pytest.mark.parametrize("order", ["original", "full_preactivation"])
@pytest.mark.parametrize("kind", ["exclusive_gating", "shortcut_only_gating"])
def test_gates(order, kind):
    """g = sigmoid(W_g x + b_g), one value for each element; 1 - g on the shortcut, g on F or 1."""
    u, x = (
        unit(6, 6, order=order, shortcut=kind, shortcut_options={"gate_bias": -1.0, "gate_std": 0.5}),
        image(6),
    )
    weight = u.gate.weight[:, :, 0, 0]
    g = 1 / (1 + torch.exp(-(torch.einsum("kc,nchw->nkhw", weight, x) + u.gate.bias.view(1, -1, 1, 1))))
    f = residual(u, x, order)
    h, scaled = u.terms(x)
    torch.testing.assert_close(h, (1 - g) * x)
    torch.testing.assert_close(scaled, g * f if kind == "exclusive_gating" else f)
    torch.testing.assert_close(u(x), after(u, h + scaled, order))


def test_initial_gates():
    """-6 is the best of the paper's search."""
    u = ResidualUnit(64, 64, shortcut="exclusive_gating")
    assert (u.gate.bias == -6).all() and u.gate.weight.shape == (64, 64, 1, 1)
    u = ResidualUnit(
        64, 64, shortcut="shortcut_only_gating", shortcut_options={"gate_bias": 0, "gate_std": 0.01}
    )
    assert (u.gate.bias == 0).all() and u.gate.weight.std().item() == pytest.approx(0.01, rel=0.1)


def test_gate_reads_the_preactivation_if_asked():
    options = {"gate_input": "preactivation", "gate_bias": 0.0}
    u = unit(6, 6, order="full_preactivation", shortcut="shortcut_only_gating", shortcut_options=options)
    x = image(6)
    g = torch.sigmoid(conv(torch.relu(normed(x, u.bn1)), u.gate))
    torch.testing.assert_close(u.terms(x)[0], (1 - g) * x)


def test_conv_shortcut_is_projection_c():
    torch.manual_seed(0)
    u = unit(6, 6, shortcut="conv")
    torch.manual_seed(0)
    c = unit(6, 6, projection="C")
    x = image(6)
    torch.testing.assert_close(u.terms(x)[0], normed(conv(x, u.downsample[0]), u.downsample[1]))
    assert torch.equal(u(x), c(x))


def test_dropout_shortcut():
    u, x = unit(6, 6, shortcut="dropout", shortcut_options={"p": 0.25}), image(6, 32)
    h, _ = u.terms(x)
    kept = h != 0
    torch.testing.assert_close(h[kept], x[kept] / 0.75)
    assert kept.double().mean().item() == pytest.approx(0.75, abs=0.03)
    assert torch.equal(u.eval().terms(x)[0], x)


def test_without_a_shortcut():
    u, x = unit(6, 6, shortcut="none"), image(6)
    h, f = u.terms(x)
    assert not h.any() and torch.equal(u(x), torch.relu(f))


@pytest.mark.parametrize("size", [8, 7])
def test_zero_padded_identity(size):
    """As many pixels as a strided convolution gives, also of odd sizes; zeros behind the channels."""
    x = image(3, size)
    y = ZeroPaddedIdentity(3, 5, 2)(x)
    assert y.shape == F.conv2d(x, torch.zeros(5, 3, 3, 3, dtype=x.dtype), None, 2, 1).shape
    assert torch.equal(y[:, :3], x[:, :, ::2, ::2]) and not y[:, 3:].any()
    assert torch.equal(ZeroPaddedIdentity(3, 3)(x), x)
    x = x.contiguous(memory_format=torch.channels_last)
    assert ZeroPaddedIdentity(3, 5, 2)(x).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("projection", ["A", "B"])
@pytest.mark.parametrize("order", ORDERS)
def test_where_dimensions_change(order, projection):
    """A: the raw x, subsampled and padded. B: a 1x1 convolution, of the activation in pre-activation units;
    with a norm except where none belongs (full pre-activation, whose norms come before; BN after
    addition)."""
    u, x = unit(4, 6, 2, order=order, projection=projection), image(4)
    h, f = u.terms(x)
    torch.testing.assert_close(f, residual(u, x, order, 2))
    if projection == "A":
        expected = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 0, 2))
    elif order == "full_preactivation":
        expected = conv(torch.relu(normed(x, u.bn1)), u.shortcut, 2)
    else:
        expected = conv(torch.relu(x) if order in PREACTIVATION else x, u.downsample[0], 2)
        if order != "bn_after_addition":
            expected = normed(expected, u.downsample[1])
    torch.testing.assert_close(h, expected)
    torch.testing.assert_close(u(x), after(u, h + f, order))


@pytest.mark.parametrize("order", PREACTIVATION)
def test_first_unit(order):
    """ "shared": the activation comes before the paths split. "none": it came with x."""
    shared, x = unit(6, 6, order=order, preactivation="shared"), image(6)
    a = torch.relu(normed(x, shared.bn1) if order == "full_preactivation" else x)
    h, f = shared.terms(x)
    torch.testing.assert_close(h, a)
    torch.testing.assert_close(f, residual(shared, x, order))
    bare = unit(6, 6, order=order, preactivation="none")
    assert hasattr(bare, "bn1") == (order != "full_preactivation")
    for name in ("conv1", "conv2", "bn2", *(["bn1"] if hasattr(bare, "bn1") else [])):
        bare.get_submodule(name).load_state_dict(shared.get_submodule(name).state_dict())
    torch.testing.assert_close(bare(a), shared(x))


@pytest.mark.parametrize("block", ["basic", "bottleneck"])
@pytest.mark.parametrize("stride_in", ["1x1", "3x3"])
def test_geometry(block, stride_in):
    u = ResidualUnit(8, 4, 2, block=block, stride_in=stride_in)
    strides = [m.stride[0] for m in (u.conv1, u.conv2)]
    assert strides == ([1, 2] if (block, stride_in) == ("bottleneck", "3x3") else [2, 1])
    assert u(torch.randn(2, 8, 9, 9)).shape == (2, 16 if block == "bottleneck" else 4, 5, 5)


def test_pre_activation_unit_is_the_one_that_has_a_fused_twin():
    for block, twin in (
        ("basic", rf.reference.PreActBasicBlock),
        ("bottleneck", rf.reference.PreActBottleneck),
    ):
        for stride in (1, 2):
            u, v = unit(8, 8, stride, block=block, order="full_preactivation"), twin(8, 8, stride).double()
            assert list(u.state_dict()) == list(v.state_dict())
            v.load_state_dict(u.state_dict())
            x = image(8)
            assert torch.equal(u(x), v(x))
            for mine, theirs in zip(u.terms(x), v.terms(x), strict=True):
                assert torch.equal(mine, theirs)
            fused = getattr(rf.nn, twin.__name__)(8, 8, stride).double()
            fused.load_state_dict(u.state_dict())
            h, f = fused.terms(x)
            torch.testing.assert_close(fused(x), fused.after_addition(h + f))


def test_equation_5():
    """x_L = x_l + sum F, for identity shortcuts and identity f, whatever the units hold."""
    units = [unit(6, 6, order="full_preactivation") for _ in range(4)]
    x = first = image(6)
    total = torch.zeros_like(x)
    for u in units:
        h, f = u.terms(x)
        assert torch.equal(h, x)
        total += f
        x = u(x)
    torch.testing.assert_close(x, first + total)


def test_equation_8():
    """x_L = (product of lambdas) x_l + sum of F, scaled."""
    options = {"shortcut_scale": 0.5, "residual_scale": 1.0}
    x = first = image(6)
    total = torch.zeros_like(x)
    for _ in range(4):
        u = unit(6, 6, order="full_preactivation", shortcut="constant_scaling", shortcut_options=options)
        total = 0.5 * total + u.terms(x)[1]
        x = u(x)
    torch.testing.assert_close(x, 0.5**4 * first + total)


@pytest.mark.parametrize(
    "order, shortcut, block", list(itertools.product(ORDERS, SHORTCUTS, ["basic", "bottleneck"]))
)
def test_a_unit_is_its_terms(order, shortcut, block):
    u = unit(4, 4, 2, order=order, shortcut=shortcut, block=block).eval()
    x = image(4)
    h, f = u.terms(x)
    assert h.shape == f.shape and torch.equal(u(x), u.after_addition(f + h))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"order": "post"}, r"order should be one of 'original', .*, but got 'post'"),
        ({"shortcut": "highway"}, r"shortcut should be one of 'identity', .*, but got 'highway'"),
        ({"projection": "D"}, "projection should be one of 'A', 'B', 'C', but got 'D'"),
        ({"block": "wide"}, "block should be one of 'basic', 'bottleneck', but got 'wide'"),
        ({"stride_in": "5x5"}, "stride_in should be one of '1x1', '3x3', but got '5x5'"),
        ({"dropout": 1.0}, r"dropout should be in \[0, 1\), but got 1.0"),
        ({"shortcut_options": {"p": 0.1}}, "shortcut 'identity' has no option 'p': it has no options"),
        ({"shortcut": "dropout", "shortcut_options": {"rate": 0.1}}, "no option 'rate': its options are p"),
        ({"shortcut": "dropout", "shortcut_options": {"p": 1}}, r"p, .* should be in \[0, 1\), but got 1"),
        (
            {"shortcut": "constant_scaling", "shortcut_options": {"shortcut_scale": float("nan")}},
            "finite number, but got nan",
        ),
        (
            {"shortcut": "exclusive_gating", "shortcut_options": {"gate_bias": "-6"}},
            "gate_bias should be a finite number",
        ),
        (
            {"shortcut": "exclusive_gating", "shortcut_options": {"gate_std": -1}},
            "gate_std should not be negative",
        ),
        (
            {"shortcut": "exclusive_gating", "shortcut_options": {"gate_input": "y"}},
            "should be 'x' or 'preactivation'",
        ),
        (
            {"shortcut": "exclusive_gating", "shortcut_options": {"gate_input": "preactivation"}},
            "have none, use 'x'",
        ),
        ({"shortcut": "dropout", "projection": "C"}, "leaves 'dropout' nothing to act on: use 'A' or 'B'"),
        ({"shortcut": "none", "projection": "C"}, "leaves 'none' nothing to act on"),
        ({"shortcut": "conv", "projection": "A"}, "projection 'A' has no place"),
        ({"preactivation": "shared"}, "units of order 'original' do not activate their input"),
    ],
)
def test_combinations_without_meaning(options, message):
    with pytest.raises(ValueError, match=message):
        ResidualUnit(4, 4, **options)


def test_zeros_cannot_take_channels_away():
    with pytest.raises(ValueError, match="cannot reduce 8 channels to 4: use 'B'"):
        ResidualUnit(8, 4, projection="A")
