"""A training run: a directory with its checkpoints and its log."""

from __future__ import annotations

import csv
import errno
import io
import math
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..models import create_model
from ..version import __version__
from .batches import Normalization, augmented_batches, epoch_generator, plain_batches
from .checkpoint import load_checkpoint, save_checkpoint, second_name, write_atomically
from .datasets import ImageDataset, load_dataset
from .errors import UserError
from .interrupt import interrupt_later
from .loop import Result, evaluate, train_epoch
from .options import TrainOptions, default_output, use_device
from .progress import epoch_bar
from .schedules import make_schedule

__all__ = ["BEST", "CHECKPOINT", "LOG", "PREVIOUS", "build_model", "checkpoint_in", "train"]

CHECKPOINT, PREVIOUS, BEST, LOG = "checkpoint.pt", "previous.pt", "best.pt", "log.csv"
_COLUMNS = (
    "epoch",
    "lr",
    "train_loss",
    "train_accuracy",
    "test_loss",
    "test_accuracy",
    "seconds",
    "images_per_second",
)


class Run:
    """Everything that a step changes, and what is needed to continue: what a checkpoint holds."""

    def __init__(self, options: TrainOptions, dataset: ImageDataset, device: torch.device) -> None:
        self.options, self.device = options, device
        mean, std = dataset.statistics()
        self.normalization = Normalization(mean, std)
        self.description = {
            "model": {"name": options.model, "num_classes": dataset.classes, "in_channels": dataset.channels},
            "normalization": {"mean": mean, "std": std},
            "dataset": {"name": dataset.name, "fingerprint": dataset.fingerprint()},
        }
        self.train_images, self.train_labels = (
            dataset.train_images.to(device),
            dataset.train_labels.to(device),
        )
        self.test_images, self.test_labels = dataset.test_images.to(device), dataset.test_labels.to(device)
        self.horizontal_flip = dataset.horizontal_flip

        torch.manual_seed(options.seed)
        self.model = build_model(self.description["model"], options.fused, options.channels_last, device)
        self.optimizer = torch.optim.SGD(
            self.model.parameters(),
            lr=options.lr,
            momentum=options.momentum,
            weight_decay=options.weight_decay,
            nesterov=options.nesterov and options.momentum > 0,
        )
        self.steps_per_epoch = math.ceil(len(self.train_images) / options.batch_size)
        self.schedule = make_schedule(
            options.schedule,
            options.lr,
            options.epochs * self.steps_per_epoch,
            warmup_steps=round(options.warmup * self.steps_per_epoch),
        )
        self.epoch = 0  # epochs that are done
        self.saved_epoch = 0  # the epoch of the checkpoint
        self.best_accuracy = 0.0
        self.history: list[dict[str, float]] = []

    def state(self) -> dict[str, Any]:
        """Content of a checkpoint."""
        return {
            "version": __version__,
            **self.description,
            "options": self.options.as_dict(),
            "epoch": self.epoch,
            "best_accuracy": self.best_accuracy,
            "history": self.history,
            "state_dict": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "rng": torch.get_rng_state(),
            "rng_cuda": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
        }

    def restore(self, state: dict[str, Any], path: str) -> None:
        """Continue from the content of a checkpoint."""
        if state["dataset"] != self.description["dataset"]:
            raise UserError(
                f"the run of {path} was trained on other data ({state['dataset'].get('name')}; not the "
                f"images "
                f"of {self.options.data}): give the same with --data"
            )
        load_weights(self.model, state, path)
        try:
            self.optimizer.load_state_dict(state["optimizer"])
            self.epoch = self.saved_epoch = int(state["epoch"])
            self.best_accuracy = float(state["best_accuracy"])
            self.history = [{name: row[name] for name in _COLUMNS} for row in state["history"]]
            torch.set_rng_state(state["rng"])
            if self.device.type == "cuda" and state["rng_cuda"] is not None:
                torch.cuda.set_rng_state(state["rng_cuda"], self.device)
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise UserError(f"{path} cannot be continued ({type(error).__name__}: {str(error)})") from error

    def layout(self, batches: Iterator[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches, in the memory format that the options ask for (they come in channels_last)."""
        for images, labels in batches:
            yield images if self.options.channels_last else images.contiguous(), labels

    def train_epoch(self, after_step: Callable[[int, Tensor], None] | None = None) -> Result:
        batches = augmented_batches(
            self.train_images,
            self.train_labels,
            self.options.batch_size,
            self.normalization,
            epoch_generator(self.options.seed, self.epoch),
            horizontal_flip=self.horizontal_flip,
        )
        return train_epoch(
            self.model,
            self.optimizer,
            self.layout(batches),
            self.schedule,
            self.epoch * self.steps_per_epoch,
            amp=self.options.amp,
            after_step=after_step,
        )

    def test(self) -> Result:
        batches = plain_batches(
            self.test_images, self.test_labels, self.options.batch_size, self.normalization
        )
        return evaluate(self.model, self.layout(batches), amp=self.options.amp)


def build_model(
    description: dict[str, Any], fused: bool, channels_last: bool, device: torch.device
) -> nn.Module:
    """The net that a run or a checkpoint describes."""
    try:
        model = create_model(
            description["name"],
            num_classes=description["num_classes"],
            in_channels=description["in_channels"],
            fused=fused,
        )
    except ValueError as error:
        raise UserError(str(error)) from error
    return model.to(device, memory_format=torch.channels_last if channels_last else torch.preserve_format)


def load_weights(model: nn.Module, state: dict[str, Any], path: str) -> None:
    """Load the weights of a checkpoint."""
    try:
        model.load_state_dict(state["state_dict"])
    except (RuntimeError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} does not hold the weights of {state['model'].get('name')}: {str(error).splitlines()[0]}"
        ) from error


def checkpoint_in(path: str) -> str:
    """``path``, or the checkpoint in it if it is the directory of a run."""
    return os.path.join(path, CHECKPOINT) if os.path.isdir(path) else path


def train(
    given: dict[str, Any], *, output: str | None = None, resume: str | None = None, overwrite: bool = False
) -> Run:
    """Train as the command line says, to the end.

    Args:
        given: fields of :class:`TrainOptions` that are given.
        output: directory of the run; None: that of ``resume``, or one named after the settings.
        resume: None, a checkpoint, the directory of a run, or "" for ``output``.
        overwrite: start again where there is a run already.

    Returns:
        The finished run.

    Raises:
        UserError: a setting, the data, a checkpoint or the directory cannot be used. Nothing has been
            overwritten.
        KeyboardInterrupt: interrupted by the user; its message says how to continue.
    """
    state = None
    if resume is not None:
        path = checkpoint_in(resume or output or default_output(TrainOptions(**given)))
        state = _load_run(path)
        options = TrainOptions.resumed(state["options"], given)
        home = os.path.dirname(path) or "."
        output = output or home
        if os.path.realpath(output) != os.path.realpath(home):
            _refuse_existing(output, overwrite)
    else:
        options = TrainOptions(**given)
        output = output or default_output(options)
        _refuse_existing(output, overwrite)

    device = use_device(options.device, options.threads)
    build_model(
        {"name": options.model, "num_classes": 1, "in_channels": 1},
        options.fused,
        False,
        torch.device("meta"),
    )  # an unknown name is told before the data is read
    run = Run(options, load_dataset(options.data, allow_unverified=options.allow_unverified), device)
    if state is not None:
        run.restore(state, path)
        print(f"resuming {path} after epoch {run.epoch} of {options.epochs}", flush=True)
    try:
        os.makedirs(output, exist_ok=True)
        if not os.access(output, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise UserError(
            f"cannot write to {output}: {error.strerror or error}; choose another --output"
        ) from error

    try:
        while run.epoch < options.epochs:
            _one_epoch(run, output)
    except KeyboardInterrupt:
        if run.saved_epoch == 0:
            raise KeyboardInterrupt(
                "stopped before the first epoch was done; no checkpoint was written"
            ) from None
        raise KeyboardInterrupt(
            f"stopped after {run.saved_epoch} of {options.epochs} epochs; continue with: resnet-fused train "
            f"--resume {output}"
        ) from None
    print(
        f"best test accuracy {100 * run.best_accuracy:.2f}%; {os.path.join(output, CHECKPOINT)}, "
        f"{BEST} and {LOG} written",
        flush=True,
    )
    return run


def _one_epoch(run: Run, output: str) -> None:
    options, number = run.options, run.epoch + 1
    with epoch_bar(f"epoch {number}/{options.epochs}", len(run.train_images)) as after_step:
        lr = run.schedule(run.epoch * run.steps_per_epoch)
        trained = run.train_epoch(after_step)
    path = os.path.join(output, CHECKPOINT)
    if not math.isfinite(trained.loss):
        kept = f"{path} is as it was after epoch {run.epoch}" if run.epoch else "no checkpoint was written"
        raise UserError(
            f"the loss of epoch {number} is {trained.loss}: training diverged ({kept}). Try a lower --lr or "
            f"some --warmup"
        )
    tested = run.test()
    row = (number, lr, trained.loss, trained.accuracy, tested.loss, tested.accuracy)
    row += (trained.seconds, trained.images_per_second)
    print(
        f"epoch {number}/{options.epochs}  loss {trained.loss:.4f}  accuracy {100 * trained.accuracy:.2f}%  "
        f"test loss {tested.loss:.4f}  test accuracy {100 * tested.accuracy:.2f}%  "
        f"{trained.images_per_second:.0f} images/s  lr {lr:.4g}",
        flush=True,
    )

    run.history.append(dict(zip(_COLUMNS, row)))
    best = tested.accuracy > run.best_accuracy or run.epoch == 0
    run.best_accuracy = max(run.best_accuracy, tested.accuracy)
    run.epoch = number
    previous = os.path.join(output, PREVIOUS)
    with interrupt_later():  # what is said of the checkpoint then is true of the files
        save_checkpoint(path, run.state(), keep_previous_as=previous if number > 1 else None)
        run.saved_epoch = number
        if number == 1 and os.path.exists(previous):  # of a run that --overwrite replaces
            os.unlink(previous)
        if best:
            second_name(path, os.path.join(output, BEST))
        write_atomically(os.path.join(output, LOG), _csv(run.history))


def _csv(history: list[dict[str, float]]) -> bytes:
    """The log: made anew from what the checkpoint holds, so that the two never disagree."""
    text = io.StringIO()
    writer = csv.DictWriter(text, _COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(history)
    return text.getvalue().encode()


def _load_run(path: str) -> dict[str, Any]:
    state = load_checkpoint(path)
    missing = {
        "model",
        "normalization",
        "dataset",
        "options",
        "epoch",
        "best_accuracy",
        "history",
        "state_dict",
        "optimizer",
        "rng",
        "rng_cuda",
    } - set(state)
    if missing:
        raise UserError(f"{path} is no checkpoint of a training run: it lacks {', '.join(sorted(missing))}")
    return state


def _refuse_existing(output: str, overwrite: bool) -> None:
    found = [name for name in (CHECKPOINT, LOG) if os.path.exists(os.path.join(output, name))]
    if found and not overwrite:
        raise UserError(
            f"{output} holds a run already ({found[0]}): continue it with --resume {output}, replace it with "
            f"--overwrite, or choose another --output"
        )
