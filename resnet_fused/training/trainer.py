"""A net in training: everything that a step changes, and what is needed to continue."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ..version import __version__
from .ema import weight_average
from .errors import UserError
from .loop import Result, Sums, evaluate, train_epoch
from .nets import build_model, load_weights
from .options import TrainOptions
from .schedules import make_schedule
from .sources import BatchSource

__all__ = ["Run"]


class Run:
    """A net in training. Its :meth:`state` is the content of a checkpoint.

    Attributes:
        step: steps of the optimizer that are done; ``epoch``: whole epochs that are.
        total_steps: with which the run ends; the last epoch can be cut short.
        sums: of the steps since the last row of ``history``.
        best_accuracy: of the tests, those of the average if there is one.
        history: a row of the log per epoch; ``steps``: (iteration, lr, loss) of every ``log_every``-th step.
    """

    def __init__(self, options: TrainOptions, source: BatchSource, device: torch.device) -> None:
        self.options, self.device, self.source = options, device, source
        model = {"name": options.model, "num_classes": source.classes, "in_channels": source.channels}
        if options.model_options:
            model["options"] = options.model_options
        self.description = {
            "model": model,
            "normalization": {"mean": source.normalization.mean, "std": source.normalization.std},
            "dataset": {"name": source.name, "fingerprint": source.fingerprint()},
        }

        torch.manual_seed(options.seed)
        self.model = build_model(model, options.fused, options.channels_last, device)
        self.average = None if options.ema is None else weight_average(self.model, options.ema)
        self.optimizer = torch.optim.SGD(
            self.model.parameters(),
            lr=options.lr,
            momentum=options.momentum,
            weight_decay=options.weight_decay,
            nesterov=options.nesterov and options.momentum > 0,
        )
        self.steps_per_epoch = math.ceil(source.train_count / options.batch_size)
        self.total_steps = options.iterations or options.epochs * self.steps_per_epoch
        self.schedule = self._schedule()
        self.step = 0
        self.saved_step = 0  # the step of the checkpoint
        self.best_accuracy = 0.0
        self.history: list[dict[str, Any]] = []
        self.steps: list[list[float]] = []
        self._unread: list[tuple[int, float, Tensor]] = []  # steps whose loss is still on the device
        self._batches: Iterator[tuple[Tensor, Tensor]] | None = None  # the rest of an epoch that has begun
        self.sums = Sums()
        self.directory = ""  # where its files are
        self.loader_speed: float | None = None  # images/s of the batches alone, once it has been measured

    def _schedule(self) -> Callable[[int], float]:
        options = self.options
        milestones = options.milestone_iterations
        if milestones is None and options.milestones is not None:
            milestones = [round(epochs * self.steps_per_epoch) for epochs in options.milestones]
        warmup = options.warmup_iterations
        return make_schedule(
            options.schedule,
            options.lr,
            self.total_steps,
            warmup_steps=round(options.warmup * self.steps_per_epoch) if warmup is None else warmup,
            warmup_lr=options.warmup_lr,
            milestone_steps=milestones,
            gamma=options.gamma,
        )

    @property
    def epoch(self) -> int:
        return self.step // self.steps_per_epoch

    @property
    def epochs(self) -> int:
        """Epochs of the whole run, a last one that is cut short included."""
        return -(-self.total_steps // self.steps_per_epoch)

    @property
    def first_of_row(self) -> int:
        """The step with which the log's next row begins."""
        if self.history and "iteration" in self.history[-1]:
            return int(self.history[-1]["iteration"])
        return self.epoch * self.steps_per_epoch

    @property
    def end_of_epoch(self) -> int:
        """The step with which the epoch that has begun, or is to begin, ends."""
        return min((self.epoch + 1) * self.steps_per_epoch, self.total_steps)

    def begin_row(self) -> None:
        """Count from here on; does nothing in an epoch that a checkpoint has interrupted."""
        if self.sums.images == 0:
            self.sums = Sums()

    def train_until(self, step: int, after_step: Callable[[int, Tensor], None] | None = None) -> None:
        """Train the steps before ``step``, which lies in the epoch of this step or at its end."""

        def after(images: int, loss: Tensor) -> None:
            done = next(counter)
            if self.average is not None:
                self.average.update_parameters(self.model)
            if self.options.log_every and done % self.options.log_every == 0:
                self._unread.append((done, self.schedule(done - 1), loss))
            if after_step is not None:
                after_step(images, loss)

        options, counter = self.options, itertools.count(self.step + 1)
        if self._batches is None:
            first = self.step - self.epoch * self.steps_per_epoch
            self._batches = self.source.train_batches(options.batch_size, options.seed, self.epoch, first)
        self.step += train_epoch(
            self.model,
            self.optimizer,
            self._layout(itertools.islice(self._batches, step - self.step)),
            self.schedule,
            self.step,
            self.sums,
            amp=options.amp,
            label_smoothing=options.label_smoothing,
            accumulate=options.accumulate,
            after_step=after,
        )
        if self.step % self.steps_per_epoch == 0:
            self._batches = None

    def read_losses(self) -> None:
        """Bring :attr:`steps` up to date; waits for the device."""
        self.steps += [[step, lr, float(loss)] for step, lr, loss in self._unread]
        self._unread.clear()

    def test(self) -> tuple[Result, Result | None]:
        """Of the weights, and of their average if there is one."""
        models = [self.model] if self.average is None else [self.model, self.average.module]
        results = [
            evaluate(
                model, self._layout(self.source.test_batches(self.options.batch_size)), amp=self.options.amp
            )
            for model in models
        ]
        return results[0], results[1] if self.average is not None else None

    def _layout(self, batches: Iterator[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches, in the memory format that the options ask for (they come in channels_last)."""
        for images, labels in batches:
            yield images if self.options.channels_last else images.contiguous(), labels

    def state(self) -> dict[str, Any]:
        """Content of a checkpoint."""
        return {
            "version": __version__,
            **self.description,
            "options": self.options.as_dict(),
            "epoch": self.epoch,
            "step": self.step,
            "sums": self.sums.state() if self.sums.images else None,
            "best_accuracy": self.best_accuracy,
            "history": self.history,
            "steps": self.steps,
            "state_dict": self.model.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "rng": torch.get_rng_state(),
            "rng_cuda": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
        }

    def restore(self, state: dict[str, Any], path: str) -> None:
        """Continue from the content of a checkpoint, of this version or one before.

        Raises:
            UserError: it is of other data, of another net, or not of a run.
        """
        if state["dataset"] != self.description["dataset"]:
            raise UserError(
                f"the run of {path} was trained on other data ({state['dataset'].get('name')}; not the "
                f"images of {self.options.data}): give the same with --data"
            )
        load_weights(self.model, state, path)
        try:
            self.optimizer.load_state_dict(state["optimizer"])
            if self.average is not None:
                self.average.load_state_dict(state["average"])
            self.step = self.saved_step = int(state.get("step", state["epoch"] * self.steps_per_epoch))
            if state.get("sums"):
                self.sums = Sums.restored(state["sums"])
            self.best_accuracy = float(state["best_accuracy"])
            self.history = [dict(row) for row in state["history"]]
            self.steps = [list(row) for row in state.get("steps", [])]
            torch.set_rng_state(state["rng"])
            if self.device.type == "cuda" and state["rng_cuda"] is not None:
                torch.cuda.set_rng_state(state["rng_cuda"], self.device)
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise UserError(f"{path} cannot be continued ({type(error).__name__}: {str(error)})") from error
