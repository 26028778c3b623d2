"""A whole unit by the CUDA library's operators, on the emulator: the same to the bit as by its primitives one by one,
in few launches, whatever the order of blocks."""

import plain
import pytest
import torch
from cuda_emulation import OnDevice, check_memory, library
from test_residual_unit import unit
from test_whole_unit import check_same, results

import resnet_fused as rf
from resnet_fused import cuda_kernels
from resnet_fused.functional import BatchNormArgs, UnitArgs
from resnet_fused.ops import running_stats
from resnet_fused.primitives import dispatch

DTYPES = [torch.float32, torch.bfloat16, torch.float16]

UNITS = {
    "basic": dict(kind="basic", c=16, h=8, w=8),
    "basic, projection": dict(kind="basic", c=16, k=32, stride=2, h=8, w=8),
    "bottleneck": dict(kind="bottleneck", c=64, mid=16),
    "bottleneck, projection": dict(kind="bottleneck", c=16, k=64, mid=16),
    "bottleneck, stride": dict(kind="bottleneck", c=64, k=136, mid=24, stride=2, h=9, w=7),
    "single": dict(kind="single", c=8),
    "single, projection": dict(kind="single", c=8, k=16, stride=2),
    "biases": dict(kind="bottleneck", c=8, k=16, mid=8, bias=True),
    "not affine": dict(kind="bottleneck", c=16, mid=8, affine=False),
    "no running statistics": dict(kind="basic", c=8, running=False),
    "several tiles": dict(kind="basic", c=8, n=3, h=20, w=19),
}


@pytest.fixture(scope="module")
def emulated():
    operators = library()
    if isinstance(operators, OnDevice):
        pytest.skip("units are run on the emulator here; on a device by bench.gpu")
    return operators


@pytest.fixture
def cuda(emulated, monkeypatch):
    """CPU tensors go to the emulated CUDA library; dispatch answers as it would for CUDA tensors."""
    for name, implementations in dispatch._implementations.items():
        if hasattr(emulated, name):
            monkeypatch.setitem(implementations, "cpu", getattr(emulated, name).default)

    def declines(backend, primitive, device_type, dtype, geometry):
        return cuda_kernels.declines(primitive, dtype, geometry)

    monkeypatch.setattr(dispatch, "_declines", declines)
    monkeypatch.setattr(dispatch, "own_operator", lambda backend, name: getattr(emulated, name).default)
    monkeypatch.setattr(cuda_kernels, "tf32_allowed", lambda: True)
    dispatch.forget()
    yield emulated
    dispatch.forget()
    emulated.set_schedule(0, False)
    emulated.set_multiprocessors(4)
    emulated.set_tree_groups(4096)
    check_memory()


def launches_of(cuda, run):
    before = cuda.launches()
    value = run()
    return cuda.launches() - before, value


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("case", UNITS)
def test_same_as_by_primitives(cuda, case, training, dtype):
    arguments = unit(**UNITS[case], training=training, dtype=dtype)
    whole, _ = launches_of(cuda, lambda: results(arguments))
    by_primitives, _ = launches_of(cuda, lambda: results(arguments, primitives_only=True))
    assert whole < by_primitives
    check_same(arguments, slope=0.1)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("training", [[True, False, True], [False, True, False]], ids=str)
def test_frozen_norms_and_master_weights(cuda, training, stride):
    arguments = unit(
        "bottleneck", c=16, mid=8, stride=stride, training=training, dtype=torch.bfloat16,
        parameters=torch.float32,
    )  # fmt: skip
    x = arguments[0].detach()
    check_same(arguments, x_stats=cuda.channel_stats(x) if training[0] else None)
    arguments[2][0].weight.requires_grad_(False)
    arguments[0].requires_grad_(False)
    check_same(arguments)
    for norm in arguments[1]:
        norm.weight.requires_grad_(False), norm.bias.requires_grad_(False)
    check_same(arguments)  # nothing below the second convolution: a merge that no preact_apply takes along


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_in_every_order_of_blocks(cuda, dtype):
    """Which block is the last, and merges, changes with the order; the result must not. Many tiles: two levels."""
    arguments = unit("bottleneck", n=4, c=24, k=40, mid=8, h=24, w=24, dtype=dtype)
    cuda.set_multiprocessors(40)
    found = []
    for order, late in ((0, False), (1, True), (2, True), (3, False)):
        cuda.set_schedule(order, late)
        found.append(results(arguments))
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


def test_too_many_tiles_for_one_launch(cuda):
    """Past a number of tiles launches of their own merge and finalize."""
    arguments = unit("bottleneck", n=2, c=16, mid=8, h=20, w=19, dtype=torch.bfloat16)
    by_tree, _ = launches_of(cuda, lambda: results(arguments))
    cuda.set_tree_groups(5)
    check_same(arguments)
    # One more where statistics leave a convolution, and for the 3x3's sums; the 1x1s' are of few programs.
    assert launches_of(cuda, lambda: results(arguments))[0] == by_tree + 3 + 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("middle", [dict(c=32), dict(c=32, k=64, stride=2)], ids=["identity", "projection"])
