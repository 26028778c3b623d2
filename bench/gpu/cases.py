"""What parts "kernels" and "cudnn" measure: every primitive at every layer of the nets, in bf16; and the
convolutions of ResNetV2-50 in float16, the dtype that cuDNN's fused graphs take.

A case has three ways to do the same, and the floor's bytes and operations: fused (the primitive); for
convolutions unfused (elementwise primitive + the library's convolution; for both gradients of a 1x1, their
two primitives one after the other); and eager, what plain PyTorch calls for it:

    preact_conv_forward       batch_norm in training (its own statistics) + relu + conv2d (+ add)
    preact_conv_dgrad         the convolution's input gradient + threshold_backward
    preact_conv_wgrad         the convolution's weight gradient, of an activation that was kept
    preact_conv_backward_1x1  both gradients + threshold_backward
    channel_stats             batch_norm's statistics
    bn_act_forward            batch_norm with given statistics + relu
    bn_act_backward           threshold_backward
    preact_apply              batch_norm's backward + the addition of the skip's gradient
    residual_add              the addition + batch_norm's statistics of the sum
    bn_act_pool_forward       batch_norm with given statistics + relu + adaptive_avg_pool2d, at a net's end
    bn_act_pool_backward      the mean's gradient spread over the pixels + threshold_backward
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from tolerances import STATS_EPS, assert_trusted
from torch import Tensor
from torch.nn import functional as F

import resnet_fused as rf
from resnet_fused import primitives
from resnet_fused.primitives import dispatch, reference

from .nets import Layer, Net, layers_of

CONVOLUTIONS = ("preact_conv_forward", "preact_conv_dgrad", "preact_conv_wgrad", "preact_conv_backward_1x1")
PASSES = ("channel_stats", "bn_act_forward", "bn_act_backward", "preact_apply", "residual_add")
POOLS = ("bn_act_pool_forward", "bn_act_pool_backward")  # passes, too, at the end of a net alone
_EPS = 1e-5


@dataclass(frozen=True)
class Case:
    """A primitive at a layer, or for a pass over memory at an activation's shape."""

    primitive: str
    layer: Layer | None
    shape: tuple[int, int, int, int]  # of x
    nets: dict[str, int] = field(compare=False)  # name -> how often in a step
    dtype: torch.dtype = torch.bfloat16  # 2 bytes an element in any case

    @property
    def name(self) -> str:
        where = "x".join(map(str, self.shape)) if self.layer is None else str(self.layer)
        return f"{self.primitive} {where}" + (" fp16" if self.dtype == torch.float16 else "")

    @property
    def flops(self) -> int:
        if self.layer is None:
            return 0
        return self.layer.flops * (2 if self.primitive == "preact_conv_backward_1x1" else 1)

    @property
    def bytes(self) -> int:
        """What has to be read and written at least, each activation and weight once; the rest is small."""
        x = _count(self.shape)
        if self.layer is None:
            return 2 * x * {"channel_stats": 1, "bn_act_forward": 2, "bn_act_backward": 3,
                            "preact_apply": 4, "residual_add": 3,
                            "bn_act_pool_forward": 1, "bn_act_pool_backward": 2}[self.primitive]  # fmt: skip
        y, weight = _count(self.layer.output), _count(self.layer.weight)
        activations = {
            "preact_conv_forward": x + y + (y if self.layer.residual else 0),
            "preact_conv_dgrad": y + 2 * x,
            "preact_conv_wgrad": y + x,
            "preact_conv_backward_1x1": y + 2 * x,
        }[self.primitive]
        return 2 * (activations + weight * (2 if self.primitive == "preact_conv_backward_1x1" else 1))


def _count(shape) -> int:
    n = 1
    for size in shape:
        n *= size
    return n


def cases(nets: list[Net]) -> list[Case]:
    """The cases of these nets, each once, convolutions in the order of the nets and then the passes."""
    layers: dict[Layer, dict[str, int]] = {}
    ends: dict[tuple, dict[str, int]] = {}
    for net in nets:
        for layer, count in layers_of(net).items():
            layers.setdefault(layer, {})[net.name] = count
            if layer.residual:
                end = layer.output
        ends.setdefault(end, {})[net.name] = 1
    found, shapes = [], {}
    for layer, counts in layers.items():
        names = ["preact_conv_forward"]
        if layer.preact:
            names += ["preact_conv_dgrad", "preact_conv_wgrad"]
            names += ["preact_conv_backward_1x1"] if layer.pointwise else []
            into = shapes.setdefault(layer.input, {})
            for net, count in counts.items():
                into[net] = into.get(net, 0) + count
        found += [Case(name, layer, layer.input, counts) for name in names]
    found += [Case(name, None, shape, counts) for shape, counts in shapes.items() for name in PASSES]
    return found + [Case(name, None, shape, counts) for shape, counts in ends.items() for name in POOLS]


