"""fuse on the nets of timm and torchvision."""

import copy

import fuse_cases as cases
import pytest
import torch

import resnet_fused as rf
from resnet_fused.fusion.classes import CONVOLUTION

pytestmark = pytest.mark.usefixtures("one_thread")


def timm_model(name, **options):
    timm = pytest.importorskip("timm", reason="timm is not installed")
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=10, **options)


def torchvision_model(name, **options):
    models = pytest.importorskip("torchvision", reason="torchvision is not installed").models
    torch.manual_seed(0)
    return models.get_model(name, weights=None, num_classes=10, **options)


def images(size=64, dtype=torch.float32):
    x = torch.randn(2, 3, size, size, dtype=dtype)
    return x.contiguous(memory_format=torch.channels_last)


def convolutions(model, x):
    """How many of them run behind norms in fused operators."""
    outside = [m for m in model.modules() if getattr(type(m), "_resnet_fused_kind", None) == CONVOLUTION]
    with rf.record_dispatch() as log:
        model(x)
    return sum(record.primitive == "preact_conv_forward" for record in log) - len(outside)


def same_in_float64(model, options=None):
    """Train and eval, forward, backward and running statistics, in float64: wiring, not rounding."""
    plain = cases.randomize(model).double()
    fused = rf.fuse(copy.deepcopy(plain), memory_format=None)
    for training in (True, False):
        fused.train(training), plain.train(training)
        for module in (fused, plain):
            (options or (lambda m: None))(module)
        cases.assert_same(fused, plain, images(dtype=torch.float64), rtol=1e-7)
    return fused


def resnetv2_names():
    """Every resnetv2 of the installed timm whose norms are BatchNormAct2d; by name, nothing is built."""
    try:
        import timm
    except ImportError:
        return ["resnetv2_18"]
    others = ("_bit", "_gn", "_evos", "_frn")
    return [name for name in timm.list_models("resnetv2*") if not name.endswith(others)]


