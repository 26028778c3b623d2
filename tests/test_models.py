"""Nets by name: published sizes, initialisation, fused against plain."""

import copy
import math

import pytest
import torch
from torch import nn

import resnet_fused as rf
from resnet_fused.models import PreActResNetCifar, create_model, list_models

#  millions of parameters: He et al. 2016 (Deep Residual Learning), table 6, and (Identity Mappings), tables 1
# and 4
PUBLISHED = {20: 0.27, 32: 0.46, 44: 0.66, 56: 0.85, 110: 1.7, 1202: 19.4, 164: 1.7, 1001: 10.2}


def on_meta(name: str, fused: bool = True) -> nn.Module:
    return create_model(name, fused=fused, device="meta")


def test_names():
    cifar = (20, 29, 32, 44, 56, 110, 164, 1001, 1202)
    assert list_models()[:18] == [f"{kind}{d}_cifar" for kind in ("resnet", "preact_resnet") for d in cifar]
    assert rf.models.create_model is create_model


@pytest.mark.parametrize("depth", PUBLISHED)
def test_published_number_of_parameters(depth):
    model = on_meta(f"preact_resnet{depth}_cifar")
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    # The published sizes have two digits; the paper's basic nets have shortcuts without parameters, ours 1x1
    # projections (2,560 parameters in all).
    assert millions == pytest.approx(PUBLISHED[depth], rel=0.02)


