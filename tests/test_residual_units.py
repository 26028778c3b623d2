"""functional.residual_units: units in one autograd node: the same to the bit as one by one, and when."""

import copy
import gc
import weakref

import plain
import pytest
import torch
from conftest import residual_units_module
from test_residual_unit import conv, gradients, norm
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import resnet_fused as rf
from resnet_fused.functional import UnitArgs, residual_units
from resnet_fused.nn import units as units_module
from resnet_fused.ops import whole_unit

CL = torch.channels_last
DTYPES = [torch.float32, torch.bfloat16, torch.float64]

pytestmark = pytest.mark.usefixtures("cpu_library", "one_thread")


@pytest.fixture
def nodes(monkeypatch):
    """How many units each call of _one_node ran as one, 0 where it left them to be called one by one."""
    seen = []

    def one_node(units, *args, original=residual_units_module._one_node):
        result = original(units, *args)
        seen.append(0 if result is None else len(units))
        return result

    monkeypatch.setattr(residual_units_module, "_one_node", one_node)
    return seen


@pytest.fixture
def one_by_one(monkeypatch):
    """A switch: called with True, residual_units calls its units one by one; with False, as it does."""
    original = residual_units_module._one_node

    def switch(on: bool) -> None:
        monkeypatch.setattr(residual_units_module, "_one_node", (lambda *args: None) if on else original)

    return switch


def bottleneck(c=16, mid=8, training=True, dtype=torch.float32, **options):
    widths = (c, mid, mid)
    return UnitArgs(
        [
            norm(w, training, dtype=dtype, **options)._replace(num_batches_tracked=torch.tensor(3))
            for w in widths
        ],
        [conv(c, mid, dtype=dtype), conv(mid, mid, 3, dtype=dtype), conv(mid, c, dtype=dtype)],
    )


def basic(c=16, k=None, stride=1, training=True, dtype=torch.float32, slope=0.0, **options):
    k = k or c
    projects = stride != 1 or k != c
    return UnitArgs(
        [norm(c, training, dtype=dtype), norm(k, training, dtype=dtype)],
        [conv(c, k, 3, stride, dtype=dtype, **options), conv(k, k, 3, dtype=dtype, **options)],
        conv(c, k, 1, stride, dtype=dtype) if projects else None,
        slope,
    )


def batch(c=16, n=2, h=6, w=5, dtype=torch.float32):
    return (torch.randn(n, c, h, w) + 0.5).to(dtype).contiguous(memory_format=CL).requires_grad_()


ROWS = {
    "bottlenecks": lambda dtype: [bottleneck(dtype=dtype) for _ in range(4)],
    "basic": lambda dtype: [basic(dtype=dtype) for _ in range(3)],
    "mixed": lambda dtype: [basic(dtype=dtype), bottleneck(dtype=dtype), bottleneck(mid=12, dtype=dtype)],
    "odd widths": lambda dtype: [basic(17, dtype=dtype) for _ in range(2)],
    "biases, leaky": lambda dtype: [basic(slope=0.1, bias=True, dtype=dtype) for _ in range(3)],
    "without affine": lambda dtype: [bottleneck(affine=False, dtype=dtype) for _ in range(2)],
    "one": lambda dtype: [bottleneck(dtype=dtype)],
    "one, projects": lambda dtype: [basic(8, 16, 2, dtype=dtype)],
    "one, projects, biases": lambda dtype: [basic(8, 20, slope=0.1, bias=True, dtype=dtype)],
    "projections": lambda dtype: [
        basic(8, 16, 2, dtype=dtype), basic(dtype=dtype), basic(16, 24, dtype=dtype), bottleneck(24, dtype=dtype),
    ],
    "projects last": lambda dtype: [basic(8, bias=True, dtype=dtype), basic(8, 20, 2, dtype=dtype, bias=True)],
    "without running": lambda dtype: [bottleneck(running=False, dtype=dtype) for _ in range(2)],
}


def results(x, units, x_stats=None, autocast=None):
    """Output, its statistics, all gradients and what the norms track."""
    x, units = plain.copy((x, units))
    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        out, stats = residual_units(x, units, x_stats=x_stats, return_stats=True)
    found = [out, stats]
    if out.requires_grad:
        generator = torch.Generator().manual_seed(3)
        found += gradients(
            out, (x, [u[:3] for u in units]), torch.randn(out.shape, generator=generator).to(out)
        )
    return found + [
        t for u in units for n in u.norms for t in (*n[2:4], n.num_batches_tracked) if t is not None
    ]


