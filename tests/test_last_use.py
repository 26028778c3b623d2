"""At a net's end the gradient of a row's output is written over that output, if nobody can read it any more."""

import copy
import ctypes

import pytest
import torch
from test_residual_units import basic, batch
from torch.utils.checkpoint import checkpoint

import resnet_fused as rf
from resnet_fused.functional import preact, residual_units
from resnet_fused.ops import last_use
from resnet_fused.primitives import dispatch

pytestmark = pytest.mark.usefixtures("cpu_library")
DTYPES = [torch.float32, torch.bfloat16]
OPTIONS = {"training": True, "global_avg_pool": True}


@pytest.fixture
def overwritten(monkeypatch):
    """Of each backward operator's call, whether dx lies where x did."""
    seen = []

    def select_several(*args, original=dispatch.select_several):
        operator = original(*args)

        def noted(dout, x, *arguments):
            dx, sums = operator(dout, x, *arguments)
            seen.append(dx.data_ptr() == x.data_ptr())
            return dx, sums

        return noted if operator is not None and args[1] == "preact_backward" else operator

    monkeypatch.setattr(dispatch, "select_several", select_several)
    return seen


def end(c, dtype):
    parameters = torch.rand(2, c, dtype=dtype if dtype is torch.float64 else torch.float32) + 0.5
    return [p.clone().requires_grad_() for p in parameters]


class Net:
    """A row and the end of a net."""

    def __init__(self, dtype=torch.float32, c=16):
        self.units = [basic(c, dtype=dtype), basic(c, dtype=dtype)]
        self.x, self.end = batch(c, dtype=dtype), end(c, dtype)
        self.leaves = [self.x, *self.end, self.units[0].convs[0].weight, self.units[1].norms[0].weight]

    def row(self):
        return residual_units(self.x, self.units)

    def finish(self, h, slope=0.0):
        return preact(h, *self.end, None, None, negative_slope=slope, **OPTIONS)

    def __call__(self, slope=0.0):
        return self.finish(self.row(), slope)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("slope", [0.0, 0.2])
def test_same_bits(overwritten, slope, dtype):
    net = Net(dtype)
    out = net(slope)
    dout = torch.randn(out.shape).to(out)
    kept = torch.autograd.grad(out, net.leaves, dout, retain_graph=True)
    with rf.record_dispatch():  # one primitive after another
        again = torch.autograd.grad(out, net.leaves, dout, retain_graph=True)
    last = torch.autograd.grad(out, net.leaves, dout)
    assert overwritten == [False, True]
    for a, b, c in zip(kept, again, last, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(out, net.leaves, dout)


def test_channels_that_do_not_fill_vectors(overwritten):
    net = Net(c=20)
    net().sum().backward()
    assert overwritten == [False]


@pytest.mark.parametrize(
    "hold",
    [
        lambda h, kept: kept.append(h),
        lambda h, kept: kept.append(h.detach()),
        lambda h, kept: kept.append(h[0, :, 1:].detach()),
        lambda h, kept: kept.append(h.detach().numpy()),
        lambda h, kept: kept.append(torch.utils.dlpack.to_dlpack(h.detach())),
        lambda h, kept: kept.append(h.untyped_storage()),
        lambda h, kept: h.register_hook(lambda g, h=h: kept.append(h)),
    ],
    ids=["tensor", "detached", "view", "array", "dlpack", "storage", "closure"],
)
def test_not_what_somebody_holds(overwritten, hold):
    net, kept = Net(), []
    h = net.row()
    before = h.detach().clone()
    hold(h, kept)
    alias = weak_alias(h)
    out = net.finish(h)
    del h
    out.sum().backward()
    assert overwritten == [False] and torch.equal(alias(), before)


def weak_alias(h):
    """What lies in h's memory later, without holding it."""
    address, shape, stride = h.data_ptr(), h.shape, h.stride()

    def read():
        array = (ctypes.c_float * shape.numel()).from_address(address)
        return torch.frombuffer(array, dtype=torch.float32).clone().as_strided(shape, stride)

    return read


def test_not_what_another_node_needs(overwritten):
    """The product's gradient reads h; which of the two runs first is autograd's to say."""
    net = Net()
    h = net.row()
    weight = torch.randn(h.shape, requires_grad=True)
    out = net.finish(h).sum() + (h * weight).sum()
    before = h.detach().clone()
    del h
    out.backward()
    assert torch.equal(weight.grad, before)


def test_two_ends_of_one_row(overwritten):
    net, other = Net(), end(16, torch.float32)

    def gradients(hold):
        h = net.row()
        out = net.finish(h).sum() + preact(h, *other, None, None, **OPTIONS).square().sum()
        if not hold:
            del h
        return torch.autograd.grad(out, [*net.leaves, *other])

    held, free = gradients(True), gradients(False)
    assert overwritten == [False, False, False, True]
    assert all(torch.equal(a, b) for a, b in zip(held, free, strict=True))


def test_only_a_rows_output(overwritten):
    """Other memory may have owners that PyTorch does not count."""
    x, weights = torch.randn(2, 16, 3, 3).contiguous(memory_format=torch.channels_last), end(16, torch.float32)
    array = x.numpy()
    before = array.copy()
    out = preact(torch.from_numpy(array).requires_grad_(), *weights, None, None, **OPTIONS)
    out.sum().backward()
    h = torch.from_numpy(array).requires_grad_() + 0
    preact(h, *weights, None, None, **OPTIONS).sum().backward()
    assert overwritten == [False, False] and (array == before).all()


def test_not_under_hooks(overwritten):
    net, kept = Net(), []

    def pack(t):
        kept.append((t, t.detach().clone()))
        return len(kept) - 1

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda i: kept[i][0]):
        out = net()
    out.sum().backward()
    assert overwritten == [False] and all(torch.equal(t, before) for t, before in kept)
    checkpoint(net, use_reentrant=False).sum().backward()
    assert overwritten == [False, False]


