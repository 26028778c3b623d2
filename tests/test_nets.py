"""All nets by name: published sizes, defaults of the papers, options, fused against plain."""

import copy
import itertools
import re

import pytest
import torch
from fuse_cases import randomize
from tolerances import assert_trusted
from torch import nn

import resnet_fused as rf
from resnet_fused.models import (
    DenseNet,
    PreActResNetCifar,
    ResNet,
    WideResNetCifar,
    create_model,
    list_models,
)
from resnet_fused.nn.reference import ORDERS, SHORTCUTS

pytestmark = pytest.mark.usefixtures("one_thread")

#: Millions of parameters, with as many digits as printed: He et al. 2015, table 6, and 2016, section 5
#: (CIFAR); Zagoruyko and Komodakis, tables 4 and 5; Huang et al., table 2; torchvision's documentation
#: (ImageNet).
PUBLISHED = {
    "resnet20_cifar": 0.27, "resnet32_cifar": 0.46, "resnet44_cifar": 0.66, "resnet56_cifar": 0.85,
    "resnet110_cifar": 1.7, "resnet164_cifar": 1.7, "resnet1202_cifar": 19.4,
    "preact_resnet110_cifar": 1.7, "preact_resnet164_cifar": 1.7,
    "plain20_cifar": 0.27, "plain56_cifar": 0.85,
    "wrn16_4_cifar": 2.7, "wrn28_10_cifar": 36.5, "wrn40_4_cifar": 8.9,
    "densenet_bc100_12_cifar": 0.8, "densenet_bc250_24_cifar": 15.3,
    "resnet18": 11.7, "resnet34": 21.8, "resnet50": 25.6, "resnet101": 44.5, "resnet152": 60.2,
    "densenet121": 8.0, "densenet169": 14.1, "densenet201": 20.0,
}  # fmt: skip
#: Exact counts that other implementations print of the same nets (CIFAR: shortcuts A, ten classes).
EXACT = {
    "resnet20_cifar": 269_722, "resnet110_cifar": 1_727_962, "wrn28_10_cifar": 36_479_194,
    "densenet_bc100_12_cifar": 769_162, "resnet50": 25_557_032, "densenet121": 7_978_856,
}  # fmt: skip


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def net(blocks=(1, 2), widths=(8, 12), block="basic", fused=True, **options) -> ResNet:
    torch.manual_seed(0)
    return ResNet(blocks, widths, block, stem_channels=8, fused=fused, **options)


def images(channels=3, size=12, dtype=torch.float32):
    x = torch.randn(4, channels, size, size, dtype=dtype)
    return x.contiguous(memory_format=torch.channels_last)  # dropout draws in the order of memory


def both(make, **options):
    """The fused and the plain net after one seed, with norms that are told apart."""
    made = []
    for fused in (True, False):
        torch.manual_seed(0)
        made.append(randomize(make(fused=fused, **options).to(memory_format=torch.channels_last)))
    fused, plain = made
    plain.load_state_dict(fused.state_dict())
    return fused, plain


def run(model, x):
    """Output, parameter gradients, and buffers after a training step's forward and backward."""
    torch.manual_seed(1)
    y = model(x)
    (y.square().sum() + y.sum()).backward()
    named = {"output": y.detach(), **{n: p.grad for n, p in model.named_parameters()}}
    return named | {n: b for n, b in model.named_buffers() if b.is_floating_point()}


def assert_same_in_float64(make, **options):
    """Wiring, not rounding: what differs by more than 1e-9 is another function."""
    fused, plain = both(make, dtype=torch.float64, **options)
    x = images(dtype=torch.float64)
    for training in (True, False):
        mine, theirs = run(fused.train(training), x), run(plain.train(training), x)
        for name, value in mine.items():
            scale = theirs[name].abs().max().item()
            torch.testing.assert_close(value, theirs[name], rtol=0, atol=1e-9 * max(scale, 1.0), msg=name)


def test_names():
    names = list_models()
    assert len(set(names)) == len(names) and set(PUBLISHED) < set(names)
    assert names.index("resnet1202_cifar") < names.index("preact_resnet20_cifar") < names.index("resnet18")
    assert names[-1] == "densenet201"


