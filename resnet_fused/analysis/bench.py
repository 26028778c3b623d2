"""``resnet-fused bench``: finds the benchmark."""

from __future__ import annotations

import importlib
from collections.abc import Sequence

from ..training.errors import UserError

__all__ = ["main"]

#: benchmark -> module with ``main(argv)``, what it measures
BENCHMARKS = {
    "step": ("resnet_fused.analysis.bench_step", "a training step: eager, fused, and the bare convolutions"),
    "fuse": ("resnet_fused.analysis.bench_fuse", "nets of timm and torchvision, as they are and fused"),
}

_USAGE = "\n".join(["usage: resnet-fused bench BENCHMARK [OPTION ...]", "",
                    *(f"  {name:8} {purpose}" for name, (_, purpose) in BENCHMARKS.items()), "",
                    "resnet-fused bench BENCHMARK --help lists the options. "
                    "pytest bench/ times primitives and units."])


def main(argv: Sequence[str]) -> int:
    """Run a benchmark; returns its exit status."""
    if not argv or argv[0] in ("-h", "--help"):
        print(_USAGE)
        return 0 if argv else 2
    if argv[0] not in BENCHMARKS:
        raise UserError(f"unknown benchmark {argv[0]!r}: expected one of {', '.join(BENCHMARKS)}")
    return importlib.import_module(BENCHMARKS[argv[0]][0]).main(argv[1:])
