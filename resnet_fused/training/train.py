"""``resnet-fused train``."""

from __future__ import annotations

from collections.abc import Sequence

from .options import parse_train
from .run import train

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Train as ``argv`` says."""
    given, paths = parse_train(argv)
    train(given, output=paths.output, resume=paths.resume, overwrite=paths.overwrite)
    return 0
