"""What ReLU's derivative may do where the sign of a pre-activation is not certain.

The derivative of ReLU jumps at 0. Where a pre-activation is nearer to 0 than it is exact, its sign differs
between equally good computations, in a handful of the millions of a step. One such sign can move a gradient
by 1e-2 in a net with small feature maps, while all else agrees to 1e-6.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

__all__ = ["UncertainSigns", "every_relu"]

#: A sign is uncertain within this many root mean square errors of the layer from 0.
_DOUBT = 4.0
_RELU = {F.relu, F.relu_, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_}
_LEAKY = {F.leaky_relu, F.leaky_relu_}


class every_relu(TorchFunctionMode):
    """Inside, ``replacement(index, z, slope)`` computes every (Leaky)ReLU; where it returns None, PyTorch."""

    def __init__(self, replacement: Callable[[int, Tensor, float], Tensor | None]) -> None:
        super().__init__()
        self._replacement, self._calls = replacement, 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function not in _RELU and function not in _LEAKY:
            return function(*args, **kwargs)
        slope = 0.0
        if function in _LEAKY:
            slope = kwargs.get("negative_slope", args[1] if len(args) > 1 else 0.01)
        z = args[0] if args else kwargs["input"]
        self._calls += 1
        result = self._replacement(self._calls - 1, z, slope)
        return function(*args, **kwargs) if result is None else result


class _Relu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z: Tensor, slope: float, certain: float, reverse: bool) -> Tensor:
        positive = z > 0
        if reverse:
            positive = positive ^ (z.abs() < certain)
        ctx.save_for_backward(positive)
        ctx.slope = slope
        return F.leaky_relu(z, slope) if slope else torch.relu(z)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        (positive,) = ctx.saved_tensors
        return torch.where(positive, gradient, gradient * ctx.slope), None, None, None


class UncertainSigns:
    """For :class:`every_relu`: ReLUs whose derivative can be reversed where it is uncertain.

    Args:
        exact: the pre-activations that a float64 run has computed, in order.
    """

    def __init__(self, exact: list[Tensor]) -> None:
        self._exact, self.reverse = exact, False

    def relu(self, index: int, z: Tensor, slope: float) -> Tensor:
        error = (z.detach() - self._exact[index]).square().mean().sqrt()
        return _Relu.apply(z, slope, _DOUBT * float(error), self.reverse)
