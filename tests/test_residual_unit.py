"""torch.ops.resnet_fused.residual_unit and functional.residual_unit."""

import weakref

import plain
import pytest
import torch
from conftest import on_every_backend
from tolerances import GRADCHECK, assert_trusted, assert_trusted_on_average
from torch.utils.checkpoint import checkpoint

import resnet_fused as rf
from resnet_fused.functional import BatchNormArgs, ConvArgs, residual_unit

CL = torch.channels_last
OP = torch.ops.resnet_fused.residual_unit.default
BACKWARD_OP = torch.ops.resnet_fused.residual_unit_backward.default


def norm(c, training=True, affine=True, running=True, dtype=torch.float32, momentum=0.1, eps=1e-5):
    gamma = (torch.rand(c) + 0.5).to(dtype).requires_grad_() if affine else None
    beta = torch.randn(c).to(dtype).requires_grad_() if affine else None
    mean, var = (torch.randn(c).to(dtype), torch.rand(c).to(dtype) + 0.5) if running else (None, None)
    return BatchNormArgs(gamma, beta, mean, var, training, momentum, eps)


def conv(c, k, kernel=1, stride=1, padding=None, dilation=1, groups=1, bias=False, dtype=torch.float32):
    weight = torch.randn(k, c // groups, kernel, kernel) / (c // groups * kernel**2) ** 0.5
    b = torch.randn(k).to(dtype).requires_grad_() if bias else None
    padding = dilation * (kernel // 2) if padding is None else padding
    return ConvArgs(weight.to(dtype).requires_grad_(), b, stride, padding, dilation, groups)


def unit(
    kind,
    n=2,
    c=8,
    h=6,
    w=5,
    k=None,
    stride=1,
    training=True,
    dtype=torch.float32,
    parameters=None,
    mid=None,
    **options,
):
    """x, norms, convs, shortcut of a basic unit, a bottleneck, or a unit of one convolution."""
    parameters = parameters or dtype
    k = k or c
    widths = {"single": [c, k], "basic": [c, mid or k, k], "bottleneck": [c, mid or 4, mid or 4, k]}[kind]
    kernels = {"single": [3], "basic": [3, 3], "bottleneck": [1, 3, 1]}[kind]
    training = [training] * len(kernels) if isinstance(training, bool) else training
    conv_options = {name: options.pop(name) for name in ("bias", "groups") if name in options}
    x = (torch.randn(n, c, h, w) + 0.5).to(dtype).contiguous(memory_format=CL).requires_grad_()
    norms = [norm(width, t, dtype=parameters, **options) for width, t in zip(widths, training, strict=False)]
    convs = [
        conv(widths[i], widths[i + 1], kernel, stride if i == 0 else 1, dtype=parameters, **conv_options)
        for i, kernel in enumerate(kernels)
    ]
    shortcut = None
    if stride != 1 or k != c:
        shortcut = conv(c, k, 1, stride, bias=conv_options.get("bias", False), dtype=parameters)
    return x, norms, convs, shortcut


def fused(x, norms, convs, shortcut=None, slope=0.0, **options):
    return residual_unit(x, norms, convs, shortcut=shortcut, negative_slope=slope, **options)


def gradients(y, arguments, dy):
    leaves = [t for t in plain.tensors(arguments) if t.requires_grad]
    return torch.autograd.grad(y, leaves, dy.to(y.dtype), allow_unused=True)


class Draw:
    """One set of arguments with the results of the oracle and of plain PyTorch."""

    def __init__(self, arguments, slope=0.0, autocast=None):
        self.arguments, self.slope, self.autocast = arguments, slope, autocast
        self.oracle_arguments, self.plain_arguments = plain.double(arguments), plain.copy(arguments)
        self.oracle = plain.residual_unit(*self.oracle_arguments, slope)
        with self.cast():
            self.plain = plain.residual_unit(*self.plain_arguments, slope)
        self.dout = torch.randn(self.oracle.shape, dtype=torch.float64).to(self.plain.dtype)
        self.oracle_gradients = gradients(self.oracle, self.oracle_arguments, self.dout)
        self.plain_gradients = gradients(self.plain, self.plain_arguments, self.dout)

    def cast(self):
        return torch.autocast("cpu", self.autocast or torch.bfloat16, enabled=self.autocast is not None)

    def check_forward(self):
        """Run the fused unit, hold the trust rule for the output and the running statistics; returns the
        gradients.
        """
        mine = plain.copy(self.arguments)
        with self.cast():
            out, stats = fused(*mine, slope=self.slope, return_stats=True)
        assert out.dtype == self.plain.dtype and out.stride() == self.plain.stride()
        assert_trusted(out, self.plain, self.oracle, "out")
        expected_stats = torch.ops.resnet_fused.channel_stats(out.detach())
        torch.testing.assert_close(stats, expected_stats, rtol=1e-5, atol=1e-5)
        norms = zip(mine[1], self.plain_arguments[1], self.oracle_arguments[1], strict=True)
        for i, (m, p, o) in enumerate(norms):
            if m.running_mean is not None:
                assert_trusted(m.running_mean, p.running_mean, o.running_mean, f"running_mean of bn{i + 1}")
                assert_trusted(m.running_var, p.running_var, o.running_var, f"running_var of bn{i + 1}")
        results = gradients(out, mine, self.dout)
        for g, p in zip(results, self.plain_gradients, strict=True):
            assert g.dtype == p.dtype and g.shape == p.shape
        return results


def check_against_plain(arguments, slope=0.0):
    """The trust rule for the output, every gradient and the running statistics, on every backend."""
    draw = Draw(arguments, slope)
    terms = draw.oracle.numel() / draw.oracle.shape[1] * draw.dout.abs().max().item()

    def check(backend):
        results = zip(draw.check_forward(), draw.plain_gradients, draw.oracle_gradients, strict=True)
        for g, p, o in results:
            assert_trusted(
                g, p, o, f"gradient of size {tuple(g.shape)}", 0.0 if g.shape == arguments[0].shape else terms
            )

    on_every_backend(check)


def check_on_average(make, slope=0.0, autocast=None):
    """The same in half precision, with the gradients compared over several draws of arguments."""
    draws = [Draw(make(), slope, autocast) for _ in range(8)]

    def check(backend):
        mine = list(zip(*(draw.check_forward() for draw in draws), strict=True))
        plains = zip(*(draw.plain_gradients for draw in draws), strict=True)
        oracles = zip(*(draw.oracle_gradients for draw in draws), strict=True)
        for g, p, o in zip(mine, plains, oracles, strict=True):
            assert_trusted_on_average(g, p, o, f"gradient of size {tuple(g[0].shape)}")

    on_every_backend(check)


UNITS = {
    "basic": dict(kind="basic", c=16),
    "basic, projection": dict(kind="basic", c=16, k=32, stride=2, h=8, w=8),
    "bottleneck": dict(kind="bottleneck", c=16, mid=8),
    "bottleneck, projection": dict(kind="bottleneck", c=16, k=64, mid=16),
    "bottleneck, stride": dict(kind="bottleneck", c=17, k=35, mid=8, stride=2, h=9, w=7),
    "single": dict(kind="single", c=8),
    "single, projection": dict(kind="single", c=8, k=12, stride=2),
    "biases": dict(kind="basic", c=8, k=16, bias=True),
    "groups": dict(kind="basic", c=8, k=8, groups=4),
    "not affine": dict(kind="bottleneck", c=16, affine=False),
    "no running statistics": dict(kind="basic", c=8, running=False),
    "odd widths": dict(kind="basic", c=3, k=5, mid=7),
}


@pytest.mark.usefixtures("one_thread")
class TestAgainstPlain:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
    @pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
    @pytest.mark.parametrize("case", UNITS)
    def test_units(self, case, training, dtype):
        check_against_plain(unit(**UNITS[case], training=training, dtype=dtype))

    @pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
    @pytest.mark.parametrize("case", UNITS)
    def test_bfloat16(self, case, training):
        """Everything in bfloat16: model.bfloat16()."""
        case = {**UNITS[case], "n": 3, "h": 10, "w": 10}
        check_on_average(lambda: unit(**case, training=training, dtype=torch.bfloat16))

    @pytest.mark.parametrize("training", [[True, False], [False, True]], ids=["bn2 frozen", "bn1 frozen"])
    @pytest.mark.parametrize("stride", [1, 2])
    def test_frozen_norm(self, training, stride):
        check_against_plain(unit("basic", c=16, h=8, w=8, stride=stride, training=training))

    @pytest.mark.parametrize("case", ["basic", "bottleneck, projection", "groups"])
    @pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
    def test_autocast(self, case, training):
        case = {**UNITS[case], "n": 3, "h": 10, "w": 10, "parameters": torch.float32}
        check_on_average(lambda: unit(**case, training=training, dtype=torch.bfloat16), 0.1, torch.bfloat16)


def operator_arguments(
    x, norms, convs, shortcut=None, *, x_stats=None, slope=0.1, want_stats=True, want_raw=False
):
    def pairs(values):
        return [v for value in values for v in ([value, value] if isinstance(value, int) else value)]

    return (
        x, x_stats, [n.weight for n in norms], [n.bias for n in norms], [n.running_mean for n in norms],
        [n.running_var for n in norms], [c.weight for c in convs], [c.bias for c in convs],
        None if shortcut is None else shortcut.weight, None if shortcut is None else shortcut.bias,
        [n.training for n in norms], [n.eps for n in norms], slope, pairs(c.stride for c in convs),
        pairs(c.padding for c in convs), pairs(c.dilation for c in convs), [c.groups for c in convs],
        [1, 1] if shortcut is None else pairs([shortcut.stride]), want_stats, want_raw,
    )  # fmt: skip


@pytest.mark.usefixtures("one_thread")
class TestOperator:
    @pytest.mark.parametrize("kind", ["single", "basic", "bottleneck"])
    @pytest.mark.parametrize("stride", [1, 2])
    @pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
    def test_opcheck(self, kind, stride, training):
        torch.library.opcheck(
            OP, operator_arguments(*unit(kind, c=4, stride=stride, training=training, bias=stride == 2))
        )

    def test_opcheck_contiguous_and_stats(self):
        x, norms, convs, shortcut = unit("basic", c=4, dtype=torch.bfloat16, parameters=torch.float32)
        x = x.detach().contiguous().requires_grad_()
        stats = torch.ops.resnet_fused.channel_stats(x.detach())
        torch.library.opcheck(
            OP, operator_arguments(x, norms, convs, shortcut, x_stats=stats, want_stats=False)
        )

    def test_opcheck_backward(self):
        arguments = unit("basic", c=4, k=6, stride=2, bias=True)
        forward = operator_arguments(*arguments, want_raw=True)
        out, _, raw, _, bns = OP(*forward)
        args = (torch.randn_like(out), forward[0], raw, bns, *forward[2:4], *forward[6:9], *forward[10:18])
        for mask in ([True] * 9, [False, False, True, False, True, False, True, True, False]):
            torch.library.opcheck(BACKWARD_OP, (*args, mask))

    @pytest.mark.parametrize("stride", [1, 2])
    @pytest.mark.parametrize("training", [[True, True], [True, False], [False, False]], ids=str)
    def test_gradcheck(self, stride, training):
        x, norms, convs, shortcut = unit(
            "basic",
            n=2,
            c=2,
            h=3,
            w=2,
            mid=3,
            stride=stride,
            training=training,
            dtype=torch.float64,
            bias=True,
        )
        leaves = plain.tensors((x, [n[:2] for n in norms], convs, shortcut or ()))

        def function(*leaves):
            it = iter(leaves)
            x = next(it)
            ns = [n._replace(weight=next(it), bias=next(it)) for n in norms]
            cs = [c._replace(weight=next(it), bias=next(it)) for c in convs]
            s = None if shortcut is None else shortcut._replace(weight=next(it), bias=next(it))
            return OP(*operator_arguments(x, ns, cs, s))[0]

        assert torch.autograd.gradcheck(function, leaves, **GRADCHECK, fast_mode=True)
        assert torch.autograd.gradgradcheck(function, leaves, **GRADCHECK, fast_mode=True)

    def test_gradient_penalty(self):
        arguments = unit("bottleneck", c=4, mid=3, k=6, stride=2, dtype=torch.float64)
        results = []
        for function in (fused, plain.residual_unit):
            mine = plain.copy(arguments)
            (dx,) = torch.autograd.grad(function(*mine).square().sum(), mine[0], create_graph=True)
            results.append(gradients(dx.square().sum(), mine, torch.ones(())))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b)

    def test_third_derivative(self):
        """Against finite differences of the second: F.batch_norm is no yardstick, it has no right third derivative."""
        arguments = unit("basic", c=2, h=3, w=3, dtype=torch.float64)

        def second_derivative(x):
            y = fused(x, *arguments[1:], slope=0.1)
            generator = torch.Generator().manual_seed(1)
            for _ in range(2):
                cotangent = torch.randn(y.shape, dtype=y.dtype, generator=generator)
                (y,) = torch.autograd.grad(y, x, cotangent, create_graph=True)
            return y

        assert torch.autograd.gradcheck(second_derivative, (arguments[0],), **GRADCHECK)

    def test_one_node_saves_x_and_raw_outputs(self):
        """Of activation size, only x and the outputs of all convolutions but the last are kept for
        backward.
        """
        x, norms, convs, shortcut = unit("bottleneck", n=4, c=16, h=8, w=8, mid=8)
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            out = fused(x, norms, convs, shortcut)
        assert out.grad_fn.next_functions[0][0] is not None and "ResidualUnit" in type(out.grad_fn).__name__
        large = sorted(t.numel() for t in saved if t.dim() == 4 and t.shape[0] == 4)
        assert large == sorted([x.numel(), 4 * 8 * 64, 4 * 8 * 64])

    def test_inference_keeps_nothing(self):
        x, norms, convs, shortcut = unit("bottleneck", c=16)
        with torch.no_grad():
            assert OP(*operator_arguments(x, norms, convs, shortcut))[2] == []

    def test_backward_frees(self):
        arguments = unit("basic")
        out = fused(*arguments)
        saved = [weakref.ref(t) for t in out.grad_fn.saved_tensors if t is not None and t.dim() == 4]
        out.sum().backward()
        del out
        assert sum(r() is not None for r in saved) == 1 + len(
            arguments[2]
        )  # x and the weights, which live elsewhere

    def test_only_what_is_needed(self):
        """With the first layers frozen, backward stops above them; every subset gives the gradients of the
        whole.
        """
        arguments = unit("bottleneck", c=6, mid=4, k=8)
        leaves = plain.tensors((arguments[0], [n[:2] for n in arguments[1]], arguments[2], arguments[3]))
        out = fused(*arguments)
        dy = torch.randn_like(out)
        expected = torch.autograd.grad(out, leaves, dy)
        for leaf in leaves:
            leaf.requires_grad_(False)
        for i, leaf in enumerate(leaves):
            leaf.requires_grad_(True)
            (gradient,) = torch.autograd.grad(fused(*arguments), leaf, dy)
            torch.testing.assert_close(gradient, expected[i])
            leaf.requires_grad_(False)
        arguments[2][2].weight.requires_grad_(True)
        with rf.record_dispatch() as log:
            torch.autograd.grad(fused(*arguments), arguments[2][2].weight, dy)
        assert [r.primitive for r in log if "grad" in r.primitive or "apply" in r.primitive] == [
            "preact_conv_wgrad"
        ]

    def test_no_pass_for_statistics(self):
        """A chain of units: one channel_stats at its head, none afterwards. (More on the unfused path: the
        framework's convolution gives no statistics.)"""
        x, norms, convs, _ = unit("basic")
        with rf.use_backend("reference"), rf.record_dispatch() as log:
            h, stats = fused(x, norms, convs, return_stats=True)
            fused(h, norms, convs, x_stats=stats)
        assert [r.primitive for r in log].count("channel_stats") == 1

    def test_projection_shares_statistics(self):
        with rf.use_backend("reference"), rf.record_dispatch() as log:
            fused(*unit("basic", stride=2)).sum().backward()
        names = [r.primitive for r in log]
        assert names.count("channel_stats") == 1 and names.count("finalize_forward") == 2
        assert names.count("preact_apply") == 2

    def test_saved_tensor_changed_in_place(self):
        x, norms, convs, _ = unit("basic")
        h = x * 1
        out = fused(h, norms, convs)
        h.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.sum().backward()
        out = fused(x, norms, convs)
        with torch.no_grad():
            convs[1].weight.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.sum().backward()

    def test_running_statistics_may_change_before_backward(self):
        arguments = unit("basic", training=False)
        dy = torch.randn(2, 8, 6, 5)
        expected = gradients(fused(*arguments), arguments, dy)
        out = fused(*arguments)
        for n in arguments[1]:
            n.running_mean.add_(1)
            n.running_var.mul_(2)
        for a, b in zip(gradients(out, arguments, dy), expected, strict=True):
            assert torch.equal(a, b)

    def test_stats_outputs(self):
        arguments = unit("basic", c=8, k=16)
        out, out_stats, raw, stats, bns = OP(*operator_arguments(*arguments, want_raw=True))
        assert len(raw) == 1 and len(stats) == len(bns) == 2
        assert not any(t.requires_grad for t in (out_stats, *raw, *stats, *bns))
        torch.testing.assert_close(
            stats[1], torch.ops.resnet_fused.channel_stats(raw[0]), rtol=1e-5, atol=1e-5
        )


class TestModes:
    @pytest.mark.parametrize("kind", ["basic", "bottleneck"])
    @pytest.mark.parametrize("stride", [1, 2])
    def test_empty_batch(self, backend, kind, stride):
        arguments = unit(kind, n=0, stride=stride, bias=True)
        before = plain.copy(arguments[1])
        out, stats = fused(*arguments, return_stats=True)
        assert out.shape == ((0, 8, 6, 5) if stride == 1 else (0, 8, 3, 3))
        assert torch.equal(stats, torch.zeros(2, 8))
        for n, b in zip(arguments[1], before, strict=True):
            assert torch.equal(n.running_mean, b.running_mean) and torch.equal(n.running_var, b.running_var)
        for g in gradients(out, arguments, torch.randn_like(out)):
            assert torch.equal(g, torch.zeros_like(g))

    def test_momentum_as_tensor(self):
        arguments = unit("basic")
        expected = plain.copy(arguments)
        arguments[1][:] = [n._replace(momentum=torch.tensor(1 / 3)) for n in arguments[1]]
        expected[1][:] = [n._replace(momentum=1 / 3) for n in expected[1]]
        fused(*arguments)
        plain.residual_unit(*expected)
        for a, b in zip(arguments[1], expected[1], strict=True):
            torch.testing.assert_close(a.running_mean, b.running_mean, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(a.running_var, b.running_var, rtol=1e-5, atol=1e-5)

    def test_whole_model_in_bfloat16(self):
        """model.bfloat16(): parameters and running statistics in bfloat16 too, computed in float32."""
        arguments = unit("basic", c=16, dtype=torch.bfloat16)
        out = fused(*arguments)
        assert out.dtype == torch.bfloat16
        for leaf, g in zip(
            [t for t in plain.tensors(arguments) if t.requires_grad],
            gradients(out, arguments, out.detach()),
            strict=True,
        ):
            assert g.dtype == leaf.dtype == torch.bfloat16

    def test_layout(self):
        x, norms, convs, _ = unit("basic")
        contiguous = x.detach().contiguous().requires_grad_()
        out = fused(contiguous, norms, convs)
        assert out.is_contiguous() and torch.equal(out, fused(x, norms, convs))
        (dx,) = torch.autograd.grad(out.sum(), contiguous)
        assert dx.is_contiguous()
        convs[1] = convs[1]._replace(
            weight=convs[1].weight.detach().contiguous(memory_format=CL).requires_grad_()
        )
        assert fused(contiguous, norms, convs).is_contiguous(memory_format=CL)

    def test_same_padding(self):
        x, norms, convs, _ = unit("basic")
        same = [c._replace(padding="same") for c in convs]
        assert torch.equal(fused(x, norms, same), fused(x, norms, convs))


def test_deterministic(threads, cpu_library):
    arguments = unit("bottleneck", n=4, c=32, mid=16, h=16, w=16)
    dy = torch.randn(4, 32, 16, 16)
    results = []
    for count in (1, 2, 2, 3):
        threads(count)
        mine = plain.copy(arguments)
        out = fused(*mine)
        results.append((out, *gradients(out, mine, dy), *(n.running_var for n in mine[1])))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant):
    """The same gradients. The running statistics are updated by each run of the unit's forward, as with
    nn.BatchNorm2d."""
    mine = unit("bottleneck")
    expected, twice = plain.copy(mine), plain.copy(mine)
    out = checkpoint(fused, *mine, use_reentrant=reentrant)
    dout = torch.randn_like(out)
    out.backward(dout)
    fused(*expected).backward(dout)
    for a, b in zip(plain.tensors(mine), plain.tensors(expected), strict=True):
        if b.requires_grad:
            assert torch.equal(a.grad, b.grad)
    with torch.no_grad():
        for _ in range(2):
            plain.residual_unit(*twice)
    torch.testing.assert_close(mine[1][2].running_var, twice[1][2].running_var)


def test_what_has_no_formula_raises():
    """Forward-mode derivatives and torch.func transforms are refused, not dropped."""
    x, norms, convs, _ = unit("basic", training=False)
    for t in plain.tensors((x, norms, convs)):
        t.requires_grad_(False)
    with torch.autograd.forward_ad.dual_level():
        assert fused(x, norms, convs).shape == x.shape
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        with pytest.raises(NotImplementedError, match="jvp"):
            fused(dual, norms, convs)
    with pytest.raises(RuntimeError, match="functorch transforms"):
        torch.func.grad(lambda x: fused(x, norms, convs).sum())(x)


class TestCompile:
    def test_dynamic_shapes(self):
        function = torch.compile(fused, fullgraph=True, backend="aot_eager", dynamic=True)
        for n in (2, 3):
            mine = unit("basic", n=n)
            expected = plain.copy(mine)
            assert torch.equal(function(*mine), fused(*expected))
            assert torch.equal(mine[1][1].running_var, expected[1][1].running_var)
        torch._dynamo.reset()

    @pytest.mark.parametrize(
        ("compiler", "stride", "autocast"),
        [("aot_eager", 1, False), ("aot_eager", 2, False), ("aot_eager", 2, True), ("inductor", 2, False)],
    )
    def test_fullgraph(self, compiler, stride, autocast):
        """Two units and the statistics between them, running statistics and momentum=None."""
        first, second = unit("basic", stride=stride), unit("bottleneck")

        def step(first, second, tracked):
            first[1][0] = first[1][0]._replace(momentum=1.0 / tracked)
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                h, stats = fused(*first, return_stats=True)
                return fused(h, *second[1:], x_stats=stats)

        results = []
        for function in (step, torch.compile(step, fullgraph=True, backend=compiler)):
            mine = plain.copy((first, second))
            out = function(*mine, torch.tensor(2))
            torch.manual_seed(1)
            running = [t for u in mine for n in u[1] for t in (n.running_mean, n.running_var)]
            results.append((out, *gradients(out, (mine[0], mine[1][1:]), torch.randn_like(out)), *running))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
        torch._dynamo.reset()
