"""Wrong arguments: PyTorch's exception types and wording, from the raw operators as well as the public
functions.

Each case is tried through the public function and through torch.ops; where plain PyTorch refuses the same
arguments, the type of its exception is compared too.
"""

import re

import plain
import pytest
import torch
import torch.nn.functional as F

from resnet_fused.functional import (
    BatchNormArgs,
    ConvArgs,
    conv2d_stats,
    preact_conv2d,
    residual_add,
    residual_unit,
)

OPS = torch.ops.resnet_fused


def arguments(**changes):
    base = {
        "x": torch.randn(2, 3, 6, 5), "bn_weight": torch.ones(3), "bn_bias": torch.zeros(3),
        "running_mean": torch.zeros(3), "running_var": torch.ones(3), "weight": torch.randn(4, 3, 3, 3),
        "bias": torch.zeros(4), "residual": None, "x_stats": None, "training": True, "eps": 1e-5, "stride": 1,
        "padding": 1, "dilation": 1, "groups": 1,
    }  # fmt: skip
    return {**base, **changes}


def pair(value):
    return [value, value] if isinstance(value, int) else list(value)


def public(a):
    return preact_conv2d(**a)


def operator(a):
    return OPS.preact_conv2d(
        a["x"], a["x_stats"], a["bn_weight"], a["bn_bias"], a["running_mean"], a["running_var"], a["weight"],
        a["bias"], a["residual"], a["training"], a["eps"], 0.0, pair(a["stride"]), pair(a["padding"]),
        pair(a["dilation"]), a["groups"], True,
    )  # fmt: skip


def unit_parts(a):
    norm = BatchNormArgs(
        a["bn_weight"], a["bn_bias"], a["running_mean"], a["running_var"], a["training"], 0.1, a["eps"]
    )
    return norm, ConvArgs(a["weight"], a["bias"], a["stride"], a["padding"], a["dilation"], a["groups"])


def unit(a):
    norm, conv = unit_parts(a)
    k = a["weight"].shape[0]
    shortcut = ConvArgs(torch.randn(k, a["x"].shape[1], 1, 1, dtype=a["weight"].dtype), stride=a["stride"])
    return residual_unit(a["x"], [norm], [conv], shortcut=shortcut, x_stats=a["x_stats"])


def unit_operator(a):
    k, c = a["weight"].shape[0], a["x"].shape[1] if a["x"].dim() > 1 else 1
    return OPS.residual_unit(
        a["x"], a["x_stats"], [a["bn_weight"]], [a["bn_bias"]], [a["running_mean"]], [a["running_var"]],
        [a["weight"]], [a["bias"]], torch.randn(k, c, 1, 1), None, [a["training"]], [a["eps"]], 0.0,
        pair(a["stride"]), pair(a["padding"]), pair(a["dilation"]), [a["groups"]], [1, 1], False, False,
    )  # fmt: skip