@pytest.mark.parametrize("name", resnetv2_names())
def test_every_resnetv2_with_batch_norm(name):
    """All units fuse, and what the net gives is what the plain net gives."""
    model = timm_model(name).eval()
    found = rf.explain(model)
    blocks = sum(type(m).__name__ in ("PreActBasic", "PreActBottleneck") for m in model.modules())
    deep_stem = name[-1] in "dt"
    assert found.units_fused == found.units_found == blocks + deep_stem
    # In d and t nets an average pool reads the activation too, where there is a stride: conv1 stays there.
    pooled = 3 if deep_stem else 0
    assert found.convs_fused == found.convs_found - pooled
    x = images(32)
    with torch.no_grad():
        expected = model(x)
        fused = rf.fuse(copy.deepcopy(model))
        assert convolutions(fused, x) == found.convs_fused
        torch.testing.assert_close(fused(x), expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
    assert rf.unfuse(fused).state_dict().keys() == model.state_dict().keys()


@pytest.mark.parametrize("name, options", [
    ("resnetv2_18", {"zero_init_last": True}), ("resnetv2_18d", {"drop_path_rate": 0.4}),
    ("resnetv2_50", {"drop_path_rate": 0.4}), ("resnetv2_50t", {}), ("densenet121", {}),
    ("densenetblur121d", {"proj_drop_rate": 0.2, "memory_efficient": True}),
])  # fmt: skip
def test_timm_in_float64(name, options):
    fused = same_in_float64(timm_model(name, **options))
    if "drop_path_rate" in options:
        with rf.record_dispatch() as log:
            fused.train()(images(dtype=torch.float64))
        assert "residual_add" in [record.primitive for record in log]  # with stochastic depth as its gate


@pytest.mark.parametrize("name, options, convs", [
    ("densenet121", {}, 119), ("densenet121", {"memory_efficient": True, "drop_rate": 0.1}, 61),
    # Behind a norm 32 and 8; conv1 and the projections give the statistics of what they make.
    ("resnet50", {}, 32 + 16 + 4), ("resnet18", {}, 8 + 8 + 3),
])  # fmt: skip
def test_torchvision_in_float64(name, options, convs):
    fused = same_in_float64(torchvision_model(name, **options)).train()
    x = images(dtype=torch.float64).requires_grad_()
    assert convolutions(fused, x) == convs  # memory_efficient: the checkpointed half stays as it is
    if name.startswith("resn"):
        with rf.record_dispatch() as log:
            fused(x)
        assert [r.primitive for r in log].count("residual_add") == (8 if name == "resnet18" else 16)


def test_units_inside_a_sequential_that_is_a_unit_itself_stay_units():
    """The deep stem's norms and convolutions are children of the Sequential that holds the dense blocks."""
    found = rf.explain(timm_model("densenetblur121d"))
    assert found.units_fused == found.units_found == 62 and found.convs_fused == 121


def test_eps_and_momentum_changed_after_fusing():
    def change(model):
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.eps, module.momentum = 1e-3, 0.01

    same_in_float64(timm_model("resnetv2_18"), change)


@pytest.mark.parametrize("training, memory_format, name", [
    (True, torch.contiguous_format, "resnetv2_18"), (True, torch.channels_last, "resnetv2_18d"),
    (False, torch.channels_last, "resnetv2_18"),
])  # fmt: skip
def test_verify_resnetv2(training, memory_format, name):
    model = timm_model(name).train(training).to(memory_format=memory_format)
    found = rf.verify(model, images().contiguous(memory_format=memory_format))
    assert found, str(found)
    assert found.units == (9 if name.endswith("d") else 8)


def test_training_under_autocast():
    """A few steps: the loss of the fused net stays as near to float64's as the plain net's."""
    model = timm_model("resnetv2_18")
    x, labels = images(), torch.tensor([1, 2])
    losses = {}
    for kind in ("exact", "plain", "fused"):
        net = copy.deepcopy(model).to(memory_format=torch.channels_last)
        net = net.double() if kind == "exact" else rf.fuse(net) if kind == "fused" else net
        optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
        losses[kind] = []
        for _ in range(4):
            with torch.autocast("cpu", torch.bfloat16, enabled=kind != "exact"):
                y = net(x.double() if kind == "exact" else x)
            loss = torch.nn.functional.cross_entropy(y.double(), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[kind].append(loss.item())
    errors = {
        kind: sum((a - b) ** 2 for a, b in zip(losses[kind], losses["exact"], strict=True)) ** 0.5
        for kind in ("plain", "fused")
    }
    assert losses["exact"][-1] < losses["exact"][0]
    # 2 ulp of bfloat16 of the largest loss.
    assert errors["fused"] <= 2 * errors["plain"] + 2 * 2**-7 * max(losses["exact"]), (errors, losses)


@pytest.mark.parametrize("name, reason", [
    ("resnetv2_50d_gn", "GroupNormAct is not a BatchNorm2d"),
    ("resnetv2_50x1_bit", "GroupNormAct is not a BatchNorm2d"),
    ("resnetv2_50d_evos", "EvoNorm2dS0 is not a BatchNorm2d"),
    ("resnetv2_50d_frn", "FilterResponseNormTlu2d is not a BatchNorm2d"),
])  # fmt: skip
def test_other_norms_of_timm_are_refused_and_run(name, reason):
    model = timm_model(name).eval()
    found = rf.explain(model)
    assert found.units_fused == 0 and found.units_found >= 16 and reason in str(found)
    with torch.no_grad():
        x = images(32)
        expected = model(x)
        assert torch.equal(rf.fuse(model, memory_format=None)(x), expected)
    with pytest.raises(RuntimeError, match=reason):
        rf.fuse(model, strict=True)


def test_timm_freezing_and_sync_batch_norm():
    timm = pytest.importorskip("timm")
    model = rf.fuse(timm_model("resnetv2_18")).eval()
    x = images(32)
    with torch.no_grad():
        expected = model(x)
        for change in (timm.layers.freeze_batch_norm_2d, timm.layers.convert_sync_batchnorm):
            other = change(copy.deepcopy(model))
            # On a frozen norm (another formula, other roundings) and on a synchronised one nothing is fused.
            assert convolutions(other, x) == 0
            torch.testing.assert_close(other(x), expected, rtol=1e-3, atol=1e-4)
            assert rf.explain(other).units_fused == 0
