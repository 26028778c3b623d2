"""Statistics that travel with a fused unit's result, and what a fused unit knows beside its parameters: both belong
to one tensor, one module. What copies, replicas and hooks do to these must not be missed."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from fuse_cases import CifarBlock, CifarBottleneck, PostActivation, assert_same, pair_of
from torch import nn

import resnet_fused as rf
from resnet_fused.fusion.plan import stats_of
from resnet_fused.fusion.unit import state_of

pytestmark = pytest.mark.usefixtures("cpu_library")
UNITS = [CifarBlock, CifarBottleneck]


class InTurn(nn.Module):
    """Two stages of units."""

    def __init__(self, unit=CifarBlock):
        super().__init__()
        self.first, self.second = nn.Sequential(unit(8, 8), unit(8, 8)), nn.Sequential(unit(8, 8), unit(8, 8))

    def forward(self, x):
        return self.second(self.first(x))


class Clamped(InTurn):
    def forward(self, x):
        x = self.first(x)
        x.data.clamp_(-0.5, 0.5)  # which no version counts
        return self.second(x)


class Array(InTurn):
    def forward(self, x):
        x = self.first(x)
        x.detach().numpy()[...] *= 1.5
        return self.second(x)


def batch():
    return torch.randn(3, 8, 6, 5, dtype=torch.float64)


def channel_stats(model, x):
    with rf.record_dispatch() as log:
        model(x)
    return [record.primitive for record in log].count("channel_stats")


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("model", [Clamped, Array])
def test_changed_by_the_parent_where_no_version_counts(model, unit):
    fused, plain = pair_of(model(unit))
    assert_same(fused, plain, batch())


CHANGES = {
    "data": lambda y: y.data.mul_(2),
    "array": lambda y: y.detach().numpy().__imul__(2),
    "other data": lambda y: setattr(y, "data", y.data * 2),
    "in place": lambda y: y.detach().mul_(2),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("where", ["first.1", "first", "second", "second.0"])
def test_changed_by_hooks(where, change):
    """Of what gives the tensor, after it; of what reads it, before. Registered after `fuse`, and removed again."""
    fused, plain = pair_of(InTurn())
    x = batch()
    without = channel_stats(fused, x)

    def hooked(model):
        module = model.get_submodule(where)
        if where.startswith("first"):
            return module.register_forward_hook(lambda m, args, y: (change(y), None)[1])
        return module.register_forward_pre_hook(lambda m, args: (change(args[0]), None)[1])

    handles = [hooked(model) for model in (fused, plain)]
    plain.load_state_dict(fused.state_dict())
    assert_same(fused, plain, x)
    for handle in handles:
        handle.remove()
    assert_same(fused, plain, x)
    assert channel_stats(fused, x) == without


def test_links():
    """Statistics are handed on in every copy that has the reader in it, and in no other."""
    model, x = rf.fuse(InTurn().double()), batch()
    known = channel_stats(model, x)
    assert known == 1 and state_of(model.first[1]).hands_on()  # of the input
    whole = copy.deepcopy(model)
    assert channel_stats(whole, x) == 1
    link = state_of(whole.first[1]).link
    assert link.parent is whole and set(link.between) <= set(whole.modules())
    assert not state_of(copy.deepcopy(model.first)[1]).hands_on()
    assert not state_of(copy.copy(model.first[1])).hands_on()
    loaded = pickle.loads(pickle.dumps(model.first))
    assert not state_of(loaded[1]).hands_on()
    assert stats_of(loaded(x)) is None and stats_of(model.first(x)) is not None


def test_changes_elsewhere():
    """A stem's ReLU in place, and one behind the units, change nothing that units hand to each other."""

    class Net(InTurn):
        def forward(self, x):
            x = F.relu_(self.second[1].bn2(x))
            return F.relu_(super().forward(x))

    model = rf.fuse(Net().double())
    model(batch())
    assert state_of(model.first[1]).hands_on() and not state_of(model.second[1]).hands_on()


