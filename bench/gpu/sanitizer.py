"""Part "sanitizer": compute-sanitizer's tools over a small sweep of the CUDA C++ kernels' tests."""

from __future__ import annotations

import os
import re
import shutil
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
#: Which tests: the convolutions and passes against the oracle, in one dtype.
SWEEP = "(TestConvolutions or TestElementwise) and bfloat16"


def find() -> str | None:
    """The program, from PATH or beside nvcc."""
    beside = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin" / "compute-sanitizer"
    return shutil.which("compute-sanitizer") or (str(beside) if beside.exists() else None)


def errors_in(log: str) -> int | None:
    """The number of errors (of hazards, for racecheck) in a summary line, None if the tool did not get that far."""
    found = re.findall(r"(?:ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard)", log)
    return None if not found else sum(int(errors or hazards) for errors, hazards in found)


def run(
    part: Part, deadline: float, say: Callable[[str], None] = print, tests=CUDA_TESTS, sweep: str = SWEEP
) -> int:
    """Run every tool; returns how many found something. What a deadline cut off is run again next time."""
    program, why = find(), dispatch.unavailable("cuda")
    if program is None or why is not None:
        part.add({"name": "all", "skipped": why or "compute-sanitizer was not found"})
        part.finish()
        say(f"sanitizer: skipped: {part.rows[-1]['skipped']}")
        return 0
    for tool in TOOLS:
        if part.has(tool):
            continue
        command = [
            program, "--tool", tool, "--target-processes", "all", sys.executable, "-m", "pytest", "-q", "-x",
            "-p", "no:cacheprovider", "-k", sweep, *tests,
        ]  # fmt: skip
        start = time.monotonic()
        try:
            result = subprocess.run(
                command, cwd=ROOT, env={**os.environ, **ON_DEVICE}, capture_output=True, text=True,
                timeout=max(1.0, deadline - start),
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            say(f"sanitizer: out of time for {tool}; run it again to go on")
            break
        errors = errors_in(result.stdout + result.stderr)
        part.add({"name": tool, "errors": errors, "tests_status": result.returncode,
                  "seconds": round(time.monotonic() - start, 1)})  # fmt: skip
        say(f"sanitizer: {tool}: {'no summary' if errors is None else f'{errors} errors'}")
    else:
        part.finish()
    return sum(row["errors"] != 0 or row["tests_status"] != 0 for row in part.rows)
