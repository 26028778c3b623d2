"""Fused modules against their plain twins: results, state_dicts, modes, hooks, copies, compilation."""

import copy
import io
import pickle

import pytest
import torch
from tolerances import SUM_EPS, TRUST_FACTOR, TRUST_ULP, largest_error, ulp
from torch import nn
from torch.nn.utils import prune

import resnet_fused as rf
from resnet_fused import nn as fused
from resnet_fused import reference as plain
from resnet_fused.primitives.layout import acc_dtype

#: name -> (constructor arguments, channels of the input)
UNITS = {
    "basic": ("PreActBasicBlock", (6, 6), {}),
    "basic-projection": ("PreActBasicBlock", (5, 8, 2), {}),
    "basic-stride": ("PreActBasicBlock", (6, 6, 2), {}),
    "bottleneck": ("PreActBottleneck", (12, 3), {}),
    "bottleneck-projection": ("PreActBottleneck", (7, 4, 2), {"expansion": 3}),
    "bias-leaky": ("PreActBasicBlock", (4, 6), {"bias": True, "negative_slope": 0.1}),
    "conv3x3": ("PreActConv2d", (5, 7, 3), {"padding": 1, "bias": True}),
    "conv1x1-stride": ("PreActConv2d", (5, 7, 1, 2), {}),
    "conv-same-groups": ("PreActConv2d", (6, 4, (3, 2)), {"padding": "same", "dilation": 2, "groups": 2}),
}


def randomize(module: nn.Module) -> None:
    """Parameters and running statistics that are not at their initial values."""
    generator = torch.Generator().manual_seed(7)
    for name, value in module.state_dict().items():
        if value.dtype.is_floating_point:
            noise = torch.randn(value.shape, generator=generator, dtype=torch.float64).to(value.dtype)
            value.copy_(1.0 + 0.3 * noise.abs() if name.endswith("running_var") else value + 0.3 * noise)


def twins(name: str, dtype: torch.dtype = torch.float32, **options):
    """(fused, plain), with the same parameters."""
    kind, arguments, more = UNITS[name]
    made = [getattr(source, kind)(*arguments, **{**more, **options}) for source in (fused, plain)]
    randomize(made[1])
    made[0].load_state_dict(made[1].state_dict())
    return [module.to(dtype) for module in made]


def batch(module: nn.Module, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    n, size = (32 if dtype == torch.bfloat16 else 4), (7, 9)  # see assert_trusted
    channels = next(child for child in module.modules() if isinstance(child, nn.BatchNorm2d)).num_features
    x = torch.randn(n, channels, *size, generator=torch.Generator().manual_seed(3)) * 2 + 0.5
    return x.to(dtype)


def outcome(
    module: nn.Module, x: torch.Tensor, autocast: bool = False, order=None
) -> dict[str, torch.Tensor]:
    """Output, input gradient, parameter gradients and buffers after one forward and backward.

    ``order``: the order in which the images of ``x`` stand; the results are given in the order 0, 1, 2, ...
    """
    order = torch.arange(len(x)) if order is None else order
    module.zero_grad()
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = module(x)
    cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(5)).to(y.dtype)
    y.backward(cotangent[order])
    back = torch.argsort(order)
    results = {"y": y.detach()[back], "x.grad": x.grad[back]}
    results.update({f"{name}.grad": p.grad for name, p in module.named_parameters() if p.grad is not None})
    results.update({name: buffer.clone() for name, buffer in module.named_buffers()})
    return results


def plain_outcomes(module: nn.Module, x: torch.Tensor) -> list[dict[str, torch.Tensor]]:
    """What plain PyTorch may answer: both memory formats, both orders of the images.

    They differ in rounding alone. A single one of them is no measure of plain PyTorch's error: it can be
    exact by luck, and in float64 it is the oracle.
    """
    results = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        for order in (torch.arange(len(x)), torch.arange(len(x)).flip(0)):
            formatted = copy.deepcopy(module).to(memory_format=memory_format)
            result = outcome(formatted, x[order].contiguous(memory_format=memory_format), order=order)
            results.append(result)
    return results


