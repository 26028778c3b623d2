"""How a call is timed, and the two ceilings of the device."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from resnet_fused.analysis.measure import Timing
from resnet_fused.primitives import tuner

_WARMUP = 3
_FLUSH_BYTES = {"cuda": tuner.FLUSH_BYTES, "cpu": 1 << 20}


class Timer:
    """Times a call on a device: the caches are flushed before every round.

    On a GPU the time is the device's own, by events, and launching is not in it (``tuner.samples_on_gpu``);
    :meth:`host` tells what launching takes.
    """

    def __init__(self, device: str, seconds: float = 0.05, rounds: tuple[int, int] = (10, 50)) -> None:
        self.device, self._seconds, self._rounds = device, seconds, rounds
        self._scratch = torch.zeros(_FLUSH_BYTES[device], dtype=torch.int8, device=device)

    def __call__(self, call: Callable[[], object]) -> Timing:
        once = min(self._samples(call, _WARMUP))  # the first compiles
        least, most = self._rounds
        return Timing.of(self._samples(call, min(most, max(least, int(self._seconds / max(once, 1e-7))))))

    def quick(self, call: Callable[[], object]) -> float:
        """Median seconds of few rounds, to choose among candidates by."""
        return statistics.median(self._samples(call, _WARMUP + 4)[_WARMUP:])

    def _samples(self, call, rounds: int) -> list[float]:
        if self.device == "cpu":
            found = []
            for _ in range(rounds):
                self._scratch.zero_()
                start = time.perf_counter()
                call()
                found.append(time.perf_counter() - start)
            return found
        return tuner.samples_on_gpu(call, rounds, self._scratch)

    def host(self, call: Callable[[], object]) -> float:
        """Median seconds that the host is busy with a call, not waiting for the device."""
        found = []
        for _ in range(10):
            if self.device == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            call()
            found.append(time.perf_counter() - start)
        return statistics.median(found)


@dataclass(frozen=True)
class Ceilings:
    """What the device reaches in this run: bytes/s of a copy (read + written), FLOP/s of a bf16 product."""

    bandwidth: float
    flops: float

    @classmethod
    def measure(cls, timer: Timer, megabytes: int = 1024, side: int = 8192) -> Ceilings:
        source = torch.empty(megabytes << 20, dtype=torch.int8, device=timer.device)
        target = torch.empty_like(source)
        copy = timer(lambda: target.copy_(source))
        # Random numbers: zeros draw less power and run faster.
        a, b = (torch.randn(side, side, device=timer.device).bfloat16() for _ in range(2))
        product = timer(lambda: a @ b)
        return cls(2 * source.numel() / copy.p50, 2 * side**3 / product.p50)

    def floor(self, bytes_moved: int, flops: int) -> float:
        """Seconds that a kernel takes at least."""
        return max(bytes_moved / self.bandwidth, flops / self.flops)
