"""``resnet-fused eval``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from .checkpoint import load_checkpoint
from .errors import UserError
from .loop import evaluate
from .nets import build_model, load_weights
from .options import OneLineParser, add_runtime_arguments, use_device
from .run import checkpoint_in
from .sources import open_source

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Print loss and accuracy of a checkpoint on the test images."""
    parser = OneLineParser(
        prog="resnet-fused eval", description="Evaluate a checkpoint on the test images.", allow_abbrev=False
    )
    parser.add_argument(
        "--checkpoint",
        "--resume",
        metavar="PATH",
        required=True,
        help="a checkpoint, or the directory of a run (its checkpoint.pt)",
    )
    parser.add_argument("--data", metavar="WHERE", help="as for train (default: what the run was trained on)")
    parser.add_argument("-b", "--batch-size", type=int, default=256, help="images per batch (default: 256)")
    parser.add_argument(
        "--fused",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="fused units, or plain ones (default: as the run was trained)",
    )
    parser.add_argument(
        "--amp",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="bfloat16 autocast (default: as the run was trained)",
    )
    parser.add_argument(
        "--ema",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="the averaged weights (default: if the checkpoint has them)",
    )
    parser.add_argument(
        "--allow-unverified", action="store_true", help="read CIFAR files that differ from the published ones"
    )
    add_runtime_arguments(parser)
    arguments = parser.parse_args(argv)
    if arguments.batch_size < 1:
        parser.error(f"--batch-size should be at least 1, but got {arguments.batch_size}")

    path = checkpoint_in(arguments.checkpoint)
    state = load_checkpoint(path)
    try:
        saved, description, normalization = state["options"], state["model"], state["normalization"]
        fused = saved["fused"] if arguments.fused is None else arguments.fused
        amp = saved["amp"] if arguments.amp is None else arguments.amp
        data = arguments.data or saved["data"]
    except (KeyError, TypeError) as error:
        raise UserError(f"{path} is no checkpoint of a training run: it lacks {error}") from error

    device = use_device(getattr(arguments, "device", None), getattr(arguments, "threads", None))
    model = build_model(description, fused, True, device)
    averaged = state.get("average") is not None if arguments.ema is None else arguments.ema
    load_weights(model, _averaged(state, path) if averaged else state, path)
    source = open_source(
        data,
        device,
        allow_unverified=arguments.allow_unverified,
        image_size=saved.get("image_size", 224),
        workers=saved.get("workers", 4),
        normalization=normalization,
    )
    if source.name != state["dataset"]["name"]:
        raise UserError(
            f"{path} was trained on {state['dataset']['name']}, but {data} is {source.name}: give the same "
            f"data set with --data"
        )
    if source.classes != description["num_classes"]:
        raise UserError(
            f"{path} was trained on {description['num_classes']} classes, but {data} has {source.classes}"
        )
    result = evaluate(model, source.test_batches(arguments.batch_size), amp=amp)
    print(
        f"{description['name']} ({'fused' if fused else 'plain'}"
        f"{', averaged weights' if averaged else ''}), {source.name}, "
        f"{result.images} test images: "
        f"loss {result.loss:.4f}  accuracy {100 * result.accuracy:.2f}%  "
        f"error {100 * (1 - result.accuracy):.2f}%  "
        f"{result.images_per_second:.0f} images/s"
    )
    return 0


def _averaged(state: dict[str, Any], path: str) -> dict[str, Any]:
    """``state`` with the averaged weights in the place of the last ones."""
    if state.get("average") is None:
        raise UserError(f"{path} has no averaged weights: it was trained without --ema")
    prefix = "module."
    weights = {
        name.removeprefix(prefix): value
        for name, value in state["average"].items()
        if name.startswith(prefix)
    }
    return {**state, "state_dict": weights}
