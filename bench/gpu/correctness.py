"""Part "correctness": the tests of the GPU kernels for real, in several processes, since most of it is
compilation."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path

from .results import Part

ROOT = Path(__file__).resolve().parents[2]
TESTS = ("tests/test_triton_kernels.py", "tests/test_triton_operators.py")
#: On the device by ON_DEVICE, instead of on the emulator, where the CUDA library is loaded.
CUDA_TESTS = ("tests/test_cuda_kernels.py", "tests/test_cuda_unit_on_gpu.py")
ON_DEVICE = {"RESNET_FUSED_TEST_DEVICE": "cuda"}
#: Processes at most: each has a CUDA context of its own.
_PROCESSES = 12


def shards() -> int:
    return max(1, min(_PROCESSES, len(os.sched_getaffinity(0))))


def read_report(path: Path) -> tuple[int, int, list[dict]]:
    """(passed, skipped, failures) of a JUnit file of pytest's."""
    passed = skipped = 0
    failures = []
    for case in ElementTree.parse(path).iter("testcase"):
        wrong = [node for node in case if node.tag in ("failure", "error")]
        if wrong:
            name = f"{case.get('classname')}::{case.get('name')}"
            failures.append({"name": name, "error": (wrong[0].get("message") or "").splitlines()[:1]})
        elif any(node.tag == "skipped" for node in case):
            skipped += 1
        else:
            passed += 1
    return passed, skipped, failures


def all_tests() -> tuple[str, ...]:
    from resnet_fused.primitives import dispatch

    return TESTS if dispatch.unavailable("cuda") is not None else (*TESTS, *CUDA_TESTS)


def run(part: Part, deadline: float, say: Callable[[str], None] = print, tests=None) -> int:
    """Run the tests; returns the number of failures. What a deadline cut off is run again next time."""
    count = shards()
    tests = all_tests() if tests is None else tests
    with tempfile.TemporaryDirectory() as directory:
        reports = [Path(directory) / f"{i}.xml" for i in range(count)]
        processes = [
            subprocess.Popen(
                [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", *tests,
                 f"--shard={i}/{count}", f"--junitxml={report}"],
                cwd=ROOT, env={**os.environ, **ON_DEVICE}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            )
            for i, report in enumerate(reports)
        ]  # fmt: skip
        start, late = time.monotonic(), False
        for process in processes:
            try:
                process.wait(max(1.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                late = True
        passed, skipped, failures, lost = 0, 0, [], 0
        for report in reports:
            if not report.exists():
                lost += 1
                continue
            some = read_report(report)
            passed, skipped, failures = passed + some[0], skipped + some[1], failures + some[2]
    part.rows.clear()
    part.add({
        "name": "all", "passed": passed, "skipped": skipped, "failed": len(failures), "failures": failures,
        "processes": count, "processes_without_a_report": lost, "seconds": round(time.monotonic() - start, 1),
    })  # fmt: skip
    if not lost:
        part.finish()
    say(f"correctness: {passed} passed, {skipped} skipped, {len(failures)} failed"
        + (f"; {lost} of {count} processes {'ran out of time' if late else 'died'}" if lost else ""))
    for failure in failures:
        say(f"correctness: {failure['name']}: {' '.join(failure['error'])}")
    return len(failures) + (lost if not late else 0)