def test_a_saved_tensor_has_no_statistics():
    model, x = rf.fuse(InTurn().double()), batch()
    y, file = model.first(x), io.BytesIO()
    torch.save(y, file)
    file.seek(0)
    loaded = torch.load(file)
    assert torch.equal(loaded, y) and stats_of(loaded) is None and stats_of(y) is not None


class TestOwners:
    """The plans of a unit are those of its own layers."""

    def replica(self, module, of):
        """As torch.nn.parallel.replicate makes them, of other values."""
        made = module._replicate_for_data_parallel()
        for name, child in module._modules.items():
            setattr(made, name, self.replica(child, of))
        for name, value in module._parameters.items():
            setattr(made, name, None if value is None else of(value))
        for name, value in module._buffers.items():
            setattr(made, name, value.clone())
        return made

    @pytest.mark.parametrize("unit", [*UNITS, PostActivation])
    @pytest.mark.parametrize("first", ["original", "replica"])
    def test_replicas(self, unit, first):
        fused, plain = pair_of(nn.Sequential(unit(8, 8), unit(8, 8)))
        x, changed = batch(), lambda value: value * 1.25
        if first == "original":
            fused(x), plain(x)
        mine, theirs = (self.replica(model, changed) for model in (fused, plain))
        torch.testing.assert_close(mine(x), theirs(x))
        for a, b in zip(mine.buffers(), theirs.buffers(), strict=True):
            torch.testing.assert_close(a, b)
        with rf.record_dispatch() as log:
            fused(x), plain(x)
        assert log  # the original is as fused as before
        plain.load_state_dict(fused.state_dict())
        assert_same(fused, plain, x)

    @pytest.mark.parametrize("unit", UNITS)
    def test_shallow_copies(self, unit):
        fused, x = rf.fuse(unit(8, 8).double()), batch()
        for _ in range(2):
            other = copy.copy(fused)
            other._modules = dict(fused._modules)
            other.conv1 = copy.deepcopy(fused.conv1)
            nn.init.zeros_(other.conv1.weight)
            nn.init.zeros_(other.bn2.bias)
            assert torch.equal(other(x), x) and not torch.equal(fused(x), x)


class Checked(nn.BatchNorm2d):
    def _check_input_dim(self, x):
        if x.shape[0] != 3:
            raise ValueError("expected 3 images")


def test_a_norm_with_a_check_of_its_own():
    unit = CifarBlock(8, 8)
    unit.bn2 = Checked(8)
    native = rf.nn.PreActBasicBlock(8, 8)
    native.bn2 = Checked(8)
    for module in (rf.fuse(unit), native):
        module(torch.randn(3, 8, 4, 4))
        with pytest.raises(ValueError, match="expected 3 images"):
            module(torch.randn(2, 8, 4, 4))


def test_a_stride_of_zero():
    unit = rf.fuse(CifarBlock(8, 8))
    unit.conv1.stride = (0, 0)
    with pytest.raises(RuntimeError, match="non-positive stride"):
        unit(torch.randn(2, 8, 4, 4))


class TestOneNormTwice:
    """A norm that one graph reads plainly and fused: what one of them has saved, the other one updates."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.unit = CifarBlock(8, 8)

        def forward(self, x):
            return self.unit(F.relu(self.unit.bn1(x)))

    def test_in_one_forward(self):
        fused, plain = pair_of(self.Net())
        assert_same(fused, plain, batch())

    @pytest.mark.parametrize("momentum", [0.1, None])
    def test_hooked_and_not(self, momentum):
        results = []
        for unit in (rf.nn.PreActBasicBlock, rf.reference.PreActBasicBlock):
            torch.manual_seed(0)
            module, x = unit(8, 8, momentum=momentum).double(), batch()
            handle = module.bn1.register_forward_hook(lambda *args: None)
            first = module(x)
            handle.remove()
            (first.sum() + module(x).square().sum()).backward()
            results.append([*(p.grad for p in module.parameters()), *module.buffers()])
        torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)