@pytest.mark.parametrize("name", list_models())
def test_every_name_gives_its_net(name):
    """On the meta device: data for none of them. Plain and fused have the same keys."""
    plain = create_model(name, fused=False, device="meta")
    classifier = plain.classifier if isinstance(plain, DenseNet) else plain.fc
    assert classifier.out_features == (10 if name.endswith("_cifar") else 1000)
    if name in PUBLISHED:
        digits = len(str(PUBLISHED[name]).partition(".")[2])
        assert round(parameters(plain) / 1e6, digits) == PUBLISHED[name]
    if name in EXACT:
        assert parameters(plain) == EXACT[name]
    if "1001" in name or "1202" in name:
        return  # seconds each, and shorter nets have the same units
    fused = create_model(name, device="meta")
    assert [(k, v.shape) for k, v in fused.state_dict().items()] == [
        (k, v.shape) for k, v in plain.state_dict().items()
    ]


@pytest.mark.parametrize("name", ["resnet1001_cifar", "preact_resnet1001_cifar"])
def test_published_size_of_the_1001_layers(name):
    """10.2 M are the weights of the layers; with gamma and beta of 1,000 norms it is 10.3."""
    layers = [
        m
        for m in create_model(name, fused=False, device="meta").modules()
        if isinstance(m, (nn.Conv2d, nn.Linear))
    ]
    assert round(sum(map(parameters, layers)) / 1e6, 1) == 10.2


def depth_of(model: nn.Module) -> int:
    """Layers with weights on the way through, those of shortcuts and gates left out."""
    aside = ("shortcut", "downsample.0", "gate")
    return sum(
        isinstance(module, (nn.Conv2d, nn.Linear)) and not name.endswith(aside)
        for name, module in model.named_modules()
    )


@pytest.mark.parametrize("name", [n for n in list_models() if n.startswith(("resnet", "preact", "plain"))])
def test_depth_is_the_number_of_layers(name):
    model = create_model(name, fused=False, device="meta")
    assert depth_of(model) == int(re.search(r"\d+", name).group())
    units = model.residual_units()
    assert all(model.get_submodule(unit_name) is unit for unit_name, unit in units)
    per_unit = 3 if hasattr(units[0][1], "conv3") else 2
    assert len(units) * per_unit + 2 == depth_of(model)


def test_defaults_of_the_papers():
    """2015: A on CIFAR, B on ImageNet; 2016: bottlenecks project where they change dimensions."""
    assert isinstance(
        create_model("resnet20_cifar", device="meta").layer2[0].downsample, rf.reference.ZeroPaddedIdentity
    )
    assert isinstance(create_model("resnet164_cifar", device="meta").layer1[0].downsample[0], nn.Conv2d)
    model = create_model("preact_resnet50", device="meta")
    assert not hasattr(model.layer1[0], "bn1") and model.layer2[0].conv2.stride == (2, 2)
    assert create_model("resnet164_cifar", device="meta").layer2[0].conv1.stride == (2, 2)
    ordered = create_model("resnet20_cifar", order="full_preactivation", device="meta")
    assert (
        ordered.layer1[0].preactivation == "shared" and hasattr(ordered, "bn") and not hasattr(ordered, "bn1")
    )


def test_nets_whose_units_have_fused_twins():
    """The options' own defaults keep them; so do the keys of what existed before."""
    same = {
        "order": "full_preactivation",
        "shortcut": "identity",
        "projection": "B",
        "first_activation": "residual",
    }
    for options in ({}, same, {"shortcut_options": {}}):
        assert type(create_model("preact_resnet20_cifar", device="meta", **options)) is PreActResNetCifar
        assert type(create_model("wrn16_4_cifar", device="meta", dropout=0.0, **options)) is WideResNetCifar
    for options in ({"projection": "A"}, {"shortcut": "dropout"}, {"order": "original"}, {"dropout": 0.3}):
        assert type(create_model("preact_resnet20_cifar", device="meta", **options)) is ResNet
    general = create_model("preact_resnet20_cifar", shortcut="dropout", device="meta")
    native = create_model("preact_resnet20_cifar", device="meta")
    assert list(general.state_dict()) == list(native.state_dict())


