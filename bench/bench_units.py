"""Residual units and the pre-activation convolution as modules, forward and backward apart.

A unit is called as inside a stage: it gets the statistics of its input and returns those of its output.
bf16 is autocast.
"""

import copy

import pytest
import torch
from harness import DTYPES, activation, nbytes
from shapes import CONVOLUTIONS, UNITS, Conv, Unit, shape_id
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import resnet_fused as rf
from resnet_fused.analysis.step_accuracy import compare
from resnet_fused.primitives import reference

BACKENDS = "unit"
SHAPES = [*(conv for conv in CONVOLUTIONS if conv.size == 32 and conv.stride == 1), *UNITS]

# Where the sign of a pre-activation is in doubt, ReLU's derivative is a matter of luck: one element of n
# moves a gradient by sqrt(2 / n) of its norm. As many as this may come out otherwise than in float64.
_SIGNS = 8


class UnitBench:
    """One unit: its plain twin, its inputs, and how it is called."""

    def __init__(self, shape: Conv | Unit, dtype: str, device: str) -> None:
        self.device, self.autocast = device, dtype == "bf16"
        if isinstance(shape, Conv):
            name = "PreActConv2d"
            arguments = (shape.channels, shape.out_channels, shape.kernel, shape.stride, shape.kernel // 2)
        else:
            name = {"basic": "PreActBasicBlock", "bottleneck": "PreActBottleneck"}[shape.block]
            arguments = (shape.channels, shape.width, shape.stride)
        self.plain, self.fused = (getattr(source, name)(*arguments) for source in (rf.reference, rf.nn))
        self.fused.load_state_dict(self.plain.state_dict())
        for unit in (self.plain, self.fused):
            unit.to(device, memory_format=torch.channels_last)
        self.dtype = DTYPES[dtype]
        self.x = activation(shape.input, self.dtype, device).requires_grad_()
        with torch.no_grad():
            self.stats = reference.channel_stats(self.x)
            self.dy = activation(copy.deepcopy(self.plain)(self.x.float()).shape, self.dtype, device)

    def call(self, unit: nn.Module, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast(self.device, torch.bfloat16, enabled=self.autocast and x.dtype != torch.float64):
            if isinstance(unit, type(self.fused)):
                return unit(x, self.stats, return_stats=True)[0]
            return unit(x)

    def quantities(self, unit: nn.Module, dtype: torch.dtype, gradients: bool) -> dict[str, torch.Tensor]:
        unit = copy.deepcopy(unit).to(dtype) if dtype == torch.float64 else copy.deepcopy(unit)
        x = self.x.detach().to(dtype).requires_grad_()
        y = self.call(unit, x)
        found = {"y": y.detach()}
        if gradients:
            y.backward(self.dy.to(y.dtype))
            found["gradient of x"] = x.grad
            found |= {f"gradient of {name}": parameter.grad for name, parameter in unit.named_parameters()}
        return {name: value.double() for name, value in found.items()}

    def verify(self, gradients: bool) -> None:
        exact = self.quantities(self.plain, torch.float64, gradients)
        slack = (2 * _SIGNS / self.x.numel()) ** 0.5
        doubt = {name: slack * float(value.norm()) for name, value in exact.items() if name != "y"}
        fused, plain = (self.quantities(unit, self.dtype, gradients) for unit in (self.fused, self.plain))
        result = compare(exact, fused, [plain], self.dtype, doubt)
        assert result.ok, str(result)

    def saved(self) -> int:
        """Bytes of the raw outputs of the convolutions inside, which a unit has to write and read again."""
        unit = copy.deepcopy(self.plain)
        convolutions = [module for module in unit.modules() if isinstance(module, nn.Conv2d)]
        sizes = []
        for conv in convolutions:
            conv.register_forward_hook(lambda module, args, y: sizes.append(nbytes(y)))
        with torch.no_grad():
            self.call(unit, self.x)
        return sum(sizes) - nbytes(self.dy)


def flops(plain: nn.Module, x: torch.Tensor) -> int:
    """Of the forward."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        copy.deepcopy(plain)(x.float())
    return counter.get_total_flops()


@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
def bench_forward(timer, shape, dtype, device, backend):
    bench = UnitBench(shape, dtype, device)
    unit, bytes_moved = bench.plain, nbytes(bench.x, bench.dy) + bench.saved()
    with rf.use_backend("auto" if backend == "eager" else backend):
        if backend != "eager":
            bench.verify(gradients=False)
            unit = bench.fused
        timer(lambda: bench.call(unit, bench.x), group=f"unit forward {shape} {dtype}", dtype=dtype,
              case=str(shape), bytes_moved=bytes_moved, flops=flops(bench.plain, bench.x))


@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
def bench_backward(timer, shape, dtype, device, backend):
    bench = UnitBench(shape, dtype, device)
    unit, bytes_moved = bench.plain, nbytes(bench.x, bench.x, bench.dy) + bench.saved()  # dx too
    with rf.use_backend("auto" if backend == "eager" else backend):
        if backend != "eager":
            bench.verify(gradients=True)
            unit = bench.fused

        def forward():
            bench.x.grad = None
            unit.zero_grad(set_to_none=True)
            return bench.call(unit, bench.x)

        timer(lambda y: y.backward(bench.dy), prepare=forward, group=f"unit backward {shape} {dtype}",
              dtype=dtype, case=str(shape), bytes_moved=bytes_moved, flops=2 * flops(bench.plain, bench.x))