def exact_outcome(module: nn.Module, x: torch.Tensor) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """outcome() in float64; and for each parameter's gradient, a sum over pixels, the sum of |terms|."""
    exact = copy.deepcopy(module).double()
    values, sums = {}, {}

    def watch(name, child):
        def backward(_, grad_inputs, grad_outputs):
            dy, (a, y) = grad_outputs[0].abs(), values[name]
            sums[f"{name}.bias.grad"] = dy.sum((0, 2, 3)).max().item()
            if isinstance(child, nn.Conv2d):
                with torch.enable_grad():
                    weight = child.weight.detach().requires_grad_()
                    (terms,) = torch.autograd.grad(child._conv_forward(a.abs(), weight, None), weight, dy)
                sums[f"{name}.weight.grad"] = terms.max().item()
            elif child.weight is not None:
                xhat = (y - child.bias[:, None, None]) / child.weight[:, None, None]
                sums[f"{name}.weight.grad"] = (dy * xhat.abs()).sum((0, 2, 3)).max().item()

        child.register_forward_hook(
            lambda _, inputs, output: values.update({name: (inputs[0].detach(), output.detach())})
        )
        child.register_full_backward_hook(backward)

    for name, child in exact.named_modules():
        if isinstance(child, (nn.BatchNorm2d, nn.Conv2d)):
            watch(name, child)
    return outcome(exact, x.double()), sums


def assert_trusted(one: nn.Module, other: nn.Module, x: torch.Tensor) -> None:
    """The trust rule of tolerances.py, for everything that a module computes.

    The error is the largest one; in bfloat16 it is the root of the mean square over many images, since there
    rounding lets
    some intermediate results that are next to 0 pass the ReLU or not: their number tells, a single one does
        not.
    """
    oracle, sums = exact_outcome(other, x)
    plain_results = plain_outcomes(other, x)
    results = outcome(one, x)
    outcome(other, x)  # so that running statistics go on for the next step
    for name, expected in oracle.items():
        result = results[name]
        assert result.dtype == plain_results[0][name].dtype and result.shape == expected.shape, name
        if not result.dtype.is_floating_point:
            assert torch.equal(result, expected), name
            continue

        def error(value, expected=expected):
            if value.dtype == torch.bfloat16:
                return (value.double() - expected).square().mean().sqrt().item()
            return largest_error(value, expected)

        plain_error = max(error(result[name]) for result in plain_results)
        allowed = (
            TRUST_FACTOR * plain_error
            + TRUST_ULP * ulp(expected.abs().max().item(), result.dtype)
            + SUM_EPS * torch.finfo(acc_dtype(result.dtype)).eps * sums.get(name, 0.0)
        )
        assert error(result) <= allowed, (
            f"{name}: error {error(result):.3g} > {allowed:.3g} (plain {plain_error:.3g})"
        )


@pytest.mark.parametrize("name", UNITS)
def test_state_dict_is_that_of_the_plain_twin_both_ways(name):
    one, other = twins(name)
    assert list(one.state_dict()) == list(other.state_dict())
    assert isinstance(one, type(other)) and repr(one) == repr(other)
    randomize(one)
    other.load_state_dict(one.state_dict())
    for key, value in one.state_dict().items():
        assert torch.equal(value, other.state_dict()[key])


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", UNITS)
def test_fused_unit_against_the_plain_one(name, dtype, training):
    one, other = (module.train(training) for module in twins(name, dtype))
    x = batch(one, dtype)
    assert_trusted(one, other, x)


@pytest.mark.parametrize("name", ["basic", "bottleneck-projection", "conv3x3"])
def test_autocast(name):
    """Under autocast the fused unit is the unit in bfloat16, with master weights in float32."""
    one, other = twins(name)
    x = batch(one, torch.bfloat16)  # what a convolution under autocast returns
    results, plain_results = outcome(copy.deepcopy(one), x, autocast=True), outcome(other, x, autocast=True)
    exact = outcome(copy.deepcopy(other).double(), x.double())
    assert {key: value.dtype for key, value in results.items()} == {
        key: value.dtype for key, value in plain_results.items()
    }
    for key, expected in exact.items():
        if expected.dtype.is_floating_point and not key.startswith("running"):
            error, plain_error = (
                (value[key].double() - expected).square().mean().sqrt() for value in (results, plain_results)
            )
            assert error <= 2 * plain_error + 2 * torch.finfo(torch.bfloat16).eps * expected.abs().max(), key


