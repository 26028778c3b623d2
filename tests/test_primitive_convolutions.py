"""The primitives with a convolution, on every backend and SIMD level, against the float64 oracle.

The oracle is the reference given float64 inputs, the yardstick of the trust rule the reference or plain
PyTorch in the same dtype.
"""

import pytest
import torch
import torch.nn.functional as F
from conftest import on_every_backend
from primitive_cases import (
    CL,
    DTYPES,
    SHAPES,
    acc,
    activation,
    bn_rows,
    check_activation,
    check_stats,
    check_sums,
    identity_bn,
    name_of,
    wide,
)
from tolerances import assert_trusted

from resnet_fused import primitives
from resnet_fused.primitives import reference
from resnet_fused.primitives.layout import convolution_output_shape

CONVOLUTION_DTYPES = [(d, d) for d in DTYPES] + [
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float32),
]


class Plain:
    """The convolution primitives as plain PyTorch composes them in one dtype, rounding after each step: the
    yardstick of the unfused path in half precision."""

    @staticmethod
    def forward(x, bn, weight, bias, residual, slope, *geometry):
        a = x if bn is None else reference.bn_act_forward(x, bn, slope)
        y = F.conv2d(a, weight.to(x.dtype), None if bias is None else bias.to(x.dtype), *geometry)
        return y if residual is None else y + residual

    @staticmethod
    def _gradient(dy, x, weight, stride, padding, dilation, groups, mask):
        return torch.ops.aten.convolution_backward(
            dy, x, weight.to(x.dtype), None, stride, padding, dilation, False, [0, 0], groups, mask
        )

    @staticmethod
    def dgrad(dy, weight, x, bn, dz_in, slope, *geometry):
        da = Plain._gradient(dy, x, weight, *geometry, [True, False, False])[0]
        return reference.bn_act_backward(da, x, bn, dz_in, slope)[0]

    @staticmethod
    def wgrad(dy, x, bn, weight, slope, *geometry):
        a = x if bn is None else reference.bn_act_forward(x, bn, slope)
        return Plain._gradient(dy, a, weight, *geometry, [False, True, False])[1].to(weight.dtype)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    ("dtype", "parameters"),
    CONVOLUTION_DTYPES,
    ids=["fp32", "fp64", "bf16", "fp16", "bf16-masters", "fp16-masters"],
)
@pytest.mark.parametrize("shape", SHAPES, ids=name_of)
class TestConvolutions:
    @pytest.fixture(autouse=True)
    def arguments(self, shape, dtype, parameters):
        self.x = activation(shape.n, shape.c, shape.h, shape.w, dtype=dtype)
        fan_in = shape.c // shape.groups * shape.kernel[0] * shape.kernel[1]
        self.weight = (torch.randn(shape.k, shape.c // shape.groups, *shape.kernel) / fan_in**0.5).to(
            parameters
        )
        self.bias = torch.randn(shape.k).to(parameters)
        self.bn = bn_rows(shape.c, dtype)
        size = convolution_output_shape(self.x.shape, self.weight.shape, *shape.geometry[:3])
        self.dy, self.residual = activation(*size, dtype=dtype), activation(*size, dtype=dtype)
        # What the cpu kernels and the reference round once, the unfused path rounds after each step.
        self.rounds_once = lambda backend: (
            backend == "reference"
            or (backend.startswith("cpu") and dtype != torch.float16 and shape.groups == 1)
        )

    @pytest.mark.parametrize("variant", ["bn", "bn+bias+residual", "plain"])
    def test_forward(self, shape, variant):
        bn = None if variant == "plain" else self.bn
        extras = (self.bias, self.residual) if variant.endswith("residual") else (None, None)
        args = (self.x, bn, self.weight, *extras, 0.0, *shape.geometry)
        oracle = reference.preact_conv_forward(*wide(*args), False)[0]
        once = reference.preact_conv_forward(*args, False)[0]
        stepwise = Plain.forward(*args)
        terms = reference.preact_conv_forward(
            *(
                None if t is None else t.double().abs()
                for t in (
                    self.x if bn is None else reference.bn_act_forward(self.x, bn, 0.0),
                    None,
                    self.weight,
                    *extras,
                )
            ),
            0.0,
            *shape.geometry,
            False,
        )[0]

        def check(backend):
            y, none = primitives.preact_conv_forward(*args, False)
            assert none.shape == (0,)
            check_activation("y", y, once if self.rounds_once(backend) else stepwise, oracle, terms)
            again, stats = primitives.preact_conv_forward(*args, True)
            assert torch.equal(y, again)
            check_stats(stats, y)

        on_every_backend(check)

    @pytest.mark.parametrize("joined", [False, True], ids=["", "dz_in"])
    def test_dgrad(self, shape, joined):
        dz_in = torch.randn_like(self.x) if joined else None
        args = (self.dy, self.weight, self.x, self.bn, dz_in, 0.1, *shape.geometry)
        oracle = reference.preact_conv_dgrad(*wide(*args))[0]
        once = reference.preact_conv_dgrad(*args)[0]
        stepwise = Plain.dgrad(*args)
        terms = Plain._gradient(
            self.dy.double().abs(),
            self.x.double(),
            self.weight.double().abs(),
            *shape.geometry,
            [True, False, False],
        )[0]

        def check(backend):
            dz, sums = primitives.preact_conv_dgrad(*args)
            check_activation("dz", dz, once if self.rounds_once(backend) else stepwise, oracle, terms)
            check_sums(sums, dz, self.x, self.bn)

        on_every_backend(check)

    def test_dgrad_with_the_sums_of_dz_in(self, shape):
        """They save work; what comes out is the same, the sums but for their rounding."""
        dz_in = torch.randn_like(self.x)
        args = (self.dy, self.weight, self.x, self.bn, dz_in, 0.1, *shape.geometry)
        known = reference.bn_act_backward(dz_in, self.x, self.bn, None, 1.0)[1]

        def check(backend):
            kept = dz_in.clone()
            dz, sums = primitives.preact_conv_dgrad(*args, known)
            assert torch.equal(dz_in, kept)
            assert torch.equal(dz, primitives.preact_conv_dgrad(*args)[0])
            check_sums(sums, dz, self.x, self.bn)

        on_every_backend(check)

    @pytest.mark.parametrize("variant", ["bn+bias", "plain"])
    def test_wgrad(self, shape, variant):
        bn = None if variant == "plain" else self.bn
        args = (self.dy, self.x, bn, self.weight, 0.0, *shape.geometry)
        oracle = reference.preact_conv_wgrad(*wide(*args), True)
        once = reference.preact_conv_wgrad(*args, True)
        stepwise = Plain.wgrad(*args)
        # The sums of |a| |dy| behind each element of dweight, and of |dy| behind dbias.
        a = self.x if bn is None else reference.bn_act_forward(self.x, bn, 0.0)
        terms = reference.preact_conv_wgrad(
            self.dy.double().abs(), a.double().abs(), None, self.weight.double(), 0.0, *shape.geometry, True
        )

        def check(backend):
            dweight, dbias = primitives.preact_conv_wgrad(*args, True)
            assert dweight.dtype == dbias.dtype == self.weight.dtype
            assert dweight.stride() == self.weight.stride()
            assert_trusted(
                dweight, once[0] if self.rounds_once(backend) else stepwise, oracle[0], "dweight", terms[0]
            )
            assert_trusted(dbias, once[1], oracle[1], "dbias", terms[1])
            again, none = primitives.preact_conv_wgrad(*args, False)
            assert torch.equal(dweight, again) and none.shape == (0,)

        on_every_backend(check)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("shape", [SHAPES[2], SHAPES[3], SHAPES[-2]], ids=name_of)
def test_weight_of_any_strides(shape, dtype):
    x, bn = activation(shape.n, shape.c, shape.h, shape.w, dtype=dtype), bn_rows(shape.c, dtype)
    weight = torch.randn(shape.k, shape.c // shape.groups, *shape.kernel).to(dtype)
    spaced = torch.empty(*weight.shape, 2, dtype=dtype)[..., 0].copy_(weight)

    def check(backend):
        y, _ = primitives.preact_conv_forward(x, bn, weight, None, None, 0.0, *shape.geometry, False)
        dz, _ = primitives.preact_conv_dgrad(y, weight, x, bn, None, 0.0, *shape.geometry)
        dweight, _ = primitives.preact_conv_wgrad(y, x, bn, weight, 0.0, *shape.geometry, False)
        for other in (weight.contiguous(memory_format=CL), spaced, weight.flip(2).flip(2)):
            args = (x, bn, other, None, None, 0.0, *shape.geometry, False)
            assert torch.equal(primitives.preact_conv_forward(*args)[0], y)
            assert torch.equal(
                primitives.preact_conv_dgrad(y, other, x, bn, None, 0.0, *shape.geometry)[0], dz
            )
            other_dweight, _ = primitives.preact_conv_wgrad(y, x, bn, other, 0.0, *shape.geometry, False)
            assert torch.equal(other_dweight, dweight)
            assert other_dweight.stride() == torch.empty_like(other).stride()

    on_every_backend(check)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=name_of)
def test_dgrad_beside_infinite_sums(dtype):
    """dz_in_sums of inf: sums as those of dz, not inf - inf."""
    x, dz_in = activation(2, 17, 6, 5, dtype=dtype), activation(2, 17, 6, 5, dtype=dtype)
    bn, dy = bn_rows(17, dtype), activation(2, 4, 3, 3, dtype=dtype)
    dz_in[0, 3, 2, 2] = dz_in[1, 5, 1, 1] = torch.inf  # read by the convolution, and not
    x[0, 3, 2, 2] = x[1, 5, 1, 1] = bn[0].max() + 1  # away from the mean: 0 * inf is no number
    known = reference.bn_act_backward(dz_in, x, bn, None, 1.0)[1]
    args = (dy, torch.randn(4, 17, 1, 1, dtype=dtype), x, bn, dz_in, 0.0, (2, 2), (0, 0), (1, 1), 1)

    def check(backend):
        dz, sums = primitives.preact_conv_dgrad(*args, known)
        expected = reference.bn_act_backward(dz, x, bn, None, 1.0)[1]
        assert torch.equal(sums.isnan(), expected.isnan()) and sums[0, 3].isinf() and sums[0, 5].isinf()
        assert torch.equal(sums.isfinite(), expected.isfinite())
        torch.testing.assert_close(sums[:, :3], expected[:, :3], rtol=1e-4, atol=1e-4)

    on_every_backend(check)


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=name_of)
def test_small_integers_are_exact(dtype, kernel):
    """Products and sums of small integers are integers that the dtype holds: every backend gives the same
    bits.
    """
    c, k = 17, 19
    geometry = ((1, 1), (kernel // 2, kernel // 2), (1, 1), 1)
    # bfloat16 holds integers up to 256: sparse ternary weights keep the sums below.
    x = torch.randint(-2, 3, (2, c, 9, 7)).to(dtype).contiguous(memory_format=CL)
    weight = (torch.randint(-1, 2, (k, c, kernel, kernel)) * (torch.rand(k, c, kernel, kernel) < 0.3)).to(
        dtype
    )
    residual = torch.randint(-8, 9, (2, k, 9, 7)).to(dtype).contiguous(memory_format=CL)
    bias = torch.randint(-4, 5, (k,)).to(dtype)
    identity = identity_bn(c, dtype)
    dy = torch.randint(-2, 3, (2, k, 9, 7)).to(dtype).contiguous(memory_format=CL)
    a = x.long().clamp_min(0).double()
    y = F.conv2d(a, weight.double(), bias.double(), 1, kernel // 2) + residual.double()
    da, dw, _ = torch.ops.aten.convolution_backward(
        dy.double(),
        a,
        weight.double(),
        None,
        [1, 1],
        [kernel // 2] * 2,
        [1, 1],
        False,
        [0, 0],
        1,
        [True, True, False],
    )
    dz = torch.where(x > 0, da, 0.0)
    assert y.abs().max() <= 256 and dw.abs().max() <= 256

    def check(backend):
        out, stats = primitives.preact_conv_forward(x, identity, weight, bias, residual, 0.0, *geometry, True)
        assert torch.equal(out.double(), y)
        out_dz, sums = primitives.preact_conv_dgrad(dy, weight, x, identity, None, 0.0, *geometry)
        assert torch.equal(out_dz.double(), dz)
        assert torch.equal(sums.double(), torch.stack((dz.sum((0, 2, 3)), (dz * x.double()).sum((0, 2, 3)))))
        dweight, dbias = primitives.preact_conv_wgrad(dy, x, identity, weight, 0.0, *geometry, True)
        assert torch.equal(dweight.double(), dw)
        assert torch.equal(dbias.double(), dy.double().sum((0, 2, 3)))
        assert torch.equal(primitives.residual_add(x, x, None, None, 1.0, 0.0, False)[0].double(), 2 * a)

    on_every_backend(check)