def test_second_derivative(overwritten, monkeypatch):
    net = Net(torch.float64)

    def penalty():
        (gradient,) = torch.autograd.grad(net().square().sum(), net.x, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), net.leaves)

    first = penalty()
    assert overwritten == [False, True]  # the last use may
    monkeypatch.setattr(last_use, "is_now", lambda: False)
    assert all(torch.equal(a, b) for a, b in zip(first, penalty(), strict=True))
    assert overwritten[2:] == [False, False]


def test_a_fused_net_ends_so(overwritten):
    """Its forward leaves no reference behind; and it trains as one that is held."""
    torch.manual_seed(0)
    net = rf.models.create_model("preact_resnet20_cifar").to(memory_format=torch.channels_last)
    other = copy.deepcopy(net)
    held = []
    x = torch.randn(4, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    net(x).sum().backward()
    assert overwritten == [True]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: held.append(t) or t, lambda t: t):
        other(x).sum().backward()
    assert overwritten == [True, False]
    for a, b in zip(net.parameters(), other.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


class TestReferences:
    def test_counts(self):
        tensor = torch.empty(3)
        assert last_use.is_only_reference(tensor) and last_use.is_only_reference(tensor)
        other = tensor
        assert not last_use.is_only_reference(tensor)
        del other
        view = tensor[1:]
        assert not last_use.is_only_reference(tensor)
        del view
        assert last_use.is_only_reference(tensor)
        tensors = [torch.empty(2), torch.empty(3)]
        assert last_use.are_only_references(tensors)
        first = tensors[0]
        assert not last_use.are_only_references(tensors)
        del first
        assert last_use.are_only_references(tensors)
        detached = tensors[1].detach()
        assert not last_use.are_only_references(tensors)
        del detached
        assert last_use.are_only_references(tensors) and last_use.are_only_references([])

    def test_memory_shared_with_other_processes(self):
        tensor = torch.empty(3)
        tensor.share_memory_()
        assert not last_use.is_only_reference(tensor) and not last_use.are_only_references([tensor])

    def test_a_graph_counts(self):
        tensor, weight = torch.ones(3), torch.ones(3, requires_grad=True)
        out = tensor * weight
        assert not last_use.is_only_reference(tensor)
        del out
        assert last_use.is_only_reference(tensor)
