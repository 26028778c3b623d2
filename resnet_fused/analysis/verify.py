"""``resnet-fused verify``."""

from __future__ import annotations

import json
from collections.abc import Sequence

from .. import fusion
from ..training.options import OneLineParser, at_least
from .user_models import add_model_arguments, build, image_batch

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Verify a net in train and in eval mode.

    Returns:
        0 if all is well, 1 if not.
    """
    parser = OneLineParser(
        prog="resnet-fused verify", allow_abbrev=False,
        description="Compare outputs, gradients and running statistics of a net, fused, with float64, beside "
                    "the errors of the net as it is. Random weights and images.",
    )  # fmt: skip
    add_model_arguments(parser)
    parser.add_argument(
        "-b", "--batch-size", type=at_least(int, 1), default=4, help="images (default: %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="as JSON")
    arguments = parser.parse_args(argv)
    model = build(arguments.model)
    images = image_batch(arguments.model, arguments.batch_size, arguments.input_size)
    found = [fusion.verify(model.train(training), images) for training in (True, False)]
    if arguments.json:
        print(json.dumps([one.as_dict() for one in found], indent=1))
    else:
        print("\n".join(map(str, found)))
    return 0 if all(found) else 1