def cudnn_cases(nets: list[Net]) -> list[Case]:
    """The convolutions that cuDNN's fused graphs stand beside: those with BatchNorm and ReLU before them, in
    float16, without the shortcut's addition, which none of the graphs does."""
    found: dict[Case, dict[str, int]] = {}
    for case in cases(nets):
        if case.layer is not None and case.layer.preact:
            layer = replace(case.layer, residual=False)
            counts = found.setdefault(Case(case.primitive, layer, layer.input, {}, torch.float16), {})
            for net, count in case.nets.items():
                counts[net] = counts.get(net, 0) + count
    return [replace(case, nets=counts) for case, counts in found.items()]


class Prepared:
    """The tensors of a case on a device, and its ways."""

    def __init__(self, case: Case, device: str) -> None:
        self.case = case
        torch.manual_seed(0)
        channels = case.shape[1]
        x = self._activation(case.shape, device)
        mean, var = torch.randn(channels) * 0.3, torch.rand(channels) + 0.5
        gamma, beta = torch.rand(channels) + 0.5, torch.randn(channels) * 0.3
        self.norm = tuple(t.to(device) for t in (mean, var, gamma, beta))
        bn = reference.finalize_forward(None, 0, *self.norm, _EPS)
        self.args, self.eager = (self._pass if case.layer is None else self._convolution)(x, bn, device)

    def _convolution(self, x: Tensor, bn: Tensor, device: str) -> tuple[tuple, Callable]:
        layer, name = self.case.layer, self.case.primitive
        fan_in = layer.weight[1] * layer.weight[2] * layer.weight[3]
        weight = (torch.randn(layer.weight) / fan_in**0.5).to(self.case.dtype)
        weight = weight.to(device, memory_format=torch.channels_last)
        dy = self._activation(layer.output, device)
        mean, var, gamma, beta = self.norm
        geometry = layer.geometry

        def backward(a, *mask):
            stride, padding, dilation, groups = geometry
            return torch.ops.aten.convolution_backward(
                dy, a, weight, None, stride, padding, dilation, False, (0, 0), groups, mask
            )

        if name == "preact_conv_forward":
            residual = self._activation(layer.output, device) if layer.residual else None
            bn = bn if layer.preact else None

            def forward():
                a = F.relu(F.batch_norm(x, None, None, gamma, beta, True, 0.1, _EPS)) if layer.preact else x
                y = F.conv2d(a, weight, None, *geometry)
                return y if residual is None else y + residual

            return (x, bn, weight, None, residual, 0.0, *geometry, True), forward
        a = reference.bn_act_forward(x, bn, 0.0)
        if name == "preact_conv_dgrad":
            def input_gradient():
                da = backward(a, True, False, False)[0]
                return torch.ops.aten.threshold_backward(da, a, 0)

            return (dy, weight, x, bn, None, 0.0, *geometry), input_gradient
        if name == "preact_conv_wgrad":
            return (dy, x, bn, weight, 0.0, *geometry, False), lambda: backward(a, False, True, False)

        def both_gradients():
            da, dweight, _ = backward(a, True, True, False)
            return torch.ops.aten.threshold_backward(da, a, 0), dweight

        return (dy, weight, x, bn, None, 0.0, False), both_gradients

    def _pass(self, x: Tensor, bn: Tensor, device: str) -> tuple[tuple, Callable]:
        name, (mean, var, gamma, beta) = self.case.primitive, self.norm

        def statistics(t):
            return torch.batch_norm_stats(t, _EPS) if t.is_cuda else torch.var_mean(t.float(), (0, 2, 3))

        if name == "channel_stats":
            return (x,), lambda: statistics(x)
        if name == "bn_act_forward":
            return (x, bn, 0.0), lambda: F.relu(F.batch_norm(x, mean, var, gamma, beta, False, 0.1, _EPS))
        if name == "bn_act_pool_forward":
            return (x, bn, 0.0), lambda: F.adaptive_avg_pool2d(
                F.relu(F.batch_norm(x, mean, var, gamma, beta, False, 0.1, _EPS)), 1
            )
        if name == "bn_act_pool_backward":
            a = reference.bn_act_forward(x, bn, 0.0)
            dy = self._activation((*x.shape[:2], 1, 1), device)

            def spread():
                return torch.ops.aten.threshold_backward(dy.expand(a.shape) / a[0, 0].numel(), a, 0)

            return (dy, x, bn, 0.0), spread
        y = self._activation(self.case.shape, device)
        if name == "bn_act_backward":
            a = reference.bn_act_forward(x, bn, 0.0)
            return (y, x, bn, None, 0.0), lambda: torch.ops.aten.threshold_backward(y, a, 0)
        if name == "residual_add":
            return (x, y, None, None, 1.0, None, True), lambda: statistics(x + y)
        dskip = self._activation(self.case.shape, device)
        coefficients = torch.randn(4, x.shape[1], device=device) * 0.3

        def norm_backward():
            dx, _, _ = torch.ops.aten.native_batch_norm_backward(
                y, x, gamma, None, None, bn[0], bn[1], True, _EPS, [True, True, True]
            )
            return dx + dskip

        return (y, x, coefficients, dskip), norm_backward

    def _activation(self, shape, device: str) -> Tensor:
        noise = torch.randn(shape, device=device).to(self.case.dtype)
        return noise.contiguous(memory_format=torch.channels_last)

    def fused(self) -> tuple[Tensor, ...]:
        result = getattr(primitives, self.case.primitive)(*self.args)
        return (result,) if isinstance(result, Tensor) else result

    def unfused(self) -> Callable[[], object] | None:
        function = dispatch.implementation(self.case.primitive, "unfused")
        return None if function is None else lambda: function(*self.args)

    def backend(self) -> str:
        """Which backend serves the fused way."""
        with rf.record_dispatch() as log:
            self.fused()
        return log[0].backend

    @staticmethod
    def expected(primitive: str, args: tuple) -> list[tuple[Tensor, Tensor]]:
        """(plain PyTorch's, the oracle's) outputs of a primitive. The oracle is float32: at least 2^13 times
        as fine as the cases' dtypes, and within reach where a float64 convolution of these sizes is not."""
        before = torch.backends.cudnn.conv.fp32_precision
        torch.backends.cudnn.conv.fp32_precision = "ieee"
        try:
            plain = _tuple(getattr(reference, primitive)(*args))
            oracle = _tuple(getattr(reference, primitive)(*(_float(a) for a in args)))
        finally:
            torch.backends.cudnn.conv.fp32_precision = before
        return list(zip(plain, oracle, strict=True))

    def verify(self) -> None:
        """The trust rule, against :meth:`expected`. Statistics and sums are checked against those of what was
        stored."""
        expected = self.expected(self.case.primitive, self.args)
        results = self.fused()
        for i, (result, (p, o)) in enumerate(zip(results, expected, strict=True)):
            if result.dim() == 4:
                assert_trusted(result, p, o, f"{self.case.name}, output {i}")
        name = self.case.primitive
        if name == "channel_stats":
            _check_stats(results[0], self.args[0])
        elif name in ("preact_conv_forward", "residual_add"):
            _check_stats(results[1], results[0])
        elif name.endswith(("_dgrad", "_backward", "_backward_1x1")):
            x, bn = (self.args[i] for i in ((1, 2) if name.startswith("bn_act") else (2, 3)))
            _check_sums(results[1], results[0], x, bn)


