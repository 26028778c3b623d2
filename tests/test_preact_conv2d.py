"""torch.ops.resnet_fused.preact_conv2d and functional.preact_conv2d."""

import plain
import pytest
import torch
import torch.nn.functional as F
from conftest import on_every_backend
from tolerances import GRADCHECK, assert_trusted

import resnet_fused as rf
from resnet_fused.functional import preact_conv2d
from resnet_fused.primitives.layout import suggests_channels_last

CL = torch.channels_last
OP = torch.ops.resnet_fused.preact_conv2d.default
BACKWARD_OP = torch.ops.resnet_fused.preact_conv2d_backward.default


def make(
    shape,
    k,
    kernel=3,
    stride=1,
    padding=0,
    dilation=1,
    groups=1,
    *,
    training=True,
    affine=True,
    bias=True,
    dtype=torch.float32,
    parameters=None,
    running=True,
    residual=False,
    momentum=0.1,
    eps=1e-5,
):
    """Arguments of plain.preact_conv2d: x, norm, conv, residual; every leaf requires grad."""  # fmt: skip
    parameters = parameters or dtype
    c = shape[1]
    kernel = (kernel, kernel) if isinstance(kernel, int) else kernel
    x = (torch.randn(shape) * 2 + 1).to(dtype).contiguous(memory_format=CL).requires_grad_()
    fan_in = c // groups * kernel[0] * kernel[1]
    weight = (torch.randn(k, c // groups, *kernel) / fan_in**0.5).to(parameters).requires_grad_()
    gamma = (torch.rand(c) + 0.5).to(parameters).requires_grad_() if affine else None
    beta = torch.randn(c).to(parameters).requires_grad_() if affine else None
    mean, var = (
        (torch.randn(c).to(parameters), torch.rand(c).to(parameters) + 0.5) if running else (None, None)
    )
    norm = (gamma, beta, mean, var, training, momentum, eps)
    conv = (
        weight,
        torch.randn(k).to(parameters).requires_grad_() if bias else None,
        stride,
        padding,
        dilation,
        groups,
    )
    r = None
    if residual:
        size = F.conv2d(
            x.detach().double(), weight.detach().double(), None, stride, padding, dilation, groups
        ).shape
        r = torch.randn(size).to(dtype).contiguous(memory_format=CL).requires_grad_()
    return x, norm, conv, r


def fused(x, norm, conv, residual=None, slope=0.0, **options):
    weight, bias, stride, padding, dilation, groups = conv
    gamma, beta, mean, var, training, momentum, eps = norm
    return preact_conv2d(
        x, gamma, beta, mean, var, weight, bias, training=training, momentum=momentum, eps=eps, stride=stride,
        padding=padding, dilation=dilation, groups=groups, negative_slope=slope, residual=residual, **options,
    )  # fmt: skip


def gradients(y, arguments, dy):
    leaves = [t for t in plain.tensors(arguments) if t.requires_grad]
    return torch.autograd.grad(y, leaves, dy.to(y.dtype), allow_unused=True)


def check_against_plain(arguments, slope=0.0, autocast=None):
    """The trust rule for the output, every gradient and the running statistics, on every backend."""
    oracle_arguments, plain_arguments = plain.double(arguments), plain.copy(arguments)
    oracle = plain.preact_conv2d(*oracle_arguments[:3], slope, oracle_arguments[3])
    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        y = plain.preact_conv2d(*plain_arguments[:3], slope, plain_arguments[3])
    dy = torch.randn(oracle.shape, dtype=torch.float64).to(y.dtype)
    oracle_gradients = gradients(oracle, oracle_arguments, dy)
    plain_gradients = gradients(y, plain_arguments, dy)
    # sum |terms| of the largest per-channel or per-weight sum is at most the number of terms times these.
    terms = oracle.numel() / oracle.shape[1] * dy.abs().max().item()

    def check(backend):
        mine = plain.copy(arguments)
        with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
            out = fused(*mine, slope=slope)
        assert out.dtype == y.dtype and out.stride() == y.stride()
        assert_trusted(out, y, oracle, "y")
        for g, p, o in zip(gradients(out, mine, dy), plain_gradients, oracle_gradients, strict=True):
            assert g.dtype == p.dtype
            assert_trusted(
                g, p, o, f"gradient of size {tuple(g.shape)}", 0.0 if g.shape == mine[0].shape else terms
            )
        for name, i in (("running_mean", 2), ("running_var", 3)):
            if mine[1][i] is not None:
                assert_trusted(mine[1][i], plain_arguments[1][i], oracle_arguments[1][i], name)

    on_every_backend(check)


CASES = {
    "1x1": dict(shape=(2, 8, 5, 4), k=16, kernel=1),
    "3x3": dict(shape=(2, 16, 8, 8), k=16, padding=1),
    "3x3 stride 2": dict(shape=(2, 17, 9, 7), k=35, stride=2, padding=1),
    "1x1 stride 2": dict(shape=(3, 65, 7, 5), k=64, kernel=1, stride=2),
    "5x5": dict(shape=(2, 3, 9, 8), k=8, kernel=5, padding=2),
    "unequal": dict(shape=(2, 5, 11, 9), k=7, kernel=(3, 2), stride=(2, 1), padding=(2, 0), dilation=(1, 3)),
    "dilation": dict(shape=(2, 8, 9, 9), k=8, padding=2, dilation=2),
    "groups": dict(shape=(2, 8, 6, 6), k=16, padding=1, groups=4),
    "depthwise": dict(shape=(2, 6, 6, 6), k=12, padding=1, groups=6),
    "one channel": dict(shape=(3, 1, 6, 5), k=1, padding=1),
    "one pixel": dict(shape=(4, 16, 1, 1), k=8, kernel=1),
    # Short sums: for one image plain PyTorch takes its native convolution, whose long sums are more accurate
    # than oneDNN's.
    "one image": dict(shape=(1, 8, 8, 8), k=17, kernel=1),
}


@pytest.mark.usefixtures("one_thread")
class TestAgainstPlain:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
    @pytest.mark.parametrize("case", CASES)
    def test_shapes(self, case, training, dtype):
        check_against_plain(make(**CASES[case], training=training, dtype=dtype))

    @pytest.mark.parametrize("options", [
        dict(affine=False), dict(running=False), dict(bias=False), dict(residual=True), dict(momentum=0.7,
        eps=0.1), dict(running=False, affine=False, training=False),
    ], ids=str)  # fmt: skip
    @pytest.mark.parametrize("slope", [0.0, 0.1])
    def test_options(self, options, slope):
        check_against_plain(make((3, 16, 10, 10), 16, padding=1, **options), slope)

    @pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
    @pytest.mark.parametrize("case", ["1x1", "3x3", "groups"])
    def test_autocast(self, case, training):
        """float32 masters, activations in bfloat16; a float32 x is cast."""
        arguments = make(
            **CASES[case], training=training, dtype=torch.bfloat16, parameters=torch.float32, residual=True
        )
        check_against_plain(arguments, autocast=torch.bfloat16)

    def test_half(self):
        check_against_plain(make((2, 8, 6, 6), 8, padding=1, dtype=torch.float16, parameters=torch.float32),
                            autocast=torch.float16)  # fmt: skip

    @pytest.mark.parametrize("transform", [
        lambda x: x + 1e4,
        lambda x: x * 1e4,
        lambda x: torch.cat((torch.full_like(x[:, :1], 3.0), x[:, 1:]), 1),
        lambda x: x * 1e-39,
    ], ids=["mean 1e4", "std 1e4", "constant channel", "denormals"])  # fmt: skip
    @pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
    def test_hard_inputs(self, transform, training):
        x, norm, conv, r = make((2, 8, 7, 6), 8, padding=1, training=training)
        x = transform(x.detach()).contiguous(memory_format=CL).requires_grad_()
        check_against_plain((x, norm, conv, r))


@pytest.mark.usefixtures("one_thread")
class TestNotFinite:
    @pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
    @pytest.mark.parametrize("where", [(0, 2, 3, 3), (1, 0, 0, 0), (1, 7, 6, 5)], ids=str)
    @pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_one_value(self, value, where, training, dtype):
        """It reaches exactly the outputs that it reaches in relu(bn(x)): padding does not hide it, nor do
        tiles spread it.
        """
        x, norm, conv, _ = make((2, 8, 7, 6), 8, padding=1, training=training, dtype=dtype)
        with torch.no_grad():
            x[where] = value
            expected = plain.preact_conv2d(x, plain.copy(norm), conv)

            def check(backend):
                y = fused(x, plain.copy(norm), conv)
                assert torch.equal(y.isnan(), expected.isnan())
                assert torch.equal(y.isinf(), expected.isinf())
                finite = expected.isfinite()
                scale = expected[finite].abs().max() if finite.any() else 0.0
                eps = torch.finfo(dtype).eps
                assert ((y - expected)[finite].abs() <= 8 * eps * scale).all()

            on_every_backend(check)

    @pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
    def test_overflow_of_the_variance(self, training):
        x, norm, conv, _ = make((2, 8, 7, 6), 8, padding=1, training=training)
        x = (x.detach() * 1e30).contiguous(memory_format=CL)
        with torch.no_grad():
            expected = plain.preact_conv2d(x, plain.copy(norm), conv)

            oracle = plain.preact_conv2d(*plain.double((x, norm, conv)))
            on_every_backend(
                lambda backend: assert_trusted(fused(x, plain.copy(norm), conv), expected, oracle)
            )

    def test_nan_reaches_the_gradients(self, backend):
        x, norm, conv, _ = make((2, 4, 5, 5), 4, padding=1)
        with torch.no_grad():
            x[0, 1, 2, 2] = torch.nan
        dx, dgamma, *_ = gradients(y := fused(x, norm, conv), (x, norm, conv), torch.ones_like(y))
        assert dx[:, 1].isnan().all() and dgamma[1].isnan()


def operator_arguments(x, norm, conv, residual=None, *, x_stats=None, slope=0.1, want_stats=True):
    weight, bias, stride, padding, dilation, groups = conv
    gamma, beta, mean, var, training, _, eps = norm
    pairs = [[v, v] if isinstance(v, int) else list(v) for v in (stride, padding, dilation)]
    return (
        x,
        x_stats,
        gamma,
        beta,
        mean,
        var,
        weight,
        bias,
        residual,
        training,
        eps,
        slope,
        *pairs,
        groups,
        want_stats,
    )


@pytest.mark.usefixtures("one_thread")
class TestOperator:
    @pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
    @pytest.mark.parametrize("layout", ["channels_last", "contiguous", "weight channels_last"])
    def test_opcheck(self, training, layout):
        x, norm, conv, r = make((2, 3, 5, 4), 4, stride=2, padding=1, training=training, residual=True)
        if layout != "channels_last":
            x = x.detach().contiguous().requires_grad_()
        if layout.startswith("weight"):
            conv = (conv[0].detach().contiguous(memory_format=CL).requires_grad_(), *conv[1:])
        torch.library.opcheck(OP, operator_arguments(x, norm, conv, r))

    def test_opcheck_bfloat16_masters(self):
        x, norm, conv, r = make((2, 3, 5, 4), 4, padding=1, dtype=torch.bfloat16, parameters=torch.float32)
        torch.library.opcheck(OP, operator_arguments(x, norm, conv, want_stats=False))

    def test_opcheck_x_stats(self):
        x, norm, conv, _ = make((2, 3, 5, 4), 4, bias=False, affine=False)
        stats = torch.ops.resnet_fused.channel_stats(x.detach())
        torch.library.opcheck(OP, operator_arguments(x, norm, conv, x_stats=stats))

    @pytest.mark.parametrize(
        "mask", [[True] * 4, [True, False, False, False], [False, False, False, True]], ids=str
    )
    def test_opcheck_backward(self, mask):
        x, norm, conv, _ = make((2, 3, 5, 4), 4, padding=1)
        y, _, _, bn = OP(*operator_arguments(x, norm, conv))
        args = (
            torch.randn_like(y),
            x,
            bn,
            norm[0],
            norm[1],
            conv[0],
            True,
            1e-5,
            0.1,
            [1, 1],
            [1, 1],
            [1, 1],
            1,
            mask,
        )
        torch.library.opcheck(BACKWARD_OP, args)

    @pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
    @pytest.mark.parametrize("backend_name", ["auto", "reference"])
    def test_gradcheck(self, training, backend_name):
        x, norm, conv, r = make(
            (2, 2, 3, 3), 2, kernel=2, training=training, dtype=torch.float64, residual=True
        )

        def function(x, gamma, beta, weight, bias, r):
            return OP(*operator_arguments(x, (gamma, beta, *norm[2:]), (weight, bias, *conv[2:]), r))[0]

        inputs = (x, *norm[:2], *conv[:2], r)
        with rf.use_backend(backend_name):
            assert torch.autograd.gradcheck(function, inputs, **GRADCHECK)
            if backend_name == "auto":
                assert torch.autograd.gradgradcheck(function, inputs, **GRADCHECK)

    def test_gradgradcheck_without_parameters(self):
        x, norm, conv, _ = make((2, 2, 3, 2), 2, kernel=1, dtype=torch.float64, affine=False, bias=False)
        conv[0].requires_grad_(False)
        assert torch.autograd.gradgradcheck(
            lambda x: OP(*operator_arguments(x, norm, conv))[0], (x,), **GRADCHECK
        )

    def test_third_derivative(self):
        """Against finite differences of the second: F.batch_norm is no yardstick, it has no right third derivative."""
        x, norm, conv, _ = make((2, 2, 3, 3), 2, kernel=2, dtype=torch.float64)

        def second_derivative(x):
            y = fused(x, norm, conv, slope=0.1)
            generator = torch.Generator().manual_seed(1)
            for _ in range(2):
                cotangent = torch.randn(y.shape, dtype=y.dtype, generator=generator)
                (y,) = torch.autograd.grad(y, x, cotangent, create_graph=True)
            return y

        assert torch.autograd.gradcheck(second_derivative, (x,), **GRADCHECK)

    def test_double_backward_of_a_gradient_penalty(self):
        """The common use: a loss with the norm of an input gradient in it; parameters get gradients through
        it.
        """
        arguments = make((2, 3, 5, 5), 4, padding=1, dtype=torch.float64)
        results = []
        for function, (x, norm, conv, _) in (
            (fused, plain.copy(arguments)),
            (plain.preact_conv2d, plain.copy(arguments)),
        ):
            (dx,) = torch.autograd.grad(function(x, norm, conv).square().sum(), x, create_graph=True)
            results.append(torch.autograd.grad(dx.square().sum(), [x, *norm[:2], *conv[:1]]))
        for mine, theirs in zip(*results, strict=True):
            torch.testing.assert_close(mine, theirs)

    @pytest.mark.parametrize("needed", ["x", "gamma", "beta", "weight", "bias", "residual"])
    def test_only_what_is_needed(self, needed):
        """A gradient of one argument runs only the primitives that it takes, and is the same."""
        arguments = make((2, 4, 5, 5), 4, padding=1, residual=True)
        x, norm, conv, r = arguments
        leaves = dict(x=x, gamma=norm[0], beta=norm[1], weight=conv[0], bias=conv[1], residual=r)
        y = fused(*arguments)
        dy = torch.randn_like(y)
        expected = dict(
            zip(
                ("x", "gamma", "beta", "weight", "bias", "residual"), gradients(y, arguments, dy), strict=True
            )
        )
        for name, leaf in leaves.items():
            leaf.requires_grad_(name == needed)
        with rf.record_dispatch() as log:
            (gradient,) = torch.autograd.grad(fused(*arguments), leaves[needed], dy)
        torch.testing.assert_close(gradient, expected[needed])
        ran = {r.primitive for r in log}
        assert ("preact_conv_wgrad" in ran) == (needed == "weight")
        assert ("preact_conv_dgrad" in ran) == (needed in ("x", "gamma", "beta"))
        assert ("preact_apply" in ran) == (needed == "x")

    def test_saved_input_changed_in_place(self):
        x, norm, conv, _ = make((2, 4, 5, 5), 4, padding=1)
        h = x * 1
        y = fused(h, norm, conv)
        h.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()

    def test_running_statistics_are_not_saved(self):
        """They may change between forward and backward (PyTorch issue 175024): evaluation mode keeps a
        copy.
        """
        arguments = make((2, 4, 5, 5), 4, padding=1, training=False)
        y = fused(*arguments)
        dy = torch.randn_like(y)
        expected = gradients(y, arguments, dy)
        y = fused(*arguments)
        arguments[1][2].add_(1)
        arguments[1][3].mul_(2)
        for a, b in zip(gradients(y, arguments, dy), expected, strict=True):
            assert torch.equal(a, b)

    def test_two_forwards_then_backward(self):
        x, norm, conv, _ = make((2, 4, 5, 5), 4, padding=1)
        (fused(x, norm, conv).sum() + fused(x * 2, norm, conv).sum()).backward()
        assert conv[0].grad.isfinite().all()

    def test_statistics_are_outputs_without_gradient(self):
        x, norm, conv, _ = make((2, 4, 5, 5), 4, padding=1)
        y, y_stats, x_stats, bn = OP(*operator_arguments(x, norm, conv))
        assert y.requires_grad and not (y_stats.requires_grad or x_stats.requires_grad or bn.requires_grad)
        torch.testing.assert_close(y_stats[0], y.mean((0, 2, 3)))
        torch.testing.assert_close(x_stats[1] / 50, x.var((0, 2, 3), correction=0))
        assert OP(*operator_arguments(x, norm, conv, want_stats=False))[1].shape == (0,)

    def test_given_statistics(self):
        """The same result with x_stats as without, forward and backward."""
        arguments = make((2, 4, 5, 5), 4, padding=1)
        stats = torch.ops.resnet_fused.channel_stats(arguments[0].detach())
        expected_norm = plain.copy(arguments[1])
        expected = fused(arguments[0], expected_norm, *arguments[2:])
        y, y_stats = fused(*arguments, x_stats=stats, return_stats=True)
        assert torch.equal(y, expected) and y_stats.shape == (2, 4)
        for mine, theirs in zip(arguments[1][2:4], expected_norm[2:4], strict=True):
            assert torch.equal(mine, theirs)
        dy = torch.randn_like(y)
        expected_gradients = gradients(expected, (arguments[0], expected_norm, *arguments[2:]), dy)
        for a, b in zip(gradients(y, arguments, dy), expected_gradients, strict=True):
            assert torch.equal(a, b)


class TestLayout:
    @pytest.mark.parametrize(
        "size", [(2, 4, 5, 6), (2, 1, 5, 6), (2, 4, 1, 1), (1, 4, 5, 1), (3, 1, 1, 1)], ids=str
    )
    @pytest.mark.parametrize(
        "x_format", [torch.contiguous_format, CL], ids=["x contiguous", "x channels_last"]
    )
    @pytest.mark.parametrize(
        "w_format", [torch.contiguous_format, CL], ids=["w contiguous", "w channels_last"]
    )
    @pytest.mark.parametrize("kernel", [1, 3])
    def test_rule(self, size, x_format, w_format, kernel):
        """The output has the strides that conv2d's has; a gradient has those of its tensor."""
        x = torch.empty(size, memory_format=x_format).normal_().requires_grad_()
        weight = torch.empty(3, size[1], kernel, kernel, memory_format=w_format).normal_().requires_grad_()
        y = preact_conv2d(x, None, None, None, None, weight, training=True, padding=kernel // 2)
        assert y.stride() == F.conv2d(x, weight, padding=kernel // 2).stride()
        dx, dweight = torch.autograd.grad(y, (x, weight), torch.randn_like(y))
        assert dx.stride() == x.stride() or suggests_channels_last(dx) == suggests_channels_last(x)
        assert dweight.stride() == weight.stride()

    @pytest.mark.parametrize("view", [
        lambda t: t[:, ::2], lambda t: t[:, :, 1:, 1:], lambda t: t.transpose(2, 3),
        lambda t: t[:, :1].expand(-1, 4, -1, -1), lambda t: t.flip(0),
    ], ids=["channels", "crop", "transpose", "expand", "flip"])  # fmt: skip
    @pytest.mark.parametrize(
        "memory_format", [torch.contiguous_format, CL], ids=["contiguous", "channels_last"]
    )
    def test_views(self, view, memory_format):
        base = torch.randn(2, 8, 6, 6).contiguous(memory_format=memory_format).requires_grad_()
        x = view(base)
        weight = torch.randn(5, x.shape[1], 3, 3, requires_grad=True)
        results = []
        for function in (fused, plain.preact_conv2d):
            y = function(x, (None, None, None, None, True, 0.1, 1e-5), (weight, None, 1, 1, 1, 1))
            results.append((y, *torch.autograd.grad(y.square().sum(), (base, weight))))
        for mine, theirs in zip(*results, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("gradient", ["expanded", "contiguous", "sliced"])
    def test_output_gradient_of_any_strides(self, gradient):
        arguments = make((2, 4, 5, 5), 6, padding=1)
        y = fused(*arguments)
        dy = {
            "expanded": torch.randn(1, 6, 1, 1).expand_as(y),
            "contiguous": torch.randn(y.shape),
            "sliced": torch.randn(2, 12, 5, 5)[:, ::2],
        }[gradient]
        dense = dy.contiguous(memory_format=CL)
        for a, b in zip(
            gradients(y, arguments, dy), gradients(fused(*arguments), arguments, dense), strict=True
        ):
            assert torch.equal(a, b)


class TestPadding:
    @pytest.mark.parametrize("kernel", [1, 2, 3, 4, (2, 3), (3, 4)], ids=str)
    @pytest.mark.parametrize("dilation", [1, 2])
    @pytest.mark.parametrize("padding", ["same", "valid"])
    @pytest.mark.filterwarnings("ignore:Using padding='same'")
    def test_names(self, kernel, dilation, padding):
        x, norm, conv, _ = make(
            (2, 3, 9, 8), 4, kernel=kernel, padding=padding, dilation=dilation, dtype=torch.float64
        )
        expected = plain.preact_conv2d(x, plain.copy(norm), conv)
        y, stats = fused(x, norm, conv, return_stats=True)
        torch.testing.assert_close(y, expected)
        torch.testing.assert_close(stats[0], expected.mean((0, 2, 3)))
        r = torch.randn_like(y)
        y = fused(x, norm, conv, residual=r)
        torch.testing.assert_close(y, expected + r)
        assert y.stride() == expected.stride()
        for a, b in zip(gradients(y, (x, conv), r), gradients(expected, (x, conv), r), strict=True):
            torch.testing.assert_close(a, b)

    def test_padded_pixels_are_zero_not_shifted(self, backend):
        x = torch.zeros(1, 1, 1, 2)
        y = preact_conv2d(
            x, None, torch.ones(1), torch.zeros(1), torch.ones(1), torch.ones(1, 1, 3, 3), padding=1
        )
        assert torch.equal(y, torch.full((1, 1, 1, 2), 2.0))


class TestModes:
    def test_momentum_as_tensor(self):
        x, norm, conv, _ = make((2, 3, 5, 5), 4)
        expected = plain.copy(norm)
        for step in range(1, 4):
            fused(x * step, (*norm[:5], 1.0 / torch.tensor(step), norm[6]), conv)
            plain.preact_conv2d(x * step, (*expected[:5], 1.0 / step, expected[6]), conv)
        torch.testing.assert_close(norm[2], expected[2])
        torch.testing.assert_close(norm[3], expected[3])

    def test_eval_leaves_running_statistics_alone(self):
        x, norm, conv, _ = make((2, 3, 5, 5), 4, training=False)
        before = plain.copy(norm)
        fused(x, norm, conv)
        assert torch.equal(norm[2], before[2]) and torch.equal(norm[3], before[3])

    @pytest.mark.parametrize("momentum", [0.1, torch.tensor(0.1)], ids=["float", "tensor"])
    def test_running_statistics_do_not_count_as_changed(self, momentum):
        """As PyTorch's batch norm leaves them: its node has saved them, and reads them in eval mode only."""
        x, norm, conv, _ = make((2, 3, 5, 5), 4)
        norm = (*norm[:5], momentum, norm[6])
        version, before = norm[2]._version, norm[2].clone()
        y = F.batch_norm(x, norm[2], norm[3], norm[0], norm[1], True, 0.1)
        z = fused(x, norm, conv)
        assert norm[2]._version == version and not torch.equal(norm[2], before)
        (y.sum() + z.sum()).backward()

    @pytest.mark.parametrize("training", [True, False])
    def test_empty_batch(self, backend, training):
        arguments = make((0, 3, 5, 5), 4, padding=1, training=training, residual=True)
        before = plain.copy(arguments[1])
        y, stats = fused(*arguments, return_stats=True)
        assert y.shape == (0, 4, 5, 5) and torch.equal(stats, torch.zeros(2, 4))
        assert torch.equal(arguments[1][2], before[2]) and torch.equal(arguments[1][3], before[3])
        dx, dgamma, dbeta, dweight, dbias, dr = gradients(y, arguments, torch.randn_like(y))
        assert dx.shape == (0, 3, 5, 5) and dr.shape == y.shape
        for g in (dgamma, dbeta, dweight, dbias):
            assert torch.equal(g, torch.zeros_like(g))

    def test_inference_mode(self):
        x, norm, conv, _ = make((2, 3, 5, 5), 4)
        expected = plain.preact_conv2d(x, plain.copy(norm), conv)
        with torch.inference_mode():
            y = fused(x, norm, conv)
        torch.testing.assert_close(y, expected)

    def test_autocast_casts_activations_only(self):
        x, norm, conv, r = make((2, 3, 5, 5), 4, padding=1, residual=True)
        with torch.autocast("cpu", torch.bfloat16):
            y, stats = fused(x, norm, conv, r, return_stats=True)
            wide = preact_conv2d(
                x.detach().double(), None, None, None, None, conv[0].detach().double(), training=True
            )
        assert wide.dtype == torch.float64
        assert y.dtype == torch.bfloat16 and stats.dtype == torch.float32 and norm[2].dtype == torch.float32
        for leaf, g in zip(
            [t for t in plain.tensors((x, norm, conv, r)) if t.requires_grad],
            gradients(y, (x, norm, conv, r), torch.randn_like(y)), strict=True,
        ):  # fmt: skip
            assert g.dtype == leaf.dtype

    def test_autocast_discards_statistics_of_the_unrounded_input(self):
        x, norm, conv, _ = make((2, 3, 5, 5), 4)
        stats = torch.ops.resnet_fused.channel_stats(x.detach())
        with torch.autocast("cpu", torch.bfloat16):
            expected = fused(x.bfloat16(), plain.copy(norm), conv)
            y = fused(x, norm, conv, x_stats=stats)
        assert torch.equal(y, expected)


class TestDeterminism:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_bitwise(self, threads, cpu_library, dtype):
        arguments = make((4, 16, 16, 16), 16, padding=1, dtype=dtype, parameters=torch.float32)
        dy = torch.randn(4, 16, 16, 16).to(dtype)
        results = []
        for count in (1, 2, 2, 3):
            threads(count)
            y = fused(*arguments)
            results.append((y, *gradients(y, arguments, dy)))
        for other in results[1:]:
            for a, b in zip(results[0], other, strict=True):
                assert torch.equal(a, b)


class TestCompile:
    @pytest.mark.parametrize(
        ("compiler", "momentum"), [("aot_eager", 0.1), ("aot_eager", None), ("inductor", 0.1)]
    )
    def test_fullgraph(self, compiler, momentum):
        """The same numbers as eager; running statistics and momentum=None are traced."""
        arguments = make((2, 4, 6, 6), 4, padding=1)

        def step(x, norm, conv, tracked):
            m = 1.0 / tracked if momentum is None else momentum
            return fused(x, (*norm[:5], m, norm[6]), conv).relu()

        tracked = torch.tensor(2)
        results = []
        for function in (step, torch.compile(step, fullgraph=True, backend=compiler)):
            x, norm, conv, _ = plain.copy(arguments)
            y = function(x, norm, conv, tracked)
            torch.manual_seed(1)
            results.append((y, *gradients(y, (x, norm, conv), torch.randn_like(y)), *norm[2:4]))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
        torch._dynamo.reset()