@pytest.mark.parametrize("name, options", [
    ("resnet20_cifar", {}), ("plain20_cifar", {}), ("preact_resnet20_cifar", {"projection": "A"}),
    ("resnet20_cifar",
     {"shortcut": "exclusive_gating", "shortcut_options": {"gate_bias": -3, "gate_std": 0.1}}),
])  # fmt: skip
def test_same_seed_same_parameters(name, options):
    made = []
    for fused in (True, False):
        torch.manual_seed(0)
        made.append(create_model(name, fused=fused, **options))
    fused, plain = (m.state_dict() for m in made)
    assert list(fused) == list(plain) and all(torch.equal(fused[k], plain[k]) for k in fused)
    made[0].load_state_dict(plain), made[1].load_state_dict(fused)
    gates = {k: v for k, v in fused.items() if "gate" in k}
    assert len(gates) == (18 if options.get("shortcut") == "exclusive_gating" else 0)
    assert all((v == -3).all() for k, v in gates.items() if k.endswith("bias"))


@pytest.mark.parametrize("order, shortcut", list(itertools.product(ORDERS, SHORTCUTS)))
def test_every_order_with_every_shortcut(order, shortcut):
    projection = "C" if shortcut == "conv" else "A"
    assert_same_in_float64(net, order=order, shortcut=shortcut, projection=projection)


@pytest.mark.parametrize("options", [
    {"block": "bottleneck", "projection": "B"},
    {"block": "bottleneck", "projection": "B", "order": "full_preactivation", "stem": "imagenet",
     "stride_in": "3x3"},
    {"block": "bottleneck", "projection": "A", "order": "relu_only_preactivation", "stem": "imagenet"},
    {"projection": "B", "stem": "imagenet"},
    {"projection": "B", "order": "full_preactivation", "first_activation": "residual"},
    {"projection": "C", "order": "full_preactivation"},
    {"projection": "B", "order": "full_preactivation", "dropout": 0.3},
    {"order": "full_preactivation", "unit_options": {"negative_slope": 0.1, "bias": True, "momentum": None}},
], ids=str)  # fmt: skip
def test_nets_in_float64(options):
    assert_same_in_float64(net, **options)


def wide(**options):
    return WideResNetCifar(10, 1, **options)


def dense(**options):
    return DenseNet([3, 2], 4, **options)


def dense_imagenet(**options):
    return DenseNet([2, 2, 1], 4, stem="imagenet", dropout=0.2, **options)


@pytest.mark.parametrize("make", [wide, dense])
def test_nets_of_fused_units_in_float64(make):
    assert_same_in_float64(make)


def test_dense_net_with_dropout_in_float64():
    """Dropout comes after the convolution: the statistics are then those of what it left."""
    fused, plain = both(dense_imagenet, dtype=torch.float64)
    x = images(size=32, dtype=torch.float64)
    mine, theirs = run(fused, x), run(plain, x)
    for name, value in mine.items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-8, atol=1e-10, msg=name)


@pytest.mark.parametrize("make, options", [
    (net, {}), (net, {"order": "bn_after_addition"}), (net, {"order": "full_preactivation"}),
    (net, {"shortcut": "exclusive_gating", "order": "full_preactivation"}), (net, {"shortcut": "none"}),
    (net, {"block": "bottleneck", "projection": "B"}), (wide, {}), (dense, {}),
])  # fmt: skip
def test_trust_rule(make, options):
    """The outputs in float32, in training and in inference, against float64."""
    fused, plain = both(make, **options)
    exact = copy.deepcopy(plain).double()
    x = images()
    for training in (True, False):
        with torch.no_grad():
            values = [m.train(training)(x.to(next(m.parameters()).dtype)) for m in (fused, plain, exact)]
        assert_trusted(*values, name=f"training={training}")


@pytest.mark.parametrize(
    "options", [{}, {"order": "relu_only_preactivation"}, {"shortcut": "shortcut_only_gating"}]
)
def test_verified(options):
    """Outputs, gradients and running statistics, as rf.verify has it."""
    result = rf.verify(randomize(net(projection="A", **options)), images())
    assert result and result.units == 3, str(result)


#: What docs/nets.md says is fused: operators, of the three units of net().
FUSED = {
    ("original", "identity"): {"ConvOp": 3, "NormOp": 3, "AddOp": 3},
    ("original", "exclusive_gating"): {"ConvOp": 3, "AddOp": 3},
    ("bn_after_addition", "identity"): {"ConvOp": 3},
    ("relu_before_addition", "identity"): {"ConvOp": 3},
    ("relu_only_preactivation", "identity"): {"ConvOp": 3},
    ("full_preactivation", "identity"): {
        "UnitOp": 1,
        "ConvOp": 3,
    },  # the first unit and that with A are two or one each
    ("full_preactivation", "conv"): {"UnitOp": 3},
    ("full_preactivation", "dropout"): {"ConvOp": 5},
    ("full_preactivation", "constant_scaling"): {"ConvOp": 5},
}


