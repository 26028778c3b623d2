"""The command line of ``resnet-fused train``."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

from ..models import list_models
from .nets import parse_model_options
from .options import FREE_ON_RESUME, OneLineParser, TrainOptions, add_runtime_arguments, at_least
from .recipes import RECIPES
from .schedules import SCHEDULES

__all__ = ["parse_train"]


def parse_train(argv: Sequence[str] | None) -> tuple[dict[str, Any], argparse.Namespace]:
    """The fields of :class:`TrainOptions` that ``argv`` gives, and the options about files."""
    parser = OneLineParser(
        prog="resnet-fused train",
        description="Train a residual net.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    _add_net_and_data(parser.add_argument_group("net and data"))
    _add_training(parser.add_argument_group("training"))
    _add_logs(parser.add_argument_group("logs and checkpoints"))
    files = parser.add_argument_group("files")
    files.add_argument(
        "--output",
        metavar="DIR",
        default=None,
        help="directory of the run: checkpoint.pt, previous.pt, best.pt, log.csv and curves.png (default: "
        "runs/ and "
        "a name made of the settings)",
    )
    files.add_argument(
        "--resume",
        metavar="PATH",
        nargs="?",
        const="",
        default=None,
        help="continue a run: its directory or one of its checkpoints (default: --output). All settings are "
        f"taken from it; {', '.join('--' + n.replace('_', '-') for n in FREE_ON_RESUME)} can be given anew",
    )
    files.add_argument(
        "--overwrite", action="store_true", default=False, help="replace a run that is in --output"
    )
    files.add_argument(
        "--curves",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="draw curves.png at the end (default: if matplotlib is there)",
    )
    add_runtime_arguments(parser)

    values = vars(parser.parse_args(argv))
    names = ("output", "resume", "overwrite", "curves")
    paths = argparse.Namespace(**{name: values.pop(name) for name in names})
    if "model_options" in values:
        values["model_options"] = parse_model_options(values["model_options"])
    return values, paths


def _add(group: Any, *flags: str, help: str, **kwargs: Any) -> None:
    """An option of the field of :class:`TrainOptions` with its name; the help tells the default."""
    value = getattr(TrainOptions(), kwargs.get("dest") or flags[-1].removeprefix("--").replace("-", "_"))
    told = help if value is None or value == {} else f"{help} (default: {value})"
    group.add_argument(*flags, help=told, **kwargs)


def _add_net_and_data(group: Any) -> None:
    _add(group, "--model", metavar="NAME", help=f"one of {', '.join(list_models())}")
    _add(
        group,
        "--model-option",
        dest="model_options",
        action="append",
        metavar="NAME=VALUE",
        help="an option of the net, for example shortcut=conv; once for each",
    )
    _add(
        group,
        "--data",
        metavar="WHERE",
        help="digits; a directory or .tar.gz file with CIFAR-10 or CIFAR-100 (Python pickles, binary "
        "version or "
        "parquet); or a directory with train/ and val/, in which each class has a directory of images",
    )
    _add(
        group,
        "--fused",
        action=argparse.BooleanOptionalAction,
        help="fused units; --no-fused trains the plain ones",
    )
    _add(
        group,
        "--allow-unverified",
        action="store_true",
        help="read CIFAR files that differ from the published ones",
    )
    _add(group, "--image-size", type=at_least(int, 8), help="pixels of a crop, for directories of images")
    _add(group, "--workers", type=at_least(int, 0), help="processes that read directories of images")


def _add_training(group: Any) -> None:
    _add(
        group,
        "--recipe",
        metavar="NAME",
        help=f"defaults of the settings below: {', '.join(RECIPES)}; list tells what is in them. Options "
        "given "
        "beside it win",
    )
    _add(group, "--epochs", type=at_least(int, 1), help="passes over the training images")
    _add(group, "--iterations", type=at_least(int, 1), help="steps of the optimizer, instead of --epochs")
    _add(group, "-b", "--batch-size", type=at_least(int, 1), help="images per step")
    _add(
        group,
        "--accumulate",
        type=at_least(int, 1),
        metavar="N",
        help="compute the gradient of a batch in N parts, one after the other: the step stays that of "
        "--batch-size "
        "images, but each part has its own BatchNorm statistics",
    )
    _add(group, "--lr", type=at_least(float, 0), help="highest learning rate")
    _add(group, "--weight-decay", type=at_least(float, 0), help="L2 penalty on all parameters")
    _add(group, "--momentum", type=at_least(float, 0), help="momentum of SGD")
    _add(group, "--nesterov", action=argparse.BooleanOptionalAction, help="Nesterov momentum")
    _add(
        group,
        "--schedule",
        choices=SCHEDULES,
        help="learning rate: step (times --gamma at each milestone), cosine or constant",
    )
    _add(
        group,
        "--milestones",
        type=at_least(float, 0),
        nargs="+",
        metavar="EPOCHS",
        help="of the step schedule, in epochs (default: 50%% and 75%% of the steps)",
    )
    _add(
        group,
        "--milestone-iterations",
        type=at_least(int, 0),
        nargs="+",
        metavar="N",
        help="the same, in iterations",
    )
    _add(group, "--gamma", type=at_least(float, 0), help="factor at each milestone")
    _add(
        group,
        "--warmup",
        type=at_least(float, 0),
        metavar="EPOCHS",
        help="epochs of warm-up; can be a fraction",
    )
    _add(group, "--warmup-iterations", type=at_least(int, 0), metavar="N", help="the same, in iterations")
    _add(
        group,
        "--warmup-lr",
        type=at_least(float, 0),
        metavar="LR",
        help="learning rate throughout the warm-up (default: a straight rise to --lr)",
    )
    _add(group, "--label-smoothing", type=_below(float, 0, 1), metavar="EPSILON", help="of the training loss")
    _add(
        group,
        "--ema",
        type=_below(float, 0, 1),
        metavar="DECAY",
        help="keep an exponential moving average of the weights, with this decay a step, and test it too",
    )
    _add(group, "--amp", action=argparse.BooleanOptionalAction, help="bfloat16 autocast")
    _add(
        group,
        "--channels-last",
        action=argparse.BooleanOptionalAction,
        help="parameters and images in channels_last",
    )
    _add(
        group,
        "--seed",
        type=int,
        help="seed of the initial weights, the order of the images and the augmentation",
    )


def _add_logs(group: Any) -> None:
    _add(
        group,
        "--checkpoint-every",
        type=at_least(int, 0),
        metavar="N",
        help="write checkpoint.pt every N iterations too, not only after each epoch; 0: do not",
    )
    _add(
        group,
        "--log-every",
        type=at_least(int, 0),
        metavar="N",
        help="write the loss of every N-th iteration to steps.csv; 0: do not",
    )
    _add(
        group,
        "--tensorboard",
        action="store_true",
        help="log for TensorBoard too, to tensorboard/ in --output",
    )


def _below(kind: Callable[[str], Any], lowest: float, bound: float) -> Callable[[str], Any]:
    """Numbers from ``lowest`` on and below ``bound``."""

    def convert(text: str) -> Any:
        value = kind(text)
        if not lowest <= value < bound:
            raise argparse.ArgumentTypeError(f"should be at least {lowest} and below {bound}, but got {text}")
        return value

    convert.__name__ = kind.__name__
    return convert
