"""A whole unit by one C++ operator, in the dispatcher's operator: the same to the bit as by its primitives, and when it
runs. Without the dispatcher: test_residual_units.py."""

import contextlib
import itertools

import plain
import pytest
import torch
from test_residual_unit import UNITS, conv, gradients, unit

import resnet_fused as rf
from resnet_fused import primitives
from resnet_fused.functional import BatchNormArgs
from resnet_fused.ops import running_stats, whole_unit
from resnet_fused.ops.residual_unit import residual_unit_by_dispatcher

CL = torch.channels_last
DTYPES = [torch.float32, torch.bfloat16, torch.float64]

pytestmark = pytest.mark.usefixtures("cpu_library", "one_thread")


def fused(x, norms, convs, shortcut=None, slope=0.0, **options):
    return residual_unit_by_dispatcher(x, norms, convs, shortcut=shortcut, negative_slope=slope, **options)


@pytest.fixture
def calls(monkeypatch):
    """The names of the operators that ran whole units."""
    names = []

    def note(find, pick):
        def found(*args):
            result = find(*args)
            if pick(result) is not None:
                names.append(pick(result)._schema.name.partition("::")[2])
            return result

        return found

    forward = note(whole_unit.forward_operator, lambda result: result)
    backward = note(whole_unit.backward_operator, lambda result: result[0])
    monkeypatch.setattr(whole_unit, "forward_operator", forward)
    monkeypatch.setattr(whole_unit, "backward_operator", backward)
    return names


def results(arguments, primitives_only=False, **options):
    """Output, its statistics, all gradients and the running statistics."""
    mine = plain.copy(arguments)
    with rf.record_dispatch() if primitives_only else contextlib.nullcontext():
        out, stats = fused(*mine, return_stats=True, **options)
        generator = torch.Generator().manual_seed(3)
        dout = torch.randn(out.shape, generator=generator).to(out)
        grads = [out] if not out.requires_grad else gradients(out, mine, dout)
    return [out, stats, *grads, *(t for n in mine[1] for t in n[2:4] if t is not None)]


def check_same(arguments, **options):
    whole = results(arguments, **options)
    for a, b in zip(whole, results(arguments, primitives_only=True, **options), strict=True):
        assert a.dtype == b.dtype and a.stride() == b.stride() and torch.equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("case", UNITS)
def test_same_as_by_primitives(calls, case, training, dtype):
    check_same(unit(**UNITS[case], training=training, dtype=dtype), slope=0.1)
    assert calls == [] if case == "groups" else calls == ["residual_units_forward", "residual_units_backward"]


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("training", list(itertools.product([True, False], repeat=3)), ids=str)
def test_frozen_norms_and_master_weights(calls, training, stride):
    arguments = unit(
        "bottleneck", c=16, mid=8, stride=stride, training=list(training), dtype=torch.bfloat16,
        parameters=torch.float32, bias=True,
    )  # fmt: skip
    x = arguments[0].detach()
    given = torch.ops.resnet_fused.channel_stats(x) if training[0] else None
    check_same(arguments, x_stats=given)
    assert len(calls) == 2


