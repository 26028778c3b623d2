"""Runs test files under Triton's interpreter. It has to be chosen before Triton is imported, hence a process
of its own."""

import os
import subprocess
import sys
from pathlib import Path

import numpy
import pytest


def _skip_where_loops_fail() -> None:
    """Triton 3.6's interpreter takes a loop's bound out of an array of one element by int()."""
    import triton

    try:
        int(numpy.ones(1))
    except TypeError:
        if triton.__version__.startswith("3.6."):
            pytest.skip(f"Triton 3.6's interpreter does not run with NumPy {numpy.__version__}: 2.3 and older do")


def run_cases(*names: str) -> None:
    """Run files of this directory; the failures are in the message."""
    _skip_where_loops_fail()
    files = [str(Path(__file__).with_name(name)) for name in names]
    # The interpreter works in NumPy on small tiles: more threads only get in each other's way.
    env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", *files]
    run = subprocess.run(command, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert " passed" in run.stdout and " skipped" not in run.stdout
