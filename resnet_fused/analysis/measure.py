"""Timing of contenders side by side, and the description of the machine that belongs to every number."""

from __future__ import annotations

import datetime
import gc
import os
import random
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from .. import extension
from ..training.machine import cpu_model
from ..version import __version__

__all__ = ["Timing", "environment", "interleave"]

_PACKAGE = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Timing:
    """Quantiles of one contender's times, in seconds."""

    p20: float
    p50: float
    p80: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> Timing:
        """Quantiles with linear interpolation between the samples, at least one."""
        if len(samples) == 1:
            return cls(samples[0], samples[0], samples[0])
        cuts = statistics.quantiles(samples, n=10, method="inclusive")
        return cls(cuts[1], statistics.median(samples), cuts[7])


def interleave(contenders: Mapping[str, Callable[[], object]], rounds: int,
               after_round: Callable[[int], object] = lambda done: None,
               lead_in: Mapping[str, Callable[[], object]] = {}) -> dict[str, list[float]]:
    """Time ``contenders`` one call each per round, so that whatever else the machine does meets all of them.

    The order is drawn anew for every round (from a fixed seed): what a contender leaves behind in the caches
    and in the allocator, which they share as they share the process, is then nobody's lasting advantage.
    Python's garbage collector runs between the rounds, not during them.

    Args:
        contenders: name -> a call to time. It must return only when its work is done.
        rounds: number of samples of each.
        after_round: called with the number of finished rounds.
        lead_in: name -> a call that is made, untimed, right before each sample. Where the contender's own, the
            sample is of a call behind another of the same kind, as in a loop, not of one behind another
            contender, which has filled caches and allocators with what is its own.

    Returns:
        name -> seconds of each round.
    """
    order, generator = list(contenders), random.Random(0)
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    collecting = gc.isenabled()
    try:
        for done in range(1, rounds + 1):
            generator.shuffle(order)
            gc.collect()
            gc.disable()
            for name in order:
                run = contenders[name]
                if name in lead_in:
                    lead_in[name]()
                start = time.perf_counter()
                run()
                samples[name].append(time.perf_counter() - start)
            after_round(done)
    finally:
        if collecting:
            gc.enable()
    return samples


def _simd_level() -> str:
    """The level that our kernels run at, and PyTorch's own."""
    ours = "none"
    if extension.cpu_available():
        ours = extension.build_info().get("cpu_variants", {})[torch.ops.resnet_fused_cpu.simd_level()]
    return f"{ours} (torch: {torch.backends.cpu.get_cpu_capability()})"


def _commit() -> str:
    """The commit of the checkout that this package is imported from, if it is one; "+" if files have changed
    since."""
    def git(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", str(_PACKAGE), *arguments], capture_output=True, text=True,
                              check=True, timeout=20)
        return done.stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != _PACKAGE.parent:
            return ""
        commit = git("rev-parse", "--short=12", "HEAD")
        return commit + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return ""


def environment() -> dict[str, str | int]:
    """What a number means nothing without: ``date`` (UTC), ``cpu``, ``cores`` (those this process may use),
    ``threads``, ``simd``, ``torch``, ``version`` (of resnet_fused) and ``commit`` ("" outside a checkout)."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "cpu": cpu_model(),
        "cores": cores,
        "threads": torch.get_num_threads(),
        "simd": _simd_level(),
        "torch": torch.__version__,
        "version": __version__,
        "commit": _commit(),
    }