@pytest.mark.parametrize("weights", [torch.contiguous_format, CL], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("x_format", [torch.contiguous_format, CL], ids=["contiguous", "channels_last"])
def test_layouts(calls, x_format, weights):
    x, norms, convs, shortcut = unit("basic", c=8, k=16, stride=2)
    x = x.detach().contiguous(memory_format=x_format).requires_grad_()
    convs = [
        c._replace(weight=c.weight.detach().contiguous(memory_format=weights).requires_grad_()) for c in convs
    ]
    check_same((x, norms, convs, shortcut))
    assert len(calls) == 2


@pytest.mark.parametrize("stride", [1, 2])
def test_every_mask_of_two_leaves(calls, stride):
    """Which gradients are needed, in pairs: where backward can stop changes with it."""
    arguments = unit("bottleneck", c=8, mid=8, stride=stride, bias=True)
    leaves = plain.tensors((arguments[0], [n[:2] for n in arguments[1]], arguments[2], arguments[3] or ()))
    for pair in itertools.combinations(range(len(leaves)), 2):
        for i, leaf in enumerate(leaves):
            leaf.requires_grad_(i in pair)
        check_same(arguments)


def test_no_raw_outputs_without_gradients(calls):
    arguments = unit("bottleneck", c=8, mid=8)
    with torch.no_grad():
        check_same(arguments)
    assert calls == ["residual_units_forward"]


def test_when_it_runs(calls):
    arguments = unit("basic")
    with rf.record_dispatch() as log:  # the log is to be complete
        fused(*arguments)
    assert calls == [] and len(log) >= 5
    for backend in ("reference", "unfused"):
        with rf.use_backend(backend):
            fused(*arguments)
    assert calls == []
    fused(*arguments)
    assert calls == ["residual_units_forward"]
    with rf.use_backend("reference"):  # a kept choice does not outlive the backend
        fused(*arguments)
    assert len(calls) == 1
    fused(*unit("basic", n=0))
    fused(*unit("basic", dtype=torch.float16))
    assert len(calls) == 1


def test_one_primitive_elsewhere_is_enough(calls, monkeypatch):
    choose = whole_unit.dispatch.choose

    def moved(primitive, device, dtype, geometry=None):
        if primitive == "preact_conv_wgrad" and geometry.weight[-1] == 3:
            return whole_unit.dispatch.Choice("unfused", "test")
        return choose(primitive, device, dtype, geometry)

    with rf.use_backend("cpu"):  # nothing is kept from before
        monkeypatch.setattr(whole_unit.dispatch, "choose", moved)
        fused(*unit("basic")).sum().backward()
    assert calls == ["residual_units_forward"]


def test_a_biased_gradient_without_the_weights_takes_primitives(calls):
    arguments = unit("basic", bias=True)
    arguments[2][1].weight.requires_grad_(False)
    check_same(arguments)
    assert calls == ["residual_units_forward"]


def test_errors_are_those_of_the_checks():
    """Where the shapes are known to fit, the operator itself finds what does not; the words stay PyTorch's."""
    x, norms, convs, _ = unit("basic")
    fused(x, norms, convs)
    for change, message in (
        ({"weight": torch.ones(5)}, "weight should contain 8 elements not 5"),
        ({"running_mean": torch.ones(5)}, "running_mean should contain 8 elements not 5"),
        ({"weight": torch.ones(8, dtype=torch.int64)}, "batch norm weight type"),
        ({"eps": 0.0}, "batch_norm eps must be positive during training, but got 0.0"),
        ({"running_var": None}, "must either both be None"),
    ):
        with pytest.raises((RuntimeError, ValueError), match=message):
            fused(x, [norms[0], norms[1]._replace(**change)], convs)
    with pytest.raises(RuntimeError, match="bias to be 1-dimensional with 8 elements"):
        fused(x, norms, [convs[0], convs[1]._replace(bias=torch.ones(3))])
    one = torch.randn(1, 8, 1, 1)
    pointwise = [conv(8, 8), conv(8, 8)]
    with pytest.raises(ValueError, match="more than 1 value per channel when training"):
        fused(one, norms, pointwise)
    wide = torch.randn(1, 8, 2, 1)  # the second norm sees one value
    with pytest.raises(ValueError, match="more than 1 value per channel when training"):
        fused(wide, norms, [conv(8, 8, 1, 2), conv(8, 8)], conv(8, 8, 1, 2))


def test_lists_of_other_lengths():
    """Of known shapes, too: parameters reach C++ as one list, where the length of each could not be seen."""
    x, norms, convs, _ = unit("basic")
    fused(x, norms, convs)
    ones = torch.ones(8)
    for first in (0, 2):  # the BatchNorms' weights and biases; running means and variances
        lists = [[ones] * 2 for _ in range(4)] + [[c.weight for c in convs], [None] * 2]
        lists[first : first + 2] = [ones], [ones] * 3
        with pytest.raises(RuntimeError, match="expected at least one convolution, and a BatchNorm"):
            torch.ops.resnet_fused.residual_unit(
                x, None, *lists, None, None, [True] * 2, [1e-5] * 2, 0.0, [1, 1] * 2, [1, 1] * 2, [1, 1] * 2,
                [1] * 2, [1, 1], False, False,
            )  # fmt: skip


class TestOptions:
    """What the operators for units say to options that do not fit."""

    def arguments(self):
        x, _, convs, _ = unit("basic")
        shapes = whole_unit.UnitShapes(
            [c.weight.shape for c in convs], [None], [1, 1] * 2, [1, 1] * 2, [1, 1] * 2, [1] * 2, [1, 1], [2]
        )
        options = whole_unit.options(0.0, [True] * 2, [1e-5] * 2, shapes)
        parameters = [None] * 4 + [c.weight for c in convs] + [None] * 4
        return x.detach().contiguous(memory_format=CL), parameters, options

    def call(self, x, parameters, options, running=(), momenta=()):
        with torch.no_grad():
            return torch.ops.resnet_fused_cpu.residual_units_forward(
                x, None, parameters, options, list(running), list(momenta), [], False, True, True
            )

    def test_as_they_should_be(self):
        x, parameters, options = self.arguments()
        out, _, raw, stats, bns = self.call(x, parameters, options)
        norms = [BatchNormArgs(None, None, None, None, True) for _ in range(2)]
        convs = [c._replace(weight=w) for c, w in zip(unit("basic")[2], parameters[4:6], strict=True)]
        assert torch.equal(out, fused(x, norms, convs)) and (len(raw), len(stats), len(bns)) == (1, 2, 2)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda o: o[:-1].contiguous(), "expected more than 22 options"),
            (lambda o: torch.cat([o, o[:2]]), "expected 2 options less"),
            (lambda o: o.float(), "expected options to be a contiguous float64 vector on the CPU"),
            (lambda o: o[::2], "expected options to be a contiguous float64 vector on the CPU"),
            (lambda o: torch.cat([o[:1] * 0, o[1:]]), "expected at least one unit"),
            (lambda o: torch.cat([o[:1], o[1:2] * 0, o[2:]]), "expected at least one convolution in each unit"),
            (lambda o: torch.cat([o[:1], o[1:2] + 1, o[2:]]), "expected 14 parameters of 3 convolutions in 1 units"),
        ],
    )
    def test_wrong_options(self, change, message):
        x, parameters, options = self.arguments()
        with pytest.raises(RuntimeError, match=message):
            self.call(x, parameters, change(options))

    def test_wrong_lists(self):
        x, parameters, options = self.arguments()
        for lists, message in (
            ((parameters[:-1],), "expected 10 parameters of 2 convolutions in 1 units, but got 9"),
            ((parameters, [None] * 3), "expected 4 running statistics or none, but got 3"),
            ((parameters, [None] * 4, [0.1]), "expected 2 momenta or none, but got 1"),
            (([None] * 10,), "expected a weight of every convolution"),
        ):
            with pytest.raises(RuntimeError, match=message):
                self.call(x, lists[0], options, *lists[1:])


