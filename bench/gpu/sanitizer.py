"""Part "sanitizer": compute-sanitizer's tools over a small sweep of the CUDA C++ kernels' tests."""

from __future__ import annotations

import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from resnet_fused.primitives import dispatch

from .correctness import CUDA_TESTS, ON_DEVICE
from .results import Part

ROOT = Path(__file__).resolve().parents[2]
#: memcheck: accesses out of bounds; racecheck: hazards in shared memory; initcheck: reads of what nobody wrote.
TOOLS = ("memcheck", "racecheck", "initcheck")
#: Which tests: the convolutions and passes against the oracle, in one dtype, in pieces that a tool runs one by one:
#: what a deadline cuts off is one piece. Repeated runs would show the tools nothing new.
SWEEPS = {
    "convolutions": "TestConvolutions and bfloat16 and not every_order",
    "1x1": "TestBothGradientsOf1x1 and bfloat16 and not every_order and not integers",
    "elementwise": "TestElementwise and bfloat16 and not every_order",
}
#: PyTorch's allocator cuts tensors out of blocks of megabytes: memcheck would see an access outside of these only.
ENVIRONMENT = {**ON_DEVICE, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}


def find() -> str | None:
    """The program, from PATH or beside nvcc."""
    beside = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin" / "compute-sanitizer"
    return shutil.which("compute-sanitizer") or (str(beside) if beside.exists() else None)


def errors_in(log: str) -> int | None:
    """The number of errors (of hazards, for racecheck) in a summary line, None if the tool did not get that far."""
    found = re.findall(r"(?:ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard)", log)
    return None if not found else sum(int(errors or hazards) for errors, hazards in found)


def run_command(command: list[str], seconds: float) -> tuple[str, int] | None:
    """Output and status; None if it took longer: it and all that it started are gone then."""
    process = subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, **ENVIRONMENT}, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        return process.communicate(timeout=seconds)[0], process.returncode
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return None


def run(
    part: Part, deadline: float, say: Callable[[str], None] = print, tests=CUDA_TESTS, sweeps=SWEEPS
) -> int:
    """Run every tool; returns how many runs found something. What a deadline cut off is run again next time."""
    program, why = find(), dispatch.unavailable("cuda")
    if program is None or why is not None:
        part.add({"name": "all", "skipped": why or "compute-sanitizer was not found"})
        part.finish()
        say(f"sanitizer: skipped: {part.rows[-1]['skipped']}")
        return 0
    for tool, sweep in itertools.product(TOOLS, sweeps):
        name = f"{tool} {sweep}"
        if part.has(name):
            continue
        command = [
            program, "--tool", tool, "--target-processes", "all", sys.executable, "-m", "pytest", "-q", "-x",
            "-p", "no:cacheprovider", "-k", sweeps[sweep], *tests,
        ]  # fmt: skip
        start = time.monotonic()
        result = run_command(command, max(1.0, deadline - start))
        if result is None:
            say(f"sanitizer: out of time for {name}; run it again to go on")
            break
        errors = errors_in(result[0])
        part.add({"name": name, "errors": errors, "tests_status": result[1],
                  "seconds": round(time.monotonic() - start, 1)})  # fmt: skip
        say(f"sanitizer: {name}: {'no summary' if errors is None else f'{errors} errors'}")
    else:
        part.finish()
    return sum(row["errors"] != 0 or row["tests_status"] != 0 for row in part.rows)
