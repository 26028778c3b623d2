"""Settings of a training run, and what the options of all commands share."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from typing import Any, NoReturn

import torch

from .errors import UserError
from .nets import told_options
from .recipes import recipe_settings

__all__ = [
    "FREE_ON_RESUME",
    "OneLineParser",
    "TrainOptions",
    "add_runtime_arguments",
    "at_least",
    "default_output",
    "use_device",
]

#: What a resumed run may be given anew; everything else is taken from the checkpoint.
FREE_ON_RESUME = (
    "data",
    "epochs",
    "iterations",
    "device",
    "threads",
    "workers",
    "fused",
    "allow_unverified",
    "checkpoint_every",
    "tensorboard",
)
#: Two ways to tell one thing, in epochs and in steps: the one that is given last takes the place of the
#: other.
_EITHER = (("epochs", "iterations"), ("warmup", "warmup_iterations"), ("milestones", "milestone_iterations"))


@dataclass(frozen=True)
class TrainOptions:
    """Settings of a run. Those of training are He et al. 2016's in epochs; ``recipe`` gives exact ones.

    ``iterations``, ``warmup_iterations`` and ``milestone_iterations`` count steps of the optimizer; where
    they are not None they count, and ``epochs``, ``warmup`` and ``milestones`` do not.
    """

    model: str = "preact_resnet20_cifar"
    model_options: dict[str, Any] = field(default_factory=dict)
    data: str = "digits"
    recipe: str | None = None
    epochs: int = 164  # 64k steps of 128 images
    iterations: int | None = None
    batch_size: int = 128
    accumulate: int = 1
    lr: float = 0.1
    weight_decay: float = 1e-4
    momentum: float = 0.9
    nesterov: bool = True
    schedule: str = "step"
    milestones: list[float] | None = None  # None: at 50 % and 75 % of the steps
    milestone_iterations: list[int] | None = None
    gamma: float = 0.1
    warmup: float = 0.0
    warmup_iterations: int | None = None
    warmup_lr: float | None = None
    label_smoothing: float = 0.0
    ema: float | None = None
    amp: bool = False
    channels_last: bool = False
    seed: int = 0
    fused: bool = True
    image_size: int = 224
    workers: int = 4
    checkpoint_every: int = 0
    log_every: int = 0
    tensorboard: bool = False
    threads: int | None = None
    device: str | None = None
    allow_unverified: bool = False

    @classmethod
    def created(cls, given: dict[str, Any]) -> TrainOptions:
        """The settings of a new run: those given, before those of the recipe, before the defaults.

        Raises:
            UserError: an unknown recipe, two settings that exclude each other, or a batch with fewer images
                than parts.
        """
        _refuse_both(given)
        settings = recipe_settings(given["recipe"]) if given.get("recipe") else {}
        return cls(**_merged(settings, given))._checked()

    @classmethod
    def resumed(cls, saved: dict[str, Any], given: dict[str, Any]) -> TrainOptions:
        """The settings of a checkpoint, with those given anew that may change.

        Raises:
            UserError: another setting is given, and differs.
        """
        known = {field.name for field in fields(cls)}
        if not isinstance(saved, dict) or set(saved) - known:
            raise UserError("the checkpoint's settings are not those of this version of resnet-fused")
        saved = {**cls().as_dict(), **saved}  # what a version before did not know has its default
        _refuse_both(given)
        for name, value in given.items():
            if name not in FREE_ON_RESUME and saved[name] != value:
                raise UserError(
                    f"--{name.replace('_', '-')} {value} differs from the {saved[name]} of the run to "
                    f"resume: leave it out, or start a new run with another --output"
                )
        return cls(**_merged(saved, given))._checked()

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def _checked(self) -> TrainOptions:
        if self.accumulate > self.batch_size:
            raise UserError(
                f"--accumulate {self.accumulate} splits a batch into more parts than it has images "
                f"(--batch-size {self.batch_size})"
            )
        return self


def _merged(settings: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """``settings`` with those of ``given`` in their place, and without what these replace."""
    merged = dict(settings)
    for pair in _EITHER:
        if any(given.get(name) is not None for name in pair):
            for name in pair:
                merged.pop(name, None)
    return {**merged, **given}


def _refuse_both(given: dict[str, Any]) -> None:
    for pair in _EITHER:
        if all(given.get(name) is not None for name in pair):
            names = " and ".join("--" + name.replace("_", "-") for name in pair)
            raise UserError(f"{names} exclude each other: give one")


class OneLineParser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")


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
    parts = [
        options.model,
        *told_options(options.model_options),
        data,
    ]
    parts += [options.recipe] if options.recipe else []
    parts += ["fused" if options.fused else "plain", f"seed{options.seed}"]
    return os.path.join("runs", "-".join(parts).replace(os.sep, "_").replace("=", "_"))


def at_least(kind: Callable[[str], Any], lowest: float) -> Callable[[str], Any]:
    """A converter for argparse: finite numbers that are not below ``lowest``."""

    def convert(text: str) -> Any:
        value = kind(text)
        if not lowest <= value < float("inf"):
            raise argparse.ArgumentTypeError(f"should be at least {lowest}, but got {text}")
        return value

    convert.__name__ = kind.__name__  # argparse: "invalid int value"
    return convert