def check_same(one_by_one, *args, **options):
    whole = results(*args, **options)
    one_by_one(True)
    for a, b in zip(whole, results(*args, **options), strict=True):
        assert (a is None) == (b is None)
        assert a is None or (a.dtype == b.dtype and a.stride() == b.stride() and torch.equal(a, b))
    one_by_one(False)


class TestSameAsOneByOne:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("case", ROWS)
    def test_results(self, nodes, one_by_one, case, dtype):
        units = ROWS[case](dtype)
        x = batch(units[0].convs[0].weight.shape[1], dtype=dtype)
        given = torch.ops.resnet_fused.channel_stats(x.detach())
        for x_stats in (None, given):
            nodes.clear()
            results(x, units, x_stats=x_stats)
            assert nodes == [len(units)]
            check_same(one_by_one, x, units, x_stats=x_stats)

    @pytest.mark.parametrize(
        "needed",
        ["x", "norm", "norm's bias", "weight", "shortcut", "all but the shortcut", "shortcut's bias"],
    )
    @pytest.mark.parametrize("behind", [0, 1])
    def test_which_gradients_of_a_projecting_unit(self, one_by_one, nodes, needed, behind):
        """By itself, and with units before and behind it that need none of their own."""
        units, x = [basic(8, 16, 2, bias=True)], batch(8)
        units[0] = units[0]._replace(shortcut=conv(8, 16, 1, 2, bias=True))
        shortcut = units[0].shortcut
        everything = [t for t in plain.tensors((x, units)) if t.is_floating_point()]
        leaves = {
            "x": [x],
            "norm": [units[0].norms[1].weight],
            "norm's bias": [units[0].norms[0].bias],
            "weight": [units[0].convs[0].weight],
            "shortcut": [shortcut.weight, shortcut.bias],
            "shortcut's bias": [shortcut.bias],
            "all but the shortcut": [
                t for t in everything if t is not shortcut.weight and t is not shortcut.bias
            ],
        }[needed]
        running = {id(t) for norm in units[0].norms for t in (norm.running_mean, norm.running_var)}
        for t in everything:
            if id(t) not in running:
                t.requires_grad_(any(t is leaf for leaf in leaves))
        if behind:
            units = [basic(8), *units, basic(16)]
            for t in plain.tensors((units[0], units[2])):
                t.requires_grad_(False)
        check_same(one_by_one, x, units)
        # What has no gradient is by itself.
        assert nodes == ([1, 2] if behind and not x.requires_grad else [len(units)])

    def test_dtypes_of_parameters(self, one_by_one, nodes):
        """BatchNorm's own in bfloat16, as after model.bfloat16()."""
        units, x = [bottleneck(dtype=torch.bfloat16)], batch(dtype=torch.bfloat16)
        norms = [
            norm._replace(weight=w, bias=b)
            for norm in units[0].norms
            for w, b in [[t.detach().bfloat16().requires_grad_() for t in (norm.weight, norm.bias)]]
        ]
        units[0] = units[0]._replace(norms=norms)
        check_same(one_by_one, x, units)
        assert nodes[0] == 1

    @pytest.mark.parametrize("training", [True, False])
    def test_without_gradients(self, nodes, one_by_one, training):
        units, x = [bottleneck(training=training) for _ in range(3)], batch()
        with torch.no_grad():
            residual_units(x, plain.copy(units))
            assert nodes == [3]
            check_same(one_by_one, x, units)
        with torch.inference_mode():
            out = residual_units(x.detach().clone(memory_format=CL), plain.copy(units))
            assert out.is_inference()

    def test_autocast(self, nodes, one_by_one):
        units, x = [bottleneck() for _ in range(3)], batch()
        out = results(x, units, autocast=torch.bfloat16)
        assert nodes == [3] and out[0].dtype is torch.bfloat16 and out[3].dtype is torch.float32
        check_same(one_by_one, x, units, autocast=torch.bfloat16)
        check_same(one_by_one, x.detach().bfloat16(), units, autocast=torch.bfloat16)

    @pytest.mark.parametrize(
        "level", range(len(rf.extension.cpu_levels()) if rf.extension.cpu_available() else 0)
    )
    def test_simd_levels(self, one_by_one, level):
        torch.ops.resnet_fused_cpu.set_simd_level(level)
        try:
            for c in (16, 20):  # BatchNorm's backward in place, and not
                check_same(one_by_one, batch(c), [basic(c), basic(c)])
        finally:
            torch.ops.resnet_fused_cpu.set_simd_level(-1)

    @pytest.mark.parametrize(
        "needed", ["x", "first", "middle", "last", "bias of a norm", "nothing below the last"]
    )
    def test_which_gradients_are_needed(self, one_by_one, needed):
        units, x = [bottleneck() for _ in range(3)], batch()
        leaves = {
            "x": [x],
            "first": [units[0].convs[0].weight],
            "middle": [units[1].norms[1].weight, units[1].convs[2].weight],
            "last": [units[2].norms[2].weight],
            "bias of a norm": [units[1].norms[0].bias],
            "nothing below the last": [units[2].convs[2].weight],
        }[needed]
        for t in plain.tensors((x, units)):
            t.requires_grad_(any(t is leaf for leaf in leaves))
        check_same(one_by_one, x, units)

    def test_a_biased_gradient_without_the_weights(self, one_by_one, nodes):
        units = [basic(bias=True) for _ in range(2)]
        units[0].convs[1].weight.requires_grad_(False)
        check_same(one_by_one, batch(), units)

    def test_backend_changed_before_backward(self):
        units, x = [bottleneck(dtype=torch.float64) for _ in range(3)], batch(dtype=torch.float64)
        expected = results(x, units)[2:-27]
        dout = torch.randn(x.shape, generator=torch.Generator().manual_seed(3)).to(x)
        units = plain.copy(units)
        out = residual_units(x, units)
        with rf.use_backend("reference"):
            found = gradients(out, (x, [u[:3] for u in units]), dout)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b)

    def test_recorded_backward(self):
        units, x = [basic() for _ in range(2)], batch()
        out = residual_units(x, units)
        with rf.record_dispatch() as log:
            out.sum().backward()
        names = [record.primitive for record in log]
        assert names.count("preact_apply") == 4 and names.count("preact_conv_dgrad") == 4


