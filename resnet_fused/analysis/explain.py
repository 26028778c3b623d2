"""``resnet-fused explain``."""

from __future__ import annotations

from collections.abc import Sequence

from .. import fusion
from ..training.options import OneLineParser
from .user_models import add_model_arguments, build, image_size

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Print what ``fuse`` does with a net."""
    parser = OneLineParser(
        prog="resnet-fused explain", allow_abbrev=False,
        description="Tell which units of a net fuse, why not the others, and what runs then.",
    )  # fmt: skip
    add_model_arguments(parser)
    parser.add_argument("--json", action="store_true", help="as JSON")
    arguments = parser.parse_args(argv)
    model = build(arguments.model)
    found = fusion.explain(model, image_size(arguments.model, arguments.input_size))
    print(found.as_json() if arguments.json else found)
    return 0