@pytest.mark.parametrize(
    "options",
    [
        {"momentum": None},
        {"track_running_stats": False},
        {"affine": False},
        {"momentum": 0.7, "eps": 0.3},
        {"momentum": 0.0},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["basic-projection", "bottleneck", "conv3x3"])
def test_modes_of_batch_norm(name, options):
    one, other = twins(name, **options)
    for step in range(3):  # momentum=None: an average over the steps
        x = batch(one) + step
        assert_trusted(one, other, x)
        one.load_state_dict(other.state_dict())  # each step on its own, from the same state
    one.eval(), other.eval()
    assert_trusted(one, other, x)


@pytest.mark.parametrize("frozen", [["bn1"], ["bn2"], ["bn1", "bn2"]], ids=str)
@pytest.mark.parametrize("name", ["basic-projection", "bottleneck"])
def test_frozen_norm_inside_a_training_unit(name, frozen):
    made = twins(name)
    for module in made:
        for norm in frozen:
            getattr(module, norm).eval().requires_grad_(False)
    one, other = made
    x = batch(one)
    assert_trusted(one, other, x)
    assert one.bn1.num_batches_tracked == other.bn1.num_batches_tracked == (0 if "bn1" in frozen else 1)


@pytest.mark.parametrize("frozen", ["conv1", "conv2", "shortcut", "bn1", "bn2.weight", "bn2.bias", "all"])
def test_requires_grad_on_any_part(frozen):
    made = twins("basic-projection")
    for module in made:
        for name, parameter in module.named_parameters():
            if name.startswith(frozen) or frozen == "all":
                parameter.requires_grad_(False)
    one, other = made
    x = batch(one)
    assert_trusted(one, other, x)


def test_settings_are_read_when_called():
    one, other = twins("basic")
    for module in (one, other):
        module.bn1.eps, module.bn2.momentum, module.negative_slope = 0.5, 0.9, 0.2
        module.conv1.stride = module.conv2.stride = (1, 1)
        module.conv1.dilation, module.conv1.padding = (2, 2), (2, 2)
    x = batch(one)
    assert_trusted(one, other, x)


@pytest.mark.parametrize("weights_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("input_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("name", ["basic", "bottleneck-projection", "stage"])
def test_output_layout_is_pytorchs(name, input_format, weights_format):
    if name == "stage":
        one, other = stages()
    else:
        one, other = twins(name)
    x = batch(one).contiguous(memory_format=input_format)
    y, expected = (module.to(memory_format=weights_format)(x) for module in (one, other))
    assert y.stride() == expected.stride()


# --- statistics from unit to unit ---


def stages(**options):
    """(fused, plain): a projection unit, identity units of both kinds, and a convolution."""

    def stage(source):
        return source.PreActStage(
            source.PreActBasicBlock(5, 8, 2, **options),
            source.PreActBasicBlock(8, 8, **options),
            source.PreActBottleneck(8, 2, **options),
            source.PreActConv2d(8, 6, 1, **options),
        )

    one, other = stage(fused), stage(plain)
    randomize(other)
    one.load_state_dict(other.state_dict())
    return one, other


def assert_close_stats(stats: torch.Tensor, y: torch.Tensor) -> None:
    y = y.detach().double()
    mean = y.mean((0, 2, 3))
    m2 = (y - mean[:, None, None]).square().sum((0, 2, 3))
    assert stats.shape == (2, y.shape[1]) and not stats.requires_grad
    torch.testing.assert_close(stats.double(), torch.stack([mean, m2]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", UNITS)
def test_unit_returns_the_statistics_of_its_output(name):
    one, _ = twins(name)
    x = batch(one)
    y, stats = one(x, return_stats=True)
    assert_close_stats(stats, y)
    assert torch.equal(one(x), y)


def test_handing_on_statistics_changes_nothing_that_matters():
    one, other = stages()
    x = batch(one)
    apart = copy.deepcopy(one)
    results, results_apart = outcome(copy.deepcopy(one), x), outcome(nn.Sequential(*apart), x)
    assert_trusted(one, other, x)
    for key, value in results.items():  # unit by unit, each computing the statistics of its input anew
        torch.testing.assert_close(value, results_apart[key], rtol=1e-4, atol=1e-5)


def test_statistics_travel_where_they_are_used(unit_calls):
    seen = unit_calls
    one, _ = stages()
    x = batch(one)
    one(x)
    assert seen == [(False, True), (True, True), (True, True), (True, False)]
    seen.clear()
    y, stats = one(x, rf.functional.conv2d_stats(x, torch.eye(5)[:, :, None, None])[1], return_stats=True)
    assert seen == [(True, True)] * 4
    assert_close_stats(stats, y)
    seen.clear()
    one.eval()(x)
    assert seen == [(False, False)] * 4  # running statistics are used: none is computed
    seen.clear()
    one[2].train()
    one(x)
    assert seen == [(False, False), (False, True), (True, False), (False, False)]


def test_any_module_may_be_in_a_stage(unit_calls):
    seen = unit_calls
    one, other = stages()
    one.insert(2, nn.AvgPool2d(2))
    other.insert(2, nn.AvgPool2d(2))
    x = batch(one)
    torch.testing.assert_close(one(x), other(x), rtol=1e-4, atol=1e-5)
    assert seen == [(False, True), (True, False), (False, True), (True, False)]
    y, stats = fused.PreActStage(fused.PreActBasicBlock(5, 5), nn.Identity())(x, return_stats=True)
    assert stats is None and y.shape == x.shape
    assert torch.equal(fused.PreActStage()(x), x)


# --- hooks, copies, replaced children ---


def test_hooks_on_units_see_what_they_see_on_plain_units():
    made = stages()
    x = batch(made[0])
    seen = []
    for module in made:
        log = []
        module[1].register_forward_pre_hook(
            lambda _, inputs, log=log: log.append([value.shape for value in inputs])
        )
        module[1].register_forward_hook(
            lambda _, inputs, output, log=log: log.append((len(inputs), output.shape))
        )
        module[2].register_forward_hook(lambda _, inputs, output: 2 * output)  # replaces the output
        module[3].register_full_backward_hook(
            lambda _, grads, outputs, log=log: log.append((grads[0].shape, len(outputs)))
        )
        seen.append((module(x), log))
        seen[-1][0].sum().backward()
    assert seen[0][1] == seen[1][1] and len(seen[0][1]) == 3
    torch.testing.assert_close(seen[0][0], seen[1][0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("child", ["bn1", "conv2", "shortcut"])
def test_hooks_on_children_run(child):
    one, other = twins("basic-projection")
    count = []
    for module in (one, other):
        getattr(module, child).register_forward_hook(
            lambda _, inputs, output: count.append(1) or 1.5 * output
        )
    x = batch(one)
    assert_trusted(one, other, x)
    assert len(count) >= 2


class LoudNorm(nn.BatchNorm2d):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize(
    "child, replacement",
    [
        ("bn2", lambda old: nn.GroupNorm(2, old.num_features)),
        ("bn2", lambda old: LoudNorm(old.num_features)),
        ("bn1", lambda old: nn.Identity()),
        ("conv1", lambda old: nn.Conv2d(old.in_channels, old.out_channels, 3, 2, 1, padding_mode="reflect")),
        ("conv2", lambda old: nn.Sequential(old, nn.Dropout(0.0))),
        (
            "shortcut",
            lambda old: nn.Sequential(
                nn.AvgPool2d(2, ceil_mode=True), nn.Conv2d(old.in_channels, old.out_channels, 1)
            ),
        ),
        ("shortcut", lambda old: nn.Conv2d(old.in_channels, old.out_channels, 3, 2, 1)),
    ],
)
def test_replaced_children_compute_what_the_plain_unit_computes(child, replacement):
    one, other = twins("basic-projection")
    x = batch(one)
    torch.manual_seed(0)
    new = replacement(getattr(other, child))
    for module in (one, other):
        setattr(module, child, copy.deepcopy(new))
    assert_trusted(one, other, x)
    y, stats = one(x, return_stats=True)
    assert stats is None or y.shape[1] == stats.shape[1]


@pytest.mark.parametrize("register", ["prune", "weight_norm"])
def test_reparametrized_weights(register):
    one, other = twins("basic")
    for module in (one, other):
        if register == "prune":
            prune.l1_unstructured(module.conv1, "weight", amount=0.5)
        else:
            torch.nn.utils.parametrizations.weight_norm(module.conv1)
    x = batch(one)
    results, expected = outcome(one, x), outcome(other, x)  # modules with a pruned weight cannot be copied
    assert results.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(results[key], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
def test_copies(way):
    one, _ = twins("bottleneck-projection")
    x = batch(one)
    one(x)
    if way == "deepcopy":
        copied = copy.deepcopy(one)
    elif way == "pickle":
        copied = pickle.loads(pickle.dumps(one))
    else:
        content = io.BytesIO()
        torch.save(one, content)
        content.seek(0)
        copied = torch.load(content, weights_only=False)
    assert type(copied) is fused.PreActBottleneck
    assert torch.equal(copied(x), one(x))


def test_double_backward_of_a_module():
    torch.manual_seed(0)
    unit = fused.PreActBasicBlock(2, 3, 2).double()
    for buffer in unit.buffers():
        buffer.detach_()
    x = torch.randn(2, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: unit(x), (x,), fast_mode=True)


# --- errors ---


@pytest.mark.parametrize("name", ["basic", "bottleneck-projection", "conv3x3"])
def test_wrong_input(name):
    one, other = twins(name)
    x = batch(one)
    for bad in (x[0], x[:, :-1], x.double(), x[:1, :, :1, :1], x.long()):
        with pytest.raises(Exception) as error:
            one(bad)
        with pytest.raises(Exception) as expected:
            other(bad)
        assert type(error.value) is type(expected.value), f"{error.value!r}, expected {expected.value!r}"
    for module in (one, other):
        with pytest.raises(ValueError, match=r"expected 4D input \(got 3D input\)"):
            module(x[0])
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        one(x[:1, :, :1, :1])


@pytest.mark.parametrize("source", [fused, rf.reference])
def test_a_stage_tells_how_many_dimensions_it_expects(source):
    with pytest.raises(ValueError, match=r"expected 4D input \(got 3D input\)"):
        source.PreActStage(source.PreActBasicBlock(4, 4))(torch.randn(4, 8, 8))


def test_one_value_per_channel_works_in_eval():
    one, other = (module.eval() for module in twins("basic"))
    x = batch(one)[:1, :, :1, :1]
    assert_trusted(one, other, x)


def test_empty_batch():
    one, other = twins("bottleneck-projection")
    before = {
        name: value.clone() for name, value in one.named_buffers() if not name.endswith("num_batches_tracked")
    }
    x = batch(one)[:0].requires_grad_()
    y = one(x)
    y.sum().backward()
    assert y.shape == (0, 12, 4, 5) and x.grad.shape == x.shape
    assert all(torch.equal(value, dict(one.named_buffers())[name]) for name, value in before.items())
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in one.parameters())


# --- ResidualAdd ---


@pytest.mark.parametrize("gate", [None, (4, 6), (4, 1)], ids=str)
@pytest.mark.parametrize(
    "options", [{}, {"alpha": 0.25}, {"negative_slope": 0.0}, {"alpha": 2.0, "negative_slope": 0.1}], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_residual_add(dtype, options, gate):
    torch.manual_seed(0)
    one, other = fused.ResidualAdd(**options), plain.ResidualAdd(**options)
    assert repr(one) == repr(other) and not one.state_dict()
    leaves = [torch.randn(4, 6, 5, 3), torch.randn(4, 6, 5, 3), *([torch.rand(gate)] if gate else [])]
    leaves, cotangent = [leaf.to(dtype) for leaf in leaves], torch.randn(4, 6, 5, 3).to(dtype)

    def results(module, dtype):
        inputs = [leaf.to(dtype).detach().requires_grad_() for leaf in leaves]
        y = module(*inputs)
        y.backward(cotangent.to(dtype))
        return [y.detach(), *(value.grad for value in inputs)]

    for result, expected, exact in zip(
        results(one, dtype), results(other, dtype), results(other, torch.float64)
    ):
        assert result.dtype == expected.dtype == dtype and result.shape == exact.shape
        error, plain_error = ((value.double() - exact).abs().max() for value in (result, expected))
        assert error <= 2 * plain_error + 2 * torch.finfo(dtype).eps * exact.abs().max()


# --- torch.compile ---


@pytest.mark.parametrize("momentum", [0.1, None])
def test_compiled_stage_is_one_graph_with_the_same_numbers(momentum):
    """aot_eager traces forward and backward as torch.compile does, and runs the graph without a compiler."""
    one, _ = stages(momentum=momentum)
    twin = copy.deepcopy(one)
    compiled = torch.compile(one, fullgraph=True, backend="aot_eager")
    for step in range(2):
        x = batch(one) + step
        results, expected = outcome(compiled, x), outcome(twin, x)
        results = {name.removeprefix("_orig_mod."): value for name, value in results.items()}
        for key, value in expected.items():
            torch.testing.assert_close(
                results[key], value, rtol=1e-5, atol=1e-6, msg=lambda text, key=key: f"{key}: {text}"
            )
        one.zero_grad(), twin.zero_grad()


# --- transformed functions ---


@pytest.mark.parametrize("name", ["basic-projection", "bottleneck", "conv3x3"])
def test_momentum_none_in_float64(name):
    """The average's factor is a float64, too."""
    one, other = (made.double() for made in twins(name, momentum=None))
    for step in range(3):
        x = batch(one).double() + step
        one(x), other(x)
    for a, b in zip(one.buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-14)


class TestFunc:
    """torch.func and forward-mode AD see PyTorch's layers, in which they have formulas for everything."""

    NETS = [
        ("preact_resnet20_cifar", 8),
        ("resnet20_cifar", 8),
        ("densenet_bc100_12_cifar", 8),
    ]

    @pytest.mark.parametrize(("name", "size"), NETS)
    def test_nets(self, name, size):
        made = [rf.models.create_model(name, num_classes=3, fused=fused) for fused in (True, False)]
        made[1].load_state_dict(made[0].state_dict())
        x, direction = torch.randn(2, 2, 3, size, size).double().unbind()
        results = []
        for model in made:
            model.double().eval()
            parameters = {key: value.detach() for key, value in model.named_parameters()}

            def loss(parameters, x, model=model):
                return torch.func.functional_call(model, parameters, (x,)).square().sum()

            weight = next(iter(parameters))
            results.append([
                torch.func.grad(loss)(parameters, x)[weight],
                torch.func.vmap(lambda image: model(image[None]))(x),
                torch.func.jvp(model, (x,), (direction,))[1],
                torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x[:, None])[weight],
            ])
            with torch.autograd.forward_ad.dual_level():
                dual = torch.autograd.forward_ad.make_dual(x, direction)
                results[-1].append(torch.autograd.forward_ad.unpack_dual(model(dual)).tangent.clone())
        for mine, theirs in zip(*results, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)

    def test_residual_add(self):
        x, y = torch.randn(2, 2, 3, 4, 4).unbind()
        add = [source.ResidualAdd(alpha=0.5, negative_slope=0.1) for source in (fused, plain)]
        mine, theirs = (torch.func.vmap(module)(x, y) for module in add)
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("name", ["preact_resnet20_cifar", "resnet20_cifar", "densenet_bc100_12_cifar"])
def test_an_image_without_a_batch(name):
    for is_fused in (True, False):
        with pytest.raises(ValueError, match=r"expected 4D input \(got 3D input\)"):
            rf.models.create_model(name, fused=is_fused)(torch.randn(3, 8, 8))