@pytest.mark.parametrize("order, shortcut", FUSED)
def test_what_is_fused(order, shortcut):
    model = net(order=order, shortcut=shortcut, projection="C" if shortcut == "conv" else "A")
    found = {}
    for plan in rf.fusion.analysis.analyze(model).units.values():
        for op in plan.found.ops.values():
            found[type(op).__name__] = found.get(type(op).__name__, 0) + 1
    assert found == FUSED[order, shortcut]


def test_plain_net_fuses_across_its_units():
    """Without additions nothing separates one unit from the next."""
    found = rf.explain(net(shortcut="none"))
    assert (found.convs_fused, found.convs_found) == (6, 6)


def test_units_of_wide_nets_run_whole(unit_calls):
    wide()(images())
    assert unit_calls == [(True, True)] * 3


def test_dense_blocks_share_statistics():
    """One pass for statistics for each block, over its input; a plain block makes one for each norm."""
    model = dense()
    with rf.record_dispatch() as log:
        model(images())
    assert sum(record.primitive == "channel_stats" for record in log) == 2
    assert sum(record.primitive == "preact_conv_forward" for record in log) == 2 * 5 + 1
    with rf.record_dispatch() as log:
        model.eval()(images())
    assert not any(record.primitive == "channel_stats" for record in log)


@pytest.mark.parametrize(
    "make",
    [wide, dense, lambda: ResNet([1, 1], [16, 32], order="full_preactivation")],
    ids=["wide", "dense", "resnet"],
)
def test_ends_in_one_pass_each_way(make):
    """The last norm, its activation and the average pool; PyTorch's, and equal, with a hook on the norm."""
    model = make().to(memory_format=torch.channels_last)
    norm = getattr(model.features, model.last_norm) if isinstance(model, DenseNet) else model.bn
    x = images()
    with rf.record_dispatch() as log:
        expected = model(x)
        expected.sum().backward()
    ran = [record.primitive for record in log]
    assert ran.count("bn_act_pool_forward") == ran.count("bn_act_pool_backward") == 1
    seen = []
    norm.register_forward_hook(lambda *args: seen.append(1))
    with rf.record_dispatch() as log:
        out = model(x)
    assert seen and not any(record.primitive.startswith("bn_act_pool") for record in log)
    torch.testing.assert_close(out, expected)


def test_dense_layers_that_are_not_what_they_were():
    """A frozen norm, a hook on a layer, a hook on a norm: the same function, and the hooks run."""
    fused, plain = both(dense, dtype=torch.float64)
    seen = []
    for model in (fused, plain):
        block = model.features.denseblock1
        block.denselayer1.norm1.eval()
        block.denselayer2.register_forward_hook(lambda *_: seen.append("layer"))
        block.denselayer3.norm2.register_forward_hook(lambda *_: seen.append("norm"))
        model.features.transition1.norm.eval()
    x = images(dtype=torch.float64)
    mine, theirs = run(fused, x), run(plain, x)
    assert seen == ["layer", "norm"] * 2
    for name, value in mine.items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-9, atol=1e-11, msg=name)


@pytest.mark.parametrize("make", [wide, dense])
def test_compiled_net_is_one_graph(make):
    fused, _ = both(make)
    twin = copy.deepcopy(fused)
    x = images()
    y, expected = torch.compile(fused, fullgraph=True, backend="aot_eager")(x), twin(x)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "make, options", [(net, {}), (net, {"shortcut": "exclusive_gating"}), (wide, {}), (dense, {})]
)
def test_autocast(make, options):
    fused, plain = both(make, **options)
    x = images()
    losses = []
    for model in (fused, plain):
        with torch.autocast("cpu", torch.bfloat16):
            y = model(x)
        assert y.dtype == torch.bfloat16
        losses.append(nn.functional.cross_entropy(y.float(), torch.arange(4)))
        losses[-1].backward()
    # bfloat16 through a dozen layers
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=0.05)
    assert all(p.grad.dtype == torch.float32 for p in fused.parameters())