# arguments, exception, message; and whether plain PyTorch raises the same type ("same"), another one, or
# nothing.
CASES = {
    "3-D": ({"x": torch.randn(3, 6, 5)}, ValueError, "expected 4D input (got 3D input)", ""),
    "5-D": ({"x": torch.randn(2, 3, 4, 6, 5)}, ValueError, "expected 4D input (got 5D input)", ""),
    "one value": (
        {"x": torch.randn(1, 3, 1, 1)},
        ValueError,
        "Expected more than 1 value per channel when training, got input size torch.Size([1, 3, 1, 1])",
        "same",
    ),
    "eps 0": (
        {"eps": 0.0},
        ValueError,
        "batch_norm eps must be positive during training, but got 0.0",
        "same",
    ),
    "eps < 0": (
        {"eps": -1e-3},
        ValueError,
        "batch_norm eps must be positive during training, but got -0.001",
        "same",
    ),
    "eps < 0 in eval": (
        {"eps": -1.0, "training": False},
        ValueError,
        "batch_norm eps must be non-negative, but got -1.0",
        "same",
    ),
    "integers": (
        {"x": torch.ones(2, 3, 6, 5, dtype=torch.int32)},
        NotImplementedError,
        "not implemented for 'int32'",
        "",
    ),
    "complex": (
        {"x": torch.ones(2, 3, 6, 5, dtype=torch.complex64)},
        NotImplementedError,
        "for 'complex64'",
        "",
    ),
    "bn weight": (
        {"bn_weight": torch.ones(4)},
        RuntimeError,
        "weight should contain 3 elements not 4",
        "same",
    ),
    "bn bias": ({"bn_bias": torch.ones(2)}, RuntimeError, "bias should contain 3 elements not 2", "same"),
    "running_mean": (
        {"running_mean": torch.ones(5)},
        RuntimeError,
        "running_mean should contain 3 elements not 5",
        "same",
    ),
    "running_var": (
        {"running_var": torch.ones(5)},
        RuntimeError,
        "running_var should contain 3 elements not 5",
        "same",
    ),
    "bn weight dtype": (
        {"bn_weight": torch.ones(3, dtype=torch.float64)},
        RuntimeError,
        "Input type (float) and batch norm weight type (double) should be the same",
        "same",
    ),
    "bn weight device": (
        {"bn_weight": torch.ones(3, device="meta")},
        RuntimeError,
        "Expected all tensors to be on the same device",
        "same",
    ),
    "x_stats size": (
        {"x_stats": torch.zeros(2, 4)},
        RuntimeError,
        "x_stats should be of size [2, 3], but got [2, 4]",
        "",
    ),
    "x_stats dtype": (
        {"x_stats": torch.zeros(2, 3, dtype=torch.float64)},
        RuntimeError,
        "expected x_stats of type float, but got double",
        "",
    ),
    "channels": (
        {"weight": torch.randn(4, 5, 3, 3)},
        RuntimeError,
        "Given groups=1, weight of size [4, 5, 3, 3], expected input[2, 3, 6, 5] to have 5 channels, but "
        "got 3 channels instead",
        "same",
    ),
    "groups and channels": (
        {"groups": 2},
        RuntimeError,
        "Given groups=2, weight of size [4, 3, 3, 3], expected input[2, 3, 6, 5] to have 6 channels, but "
        "got 3 channels instead",
        "same",
    ),
    "groups and outputs": (
        {"groups": 3},
        RuntimeError,
        "Given groups=3, expected weight to be divisible by 3 at dimension 0",
        "same",
    ),
    "groups 0": ({"groups": 0}, RuntimeError, "non-positive groups is not supported", "same"),
    "bias": (
        {"bias": torch.zeros(3)},
        RuntimeError,
        "Given weight of size [4, 3, 3, 3], expected bias to be 1-dimensional with 4 elements, but got bias "
        "of size [3] instead",
        "same",
    ),
    "weight dtype": (
        {"weight": torch.randn(4, 3, 3, 3, dtype=torch.float64)},
        RuntimeError,
        "Input type (float) and weight type (double) should be the same",
        "",
    ),
    "bias dtype": (
        {"bias": torch.zeros(4, dtype=torch.float64)},
        RuntimeError,
        "Input type (float) and bias type (double) should be the same",
        "same",
    ),
    "weight device": (
        {"weight": torch.randn(4, 3, 3, 3, device="meta")},
        RuntimeError,
        "Expected all tensors to be on the same device, but found at least two devices",
        "",
    ),
    "kernel too large": (
        {"x": torch.randn(2, 3, 2, 2), "padding": 0},
        RuntimeError,
        "Calculated padded input size per channel: (2 x 2). Kernel size: (3 x 3). Kernel size can't be "
        "greater than actual input size",
        "same",
    ),
    "stride 0": ({"stride": 0}, RuntimeError, "non-positive stride is not supported", "same"),
    "padding < 0": ({"padding": -1}, RuntimeError, "negative padding is not supported", "same"),
    "dilation 0": ({"dilation": 0}, RuntimeError, "non-positive dilation is not supported", "same"),
    "three strides": (
        {"stride": (1, 1, 1)},
        RuntimeError,
        "expected stride to be a single integer value or a list of 2 values to match the convolution "
        "dimensions, but got stride=[1, 1, 1]",
        "same",
    ),
    "three paddings": (
        {"padding": (1, 1, 1)},
        RuntimeError,
        "expected padding to be a single integer value or a list of 2 values",
        "same",
    ),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("call", [public, operator], ids=["public", "operator"])
@pytest.mark.parametrize("requires_grad", [False, True], ids=["", "with grad"])
def test_preact_conv2d(case, call, requires_grad):
    changes, exception, message, _ = CASES[case]
    a = arguments(**changes)
    if requires_grad and a["x"].is_floating_point():
        a["x"] = a["x"].clone().requires_grad_()
    running = a["running_mean"].clone(), a["running_var"].clone()
    with pytest.raises(exception, match=re.escape(message)) as raised:
        call(a)
    assert type(raised.value) is exception
    assert torch.equal(a["running_mean"], running[0]) and torch.equal(a["running_var"], running[1])


# The shortcut of these units cannot have the size that the case is about, or the case is one of pairs of the
# flat lists.
NOT_FOR_UNITS = {"three strides", "three paddings"}


@pytest.mark.parametrize("case", [c for c in CASES if c not in NOT_FOR_UNITS])
@pytest.mark.parametrize("call", [unit, unit_operator], ids=["public", "operator"])
def test_residual_unit(case, call):
    changes, exception, message, _ = CASES[case]
    with pytest.raises(exception, match=re.escape(message)) as raised:
        call(arguments(**changes))
    assert type(raised.value) is exception


@pytest.mark.parametrize("case", [c for c in CASES if CASES[c][3] == "same"])
def test_plain_pytorch_raises_the_same_type(case):
    changes, exception, _, _ = CASES[case]
    a = arguments(**changes)
    norm = (a["bn_weight"], a["bn_bias"], a["running_mean"], a["running_var"], a["training"], 0.1, a["eps"])
    with pytest.raises(exception):
        plain.preact_conv2d(
            a["x"], norm, (a["weight"], a["bias"], a["stride"], a["padding"], a["dilation"], a["groups"])
        )


@pytest.mark.parametrize("call", [public, operator], ids=["public", "operator"])
class TestPreactConv2d:
    def test_half_of_the_running_statistics(self, call):
        with pytest.raises(
            ValueError, match="running_mean and running_var must either both be None or neither be None"
        ):
            call(arguments(running_var=None))
        with pytest.raises(RuntimeError, match="running_var must be defined in evaluation mode"):
            call(arguments(running_var=None, training=False))

    def test_residual(self, call):
        with pytest.raises(
            RuntimeError, match=re.escape("The size of tensor a (4) must match the size of tensor b (3)")
        ):
            call(arguments(residual=torch.randn(2, 3, 6, 5)))
        with pytest.raises(
            RuntimeError, match="The size of tensor a .5. must match the size of tensor b .1. at non-single"
        ):
            call(arguments(residual=torch.randn(2, 4, 6, 1)))
        with pytest.raises(
            RuntimeError, match=re.escape("Input type (float) and residual type (double) should be the")
        ):
            call(arguments(residual=torch.randn(2, 4, 6, 5).double()))

    def test_one_value_in_eval(self, call):
        call(arguments(x=torch.randn(1, 3, 1, 1), training=False))

    def test_not_a_tensor(self, call):
        with pytest.raises((TypeError, RuntimeError), match="Tensor"):
            call(arguments(x=[[1.0]]))


class TestPublicArguments:
    def test_padding_name(self):
        with pytest.raises(RuntimeError, match="Invalid padding string: 'full'"):
            public(arguments(padding="full"))

    def test_same_with_stride(self):
        with pytest.raises(RuntimeError, match="padding='same' is not supported for strided convolutions"):
            public(arguments(padding="same", stride=2))

    def test_weight_rank(self):
        for padding in (1, "same"):
            with pytest.raises(RuntimeError, match="expected a 4-dimensional weight"):
                public(arguments(weight=torch.randn(4, 3, 3), padding=padding))

    def test_conv2d_stats(self):
        with pytest.raises(ValueError, match=re.escape("expected 4D input (got 3D input)")):
            conv2d_stats(torch.randn(3, 5, 5), torch.randn(4, 3, 3, 3))
        x, weight = torch.randn(2, 3, 5, 5), torch.randn(4, 3, 3, 3, requires_grad=True)
        y, stats = conv2d_stats(x, weight, padding=1)
        assert y.requires_grad and not stats.requires_grad
        torch.testing.assert_close(y, F.conv2d(x, weight, padding=1))
        torch.testing.assert_close(stats[0], y.mean((0, 2, 3)), rtol=1e-5, atol=1e-5)


class TestResidualUnit:
    def units(self, **changes):
        norm, conv = unit_parts(arguments(weight=torch.randn(3, 3, 3, 3), bias=None, **changes))
        return [norm, norm], [conv, conv]

    def test_identity_of_another_size(self):
        norms, convs = self.units()
        with pytest.raises(
            RuntimeError, match=re.escape("The size of tensor a (3) must match the size of tensor b (6)")
        ):
            residual_unit(torch.randn(2, 3, 6, 6), norms, [convs[0]._replace(stride=2), convs[1]])
        with pytest.raises(
            RuntimeError, match="must match the size of tensor b .3. at non-singleton dimension 1"
        ):
            residual_unit(
                torch.randn(2, 3, 6, 6), norms, [convs[0], convs[1]._replace(weight=torch.randn(4, 3, 3, 3))]
            )

    def test_later_norm(self):
        """The message gives the size of the tensor that the failing BatchNorm reads."""
        norms, convs = self.units()
        shrink = convs[0]._replace(stride=9, weight=torch.randn(3, 3, 3, 3))
        shortcut = ConvArgs(torch.randn(3, 3, 1, 1), stride=9)
        with pytest.raises(
            ValueError, match=re.escape("when training, got input size torch.Size([1, 3, 1, 1])")
        ):
            residual_unit(torch.randn(1, 3, 6, 6), norms, [shrink, convs[1]], shortcut=shortcut)
        with pytest.raises(ValueError, match="eps must be positive during training, but got 0.0"):
            residual_unit(torch.randn(2, 3, 6, 6), [norms[0], norms[1]._replace(eps=0.0)], convs)
        running = norms[0].running_mean.clone()
        assert torch.equal(running, torch.zeros(3))

    def test_lists(self):
        norms, convs = self.units()
        x = torch.randn(2, 3, 6, 6)
        for n, c in ((norms[:1], convs), (norms, convs[:1]), ([], [])):
            with pytest.raises(
                RuntimeError, match="expected at least one convolution, and a BatchNorm and a geometry for"
            ):
                residual_unit(x, n, c)
            with pytest.raises(RuntimeError, match="expected at least one convolution"):
                residual_unit(x.clone().requires_grad_(), n, c)

    def test_shortcut_options(self):
        norms, convs = self.units()
        for option in ({"padding": 1}, {"dilation": 2}, {"groups": 3}):
            with pytest.raises(
                ValueError, match="the shortcut of a residual unit has padding 0, dilation 1 and groups 1"
            ):
                residual_unit(
                    torch.randn(2, 3, 6, 6),
                    norms,
                    convs,
                    shortcut=ConvArgs(torch.randn(3, 3, 1, 1), **option),
                )

    def test_asymmetric_same_padding(self):
        norms, convs = self.units()
        even = convs[0]._replace(weight=torch.randn(3, 3, 2, 2), padding="same")
        with pytest.raises(ValueError, match="padding='same' with an even kernel"):
            residual_unit(torch.randn(2, 3, 6, 6), norms, [even, convs[1]])


class TestResidualAdd:
    @pytest.mark.parametrize(("changes", "exception", "message"), [
        ({"x": torch.randn(3, 4, 4)}, ValueError, "expected 4D input (got 3D input)"),
        ({"y": torch.randn(2, 3, 4, 1)}, RuntimeError, "tensor a (4) must match the size of tensor b (1)"),
        ({"affine": torch.ones(2, 4)}, RuntimeError, "affine should be of size [2, 3], but got [2, 4]"),
        ({"gate": torch.ones(3, 3)}, RuntimeError, "gate should be of size [2, 3] or [2, 1], but got [3, 3]"),
        ({"negative_slope": -0.1}, ValueError, "negative_slope must be non-negative, but got -0.1"),
        ({"y": torch.randn(2, 3, 4, 4, device="meta")}, RuntimeError, "all tensors to be on the same device"),
    ])  # fmt: skip
    @pytest.mark.parametrize("raw", [False, True], ids=["public", "operator"])
    def test_arguments(self, changes, exception, message, raw):
        a = {"x": torch.randn(2, 3, 4, 4), "y": torch.randn(2, 3, 4, 4), "affine": None, "gate": None}
        a |= {"alpha": 1.0, "negative_slope": None, **changes}
        if a["x"].dim() == 3:
            a["y"] = a["x"]
        with pytest.raises(exception, match=re.escape(message)):
            OPS.residual_add(*a.values(), False) if raw else residual_add(**a)

    def test_raw_operator_does_not_promote(self):
        x = torch.randn(2, 3, 4, 4)
        with pytest.raises(
            RuntimeError, match=re.escape("Input type (float) and y type (c10::BFloat16) should be the same")
        ):
            OPS.residual_add(x, x.bfloat16(), None, None, 1.0, None, False)


def test_fake_kernels_check_too():
    """torch.compile and meta tensors report the same mistakes."""
    x = torch.randn(1, 3, 1, 1, device="meta")
    a = {k: v.to("meta") if isinstance(v, torch.Tensor) else v for k, v in arguments().items()}
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        operator({**a, "x": x})
    with pytest.raises(RuntimeError, match="to have 5 channels, but got 3 channels instead"):
        operator({**a, "weight": torch.randn(4, 5, 3, 3, device="meta")})
