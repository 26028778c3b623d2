"""fuse: units in turn in an nn.Sequential share autograd nodes, with the same results to the bit."""

import copy
import io
import pickle

import fuse_cases as cases
import pytest
import torch
from conftest import residual_units_module
from torch import nn

import resnet_fused as rf

CL = torch.channels_last

pytestmark = pytest.mark.usefixtures("cpu_library", "one_thread")


@pytest.fixture
def rows(monkeypatch):
    """How many units each row had that fuse's Sequentials ran."""
    seen = []

    def residual_units(x, units, *, original=rf.functional.residual_units, **options):
        seen.append(len(units))
        return original(x, units, **options)

    monkeypatch.setattr(rf.functional, "residual_units", residual_units)
    return seen


def stage(count=4, channels=8, first=None):
    units = [cases.CifarBlock(channels, channels) for _ in range(count)]
    if first is not None:
        units.insert(0, cases.CifarBlock(first, channels, 2))
    return nn.Sequential(*units)


def model(count=4):
    """Stages as deep nets have them: a projection, then identity units."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), stage(count), stage(count, 16, 8), nn.BatchNorm2d(16), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5),
    )  # fmt: skip
    cases.randomize(net)
    return net


def batch(channels=3, size=8, dtype=torch.float32):
    return torch.randn(2, channels, size, size, dtype=dtype).contiguous(memory_format=CL)


def outcome(net, x, autocast=False):
    net = copy.deepcopy(net)
    x = x.clone(memory_format=CL).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = net(x)
    y.float().square().sum().backward()
    return [y, x.grad, *[p.grad for p in net.parameters()], *net.buffers()]


def test_against_the_plain_model(rows):
    fused, plain = cases.pair_of(model().double())
    cases.assert_same(fused, plain, batch(dtype=torch.float64))
    assert rows == [4, 5]
    cases.assert_same(fused.eval(), plain.eval(), batch(dtype=torch.float64))


@pytest.mark.parametrize("autocast", [False, True])
def test_same_as_unit_by_unit(rows, monkeypatch, autocast):
    fused, x = rf.fuse(model()), batch()
    whole = outcome(fused, x, autocast)
    assert rows == [4, 5]
    monkeypatch.setattr(residual_units_module, "_one_node", lambda *args: None)
    for a, b in zip(whole, outcome(fused, x, autocast), strict=True):
        assert torch.equal(a, b)


def test_modes(rows):
    fused, x = rf.fuse(model()), batch()
    for context in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        rows.clear()
        with context():
            fused(x)
        assert rows == [4, 5]
    fused.eval()
    with torch.no_grad():
        fused(x)
    assert rows == [4, 5] * 2


def test_what_parts_a_row(rows):
    x = batch(8)

    def parted(change, count=5):
        net = rf.fuse(stage(count))
        change(net)
        rows.clear()
        net(x)
        return rows

    assert parted(lambda net: None) == [5]
    seen = []
    hooked = parted(lambda net: net[2].register_forward_hook(lambda *args: seen.append(1)))
    assert hooked == [2, 2] and seen == [1]
    assert parted(lambda net: net[1].conv2.register_forward_hook(lambda *args: None)) == [3]
    assert parted(lambda net: setattr(net[4], "forward", lambda y: y)) == [4]
    for index, name, row in ((4, "", 4), (1, "conv2", 3)):  # .compile() of a unit, of a layer in one

        def compiled(net, index=index, name=name):
            module = net[index].get_submodule(name)
            module._compiled_call_impl = module._call_impl

        assert parted(compiled) == [row]
    assert parted(lambda net: net.insert(2, nn.Identity())) == [2, 3]
    assert parted(lambda net: net[3].train(False)) == [5]  # one node or not is residual_units' to decide
    assert parted(lambda net: None, count=1) == []
    handle = nn.modules.module.register_module_forward_hook(lambda *args: None)
    try:
        assert parted(lambda net: None) == []
    finally:
        handle.remove()


def test_tensors_that_the_operators_do_not_take(rows):
    net = rf.fuse(stage(3))
    with torch.autocast("cpu", torch.bfloat16):
        net(batch(8))  # float32: a norm would read it as it is; from the second unit on it is bfloat16
    assert rows == [2]
    with pytest.raises(RuntimeError, match="running_mean should contain 5 elements not 8"):
        net(batch(5))


def test_counts_batches_once(rows):
    fused, plain = cases.pair_of(stage(3))
    for net in (fused, plain):
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = None
    x = batch(8, dtype=torch.float64)
    for _ in range(2):
        fused(x), plain(x)
    assert rows == [3, 3]
    for (name, a), b in zip(fused.named_buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, msg=name)
    assert fused[0].bn1.num_batches_tracked.item() == 2


class TestTheModelStaysTheUsers:
    def test_unfuse(self):
        net = model()
        kinds = [type(m) for m in net.modules()]
        rf.fuse(net)
        assert isinstance(net[1], nn.Sequential) and type(net[1]) is not nn.Sequential
        assert type(net[1]).__name__ == "Sequential" and repr(net) == repr(model())
        rf.fuse(net)
        rf.unfuse(net)
        assert [type(m) for m in net.modules()] == kinds

    def test_only_where_units_follow_one_another(self):
        net = nn.Sequential(cases.CifarBlock(8, 8), nn.MaxPool2d(2), cases.CifarBlock(8, 8))
        assert type(rf.fuse(net)) is nn.Sequential
        net = rf.fuse(stage(3))
        rf.fuse(net, filter_fn=lambda name, module: name == "0")
        assert type(net) is nn.Sequential

    def test_a_forward_of_the_users(self, rows):
        class Mine(nn.Sequential):
            def forward(self, x):
                for unit in self:
                    x = unit(x) * 2
                return x

        class Bare(nn.Sequential):
            pass

        fused, plain = cases.pair_of(Mine(*stage(3)).double())
        cases.assert_same(fused, plain, batch(8, dtype=torch.float64))
        assert rows == []
        net = rf.fuse(Bare(*stage(3)))
        net(batch(8))
        assert rows == [3] and isinstance(net, Bare)

    def test_copies_pickles_and_slices(self, rows):
        net, x = rf.fuse(stage(4)), batch(8)
        expected = copy.deepcopy(net)(x)
        for again in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
            assert type(again) is type(net)
            assert torch.equal(again(x), expected)
        saved = io.BytesIO()
        torch.save(net, saved)
        saved.seek(0)
        assert torch.equal(torch.load(saved, weights_only=False)(x), expected)
        rows.clear()
        part = copy.deepcopy(net)[1:]
        assert isinstance(part, nn.Sequential) and len(part) == 3
        part(x)
        assert rows == [3]

    def test_traced_exported_compiled(self, rows):
        net, x = rf.fuse(stage(3)).eval(), batch(8)
        expected = copy.deepcopy(rf.unfuse(copy.deepcopy(net)))(x)
        with torch.no_grad():
            traced = torch.jit.trace(net, x, check_trace=False)
            torch.testing.assert_close(traced(x), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(torch.export.export(net, (x,)).module()(x), expected, rtol=1e-5, atol=1e-5)
        compiled = torch.compile(net, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), expected, rtol=1e-5, atol=1e-5)
        assert rows == []

    def test_explain_names_units_only(self):
        fused = rf.fuse(model())
        found = rf.explain(fused, input_size=8)
        assert (found.units_fused, found.units_found) == (9, 9)
        assert [unit["type"] for unit in found.as_dict()["units"] if unit["fused"]] == ["CifarBlock"] * 9
