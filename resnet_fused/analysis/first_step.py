"""The first step of a contender, in a fresh process: what it takes until a training begins to go on.

In it are what libraries do at their first call, threads that are started, memory that is mapped for the
first time, and, for a compiled net, the compilation, with empty caches. Importing, building the net, its
batch and its optimizer are not.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass

import torch

from ..training.errors import UserError
from ..training.own_process import json_from_process
from .benchmark_net import BenchmarkNet
from .contenders import Contender, contender_by_key
from .modes import MODES, start
from .step_memory import StepMemory, tensor_bytes

__all__ = ["FirstStep", "measure_first_step", "told_error"]

_LONGEST = 120  # characters of a reason


@dataclass(frozen=True)
class FirstStep:
    """Attributes:
        seconds: of the first step; None if it failed.
        memory: of a later step, for compiled nets, whose tensors are counted here to compile only once.
        failure: why it failed, in one line.
    """

    seconds: float | None = None
    memory: StepMemory | None = None
    failure: str | None = None


def measure_first_step(net: BenchmarkNet, mode: str, dtype: str, contender: Contender, threads: int,
                       cache: str, memory: bool, timeout: float | None) -> FirstStep:
    """Run the first step of a contender in a process of its own.

    Args: cache: an empty directory for what torch.compile makes. memory: count a compiled net's tensors too.
        timeout: seconds after which the process is stopped, which is a failure.

    Raises:
        UserError: a contender that is not compiled failed. That a compiled one did is told in the result.
    """
    arguments = ["--net", str(net), "--mode", mode, "--dtype", dtype, "--threads", str(threads),
                 "--contender", contender.key, *(["--memory"] if memory and contender.compiled else [])]
    failure = f"the first step of {net} ({contender.key}, {dtype}) could not be measured"
    try:
        found = json_from_process(__name__, arguments, failure=failure, timeout=timeout,
                                  TORCHINDUCTOR_CACHE_DIR=cache)
    except UserError as error:
        if not contender.compiled:
            raise
        return FirstStep(failure=str(error).removeprefix(f"{failure}: ")[:_LONGEST])
    tensors = found["memory"]
    return FirstStep(found["seconds"], tensors and StepMemory(*tensors, resident=None), found["failure"])


def told_error(error: Exception) -> str:
    """An exception in one line."""
    lines = [line for line in str(error).splitlines() if line.strip()] or [""]
    return f"{type(error).__name__}: {lines[0].strip()}".removesuffix(": ")[:_LONGEST]


def _main() -> None:
    parser = argparse.ArgumentParser(prog="first_step", description=__doc__)
    parser.add_argument("--net", type=BenchmarkNet.parse, required=True)
    parser.add_argument("--mode", choices=MODES, required=True)
    parser.add_argument("--dtype", required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--contender", required=True)
    parser.add_argument("--memory", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    step = start(arguments.mode, arguments.contender, arguments.net, arguments.dtype)
    found = {"seconds": None, "memory": None, "failure": None}
    try:
        begin = time.perf_counter()
        step()
        found["seconds"] = time.perf_counter() - begin
        if arguments.memory:
            found["memory"] = tensor_bytes(step)
    except Exception as error:
        if not contender_by_key(arguments.contender).compiled:
            raise
        found["failure"] = told_error(error)
    print(json.dumps(found))


if __name__ == "__main__":
    _main()
