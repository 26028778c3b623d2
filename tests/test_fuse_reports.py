"""explain and verify, from Python and from the command line."""

import copy
import json
import sys

import fuse_cases as cases
import pytest
import torch
from torch import nn

import resnet_fused as rf
from resnet_fused import cli, fusion
from resnet_fused.fusion import plan

pytestmark = pytest.mark.usefixtures("one_thread")


def model():
    return cases.randomize(cases.net(cases.CifarBlock))


def saved_bytes(model, x):
    """Bytes of activations that backward keeps: the distinct 4-D tensors, except weights."""
    kept, weights = {}, {p.data_ptr() for p in model.parameters()}

    def pack(t):
        if t.dim() == 4 and t.data_ptr() not in weights:
            kept[t.data_ptr()] = (t.numel() * t.element_size(), t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = model(x)
    assert y.grad_fn is not None
    return sum(size for size, _ in kept.values())


# --- explain ---


def test_explain():
    net = nn.Sequential(model(), nn.BatchNorm2d(8), nn.ReLU())
    net[0][2].conv2.register_forward_hook(lambda *_: None)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    found = rf.explain(net, (2, 10, 8, 8))
    text, tree = str(found), found.as_dict()
    assert max(map(len, text.splitlines())) <= 80
    assert text.startswith("Sequential: 4 of 4 units fuse, 8 of 9 convolutions")
    assert "0.2 (CifarBlock): fused" in text and "  bn2: conv2: Conv2d has hooks\n" in text
    assert "1: its activation goes to the unit's output" in text
    assert (found.units_fused, found.units_found, found.convs_fused, found.convs_found) == (4, 4, 8, 9)
    assert json.loads(found.as_json()) == tree
    first = tree["units"][1]
    assert first["name"] == "0.1" and first["type"] == "CifarBlock" and not first["is_fused_now"]
    names = [[conv["name"] for conv in norm["convs"]] for norm in first["norms"]]
    assert names == [["0.1.shortcut.0", "0.1.conv1"], ["0.1.conv2"]]
    conv = first["norms"][1]["convs"][0]
    assert conv["input"] == [2, 8, 4, 4] and conv["operator"] == "unit"
    assert conv["backends"].keys() == {"preact_conv_forward", "preact_conv_dgrad", "preact_conv_wgrad"}
    with rf.use_backend("reference"):
        assert "[unit: reference]" in str(rf.explain(net, (2, 10, 8, 8)))
    assert {k: torch.equal(v, before[k]) for k, v in net.state_dict().items()} == dict.fromkeys(before, True)
    assert rf.explain(net).bytes_saved is None
    rf.fuse(net)
    assert rf.explain(net).as_dict()["units"][1]["is_fused_now"]


def test_the_backend_named_is_the_one_that_runs():
    net = rf.fuse(model())
    x = torch.randn(2, 10, 8, 8)
    with rf.record_dispatch() as log:
        net(x).sum().backward()
    ran = {r.primitive: set() for r in log}
    for record in log:
        ran[record.primitive].add(record.backend)
    for unit in rf.explain(net, (2, 10, 8, 8)).as_dict()["units"]:
        for norm in unit["norms"]:
            for conv in norm["convs"]:
                for primitive, backend in conv["backends"].items():
                    assert {backend} == ran[primitive]


@pytest.mark.parametrize("name", ["cifar", "cifar-bottleneck", "wide", "keras"])
def test_bytes_saved_are_those_that_backward_no_longer_keeps(name):
    net = cases.net(cases.UNITS[name][0]).to(memory_format=torch.channels_last)
    x = torch.randn(2, 10, 16, 16).contiguous(memory_format=torch.channels_last).requires_grad_()
    promised = rf.explain(net, (2, 10, 16, 16)).bytes_saved
    saved = saved_bytes(net, x) - saved_bytes(rf.fuse(net), x)
    assert saved == promised > 0


def test_explain_of_what_is_fused_already_and_of_bad_arguments():
    own = rf.models.create_model("preact_resnet20_cifar")
    assert rf.explain(own).units_found == 0
    assert "PreActStage of resnet_fused is fused as it is" in str(rf.explain(own.layer1))
    assert rf.explain(rf.models.create_model("preact_resnet20_cifar", fused=False)).units_fused == 9
    assert rf.explain(nn.Linear(2, 2)).units_found == 0
    with pytest.raises(ValueError, match="input_size should be S, .*got \\(3, 0, 8\\)"):
        rf.explain(model(), (3, 0, 8))


# --- verify ---


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", cases.UNITS)
def test_verify_of_every_kind_of_unit(name, training):
    net = cases.randomize(cases.net(cases.UNITS[name][0])).train(training)
    found = rf.verify(net, torch.randn(4, 10, 16, 16))
    assert found and found.ok, str(found)
    assert found.units == 4 and [kind.name for kind in found.kinds] == [
        "outputs", "input gradients", "parameter gradients", "running statistics"
    ]  # fmt: skip
    assert max(map(len, str(found).splitlines())) <= 80


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_verify_in_other_dtypes(dtype):
    found = rf.verify(model().to(dtype), torch.randn(8, 10, 16, 16, dtype=dtype))
    assert found, str(found)


def test_verify_leaves_the_model_as_it_was():
    net = rf.fuse(model())
    net(torch.randn(2, 10, 8, 8)).sum().backward()
    state = copy.deepcopy(net.state_dict())
    gradients = {n: p.grad.clone() for n, p in net.named_parameters()}
    classes, drawn = [type(m) for m in net.modules()], torch.get_rng_state()
    x = torch.randn(2, 10, 8, 8, requires_grad=True)
    drawn = torch.get_rng_state()
    assert rf.verify(net, x)
    assert torch.equal(torch.get_rng_state(), drawn) and x.grad is None
    assert [type(m) for m in net.modules()] == classes and all(m.training for m in net.modules())
    for key, value in net.state_dict().items():
        assert torch.equal(value, state[key]) and value.stride() == state[key].stride(), key
    assert all(torch.equal(p.grad, gradients[n]) for n, p in net.named_parameters())


def exchange_operator(monkeypatch, broken):
    """Have fused units call this one, by themselves and in rows."""
    def in_rows(x, units, *, x_stats=None, return_stats=False):
        for unit in units:
            x, x_stats = broken(x, unit.norms, unit.convs, shortcut=unit.shortcut, x_stats=x_stats, return_stats=True,
                                negative_slope=unit.negative_slope)  # fmt: skip
        return (x, x_stats) if return_stats else x

    monkeypatch.setattr(plan.F, "residual_unit", broken)
    monkeypatch.setattr(plan.F, "residual_units", in_rows)


@pytest.mark.parametrize("wrong", ["outputs", "gradients", "statistics", "nan"])
def test_verify_finds_what_is_wrong_and_where(wrong, monkeypatch):
    """One part in a thousand off in one unit of four: the one that takes 10 channels to 8."""
    original = plan.F.residual_unit

    def broken(x, norms, convs, **options):
        if options["shortcut"] is None:
            return original(x, norms, convs, **options)
        if wrong == "statistics":
            norms = [norms[0], norms[1]._replace(momentum=0.101)]
        if wrong == "gradients":  # right in forward
            x = 1.001 * x - 0.001 * x.detach()
        result = original(x, norms, convs, **options)
        y = result[0] if options["return_stats"] else result
        if wrong == "outputs":
            y = y * 1.001
        if wrong == "nan":
            y = y * torch.nan
        return (y, result[1]) if options["return_stats"] else y

    net, x = model(), torch.randn(4, 10, 16, 16)
    assert rf.verify(net, x)
    exchange_operator(monkeypatch, broken)
    found = rf.verify(net, x)
    assert not found and found.failing_units == ["1"]
    text = str(found)
    assert text.startswith("WRONG: 4 fused units, train mode") and "units that fail on their own: 1" in text
    kinds = {kind.name: kind for kind in found.kinds}
    if wrong == "gradients":
        assert kinds["outputs"].ok and not kinds["input gradients"].ok
    if wrong == "statistics":
        assert kinds["outputs"].ok and not kinds["running statistics"].ok
        assert kinds["running statistics"].worst == "1.bn2.running_mean"
    assert found.as_dict()["failing_units"] == ["1"] and not found.as_dict()["ok"]


def test_verify_of_what_it_cannot_compare():
    class Nothing(nn.Module):
        def forward(self, x):
            return x.argmax()

    with pytest.raises(RuntimeError, match="returns floating-point tensors"):
        rf.verify(Nothing(), torch.randn(2, 2))

    class Two(cases.CifarBlock):
        def forward(self, x, other):
            return {"sum": super().forward(x), "rest": [other * 2, None]}

    assert rf.verify(Two(10, 10), (torch.randn(2, 10, 8, 8), torch.randn(3)))


# --- the commands ---


def test_commands(capsys):
    assert cli.main(["explain", "preact_resnet20_cifar", "--input-size", "16"]) == 0
    text = capsys.readouterr().out
    assert "9 of 9 units fuse, 20 of 20 convolutions" in text and "1 x 3 x 16 x 16" in text
    assert cli.main(["explain", "preact_resnet20_cifar", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["units_fused"] == 9
    assert cli.main(["verify", "preact_resnet20_cifar", "-b", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [one["training"] for one in found] == [True, False] and all(one["ok"] for one in found)


def test_commands_with_a_name_that_is_not_there(capsys, monkeypatch):
    def error(*arguments):
        assert cli.main(list(arguments)) == 2
        text = capsys.readouterr().err
        assert text.count("\n") == 1
        return text

    assert "Did you mean preact_resnet" in error("explain", "preact_resnet21_cifar")
    assert "unknown package 'hub'" in error("verify", "hub:resnet50")
    for package in ("timm", "torchvision"):
        monkeypatch.setitem(sys.modules, package, None)
        line = error("explain", f"{package}:densenet121")
        assert f"needs the package {package}" in line and line.endswith(f": pip install {package}\n")


def test_verify_command_says_what_is_wrong(capsys, monkeypatch):
    original = plan.F.residual_unit

    def broken(*args, **options):
        result = original(*args, **options)
        return (result[0] * 1.01, result[1]) if options["return_stats"] else result * 1.01

    exchange_operator(monkeypatch, broken)
    assert cli.main(["verify", "preact_resnet20_cifar", "-b", "2"]) == 1
    assert capsys.readouterr().out.startswith("WRONG: 9 fused units, train mode")
    assert cli.main(["bench", "fuse", "--models", "preact_resnet20_cifar"]) == 1
    assert "not timed" in capsys.readouterr().err


def test_bench_fuse(capsys, threads, tmp_path):
    options = ["--models", "preact_resnet20_cifar", "-b", "2", "--rounds", "1", "--threads", "1"]
    assert cli.main(["bench", "fuse", *options, "--json", str(tmp_path / "fuse.json")]) == 0
    *_, header, rule, row = capsys.readouterr().out.splitlines()
    assert header.count("|") == rule.count("|") == row.count("|") == 10
    assert row.startswith("| preact_resnet20_cifar | 32 | 9 / 9 | 20 / 20 |") and row.endswith(" x |")
    (net,) = json.loads((tmp_path / "fuse.json").read_text())["nets"]
    assert (net["units_fused"], net["convs_found"]) == (9, 20)
    assert [f"{ms['p50']:.1f}" for ms in net["ms"].values()] == row.replace(" ", "").split("|")[6:9]
    assert cli.main(["bench", "fuse", *options, "--no-timing"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].count("|") == 6
    assert cli.main(["bench", "fuse", *options, "--json", str(tmp_path / "missing" / "fuse.json")]) == 2
    assert "there is no directory" in capsys.readouterr().err


def test_the_package_gives_what_it_lists():
    assert set(fusion.__all__) - {"Explanation", "Verification"} <= set(rf.__all__)