@pytest.mark.parametrize("name", [f"preact_resnet{d}_cifar" for d in (20, 29, 32, 44, 56, 110, 164, 1001, 1202)])
def test_depth_is_the_number_of_layers_with_weights(name):
    model = on_meta(name)
    shortcuts = [module for key, module in model.named_modules() if key.endswith("shortcut")]
    layers = [module for module in model.modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    assert name == f"preact_resnet{len(layers) - len(shortcuts)}_cifar"
    assert len(shortcuts) == (2 if isinstance(model.layer1[0], rf.nn.PreActBasicBlock) else 3)


def test_geometry_of_the_bottleneck_net():
    """resnet-pre-act.lua of the authors: widths 16, 64, 128, 256, the stride on the first 1x1 convolution."""
    model = on_meta("preact_resnet164_cifar")
    assert [len(stage) for stage in (model.layer1, model.layer2, model.layer3)] == [18, 18, 18]
    assert [stage[-1].conv3.out_channels for stage in (model.layer1, model.layer2, model.layer3)] == [
        64,
        128,
        256,
    ]
    unit = model.layer2[0]
    assert unit.conv1.stride == unit.shortcut.stride == (2, 2) and unit.conv2.stride == unit.conv3.stride == (
        1,
        1,
    )
    assert model.layer1[0].shortcut is not None and model.layer1[0].conv1.stride == (1, 1)


def test_unknown_name():
    with pytest.raises(
        ValueError, match="Unknown model 'preact_resnet21_cifar'. Did you mean .*preact_resnet20_cifar"
    ):
        create_model("preact_resnet21_cifar")
    with pytest.raises(ValueError, match="Unknown model 'vgg'. Known models: resnet20_cifar, "):
        create_model("vgg")


def test_wrong_depth_or_block():
    with pytest.raises(
        ValueError, match=r"depth of a net of basic units should be 6n \+ 2 with n >= 1, but got 21"
    ):
        PreActResNetCifar(21)
    with pytest.raises(ValueError, match=r"bottleneck units should be 9n \+ 2 with n >= 1, but got 2"):
        PreActResNetCifar(2, "bottleneck")
    with pytest.raises(ValueError, match="block should be 'basic' or 'bottleneck', but got 'wide'"):
        PreActResNetCifar(20, "wide")


def test_initialisation_is_the_papers():
    torch.manual_seed(0)
    model = create_model("preact_resnet56_cifar")
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            expected = math.sqrt(2 / (module.kernel_size[0] * module.kernel_size[1] * module.out_channels))
            assert module.weight.std().item() == pytest.approx(
                expected, rel=6 / math.sqrt(2 * module.weight.numel())
            )
            assert module.bias is None
        elif isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all() and (module.bias == 0).all()
    assert (model.fc.bias == 0).all() and model.fc.weight.abs().max() <= 1 / math.sqrt(64)


def pair(depth=8, block="basic", **options) -> tuple[nn.Module, nn.Module]:
    made = []
    for fused in (True, False):
        torch.manual_seed(0)
        made.append(PreActResNetCifar(depth, block, fused=fused, **options))
    return tuple(made)


@pytest.mark.parametrize("block, depth", [("basic", 14), ("bottleneck", 20)])
def test_same_seed_same_parameters_and_state_dicts_fit_both_ways(block, depth):
    fused, plain = pair(depth, block)
    assert list(fused.state_dict()) == list(plain.state_dict())
    for key, value in fused.state_dict().items():
        assert torch.equal(value, plain.state_dict()[key])
    fused(torch.randn(2, 3, 16, 16))
    plain.load_state_dict(fused.state_dict())
    fused.load_state_dict(plain.state_dict())
    assert type(plain.layer1[0]).__mro__[0].__module__ == "resnet_fused.nn.reference.pre_activation"


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(
    "in_channels, memory_format",
    [(3, torch.contiguous_format), (3, torch.channels_last), (1, torch.contiguous_format)],
)
@pytest.mark.parametrize("block, depth", [("basic", 14), ("bottleneck", 20)])
def test_fused_net_against_the_plain_one(block, depth, in_channels, memory_format, training):
    fused, plain = (model.train(training) for model in pair(depth, block, in_channels=in_channels))
    x = torch.randn(6, in_channels, 16, 16).contiguous(memory_format=memory_format)
    labels = torch.arange(6)
    losses = []
    for model in (fused, plain):
        model.to(memory_format=memory_format)
        losses.append(nn.functional.cross_entropy(model(x), labels))
        losses[-1].backward()
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-5)
    for (name, parameter), other in zip(fused.named_parameters(), plain.parameters()):
        difference = (parameter.grad - other.grad).norm() / other.grad.norm()
        assert difference < 1e-4, (
            f"{name}: {difference}"
        )  # float32, through up to 20 layers; a wrong term gives > 1e-2
    for (name, buffer), other in zip(fused.named_buffers(), plain.buffers()):
        torch.testing.assert_close(
            buffer, other, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_autocast_trains():
    fused, plain = pair(14)
    x = torch.randn(8, 3, 16, 16)
    losses = []
    for model in (fused, plain):
        with torch.autocast("cpu", torch.bfloat16):
            y = model(x)
        assert y.dtype == torch.bfloat16
        losses.append(nn.functional.cross_entropy(y.float(), torch.arange(8)))
        losses[-1].backward()
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=0.02)
    assert all(parameter.grad.dtype == torch.float32 for parameter in fused.parameters())


def test_statistics_travel_through_the_whole_net(unit_calls):
    fused, _ = pair(14)
    fused(torch.randn(2, 3, 16, 16))
    assert unit_calls == [(True, True)] * 6  # from the first convolution to the last norm


def test_options_reach_the_units():
    model = PreActResNetCifar(
        8, unit_options={"eps": 0.01, "momentum": None, "negative_slope": 0.1, "bias": True}
    )
    assert model.bn.eps == model.layer3[0].bn2.eps == 0.01 and model.bn.momentum is None
    assert (
        model.layer2[0].negative_slope == model.negative_slope == 0.1
        and model.layer1[0].conv2.bias is not None
    )
    assert (
        create_model("preact_resnet20_cifar", num_classes=7, dtype=torch.float64).fc.weight.dtype
        == torch.float64
    )


def test_compiled_net_is_one_graph():
    fused, _ = pair(8)
    twin = copy.deepcopy(fused)
    x = torch.randn(4, 3, 16, 16)
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    y, expected = compiled(x), twin(x)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-6)
    y.square().sum().backward()
    expected.square().sum().backward()
    for parameter, other in zip(fused.parameters(), twin.parameters()):
        torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-4, atol=1e-4)