class TestRunningStatistics:
    def norms(self, **changes):
        generator = torch.Generator().manual_seed(0)

        def draw(c):
            return torch.rand(c, generator=generator)

        made = [
            BatchNormArgs(None, None, draw(c), draw(c), True, 0.1 * (i + 1), 1e-5, torch.tensor(i))
            for i, c in enumerate((3, 4, 3))
        ]
        return [n._replace(**changes) for n in made]

    def test_one_call_is_several(self):
        one, several = self.norms(), self.norms()
        stats = [torch.rand(2, len(n.running_mean)) for n in one]
        running_stats.update_of_unit([(n, s, 7) for n, s in zip(one, stats, strict=True)])
        for n, s in zip(several, stats, strict=True):
            primitives.update_running_stats(n.running_mean, n.running_var, s, 7, n.momentum)
        for i, (a, b) in enumerate(zip(one, several, strict=True)):
            assert torch.equal(a.running_mean, b.running_mean) and torch.equal(a.running_var, b.running_var)
            assert a.num_batches_tracked.item() == i + 1
            assert a.running_mean._version == a.running_var._version == 0  # as PyTorch's batch norm leaves them

    @pytest.mark.parametrize("recorded", [False, True])
    def test_what_stays_out(self, recorded):
        """Tensor momenta, an empty batch, norms that only count."""
        norms = self.norms()
        norms[0] = norms[0]._replace(momentum=torch.tensor(0.5))
        norms[2] = norms[2]._replace(running_mean=None, running_var=None)
        before = plain.copy(norms)
        stats = [torch.rand(2, c) for c in (3, 4, 3)]
        with rf.record_dispatch() if recorded else torch.no_grad():
            running_stats.update_of_unit(list(zip(norms, stats, (7, 0, 7), strict=True)))
        assert [n.num_batches_tracked.item() for n in norms] == [1, 2, 3]
        expected = torch.lerp(before[0].running_mean, stats[0][0], 0.5)
        torch.testing.assert_close(norms[0].running_mean, expected)
        assert torch.equal(norms[1].running_mean, before[1].running_mean)

    def test_wrong_counter(self):
        operator = torch.ops.resnet_fused_cpu.update_running_stats_of_unit
        mean = torch.zeros(3)
        with pytest.raises(RuntimeError, match="num_batches_tracked to be one int64"):
            operator([mean], [mean.clone()], [torch.ones(2, 3)], [4], [0.1], [torch.ones(2)])
        assert not mean.any()