class TestRows:
    """Which units share a node."""

    def test_at_most_16(self, nodes):
        units = [basic(4, bias=False) for _ in range(37)]
        residual_units(batch(4), units)
        assert nodes == [13, 13, 11]

    @pytest.mark.parametrize("count, longest", [(1, 1), (2, 2), (16, 16), (17, 9), (64, 16), (110, 16)])
    def test_as_few_as_may_be(self, count, longest):
        lengths = [len(units) for units in residual_units_module._rows([basic(4)] * count)]
        assert sum(lengths) == count and max(lengths) == longest and len(lengths) == -(-count // 16)

    def test_as_many_parameters_as_a_bucket_has_room_for(self):
        small, large, projecting = basic(8), bottleneck(2048, 512), basic(512, 1024, 2)  # 5 KB, 18 MB, 59 MB
        rows = residual_units_module._rows([small, small, large, small, projecting, small])
        assert [len(row) for row in rows] == [2, 1, 1, 1, 1]
        medium = bottleneck(1024, 256)  # 4.5 MB
        assert [len(row) for row in residual_units_module._rows([medium] * 7)] == [3, 3, 1]

    def test_projections_join(self, nodes):
        row = [basic(8), basic(8), basic(8, 16, 2), basic(16), basic(16)]
        out, stats = residual_units(batch(8), row, return_stats=True)
        assert nodes == [5] and out.shape == (2, 16, 3, 3)
        torch.testing.assert_close(
            stats, torch.ops.resnet_fused.channel_stats(out.detach()), rtol=1e-5, atol=1e-4
        )

    def test_hooks_get_the_saved_tensors_of_one_unit(self, nodes):
        with torch.autograd.graph.save_on_cpu():
            residual_units(batch(), [basic() for _ in range(3)])
        assert nodes == [1, 1, 1]

    def test_frozen_units_in_front_save_nothing(self, nodes, one_by_one):
        units, x = [basic(8), basic(8, 16, 2), basic(), basic()], batch(8).detach()
        for t in plain.tensors(units[:2]):
            t.requires_grad_(False)
        out = residual_units(x, plain.copy(units))
        assert nodes == [2, 2] and out.grad_fn is not None
        assert out.grad_fn.saved_tensors[0].shape[1] == 16  # what the third reads
        check_same(one_by_one, x, units)
        for t in plain.tensors(units):
            t.requires_grad_(False)
        nodes.clear()
        assert residual_units(x, units).grad_fn is None and nodes == [4]

    def test_what_a_node_has_in_common(self, nodes):
        frozen = [basic(training=False) for _ in range(2)]
        with torch.no_grad():
            residual_units(batch(), [basic(), basic(slope=0.1), basic(slope=0.1), *frozen, basic()])
        assert nodes == [1, 2, 2, 1]

    def test_units_that_cannot_share_one_have_their_own(self, nodes, one_by_one):
        grouped = basic()
        weight = torch.randn(16, 8, 3, 3).contiguous(memory_format=CL).requires_grad_()
        grouped.convs[1] = grouped.convs[1]._replace(weight=weight, groups=2)  # the unfused path's
        units, x = [basic(), grouped, basic()], batch()
        residual_units(x, plain.copy(units))
        assert nodes == [0, 1, 0, 1]
        check_same(one_by_one, x, units)

    def test_left_one_by_one(self, nodes):
        def left(x, units, grad=True, alone=0):
            """Whether the row is no node, and each unit then is one (alone = 1) or none."""
            nodes.clear()
            with torch.set_grad_enabled(grad):
                residual_units(x, units)
            return nodes == [0, *[alone] * len(units)]

        x, two = batch(), [basic(), basic()]
        assert not left(x, two) and nodes == [2]
        assert not left(x, two[:1]) and nodes == [1]
        assert left(x.detach().contiguous(), two)
        frozen = [basic(training=False), basic(training=False)]
        assert left(x, frozen) and not left(x, frozen, grad=False)
        assert left(x, [two[0], two[0]], alone=1)  # its running statistics are updated twice, in order
        assert left(x[:0], two)
        assert left(x.detach().to(torch.float16), [basic(dtype=torch.float16) for _ in range(2)])
        with rf.record_dispatch() as log:
            assert left(x, two)
        assert sum(record.primitive == "preact_conv_forward" for record in log) == 4
        for name in ("reference", "unfused"):
            with rf.use_backend(name):
                assert left(x, two)
        assert not left(x, two)

    def test_no_units(self):
        with pytest.raises(ValueError, match="at least one unit"):
            residual_units(batch(), [])


class TestFromStageToStage:
    def net(self):
        torch.manual_seed(0)
        return rf.models.create_model("preact_resnet20_cifar", num_classes=10).to(memory_format=CL)

    def outcome(self, net):
        x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1)).contiguous(memory_format=CL)
        net.zero_grad()
        y = net(x)
        y.square().sum().backward()
        return [y.detach(), *[p.grad for p in net.parameters()], *net.buffers()]

    def test_same_as_stage_by_stage(self, nodes, monkeypatch):
        whole = self.outcome(self.net())
        assert nodes == [9]
        monkeypatch.setattr(units_module, "_without_stages", list)
        apart = self.outcome(self.net())
        assert nodes == [9, 3, 3, 3] and all(map(torch.equal, whole, apart))

    def test_what_parts_stages(self, nodes):
        def nodes_with(change):
            net = self.net()
            nodes.clear()
            change(net)
            self.outcome(net)
            return nodes

        class Stage(rf.nn.PreActStage):
            def forward(self, *args, **kwargs):
                return super().forward(*args, **kwargs)

        seen = []

        def hook(*args):
            seen.append(1)

        assert nodes_with(lambda net: net.layer2.register_forward_hook(hook)) == [3, 3, 3]
        assert seen == [1]
        assert nodes_with(lambda net: setattr(net, "layer1", Stage(*net.layer1))) == [3, 6]
        assert nodes_with(lambda net: setattr(net.layer3, "forward", net.layer3.forward)) == [6, 3]

        def compile_stage(net):  # as net.layer1.compile() does
            net.layer1._compiled_call_impl = net.layer1._call_impl

        assert nodes_with(compile_stage) == [3, 6]
        handle = nn.modules.module.register_module_forward_hook(lambda *args: None)
        try:
            assert nodes_with(lambda net: None) == [1] * 9
        finally:
            handle.remove()