@pytest.mark.parametrize("order", ORDERS)
def test_a_net_is_its_units(order):
    """residual_units in the order in which they run, and terms, are the net: what an analysis relies on."""
    model = net(order=order, fused=False, dtype=torch.float64).eval()
    inputs = {}
    for name, unit in model.residual_units():

        def note(module, args, out, name=name):
            inputs[name] = (args[0], out)

        unit.register_forward_hook(note)
    model(images(dtype=torch.float64))
    assert (
        list(inputs) == [name for name, _ in model.residual_units()] == ["layer1.0", "layer2.0", "layer2.1"]
    )
    before = None
    for name, unit in model.residual_units():
        x, out = inputs[name]
        assert before is None or before is x
        h, f = unit.terms(x)
        assert torch.equal(unit.after_addition(f + h), out)
        before = out


def torchvision_twin(name):
    models = pytest.importorskip("torchvision", reason="torchvision is not installed").models
    return models.get_model(name, weights=None)


@pytest.mark.parametrize(
    "name", [f"resnet{d}" for d in (18, 34, 50, 101, 152)] + [f"densenet{d}" for d in (121, 169, 201)]
)
def test_keys_are_torchvisions(name):
    with torch.device("meta"):
        theirs = torchvision_twin(name).state_dict()
    ours = create_model(name, fused=False, device="meta").state_dict()
    assert [(k, v.shape) for k, v in ours.items()] == [(k, v.shape) for k, v in theirs.items()]


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "densenet121"])
def test_checkpoints_of_torchvision(name):
    theirs = torchvision_twin(name).eval()
    for module in theirs.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, 0, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = theirs(x)
        assert expected.abs().max() > 0.1
        for fused in (True, False):
            ours = create_model(name, fused=fused).eval()
            ours.load_state_dict(theirs.state_dict())
            # 1e-5 of the largest: float32 through up to 120 layers, in another order; a wrong layer gives >
            # 1e-1
            torch.testing.assert_close(ours(x), expected, rtol=0, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize(
    "name, options, message",
    [
        (
            "resnet20_cifar",
            {"shortcuts": "conv"},
            "resnet20_cifar has no option 'shortcuts': its options are order, shortcut,",
        ),
        (
            "densenet121",
            {"order": "original"},
            "densenet121 has no option 'order': its options are dropout, unit_options",
        ),
        (
            "plain20_cifar",
            {"shortcut": "identity"},
            "a plain net has no shortcuts, so it takes no shortcut: use 'resnet20_cifar'",
        ),
        ("plain20_cifar", {"projection": "B"}, "takes no projection"),
        ("resnet20_cifar", {"order": "bn_first"}, "order should be one of"),
        (
            "resnet20_cifar",
            {"first_activation": "residual"},
            "first_activation is an option of pre-activation orders",
        ),
        (
            "preact_resnet18",
            {"first_activation": "residual"},
            "the ImageNet stem activates before its max pool",
        ),
        (
            "preact_resnet20_cifar",
            {"first_activation": "none"},
            "first_activation should be one of 'before_split', 'residual'",
        ),
        ("preact_resnet20_cifar", {"shortcut_options": {"p": 0.5}}, "shortcut 'identity' has no option 'p'"),
        ("resnet20_cifar", {"shortcut": "conv", "projection": "A"}, "projection 'A' has no place"),
        (
            "preact_resnet20_cifar",
            {"shortcut": "dropout", "projection": "C"},
            "leaves 'dropout' nothing to act on",
        ),
        ("wrn16_4_cifar", {"dropout": 1.5}, r"dropout should be in \[0, 1\)"),
        ("densenet_bc100_12_cifar", {"dropout": -0.1}, r"dropout should be in \[0, 1\)"),
    ],
)
def test_combinations_without_meaning(name, options, message):
    with pytest.raises(ValueError, match=message):
        create_model(name, device="meta", **options)


def test_wrong_depths_and_lengths():
    with pytest.raises(ValueError, match=r"Wide ResNet should be 6n \+ 4 with n >= 1, but got 4"):
        WideResNetCifar(4, 1)
    with pytest.raises(ValueError, match="width of a Wide ResNet should be at least 1, but got 0"):
        WideResNetCifar(10, 0)
    with pytest.raises(ValueError, match="blocks and widths should be of one length, but got 2 and 3"):
        ResNet([1, 1], [8, 8, 8])
    with pytest.raises(ValueError, match="stem should be 'cifar' or 'imagenet', but got 'mnist'"):
        DenseNet([1], 4, stem="mnist")
