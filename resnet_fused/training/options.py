"""Settings of a training run, and their command line options."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, NoReturn

import torch

from ..models import list_models
from .errors import UserError
from .schedules import SCHEDULES

__all__ = [
    "OneLineParser",
    "TrainOptions",
    "add_runtime_arguments",
    "at_least",
    "default_output",
    "parse_train",
    "use_device",
]

#: What a resumed run may be given anew; everything else is taken from the checkpoint.
_FREE_ON_RESUME = ("data", "epochs", "device", "threads", "fused", "allow_unverified")


@dataclass(frozen=True)
class TrainOptions:
    """Settings of a run; the defaults of the training are the paper's (He et al. 2016, section 4)."""

    model: str = "preact_resnet20_cifar"
    data: str = "digits"
    epochs: int = 164  # 64k steps of 128 images
    batch_size: int = 128
    lr: float = 0.1
    weight_decay: float = 1e-4
    momentum: float = 0.9
    nesterov: bool = True
    schedule: str = "step"
    warmup: float = 0.0
    amp: bool = False
    channels_last: bool = False
    seed: int = 0
    fused: bool = True
    threads: int | None = None
    device: str | None = None
    allow_unverified: bool = False

    @classmethod
    def resumed(cls, saved: dict[str, Any], given: dict[str, Any]) -> TrainOptions:
        """The settings of a checkpoint, with those given anew that may change.

        Raises:
            UserError: another setting is given, and differs.
        """
        known = {field.name for field in fields(cls)}
        if not isinstance(saved, dict) or set(saved) - known:
            raise UserError("the checkpoint's settings are not those of this version of resnet-fused")
        for name, value in given.items():
            if name not in _FREE_ON_RESUME and saved.get(name, value) != value:
                raise UserError(
                    f"--{name.replace('_', '-')} {value} differs from the {saved[name]} of the run to "
                    f"resume: leave it out, or start a new run with another --output"
                )
        return cls(**{**saved, **given})

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class OneLineParser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")


def parse_train(argv: Sequence[str] | None) -> tuple[dict[str, Any], argparse.Namespace]:
    """The fields of :class:`TrainOptions` that ``argv`` gives, and the options about files."""
    default = TrainOptions()
    parser = OneLineParser(
        prog="resnet-fused train",
        description="Train a pre-activation ResNet.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )

    def add(group: Any, *flags: str, help: str, **kwargs: Any) -> None:
        name = kwargs.get("dest") or flags[-1].removeprefix("--").replace("-", "_")
        value = getattr(default, name)
        group.add_argument(*flags, help=help if value is None else f"{help} (default: {value})", **kwargs)

    net = parser.add_argument_group("net and data")
    add(net, "--model", metavar="NAME", help=f"one of {', '.join(list_models())}")
    add(
        net,
        "--data",
        metavar="WHERE",
        help="digits, or a directory or .tar.gz file with CIFAR-10 or CIFAR-100 (Python "
        "pickles, binary version or parquet)",
    )
    add(
        net,
        "--fused",
        action=argparse.BooleanOptionalAction,
        help="fused units; --no-fused trains the plain ones",
    )
    add(
        net,
        "--allow-unverified",
        action="store_true",
        help="read CIFAR files that differ from the published ones",
    )

    training = parser.add_argument_group("training")
    add(training, "--epochs", type=at_least(int, 1), help="passes over the training images")
    add(training, "-b", "--batch-size", type=at_least(int, 1), help="images per step")
    add(training, "--lr", type=at_least(float, 0), help="highest learning rate")
    add(training, "--weight-decay", type=at_least(float, 0), help="L2 penalty on all parameters")
    add(training, "--momentum", type=at_least(float, 0), help="momentum of SGD")
    add(training, "--nesterov", action=argparse.BooleanOptionalAction, help="Nesterov momentum")
    add(
        training,
        "--schedule",
        choices=SCHEDULES,
        help="learning rate: step (divided by 10 at 50%% and 75%% of the steps), cosine or constant",
    )
    add(
        training,
        "--warmup",
        type=at_least(float, 0),
        metavar="EPOCHS",
        help="epochs of linear warm-up; can be a fraction",
    )
    add(training, "--amp", action=argparse.BooleanOptionalAction, help="bfloat16 autocast")
    add(
        training,
        "--channels-last",
        action=argparse.BooleanOptionalAction,
        help="parameters and images in channels_last",
    )
    add(
        training,
        "--seed",
        type=int,
        help="seed of the initial weights, the order of the images and the augmentation",
    )

    files = parser.add_argument_group("files")
    files.add_argument(
        "--output",
        metavar="DIR",
        default=None,
        help="directory of the run: checkpoint.pt, previous.pt, best.pt "
        "and log.csv (default: runs/ and a name made of the settings)",
    )
    files.add_argument(
        "--resume",
        metavar="PATH",
        nargs="?",
        const="",
        default=None,
        help="continue a run: its directory or one of its checkpoints (default: --output). All settings are "
        f"taken from it; {', '.join('--' + n.replace('_', '-') for n in _FREE_ON_RESUME)} can be given anew",
    )
    files.add_argument(
        "--overwrite", action="store_true", default=False, help="replace a run that is in --output"
    )
    add_runtime_arguments(parser)

    values = vars(parser.parse_args(argv))
    paths = argparse.Namespace(**{name: values.pop(name) for name in ("output", "resume", "overwrite")})
    return values, paths


def add_runtime_arguments(parser: argparse.ArgumentParser) -> None:
    """--device and --threads."""
    machine = parser.add_argument_group("machine")
    machine.add_argument(
        "--device",
        default=argparse.SUPPRESS,
        help="cpu, cuda, cuda:1, ... (default: cuda where there is one)",
    )
    machine.add_argument(
        "--threads",
        type=at_least(int, 1),
        default=argparse.SUPPRESS,
        help="threads on the CPU (default: PyTorch's)",
    )


def use_device(device: str | None, threads: int | None) -> torch.device:
    """Apply --device and --threads; returns the device."""
    if threads is not None:
        torch.set_num_threads(threads)
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:  # AssertionError: a PyTorch without CUDA
        raise UserError(
            f"--device {device} cannot be used ({str(error).splitlines()[0]}): use --device cpu"
        ) from error
    if chosen.type == "cuda":
        torch.backends.cudnn.deterministic = True  # the plain nets too give the same run for the same seed
    return chosen


def default_output(options: TrainOptions) -> str:
    """Directory of a run for which none is given."""
    data = os.path.basename(os.path.abspath(options.data)).split(".")[0]
    return os.path.join(
        "runs", f"{options.model}-{data}-{'fused' if options.fused else 'plain'}-seed{options.seed}"
    )


def at_least(kind: Callable[[str], Any], lowest: float) -> Callable[[str], Any]:
    def convert(text: str) -> Any:
        value = kind(text)
        if not lowest <= value < float("inf"):
            raise argparse.ArgumentTypeError(f"should be at least {lowest}, but got {text}")
        return value

    convert.__name__ = kind.__name__  # argparse: "invalid int value"
    return convert