class TestErrors:
    """Those of the units, before anything has run or been updated."""

    @pytest.mark.parametrize("known", [False, True], ids=["new shape", "known shape"])
    def test_words(self, known):
        x, units = batch(), [bottleneck() for _ in range(3)]
        if known:
            residual_units(x, plain.copy(units))
        before = plain.copy(units)
        for index, change, message in (
            (1, {"weight": torch.ones(5)}, "weight should contain 8 elements not 5"),
            (2, {"running_var": None}, "must either both be None"),
            (1, {"eps": 0.0}, "batch_norm eps must be positive"),
        ):
            norms = list(units[index].norms)
            norms[1] = norms[1]._replace(**change)
            wrong = [u if i != index else u._replace(norms=norms) for i, u in enumerate(units)]
            with pytest.raises((RuntimeError, ValueError), match=message):
                residual_units(x, wrong)
        wide = units[1]._replace(convs=[*units[1].convs[:2], conv(8, 12)])
        with pytest.raises(RuntimeError, match="size of tensor a"):
            residual_units(x, [units[0], wide, units[2]])
        for now, then in zip(plain.tensors(units), plain.tensors(before), strict=True):
            assert torch.equal(now, then)

    def test_numbers_of_norms_and_convolutions(self):
        units = [basic(), basic()]
        with pytest.raises((RuntimeError, ValueError)):
            residual_units(batch(), [units[0], units[1]._replace(norms=units[1].norms[:1])])


