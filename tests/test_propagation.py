"""Propagation through residual nets, measured against formulas that the measurement does not use."""

import math
from fractions import Fraction

import pytest
import torch
from torch.nn import functional as F

from resnet_fused.analysis import shortcut_sum
from resnet_fused.analysis.observed_units import observe
from resnet_fused.analysis.propagation import measure_propagation
from resnet_fused.analysis.shortcut_sum import ShortcutSum
from resnet_fused.models import DenseNet, PreActResNetCifar, ResNet
from resnet_fused.nn.reference import ORDERS, SHORTCUTS

pytestmark = pytest.mark.usefixtures("one_thread")

GATED = ("exclusive_gating", "shortcut_only_gating")


def net(dtype=torch.float64, blocks=(4, 3), **options):
    if options.get("shortcut") == "conv":
        options["projection"] = "C"
    torch.manual_seed(0)
    model = ResNet(list(blocks), (4, 6)[: len(blocks)], stem_channels=4, fused=False, dtype=dtype, **options)
    with torch.no_grad():
        for parameter in model.parameters():  # norms and gates that are told apart
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def batch(dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(3, 3, 10, 10, dtype=torch.float64, generator=generator)
    return images.to(dtype), torch.randint(10, (3,), generator=generator)


def by_autograd(model, images, labels):
    """Inputs of all units, the last output, and the loss's gradients in them, by one ordinary backward."""
    units = [unit for _, unit in model.residual_units()]
    seen, handles = [], []
    for unit in units:
        handles.append(unit.register_forward_pre_hook(lambda _, args: seen.append(args[0])))
    handles.append(units[-1].register_forward_hook(lambda _, args, out: seen.append(out)))
    torch.manual_seed(0)
    loss = F.cross_entropy(model(images), labels)
    gradients = torch.autograd.grad(loss, seen)
    for handle in handles:
        handle.remove()
    return loss, [x.detach() for x in seen], gradients


class TestShortcutSum:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("factor", [1.0, 0.7, "each its own"])
    def test_against_fractions(self, dtype, factor):
        x, *residuals = torch.randn(6, 20, dtype=dtype) * torch.logspace(-6, 6, 20, dtype=dtype)
        k = torch.rand(20, dtype=dtype) if isinstance(factor, str) else factor
        total, value, exact = ShortcutSum(x), x, [Fraction(float(v)) for v in x]
        factors = [Fraction(float(v)) for v in torch.as_tensor(k, dtype=dtype).expand(20)]
        for residual in residuals:
            shortcut = value if factor == 1.0 else k * value
            value = residual + shortcut
            total.add(k, residual, shortcut, value)
            exact = [a * s + Fraction(float(r)) for a, s, r in zip(factors, exact, residual)]
        deviations, bounds = total.deviation(value), total.bound()
        for found, bound, end, true in zip(deviations, bounds, value, exact):
            deviation = Fraction(float(end)) - true
            assert abs(deviation) <= Fraction(float(bound)) * (1 + Fraction(1, 10**12))
            assert (
                abs(Fraction(float(found)) - deviation)
                <= abs(Fraction(float(end))) * Fraction(torch.finfo(dtype).eps) ** 2 * 64
            )
        assert deviations.any(), "20 sums of 6 numbers are not all exact"

    def test_half_ulp(self):
        for dtype, digits in ((torch.float32, 24), (torch.float64, 53)):
            values = torch.tensor([1.0, 1.5, -2.0, 0.0, 3e-30], dtype=dtype)
            found = shortcut_sum._half_ulp(values).tolist()
            assert found[:4] == [2.0**-digits, 2.0**-digits, 2.0 ** (1 - digits), 0.0]
            assert found[4] == 2.0 ** (math.floor(math.log2(3e-30)) - digits)
            assert shortcut_sum.ulp_of_largest(values) == 2.0 ** (2 - digits)

    def test_other_dtypes(self):
        with pytest.raises(TypeError, match="float32 or float64"):
            ShortcutSum(torch.ones(2, dtype=torch.bfloat16))


@pytest.mark.parametrize("shortcut", SHORTCUTS)
@pytest.mark.parametrize("order", ORDERS)
def test_the_net_is_what_it_was(order, shortcut):
    """Same values and gradients as an ordinary forward and backward; nothing left behind."""
    model, (images, labels) = net(order=order, shortcut=shortcut), batch()
    loss, seen, gradients = by_autograd(model, images, labels)
    model = net(order=order, shortcut=shortcut)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    found = measure_propagation(model, images, labels)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert all(
        "forward" not in vars(m) and not m._forward_hooks and not m._forward_pre_hooks
        for m in model.modules()
    )

    assert found.loss == float(loss.detach()) and found.dtype is torch.float64
    assert [unit.name for unit in found.units] == [name for name, _ in model.residual_units()] + ["head"]
    for unit, x, gradient in zip(found.units, seen, gradients, strict=True):
        assert (unit.channels, unit.height, unit.width) == tuple(x.shape[1:])
        assert unit.signal_rms == pytest.approx(float(x.square().mean().sqrt()), rel=1e-12)
        assert unit.signal_mean == pytest.approx(float(x.mean()), rel=1e-9, abs=1e-12)
        assert unit.signal_variance == pytest.approx(float(x.var(correction=0)), rel=1e-9)
        assert unit.gradient_norm == pytest.approx(float(gradient.norm()), rel=1e-9)
    for unit in found.units:
        if unit.stage is not None:
            assert unit.split_error < 1e-14, "direct and rest add up to the gradient"


def test_observed_values_are_the_nets():
    model, (images, _) = net(torch.float32), batch(torch.float32)
    with torch.no_grad():
        expected = model.eval()(images)
    with observe(model) as units:
        assert torch.equal(model(images), expected)
    assert len(units) == 7 and all(torch.equal(a.out, b.x) for a, b in zip(units, units[1:]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shortcut", ["identity", "constant_scaling", *GATED, "dropout"])
@pytest.mark.parametrize("order", ["relu_only_preactivation", "relu_before_addition", "full_preactivation"])
def test_equations_4_and_7_hold_to_rounding(order, shortcut, dtype):
    options = {"shortcut_scale": 0.7, "residual_scale": 0.4} if shortcut == "constant_scaling" else {}
    model = net(dtype, order=order, shortcut=shortcut, shortcut_options=options)
    found = measure_propagation(model, *batch(dtype))
    assert [(stage.begin, stage.end) for stage in found.stages] == [
        (1 if order.endswith("preactivation") else 0, 4),
        (5, 7),
    ]
    for stage in found.stages:
        assert stage.exact and stage.rounding_ratio <= 1
        assert 0 < stage.deviation < 8 * torch.finfo(dtype).eps and stage.deviation_ulp < 8


def test_equation_4_by_hand():
    """x_L - x_l - sum F, in plain float64."""
    model, (images, labels) = net(order="full_preactivation", first_activation="residual"), batch()
    _, seen, _ = by_autograd(model, images, labels)
    units = [unit for _, unit in model.residual_units()]
    total = seen[0] + sum(unit.terms(x)[1] for unit, x in zip(units[:4], seen))
    largest = float(total.detach().abs().max())
    torch.testing.assert_close(seen[4], total, rtol=0, atol=8 * torch.finfo(torch.float64).eps * largest)
    (first, _) = measure_propagation(model, images, labels).stages
    assert (first.begin, first.end, first.first, first.last) == (0, 4, "layer1.0", "layer1.3")
    assert first.deviation < 1e-15


def test_what_is_no_identity_shows():
    """The check can fail: f = ReLU changes x, and a deviation far below a tolerance of 1e-5 is found too."""
    found = measure_propagation(net(order="original"), *batch())
    assert all(not stage.exact and stage.deviation > 0.01 for stage in found.stages)

    model = net(torch.float32, order="full_preactivation")
    unit = model.get_submodule("layer1.2")
    unit.after_addition = lambda y: y * (1 + 5e-7)
    first, second = measure_propagation(model, *batch(torch.float32)).stages
    assert not first.exact and 1e-7 < first.deviation < 1e-6 and second.exact


class TestGradient:
    def measured(self, **options):
        model, (images, labels) = net(**options), batch()
        _, seen, gradients = by_autograd(model, images, labels)
        found = measure_propagation(model, images, labels)
        return model, found, seen, gradients

    @pytest.mark.parametrize("order", ["relu_before_addition", "full_preactivation"])
    def test_equation_5(self, order):
        """The direct term is dE/dx_L itself, the rest what is missing to dE/dx_l."""
        _, found, _, gradients = self.measured(order=order)
        for stage in found.stages:
            for index in range(stage.begin, stage.end):
                unit, end = found.units[index], gradients[stage.end]
                assert (
                    unit.coefficient_mean == unit.direct_mean == unit.product_mean == unit.factor_mean == 1.0
                )
                assert unit.coefficient_std == unit.direct_std == 0.0 and unit.direct_ratio == 1.0
                assert unit.direct_norm == pytest.approx(float(end.norm()), rel=1e-12)
                assert unit.rest_norm == pytest.approx(float((gradients[index] - end).norm()), rel=1e-9)
            assert stage.product == 1.0 and stage.coefficient_error == 0.0

    @pytest.mark.parametrize("scale", [0.5, 0.7, 1.3])
    def test_equation_8(self, scale):
        options = {"shortcut_scale": scale, "residual_scale": 1.0}
        _, found, _, gradients = self.measured(
            order="full_preactivation", shortcut="constant_scaling", shortcut_options=options
        )
        for stage in found.stages:
            assert stage.product == pytest.approx(scale ** (stage.end - stage.begin), rel=1e-14)
            assert stage.coefficient_error <= (0 if scale == 0.5 else 1e-15)
            for index in range(stage.begin, stage.end):
                unit, power = found.units[index], scale ** (stage.end - index)
                direct = power * gradients[stage.end]
                assert (
                    unit.coefficient_mean == pytest.approx(power, rel=1e-14) and unit.coefficient_std < 1e-15
                )
                assert unit.direct_ratio == pytest.approx(power, rel=1e-12)
                assert unit.rest_norm == pytest.approx(float((gradients[index] - direct).norm()), rel=1e-9)

    @pytest.mark.parametrize("gate_input", ["x", "preactivation"])
    @pytest.mark.parametrize("shortcut", GATED)
    def test_products_of_gates(self, shortcut, gate_input):
        model, found, seen, gradients = self.measured(
            order="full_preactivation",
            shortcut=shortcut,
            shortcut_options={"gate_bias": -1.0, "gate_input": gate_input},
        )
        units = [unit for _, unit in model.residual_units()]
        for stage in found.stages:
            product = torch.ones_like(seen[stage.end])
            for index in range(stage.end - 1, stage.begin - 1, -1):
                unit, x = units[index], seen[index]
                read = (
                    x
                    if gate_input == "x"
                    else F.relu(F.batch_norm(x, None, None, unit.bn1.weight, unit.bn1.bias, training=True))
                )
                factor = torch.sigmoid(-F.conv2d(read, unit.gate.weight, unit.gate.bias)).detach()
                product = factor * product
                row = found.units[index]
                assert row.factor_mean == pytest.approx(float(factor.mean()), rel=1e-12)
                assert row.factor_std == pytest.approx(float(factor.std(correction=0)), rel=1e-9)
                for kind in ("product", "coefficient", "direct"):
                    assert getattr(row, f"{kind}_mean") == pytest.approx(float(product.mean()), rel=1e-12)
                    assert getattr(row, f"{kind}_std") == pytest.approx(
                        float(product.std(correction=0)), rel=1e-9
                    )
                direct = product * gradients[stage.end]
                assert row.direct_norm == pytest.approx(float(direct.norm()), rel=1e-9)
                assert row.rest_norm == pytest.approx(float((gradients[index] - direct).norm()), rel=1e-9)
            assert stage.product is None and stage.coefficient_error < 1e-14

    def test_relu_after_addition(self):
        """In original units the shortcut's coefficient is 1 and f lets pass where x_{l+1} > 0."""
        _, found, seen, gradients = self.measured(order="original")
        for stage in found.stages:
            passed = torch.ones_like(seen[stage.end])
            for index in range(stage.end - 1, stage.begin - 1, -1):
                passed = passed * (seen[index + 1] > 0)
                row = found.units[index]
                assert (row.coefficient_mean, row.coefficient_std) == (1.0, 0.0)
                assert row.direct_mean == pytest.approx(float(passed.mean()), rel=1e-12)
                direct = passed * gradients[stage.end]
                assert row.direct_norm == pytest.approx(float(direct.norm()), rel=1e-12)
                assert row.rest_norm == pytest.approx(float((gradients[index] - direct).norm()), rel=1e-9)

    def test_plain_nets_have_no_direct_term(self):
        _, found, *_ = self.measured(order="original", shortcut="none")
        rows = [unit for unit in found.units if unit.stage is not None]
        assert rows and all(row.direct_norm == row.coefficient_mean == 0.0 for row in rows)
        assert all(row.rest_norm == pytest.approx(row.gradient_norm, rel=1e-12) for row in rows)

    def test_convolutions_are_no_factor(self):
        model, found, _, gradients = self.measured(order="full_preactivation", shortcut="conv")
        assert [(s.begin, s.end, s.product, s.deviation, s.exact) for s in found.stages] == [
            (1, 4, None, None, None),
            (5, 7, None, None, None),
        ]
        row = found.units[6]
        assert row.coefficient_mean is None and row.direct_ratio > 0
        unit = model.get_submodule("layer2.1")
        assert unit.shortcut is not None and row.rest_norm > 0

    def test_norms_after_the_addition_are_no_factor(self):
        _, found, *_ = self.measured(order="bn_after_addition")
        assert all(
            u.direct_mean is None and u.coefficient_mean == 1.0 for u in found.units if u.stage is not None
        )


def test_units_of_published_preactivation_nets():
    torch.manual_seed(0)
    model = PreActResNetCifar(20, fused=False, dtype=torch.float64)
    found = measure_propagation(model, *batch())
    assert [(s.begin, s.end, s.exact) for s in found.stages] == [(0, 3, True), (4, 6, True), (7, 9, True)]


def test_dropout_is_drawn_anew_from_the_seed():
    model, given = net(shortcut="dropout"), batch()
    a, b, c = (measure_propagation(model, *given, seed=seed) for seed in (0, 0, 1))
    assert a == b and a.loss != c.loss


def test_not_a_number_is_told():
    model, (images, labels) = net(order="full_preactivation"), batch()
    images[0, 0, 0, 0] = math.nan
    found = measure_propagation(model, images, labels)
    assert math.isnan(found.loss) and not any(stage.exact for stage in found.stages)
    assert all(math.isnan(unit.gradient_norm) for unit in found.units)


def test_what_cannot_be_measured():
    images, labels = batch(torch.float32)
    with pytest.raises(ValueError, match="fused=False"):
        measure_propagation(ResNet([1], [4], stem_channels=4), images, labels)
    with pytest.raises(TypeError, match="residual units"):
        measure_propagation(DenseNet([1], 4, fused=False), images, labels)
    with pytest.raises(TypeError, match="float32 or float64"):
        measure_propagation(net(torch.bfloat16), images.bfloat16(), labels)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        measure_propagation(net(torch.float32), images[:1, :, :1, :1], labels[:1])
