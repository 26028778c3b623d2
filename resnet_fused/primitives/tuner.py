"""Times the candidates of a Triton primitive at one shape and keeps the winner: on request only, never inside
a step."""

import contextlib
import importlib
import inspect
import statistics
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from resnet_fused import triton_kernels

from . import dispatch, tuning

_WARMUP, _ROUNDS = 3, 15
#: More than any chip's L2 holds.
FLUSH_BYTES = 256 << 20
#: 300 us at 2 GHz. The flush alone takes about 70 on an H200, less than launching an unfused path can.
_WAIT_CYCLES = 600_000


class Tuned(NamedTuple):
    """What was measured, in seconds.

    candidates: (problem, configuration, median), in the order they were tried; infinite where it did not run.
    fused: with the winners. unfused: of the unfused path, None where there is none.
    """

    candidates: list[tuple]
    fused: float
    unfused: float | None


def samples_on_gpu(call: Callable[[], object], rounds: int, scratch: Tensor) -> list[float]:
    """Seconds of each of several calls on the current CUDA device, by events. Writing scratch, more than L2
    holds, flushes it before each; then the device waits until the host has queued the call, so that launching
    is not in the time."""
    events = []
    for _ in range(rounds):
        scratch.zero_()
        torch.cuda._sleep(_WAIT_CYCLES)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        events.append((start, end))
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1e3 for start, end in events]


def median_on_gpu(call: Callable[[], object]) -> float:
    """Median seconds of a call on the current CUDA device, with L2 flushed before each."""
    scratch = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")
    return statistics.median(samples_on_gpu(call, _WARMUP + _ROUNDS, scratch)[_WARMUP:])


@contextlib.contextmanager
def _configured(module, look_up: Callable) -> Iterator[None]:
    """Plans made inside take their configuration from look_up."""
    configs = importlib.import_module("resnet_fused.triton_kernels.configs")
    module._plan.cache_clear()
    configs.use_measured(look_up)
    try:
        yield
    finally:
        module._plan.cache_clear()
        configs.use_measured(tuning.look_up)


def _geometry(launcher: Callable, args: tuple) -> tuple[Tensor, dispatch.ConvGeometry | None]:
    """x, and the geometry if the primitive is a convolution."""
    given = inspect.signature(launcher).bind(*args).arguments
    x = given["x"]
    if "weight" not in given:
        return x, None
    own = ((1, 1), (0, 0), (1, 1), 1)  # of a primitive that takes none
    names = ("stride", "padding", "dilation", "groups")
    options = (given.get(name, default) for name, default in zip(names, own, strict=True))
    options = (tuple(o) if isinstance(o, (list, tuple)) else o for o in options)
    return x, dispatch.ConvGeometry(tuple(x.shape), tuple(given["weight"].shape), *options)


def tune(primitive: str, *args, timer: Callable[[Callable[[], object]], float] = median_on_gpu) -> Tuned:
    """Time every candidate configuration of a primitive on these arguments, and the unfused path, and store
    the faster ones (``tuning.store``): later calls of this shape use them, in this process and others.

    Args:
        primitive: with tile configurations: a convolution primitive or a pass over memory.
        args: of the primitive, on the device, dense channels_last.
        timer: seconds that a call takes.

    Raises:
        ValueError: a primitive without configurations, or a case that the Triton kernels decline.
    """
    launcher = triton_kernels.load(primitive)
    module = importlib.import_module(launcher.__module__)
    if not hasattr(module, "_plan"):
        raise ValueError(f"{primitive} has no configurations to choose from")
    configs = importlib.import_module("resnet_fused.triton_kernels.configs")
    launch = importlib.import_module("resnet_fused.triton_kernels.launch")
    x, geometry = _geometry(launcher, args)
    support = importlib.import_module("resnet_fused.triton_kernels.support")
    why = triton_kernels.declines_device(x.device.type) or support.declines(primitive, x.dtype, geometry)
    if why is not None:
        raise ValueError(f"{primitive} cannot be tuned: {why}")

    def timed(look_up: Callable) -> float:
        with _configured(module, look_up):
            return timer(lambda: launcher(*args))

    problems = []
    with _configured(module, problems.append):
        launcher(*args)
    tried, best = [], {}
    for problem in problems:
        times = {}
        for config in configs.candidates(
            launch.target(x.device), *problem[1:4], columns=problem.columns, depth=problem.depth,
            aligned=problem.aligned,
        ):  # fmt: skip
            try:
                times[config] = timed({**best, problem: config}.get)
            except Exception:  # out of shared memory or registers: not a candidate on this chip
                times[config] = float("inf")
            tried.append((problem, config, times[config]))
        if times and min(times.values()) < float("inf"):
            best[problem] = min(times, key=times.get)
    fused = timed(best.get)
    unfused, faster = None, {}
    other = dispatch.implementation(primitive, "unfused")
    if other is not None:
        unfused = timer(lambda: other(*args))
        faster[tuning.convolution_name(primitive, x.dtype, geometry)] = unfused < fused
    tuning.store(best, faster)
    dispatch.forget()
    return Tuned(tried, fused, unfused)
