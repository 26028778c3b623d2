"""How one primitive or unit is verified and timed."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import pytest
import torch
from shapes import Conv
from tolerances import STATS_EPS, assert_trusted, library_has_kernels
from torch import Tensor

import resnet_fused as rf
from resnet_fused import primitives
from resnet_fused.analysis.measure import environment
from resnet_fused.primitives import reference

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

_SECONDS = 0.15    # of timing per benchmark
_ROUNDS = (5, 20)  # the least and the most
_FLUSH_BYTES = {"cpu": 64 << 20, "cuda": 256 << 20}  # more than the last level of the caches holds


def backends(device: str, convolution: bool) -> list[str]:
    """Those that can serve tensors of this device; "unfused" is about convolutions alone."""
    own = ["cpu"] if device == "cpu" else ["cuda", "triton"]
    return ["reference", *(["unfused"] if convolution else []), *own]


def activation(shape: Sequence[int], dtype: torch.dtype, device: str) -> Tensor:
    return torch.randn(shape, device=device).to(dtype).contiguous(memory_format=torch.channels_last)


def bn_rows(channels: int, device: str) -> Tensor:
    """Coefficients of a BatchNorm, [4, C]: about half of the pre-activations are positive."""
    mean, var = torch.randn(channels) * 0.3, torch.rand(channels) + 0.5
    weight, bias = torch.rand(channels) + 0.5, torch.randn(channels) * 0.3
    return reference.finalize_forward(None, 0, mean, var, weight, bias, 1e-5).to(device)


def nbytes(*tensors: Tensor | None) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def mean_abs(t: Tensor) -> float:
    return t.abs().mean(dtype=torch.float32).item()


class ConvInputs:
    """Tensors of one convolution and of the BatchNorm before it; the weight is a master weight, float32."""

    def __init__(self, conv: Conv, dtype: str, device: str) -> None:
        self.x = activation(conv.input, DTYPES[dtype], device)
        self.dy = activation(conv.output, DTYPES[dtype], device)
        self.bn = bn_rows(conv.channels, device)
        weight = torch.randn(conv.weight) / (conv.channels * conv.kernel**2) ** 0.5
        self.weight = weight.to(device, memory_format=torch.channels_last)


class Timer:
    """Times a call: the caches are flushed before every round, the device has finished at its end."""

    def __init__(self, benchmark, device: str, backend: str) -> None:
        self._benchmark = benchmark
        self._device = device
        self._scratch = torch.zeros(_FLUSH_BYTES[device], dtype=torch.int8, device=device)
        self._backend = backend

    def _synchronize(self) -> None:
        if self._device == "cuda":
            torch.cuda.synchronize()

    def _flush(self) -> None:
        self._scratch.add_(1)
        self._synchronize()

    def __call__(self, function: Callable[[], object], *, group: str, bytes_moved: int, flops: int,
                 prepare: Callable[[], object] | None = None, **extra) -> None:
        """Time ``function()``.

        Args:
            function: what to time.
            group: stands in one table with others of the same group.
            bytes_moved: what has to be read and written at least, each tensor once.
            flops: additions and multiplications of the convolutions.
            prepare: called before each round, not timed; its result is passed to ``function``.
            extra: more of ``extra_info``.
        """
        def setup():
            arguments = () if prepare is None else (prepare(),)
            self._flush()
            return arguments, {}

        def run(*arguments):
            function(*arguments)
            self._synchronize()

        run(*setup()[0])  # compiles, packs, allocates
        arguments = setup()[0]
        start = time.perf_counter()
        run(*arguments)
        rounds = min(max(int(_SECONDS / (time.perf_counter() - start)), _ROUNDS[0]), _ROUNDS[1])
        self._benchmark.group = group
        self._benchmark.extra_info.update(
            backend=self._backend, device=self._device, bytes=bytes_moved, flops=flops, **extra,
            **({"gpu": torch.cuda.get_device_name()} if self._device == "cuda" else {}), **environment_once())
        self._benchmark.pedantic(run, setup=setup, rounds=rounds, iterations=1)


_environment: dict = {}


def environment_once() -> dict:
    if not _environment:
        _environment.update(environment())
    return _environment


class PrimitiveBench:
    """Verifies a primitive against the float64 oracle by the trust rule, then times it."""

    def __init__(self, timer: Timer, backend: str, dtype: str) -> None:
        self._timer, self._backend, self._dtype = timer, backend, dtype

    def __call__(self, name: str, args: tuple, outputs: dict[str, float | None], *, case: str,
                 bytes_read: int, flops: int = 0) -> None:
        """
        Args:
            name: of the primitive.
            args: its arguments.
            outputs: name -> sum of the absolute terms of an element, for those outputs that are long sums,
                else 0 (see ``assert_trusted``); None for statistics, of the first output or, if they are the
                only one, of the first argument.
            bytes_read: of the arguments that have to be read; the outputs are added.
        """
        function, plain = getattr(primitives, name), getattr(reference, name)
        self._bench(name, function, plain, args, outputs, case, bytes_read, flops)

    def in_place(self, name: str, args: tuple, *, changed: int, case: str, bytes_read: int) -> None:
        """The same for a primitive that changes its first ``changed`` arguments and returns nothing."""
        def on_copies(function):
            def call(*args):
                copies = [a.clone() for a in args[:changed]]
                function(*copies, *args[changed:])
                return tuple(copies)
            return call

        function, plain = getattr(primitives, name), getattr(reference, name)
        outputs = {f"argument {i}": 0.0 for i in range(changed)}
        self._bench(name, on_copies(function), on_copies(plain), args, outputs, case, bytes_read, flops=0,
                    timed=function)

    def _bench(self, name, function, plain, args, outputs, case, bytes_read, flops, timed=None) -> None:
        with rf.use_backend(self._backend):
            with rf.record_dispatch() as log:
                results = _flat(function(*args))
            if log[0].backend != self._backend:
                pytest.skip(f"{self._backend} declines {name}: {log[0].reason}")
            if self._backend == "unfused" and not library_has_kernels(DTYPES[self._dtype], args[0].device):
                pytest.skip("the library has no bfloat16 kernels for this CPU: its substitute adds up in bfloat16")
            plains = _flat(plain(*args))
            oracles = _flat(plain(*map(_wide, args)))
            if self._backend == "unfused":
                # The library rounds its weight gradient to the activation dtype, as it does in plain PyTorch.
                plains = tuple(p.to(DTYPES[self._dtype]).to(p.dtype) if p.dim() == 4 else p for p in plains)
            for (output, terms), *values in zip(outputs.items(), results, plains, oracles, strict=True):
                if not values[0].is_floating_point():
                    assert torch.equal(*values[:2]), output
                elif terms is None:
                    _check_stats(values[0], results[0] if len(results) > 1 else args[0])
                else:  # the rows of a table are of different size
                    for row in zip(*values) if values[0].dim() == 2 else [values]:
                        assert_trusted(*row, output, terms)
            self._timer(lambda: (timed or function)(*args), group=f"{name} {case} {self._dtype}",
                        dtype=self._dtype, case=case, bytes_moved=bytes_read + nbytes(*results), flops=flops)


def _wide(argument: object) -> object:
    floating = isinstance(argument, Tensor) and argument.is_floating_point()
    return argument.double() if floating else argument


def _flat(results: Tensor | tuple) -> tuple[Tensor, ...]:
    return (results,) if isinstance(results, Tensor) else tuple(r for r in results if r.numel() > 0)


def _check_stats(stats: Tensor, y: Tensor) -> None:
    """Against those of y as rounded; the tolerance is the tests'."""
    oracle = reference.channel_stats(y.double())
    spread = (oracle[1] * y.shape[1] / y.numel()).sqrt() + oracle[0].abs()
    tolerance = STATS_EPS * torch.finfo(stats.dtype).eps
    assert ((stats[0] - oracle[0]).abs() <= tolerance * spread).all(), "mean"
    assert ((stats[1] - oracle[1]).abs() <= tolerance * (oracle[1] + spread**2)).all(), "M2"