def _tuple(result) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)


def _float(value):
    return value.float() if isinstance(value, Tensor) else value


def _check_stats(stats: Tensor, y: Tensor) -> None:
    y = y.double()
    mean = y.mean((0, 2, 3))
    m2 = (y - mean.view(1, -1, 1, 1)).square().sum((0, 2, 3))
    eps, spread = torch.finfo(torch.float32).eps, (m2 * y.shape[1] / y.numel()).sqrt() + mean.abs()
    assert ((stats[0] - mean).abs() <= STATS_EPS * eps * spread).all(), "mean"
    assert ((stats[1] - m2).abs() <= STATS_EPS * eps * (m2 + spread.square())).all(), "M2"


def _check_sums(sums: Tensor, dz: Tensor, x: Tensor, bn: Tensor) -> None:
    d = dz.double()
    terms = (d, d * (x.double() - bn[0].view(1, -1, 1, 1)) * bn[1].view(1, -1, 1, 1))
    for row, term in zip(sums, terms, strict=True):
        expected, size = term.sum((0, 2, 3)), term.abs().sum((0, 2, 3))
        # The rounding of a partial sum's terms, as in tolerances.SUM_EPS, and of x - mean.
        assert ((row - expected).abs() <= 4 * torch.finfo(torch.float32).eps * size).all(), "sums"
