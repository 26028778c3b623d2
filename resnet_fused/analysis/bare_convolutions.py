"""The convolutions of a net alone: what a step would cost if BatchNorm, ReLU and addition cost nothing."""

from __future__ import annotations

import copy
import time
from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .measure import Timing

__all__ = ["BareConvolutions", "Convolution", "collect_convolutions"]

_FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


@dataclass(frozen=True)
class Convolution:
    """One convolution of a net: x [N, C, H, W], weight [K, C/groups, R, S], as :class:`torch.nn.Conv2d` takes
    them.

    ``input_gradient`` is False for the first of a net: nobody asks for the gradient of the images.
    """

    input: tuple[int, ...]
    weight: tuple[int, ...]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    bias: bool
    input_gradient: bool

    @property
    def output(self) -> tuple[int, ...]:
        dimensions = zip(self.input[2:], self.weight[2:], self.stride, self.padding, self.dilation)
        size = [(extent + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
                for extent, kernel, stride, padding, dilation in dimensions]
        return (self.input[0], self.weight[0], *size)

    @property
    def flops(self) -> int:
        """Of the forward (a multiplication and an addition are two); each of the gradients takes as many."""
        n, k, p, q = self.output
        return 2 * n * k * p * q * self.weight[1] * self.weight[2] * self.weight[3]

    def __str__(self) -> str:
        n, c, h, w = self.input
        k, _, r, s = self.weight
        return (f"{c}->{k} {r}x{s}" + (f" stride {self.stride[0]}" if self.stride != (1, 1) else "")
                + (f" groups {self.groups}" if self.groups != 1 else "") + f" on {n}x{h}x{w}")


def collect_convolutions(model: nn.Module, images: Tensor) -> Counter[Convolution]:
    """The convolutions that ``model(images)`` runs, and how often each occurs. Nothing is computed: it runs
    on "meta".

    Args:
        model: its convolutions must be :class:`torch.nn.Conv2d` modules that are called, as in a plain net.
        images: [N, C, H, W].
    """
    found: Counter[Convolution] = Counter()

    def record(conv: nn.Conv2d, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if isinstance(conv.padding, str) or conv.padding_mode != "zeros":
            raise ValueError(f"a convolution with padding={conv.padding!r} and padding_mode="
                             f"{conv.padding_mode!r} cannot be timed alone")
        found[Convolution(tuple(inputs[0].shape), tuple(conv.weight.shape), conv.stride, conv.padding,
                          conv.dilation, conv.groups, conv.bias is not None, inputs[0].requires_grad)] += 1

    skeleton = copy.deepcopy(model).to("meta").train()
    for module in skeleton.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(record)
    with torch.enable_grad():
        skeleton(images.to("meta"))
    return found


class _Candidate:
    """One convolution in one memory format: its operations, and the times of each."""

    def __init__(self, conv: Convolution, memory_format: torch.memory_format, dtype: torch.dtype,
                 generator: torch.Generator, training: bool = True) -> None:
        def tensor(shape: tuple[int, ...], scale: float = 1.0) -> Tensor:
            values = torch.randn(shape, generator=generator) * scale
            return values.to(dtype).contiguous(memory_format=memory_format)

        x, dy = tensor(conv.input), tensor(conv.output)
        weight = tensor(conv.weight, (2.0 / (conv.weight[0] * conv.weight[2] * conv.weight[3])) ** 0.5)
        bias = torch.zeros(conv.weight[0], dtype=dtype) if conv.bias else None
        bias_sizes = [conv.weight[0]] if conv.bias else None
        geometry = (conv.stride, conv.padding, conv.dilation, False, (0, 0), conv.groups)

        def backward(*mask: bool):
            return lambda: torch.ops.aten.convolution_backward(dy, x, weight, bias_sizes, *geometry, mask)

        self.operations = {"forward": lambda: torch.ops.aten.convolution(x, weight, bias, *geometry)}
        if training:
            self.operations["wgrad"] = backward(False, True, conv.bias)
        if training and conv.input_gradient:
            self.operations["dgrad"] = backward(True, False, False)
            self.operations["dgrad+wgrad"] = backward(True, True, conv.bias)
        self.samples: dict[str, list[float]] = {name: [] for name in self.operations}

    def fastest(self) -> tuple[str, ...]:
        """The operations of a step: both gradients in one call where that is faster."""
        apart = tuple(name for name in ("forward", "dgrad", "wgrad") if name in self.operations)
        together = ("forward", "dgrad+wgrad")
        return min((way for way in (apart, together) if set(way) <= set(self.operations)), key=self.seconds)

    def seconds(self, operations: tuple[str, ...]) -> float:
        return sum(Timing.of(self.samples[name]).p50 for name in operations)


class BareConvolutions:
    """Times the convolutions of a net, one by one, by the framework's own library.

    Timed are the forward and, for training, the input gradient and the weight gradient (``aten::convolution``
    and ``aten::convolution_backward``). Each distinct convolution is timed once per round and counts as often
    as the net has it. For each, the faster memory format is taken, and both gradients in one call where that
    is faster than two.

    What favours them, on purpose, so that the overhead of a step is not flattered: inputs, weights and
    gradients are there beforehand in the right dtype and format (under autocast a step has to convert its
    weights), and each operation is called twice in a row and the second call timed, with its operands in the
    caches as far as they fit and with memory for its output that the allocator had in hand a moment ago. In a
    net, the caches also hold what lies between the convolutions.

    Args:
        convolutions: as :func:`collect_convolutions` returns them.
        dtype: of x, weight and gradients.
        training: the gradients too.
    """

    def __init__(self, convolutions: Counter[Convolution], dtype: torch.dtype,
                 training: bool = True) -> None:
        generator = torch.Generator().manual_seed(0)
        self.counts = convolutions
        self._candidates = {conv: {name: _Candidate(conv, memory_format, dtype, generator, training)
                                   for name, memory_format in _FORMATS.items()} for conv in convolutions}

    @torch.no_grad()
    def run_round(self) -> None:
        """Time every operation of every candidate once."""
        for candidates in self._candidates.values():
            for candidate in candidates.values():
                for name, operation in candidate.operations.items():
                    operation()
                    start = time.perf_counter()
                    operation()
                    candidate.samples[name].append(time.perf_counter() - start)

    def reset(self) -> None:
        """Forget the rounds so far, as after the warm-up."""
        for candidates in self._candidates.values():
            for candidate in candidates.values():
                for samples in candidate.samples.values():
                    samples.clear()

    def _choices(self) -> dict[Convolution, tuple[str, tuple[str, ...]]]:
        choices = {}
        for conv, candidates in self._candidates.items():
            ways = {name: candidate.fastest() for name, candidate in candidates.items()}
            best = min(ways, key=lambda name: candidates[name].seconds(ways[name]))
            choices[conv] = best, ways[best]
        return choices

    def timing(self) -> Timing:
        """Seconds of all convolutions of one step, over the rounds."""
        sums: list[float] = []
        for conv, (memory_format, operations) in self._choices().items():
            samples = self._candidates[conv][memory_format].samples
            rounds = zip(*(samples[name] for name in operations))
            seconds = [self.counts[conv] * sum(times) for times in rounds]
            sums = [a + b for a, b in zip(sums, seconds)] if sums else seconds
        return Timing.of(sums)

    def details(self) -> list[dict]:
        """Of each distinct convolution: count, memory format, and the median ms of its operations."""
        found = []
        for conv, (memory_format, operations) in self._choices().items():
            samples = self._candidates[conv][memory_format].samples
            found.append({"convolution": str(conv), "count": self.counts[conv], "gflop": conv.flops / 1e9,
                          "memory_format": memory_format,
                          "ms": {name: 1e3 * Timing.of(samples[name]).p50 for name in operations}})
        return found