class TestAutograd:
    def test_second_derivative(self, nodes, one_by_one):
        """Of a penalty on gradients; one parameter is shared by two units."""
        units = [basic(4, dtype=torch.float64, slope=0.1, bias=True) for _ in range(3)]
        units[2] = units[2]._replace(convs=[units[0].convs[0], units[2].convs[1]])
        x = batch(4, dtype=torch.float64)
        leaves = [t for t in plain.tensors((x, [u[:3] for u in units])) if t.requires_grad]
        leaves = list({id(t): t for t in leaves}.values())

        def penalty():
            nodes.clear()
            out = residual_units(x, units).square().sum()
            grads = torch.autograd.grad(out, leaves, create_graph=True)
            return torch.autograd.grad(sum(g.square().sum() for g in grads), leaves)

        whole = penalty()
        assert nodes[0] == 3
        one_by_one(True)
        for a, b in zip(whole, penalty(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)

    def test_gradgradcheck(self, nodes):
        units = [basic(2, dtype=torch.float64, slope=0.3) for _ in range(2)]
        x = batch(2, n=2, h=3, w=3, dtype=torch.float64)
        weights = [u.convs[0].weight for u in units]

        def function(x, *weights):
            row = [
                u._replace(convs=[u.convs[0]._replace(weight=w), u.convs[1]])
                for u, w in zip(units, weights, strict=True)
            ]
            return residual_units(x, row)

        assert torch.autograd.gradcheck(function, (x, *weights))
        assert torch.autograd.gradgradcheck(function, (x, *weights))
        assert nodes[0] == 2

    def test_twice_through_one_graph(self):
        units, x = [basic(), basic()], batch()
        out = residual_units(x, units)
        (first,) = torch.autograd.grad(out.sum(), x, retain_graph=True)
        (second,) = torch.autograd.grad(out.sum(), x)
        assert torch.equal(first, second)
        with pytest.raises(RuntimeError, match="second time"):
            torch.autograd.grad(out.sum(), x)

    def test_changed_in_place(self):
        units, x = [basic(), basic()], batch()
        out = residual_units(x, units)
        with torch.no_grad():
            units[1].convs[0].weight.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.sum().backward()

    @pytest.mark.parametrize("case", ["one, projects", "mixed"])
    @pytest.mark.parametrize("as_node", [True, False])
    def test_saved_tensors_come_back_in_another_layout(self, one_by_one, as_node, case):
        """As from a hook that packs them."""
        one_by_one(not as_node)
        units = ROWS[case](torch.float32)
        x = batch(units[0].convs[0].weight.shape[1])
        expected = results(x, units)
        contiguous = torch.autograd.graph.saved_tensors_hooks(
            lambda t: t.detach().clone(memory_format=torch.contiguous_format), lambda t: t
        )
        with contiguous:
            found = results(x, units)
        for a, b in zip(found, expected, strict=True):
            assert (a is None) == (b is None) and (a is None or torch.equal(a, b))

    def test_running_statistics_may_change_before_backward(self):
        units, x = [basic(), basic()], batch()
        first, second = residual_units(x, units), residual_units(x, units)
        (first.sum() + second.sum()).backward()
        assert x.grad is not None

    @pytest.mark.parametrize("reentrant", [False, True])
    def test_checkpoint(self, one_by_one, reentrant):
        units, x = [basic() for _ in range(3)], batch()
        out = checkpoint(lambda t: residual_units(t, units), x, use_reentrant=reentrant)
        found = torch.autograd.grad(out.sum(), x) if not reentrant else (out.sum().backward(), x.grad)[1:]
        expected = torch.autograd.grad(residual_units(x, units).sum(), x)
        assert torch.equal(found[0], expected[0])

    def test_forward_mode_says_so(self):
        units, x = [basic(), basic()], batch()
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(x.detach(), torch.ones_like(x))
            with pytest.raises(RuntimeError):
                residual_units(dual, units)

    def test_a_dispatch_mode_sees_units(self, nodes):
        class Names(TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                seen.append(func.name())
                return func(*args, **(kwargs or {}))

        seen = []
        units, x = [basic(), basic()], batch()
        with Names():
            residual_units(x, units)
        assert nodes == [0, 0, 0] and seen.count("resnet_fused::residual_unit") == 2

    def test_nothing_is_kept_alive(self):
        units, x = [basic(), basic()], batch()
        gc.disable()
        try:
            out = residual_units(x, units)
            seen = weakref.ref(out.grad_fn)
            out.sum().backward()
            del out
            assert seen() is None
        finally:
            gc.enable()


LEVELS = range(len(rf.extension.cpu_levels()) if rf.extension.cpu_available() else 0)


class TestGradientOfTheNextUnit:
    """Of many pixels, a unit's last 1x1 makes the gradient of the next one's input run by run, as it reads it."""

    ROWS = {
        "over x": lambda dtype: [bottleneck(64, 16, dtype=dtype) for _ in range(3)],
        "not over x": lambda dtype: [bottleneck(40, 20, dtype=dtype) for _ in range(3)],
        "a 3x3 reads it": lambda dtype: [basic(32, dtype=dtype), bottleneck(32, 16, dtype=dtype)],
        "biases": lambda dtype: [
            UnitArgs(u.norms, [*u.convs[:2], conv(16, 48, dtype=dtype, bias=True)], None, 0.1)
            for u in (bottleneck(48, 16, dtype=dtype) for _ in range(2))
        ],
    }

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("row", ROWS)
    @pytest.mark.parametrize("level", LEVELS)
    def test_same_as_one_by_one(self, one_by_one, level, row, dtype):
        units = self.ROWS[row](dtype)
        torch.ops.resnet_fused_cpu.set_simd_level(level)
        try:
            check_same(one_by_one, batch(units[0].convs[0].weight.shape[1], 3, 21, 22, dtype), units)
        finally:
            torch.ops.resnet_fused_cpu.set_simd_level(-1)

    @pytest.mark.parametrize("needed", ["norms", "last weights", "all but the last weights", "first unit"])
    def test_which_gradients_are_needed(self, one_by_one, needed):
        units = self.ROWS["over x"](torch.float32)
        for i, unit in enumerate(units):
            for tensor in plain.tensors(unit[:3]):
                if not tensor.requires_grad:
                    continue
                last = tensor is unit.convs[-1].weight
                tensor.requires_grad_(
                    {"norms": tensor.dim() == 1, "last weights": last, "first unit": i == 0}.get(needed, not last)
                )
        check_same(one_by_one, batch(64, 3, 21, 22), units)
        check_same(one_by_one, batch(64, 3, 21, 22).detach(), units)

    def test_saved_tensors_kept_or_not(self):
        units = self.ROWS["over x"](torch.float32)
        x = batch(64, 3, 21, 22)
        leaves = [t for t in plain.tensors((x, [u[:3] for u in units])) if t.requires_grad]
        out = residual_units(x, units)
        dout = torch.randn(out.shape).to(out)
        kept = torch.autograd.grad(out, leaves, dout, retain_graph=True)
        for a, b in zip(kept, torch.autograd.grad(out, leaves, dout), strict=True):
            assert torch.equal(a, b)


@pytest.fixture
def reused(monkeypatch):
    """Of each backward operator's call, whether it was allowed to write over what forward had saved."""
    seen = []

    def backward_operator(*args, original=whole_unit.backward_operator):
        operator, combined = original(*args)

        def noted(*arguments):
            seen.append(arguments[-1])
            return operator(*arguments)

        return operator and noted, combined

    monkeypatch.setattr(whole_unit, "backward_operator", backward_operator)
    return seen


class TestSavedTensors:
    """Gradients are written over the raw outputs that a node has saved, if nobody can read them any more."""

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("row", [*ROWS, "projection"])
    def test_same_bits(self, reused, row, dtype):
        units = ROWS[row](dtype) if row in ROWS else [basic(16, 32, 2, dtype=dtype)]
        x = batch(units[0].convs[0].weight.shape[1], dtype=dtype)
        leaves = [t for t in plain.tensors((x, [u[:3] for u in units])) if t.requires_grad]
        out = residual_units(x, units)
        dout = torch.randn(out.shape).to(out)
        kept = torch.autograd.grad(out, leaves, dout, retain_graph=True)
        again = torch.autograd.grad(out, leaves, dout, retain_graph=True)
        last = torch.autograd.grad(out, leaves, dout)
        assert reused == [False, False, True]
        for a, b, c in zip(kept, again, last, strict=True):
            assert torch.equal(a, b) and torch.equal(a, c)
        with pytest.raises(RuntimeError, match="second time"):
            torch.autograd.grad(out, leaves, dout)

    @pytest.mark.parametrize("given", [False, True])
    def test_statistics_are_saved_of_a_norm(self, given):
        """Half as much as the rows that the kernels read."""
        units, x = [basic(16, 32, 2), bottleneck(32)], batch()
        for row in (units[:1], units[1:]):
            stats = torch.ops.resnet_fused.channel_stats(x.detach()) if given else None
            n = sum(len(unit.convs) for unit in row)
            out, _ = residual_units(x, row, x_stats=stats, return_stats=True)
            saved = out.grad_fn.saved_tensors[n : 2 * n]
            assert [t.shape for t in saved] == [(2, c.weight.shape[1]) for unit in row for c in unit.convs]
            x = out.detach().requires_grad_()

    def test_not_what_somebody_holds(self, reused):
        units, x = [basic(), basic()], batch()
        out = residual_units(x, units)
        held = out.grad_fn.saved_tensors
        before = [None if t is None else t.detach().clone() for t in held]
        out.sum().backward()
        assert reused == [False]
        for t, b in zip(held, before, strict=True):
            assert t is b is None or torch.equal(t, b)

    def test_not_under_hooks(self, reused):
        units, x = [basic(), basic()], batch()
        kept = []

        def pack(t):
            kept.append((t, t.detach().clone()))
            return len(kept) - 1

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda i: kept[i][0]):
            out = residual_units(x, units)
        out.sum().backward()
        assert reused == [False] * 2 and all(torch.equal(t, before) for t, before in kept)
        checkpoint(lambda x: residual_units(x, units), x, use_reentrant=False).sum().backward()
        assert reused == [False] * 4

    def test_second_derivative(self, reused, one_by_one):
        units, x = [basic(4, dtype=torch.float64)], batch(4, dtype=torch.float64)

        def penalty():
            (gradient,) = torch.autograd.grad(residual_units(x, units).square().sum(), x, create_graph=True)
            return torch.autograd.grad(gradient.square().sum(), x)

        whole = penalty()
        assert True not in reused[:-1]  # the last use may
        one_by_one(True)
        torch.testing.assert_close(whole, penalty(), rtol=1e-9, atol=1e-9)

    def test_a_backward_that_fails_cannot_be_repeated(self, monkeypatch):
        """Half of what was saved may have been written over."""
        units, x = [basic(), basic()], batch()
        out = residual_units(x, units)
        original = whole_unit.backward_operator

        def failing(*args):
            raise RuntimeError("out of memory")

        monkeypatch.setattr(whole_unit, "backward_operator", lambda *args: (failing, original(*args)[1]))
        with pytest.raises(RuntimeError, match="out of memory"):
            out.sum().backward()
        with pytest.raises(RuntimeError, match="second time"):
            out.sum().backward()


class TestStage:
    """nn.PreActStage uses it."""

    def stage(self, count=3):
        return rf.nn.PreActStage(*(rf.nn.PreActBasicBlock(8, 8) for _ in range(count)))

    def test_one_node(self, nodes):
        stage, x = self.stage(), batch(8)
        stage(x)
        assert nodes == [3]
        stage.eval()
        with torch.no_grad():
            stage(x)
        assert nodes == [3, 3]

    def test_hooks_part_it(self, nodes):
        stage, x = self.stage(4), batch(8)
        seen = []
        handle = stage[1].register_forward_hook(lambda module, args, out: seen.append(out.shape))
        stage(x)
        assert nodes == [1, 1, 2] and len(seen) == 1  # the first by itself, the second as a module, two as one
        handle.remove()
        nodes.clear()
        handle = nn.modules.module.register_module_forward_hook(lambda module, args, out: seen.append(module))
        try:
            stage(x)
        finally:
            handle.remove()
        assert nodes == [1] * 4 and all(any(module is unit for module in seen) for unit in stage)

    def test_other_forward(self, nodes):
        class Mine(rf.nn.PreActBasicBlock):
            def forward(self, x, x_stats=None, return_stats=False):
                y = super().forward(x)
                return (y * 2, None) if return_stats else y * 2

        stage = rf.nn.PreActStage(rf.nn.PreActBasicBlock(8, 8), Mine(8, 8), rf.nn.PreActBasicBlock(8, 8))
        stage(batch(8))
        assert nodes == [1, 1, 1]  # around the other one, and in it
        stage = self.stage()
        stage[2].forward = lambda x, *args: x
        nodes.clear()
        stage(batch(8))
        assert nodes == [2]

    def test_momentum_none_counts_once(self, one_by_one):
        stage = rf.nn.PreActStage(*(rf.nn.PreActBasicBlock(8, 8, momentum=None) for _ in range(3)))
        other, x = copy.deepcopy(stage), batch(8)
        for _ in range(2):
            stage(x)
        one_by_one(True)
        for _ in range(2):
            other(x)
        for (name, a), b in zip(stage.named_buffers(), other.buffers(), strict=True):
            assert torch.equal(a, b), name
        assert stage[0].bn1.num_batches_tracked.item() == 2

    @pytest.mark.parametrize("momentum", [0.3, 1, torch.tensor(0.2)], ids=["float", "int", "tensor"])
    def test_running_statistics(self, one_by_one, momentum):
        """By the operator itself, or after it; some of the norms have none or do not count."""
        units, x = [bottleneck() for _ in range(2)], batch()
        norms = [n._replace(momentum=momentum) for n in units[0].norms]
        norms[1] = norms[1]._replace(running_mean=None, running_var=None)
        norms[2] = norms[2]._replace(num_batches_tracked=None)
        units[0] = units[0]._replace(norms=norms)
        before = norms[0].running_mean.clone()
        check_same(one_by_one, x, units)
        running = norms[0].running_mean, norms[0].running_var
        versions = [t._version for t in running]
        residual_units(x, units)
        assert not torch.equal(norms[0].running_mean, before) and norms[0].num_batches_tracked.item() == 4
        assert [t._version for t in running] == versions  # as PyTorch's batch norm leaves them

    def test_shared_unit(self, one_by_one):
        unit = rf.nn.PreActBasicBlock(8, 8)
        stage = rf.nn.PreActStage(unit, rf.nn.PreActBasicBlock(8, 8), unit)
        other, x = copy.deepcopy(stage), batch(8)
        stage(x).sum().backward()
        one_by_one(True)
        other(x).sum().backward()
        for a, b in zip(stage.parameters(), other.parameters(), strict=True):
            assert torch.equal(a.grad, b.grad)
        for a, b in zip(stage.buffers(), other.buffers(), strict=True):
            assert torch.equal(a, b)
        assert unit.bn1.num_batches_tracked.item() == 2

    @pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
    def test_traced(self, nodes):
        """torch.jit.trace records primitives: it does not take the operators' lists of optional tensors."""
        stage, x = self.stage().eval(), batch(8).detach()
        with torch.no_grad():
            traced = torch.jit.trace(stage, x)
            assert nodes[0] == 0
            other = batch(8).detach()
            assert torch.equal(traced(other), stage(other))
