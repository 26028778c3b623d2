"""``resnet-fused eval``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from .batches import Normalization, plain_batches
from .checkpoint import load_checkpoint
from .datasets import load_dataset
from .errors import UserError
from .loop import evaluate
from .options import OneLineParser, add_runtime_arguments, use_device
from .run import build_model, checkpoint_in, load_weights

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
        "--allow-unverified", action="store_true", help="read CIFAR files that differ from the published ones"
    )
    add_runtime_arguments(parser)
    arguments = parser.parse_args(argv)
    if arguments.batch_size < 1:
        parser.error(f"--batch-size should be at least 1, but got {arguments.batch_size}")

    path = checkpoint_in(arguments.checkpoint)
    state = load_checkpoint(path)
    try:
        saved, description, normalization = (
            state["options"],
            state["model"],
            Normalization(**state["normalization"]),
        )
        fused = saved["fused"] if arguments.fused is None else arguments.fused
        amp = saved["amp"] if arguments.amp is None else arguments.amp
        data = arguments.data or saved["data"]
    except (KeyError, TypeError) as error:
        raise UserError(f"{path} is no checkpoint of a training run: it lacks {error}") from error

    device = use_device(getattr(arguments, "device", None), getattr(arguments, "threads", None))
    model = build_model(description, fused, True, device)
    load_weights(model, state, path)
    dataset = load_dataset(data, allow_unverified=arguments.allow_unverified)
    if dataset.name != state["dataset"]["name"]:
        raise UserError(
            f"{path} was trained on {state['dataset']['name']}, but {data} is {dataset.name}: give the same "
            f"data set with --data"
        )
    result = evaluate(
        model,
        plain_batches(
            dataset.test_images.to(device),
            dataset.test_labels.to(device),
            arguments.batch_size,
            normalization,
        ),
        amp=amp,
    )
    print(
        f"{description['name']} ({'fused' if fused else 'plain'}), {dataset.name}, "
        f"{result.images} test images: "
        f"loss {result.loss:.4f}  accuracy {100 * result.accuracy:.2f}%  "
        f"error {100 * (1 - result.accuracy):.2f}%  "
        f"{result.images_per_second:.0f} images/s"
    )
    return 0
