"""Memory of a training step or of an inference, by three measures, each in a process of its own.

* saved: bytes of the tensors that autograd holds from forward to backward: the activations proper. None in
  inference.
* peak: the most bytes that tensors take at any moment of forward and backward, temporaries included.
* resident: by how much the process grows (resident set) while it trains: what the system really has to give.

None counts parameters, the optimizer's state or the batch, which are there before counting begins, nor the
parameters' gradients, which are as large for every contender.

The first two count tensors and come out the same on every machine. They are taken with
RESNET_FUSED_CPU_POOL_MB=0, which lets our kernels take every output from PyTorch's allocator, whose events
the profiler sees; the pool that they use otherwise does not pass there. The third is taken as the net runs
otherwise, pool included, and so also shows what allocators keep, what libraries hold for themselves, and the
code that they generate at the first call.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from ..training.memory import peak_activation_bytes, peak_allocated_bytes, saved_activation_bytes
from ..training.own_process import json_from_process
from .benchmark_net import BenchmarkNet
from .modes import MODES, Run, start
from .training_step import TrainingStep

__all__ = ["StepMemory", "measure_memory", "tensor_bytes"]

_STEPS = 3


@dataclass(frozen=True)
class StepMemory:
    """Bytes of one contender's step; ``resident`` is None where the system does not tell."""

    saved: int
    peak: int
    resident: int | None


def measure_memory(net: BenchmarkNet, mode: str, dtype: str, contenders: Iterable[str],
                   threads: int) -> dict[str, StepMemory]:
    """Memory of a step (``mode`` "train" or "inference") of each of ``contenders`` (keys).

    Raises:
        UserError: a process that measures did not come to its end, as when the machine has too little memory.
    """
    contenders = list(contenders)
    counted = _worker("tensors", net, mode, dtype, contenders, threads, RESNET_FUSED_CPU_POOL_MB="0")
    return {key: StepMemory(*counted[key], _worker("resident", net, mode, dtype, [key], threads)[key])
            for key in contenders}


def _worker(measure: str, net: BenchmarkNet, mode: str, dtype: str, contenders: list[str], threads: int,
            **environment: str) -> dict:
    arguments = [measure, "--net", str(net), "--mode", mode, "--dtype", dtype, "--threads", str(threads),
                 "--contenders", *contenders]
    failure = f"the memory of {net} ({', '.join(contenders)}, {dtype}) could not be measured"
    return json_from_process(__name__, arguments, failure=failure, advice="--no-memory leaves this out",
                             **environment)


def tensor_bytes(step: Run) -> tuple[int, int]:
    """saved, peak."""
    if not isinstance(step, TrainingStep):
        step()
        return 0, peak_allocated_bytes(step)
    step.forward_backward()  # what a first call makes is there from now on
    saved = saved_activation_bytes(step.forward, step.model, (step.images, step.labels))
    return saved, peak_activation_bytes(step.forward_backward, step.model.parameters())


def _proc_status(field: str) -> int | None:
    """A size in /proc/self/status, in bytes; None where there is no such thing."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":")), None)


def _resident_growth(step: Run, small: Run) -> int | None:
    """Growth of the peak resident set over some steps, after steps with two images that load code and make
    the state of the optimizer. The two share a model."""
    for _ in range(2):
        small()
    if isinstance(small, TrainingStep):
        small.forward_backward()  # leaves gradients behind, so that they are in the baseline
    if hasattr(torch.ops.resnet_fused_cpu, "pool_clear"):
        torch.ops.resnet_fused_cpu.pool_clear()
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)  # free memory in the baseline would hide as much of the growth
    except (OSError, AttributeError):
        pass
    try:
        Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM to VmRSS; Linux >= 4.0
    except OSError:
        pass
    before = _proc_status("VmRSS")
    for _ in range(_STEPS):
        step()
    peak = _proc_status("VmHWM")
    return None if before is None or peak is None else max(0, peak - before)


def _main() -> None:
    parser = argparse.ArgumentParser(prog="step_memory", description=__doc__)
    parser.add_argument("measure", choices=["tensors", "resident"])
    parser.add_argument("--net", type=BenchmarkNet.parse, required=True)
    parser.add_argument("--mode", choices=MODES, required=True)
    parser.add_argument("--dtype", required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--contenders", nargs="+", required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    results = {}
    for key in arguments.contenders:
        step = start(arguments.mode, key, arguments.net, arguments.dtype)
        if arguments.measure == "tensors":
            results[key] = tensor_bytes(step)
        else:
            results[key] = _resident_growth(step, step.with_batch(step.images[:2], step.labels[:2]))
    print(json.dumps(results))


if __name__ == "__main__":
    _main()
