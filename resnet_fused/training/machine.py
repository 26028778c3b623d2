"""What machine a result is from, in words."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch

from ..version import __version__

__all__ = ["cpu_model", "describe_machine"]


def cpu_model() -> str:
    """The processor's own name for itself."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def describe_machine(device: torch.device) -> str:
    """The device that trains, PyTorch's version and this package's: for a report, without names of hosts."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        threads = torch.get_num_threads()
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        name = f"{cpu_model()}, {threads} thread{'s' * (threads != 1)} on {cores} cores"
    return f"{name}; PyTorch {torch.__version__}, resnet_fused {__version__}"
