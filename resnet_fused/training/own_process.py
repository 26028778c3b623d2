"""A module of this package, run as a process of its own: for what has to be measured without company."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .errors import UserError

__all__ = ["json_from_process"]

_PACKAGE_PARENT = str(Path(__file__).resolve().parents[2])


def json_from_process(
    module: str, arguments: Sequence[str], *, failure: str, advice: str = "", timeout: float | None = None,
    **environment: str,
) -> Any:
    """Run ``python -m module arguments``; what the last line that it prints says, as JSON.

    The process imports the package that runs here, whatever else is installed.

    Args:
        failure, advice: of the error: "<failure>: <reason>[; <advice>]".
        timeout: seconds after which it is stopped.
        environment: variables to set.

    Raises:
        UserError: the process came to no good end, as when the machine has too little memory, or was stopped.
    """
    paths = [_PACKAGE_PARENT, *filter(None, [os.environ.get("PYTHONPATH")])]
    try:
        done = subprocess.run(
            [sys.executable, "-m", module, *arguments],
            capture_output=True,
            text=True,
            check=False,
            timeout=timeout,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), **environment},
        )
    except subprocess.TimeoutExpired:
        failure = f"{failure}: stopped after {timeout:.0f} s"
        raise UserError("; ".join(filter(None, [failure, advice]))) from None
    if done.returncode != 0:
        reason = (done.stderr.strip() or f"exit status {done.returncode}").splitlines()[-1]
        raise UserError("; ".join(filter(None, [f"{failure}: {reason}", advice])))
    return json.loads(done.stdout.splitlines()[-1])