def test_units_in_one_node(cuda, middle, dtype):
    """The same to the bit as one by one, where BatchNorm's backward takes the place of what it reads, too."""
    x, row = torch.randn(2, 32, 6, 5).to(dtype).contiguous(memory_format=torch.channels_last), []
    for sizes in (dict(c=32), middle, dict(c=middle.get("k", 32))):
        _, norms, convs, shortcut = unit("bottleneck", mid=8, dtype=dtype, **sizes)
        row.append(UnitArgs(norms, convs, shortcut))
    x.requires_grad_()
    leaves = [t for t in plain.tensors((x, [u[:3] for u in row])) if t.requires_grad]

    def run(units):
        out, stats = units(row)
        return [out, stats, *torch.autograd.grad(out, leaves, torch.ones_like(out))]

    def one_by_one(units):
        out, stats = x, None
        for u in units:
            out, stats = rf.functional.residual_unit(
                out, *u[:2], shortcut=u.shortcut, x_stats=stats, return_stats=True
            )
        return out, stats

    whole = run(lambda units: rf.functional.residual_units(x, units, return_stats=True))
    assert whole[0].grad_fn is not None and whole[0].grad_fn.name() == "_ResidualUnitsBackward"
    for a, b in zip(whole, run(one_by_one), strict=True):
        assert torch.equal(a, b)


class TestLaunches:
    """What docs/design.md says of a unit's launches."""

    def count(self, cuda, arguments):
        """(forward, backward), with the statistics of x given as in a chain of units."""
        x, norms, convs, shortcut = arguments
        stats = cuda.channel_stats(x.detach())
        n = [norm._replace(num_batches_tracked=torch.tensor(0)) for norm in norms]
        forward, out = launches_of(
            cuda, lambda: rf.functional.residual_unit(x, n, convs, shortcut=shortcut, x_stats=stats)
        )
        assert all(norm.num_batches_tracked.item() == 1 for norm in n)
        return forward, launches_of(cuda, lambda: out.backward(torch.ones_like(out)))[0]

    def arguments(self, *args, **options):
        x, norms, convs, shortcut = unit(*args, dtype=torch.bfloat16, parameters=torch.float32, **options)
        return x, norms, convs, shortcut

    def test_bottleneck(self, cuda):
        # begin, 3 convolutions, running statistics; begin, 2 for each 1x1 and 3 for the 3x3
        assert self.count(cuda, self.arguments("bottleneck", c=64, mid=16)) == (5, 8)

    def test_bottleneck_of_more_channels(self, cuda):
        # 3 for the 1x1 with more than 64 outputs
        assert self.count(cuda, self.arguments("bottleneck", c=128, mid=32)) == (5, 9)

    def test_basic(self, cuda):
        assert self.count(cuda, self.arguments("basic", c=16)) == (4, 7)

    def test_projection(self, cuda):
        # and the shortcut's convolution; its two gradients
        assert self.count(cuda, self.arguments("basic", c=16, k=32, stride=2)) == (5, 9)

    def test_by_primitives(self, cuda):
        """4 and 6 for each convolution (5 where one kernel makes both gradients), and one more for each float32
        weight; running statistics are counted apart."""
        with rf.record_dispatch():
            forward, backward = self.count(cuda, self.arguments("bottleneck", c=64, mid=16))
        assert (forward, backward) == (3 * 4 - 1 + 3, 5 + 6 + 5 + 3)


def test_running_statistics_of_many_norms(cuda):
    norms = [
        BatchNormArgs(None, None, torch.rand(c), torch.rand(c), True, 0.1, 1e-5, torch.tensor(5))
        for c in range(1, 200, 19)
    ]
    again = [n._replace(running_mean=n.running_mean.clone(), running_var=n.running_var.clone()) for n in norms]
    stats = [torch.rand(2, len(n.running_mean)) for n in norms]
    count, _ = launches_of(
        cuda, lambda: running_stats.update_of_unit([(n, s, 9) for n, s in zip(norms, stats, strict=True)])
    )
    assert count == 2 and all(n.num_batches_tracked.item() == 6 for n in norms)
    for n, a, s in zip(norms, again, stats, strict=True):
        cuda.update_running_stats(a.running_mean, a.running_var, s, 9, 0.1)
        assert torch.equal(n.running_mean, a.running_mean) and torch.equal(n.running_var, a.running_var)


def test_running_statistics_of_one_norm_several_times(cuda):
    """As one after the other: blocks of one launch run side by side, so no launch has a norm or a counter twice."""
    mean, var, other = torch.rand(9), torch.rand(9), torch.rand(9)
    batches = torch.tensor(5)
    again = BatchNormArgs(None, None, mean, var, True, 0.1, 1e-5, batches)
    crossed = BatchNormArgs(None, None, other, mean, True, 0.3, 1e-5, torch.tensor(0))
    norms = [again, again._replace(momentum=0.2), crossed, again]
    stats = [torch.rand(2, 9) for _ in norms]
    expected = mean.clone(), var.clone(), other.clone()
    count, _ = launches_of(
        cuda, lambda: running_stats.update_of_unit([(n, s, 9) for n, s in zip(norms, stats, strict=True)])
    )
    for norm, s, vectors in zip(norms, stats, ((0, 1), (0, 1), (2, 0), (0, 1)), strict=True):
        cuda.update_running_stats(*(expected[i] for i in vectors), s, 9, norm.momentum)
    assert all(map(torch.equal, (mean, var, other), expected))
    assert batches.item() == 8 and crossed.num_batches_tracked.item() == 1
    assert count == 4
