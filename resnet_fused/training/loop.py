"""One step, a run of steps, one evaluation."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["Result", "Sums", "evaluate", "train_epoch", "train_step"]

Batches = Iterable[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Result:
    """Mean loss (cross-entropy, nats), accuracy (0 to 1) and speed over some images.

    ``data_seconds`` is the part of ``seconds`` in which the loop waited for its batches. On the CPU that is
    all that augmentation costs; on CUDA, where the device augments in turn with the steps, only what starting
    it costs.
    """

    loss: float
    accuracy: float
    images: int
    seconds: float
    data_seconds: float = 0.0

    @property
    def images_per_second(self) -> float:
        return self.images / self.seconds if self.seconds else 0.0


class Sums:
    """Sums over batches, kept on the device: nothing waits for it until the result is asked for."""

    def __init__(self) -> None:
        self.loss: Any = 0.0
        self.correct: Any = 0
        self.images = 0
        self.data_seconds = 0.0
        self._seconds = 0.0  # of earlier processes
        self._start = time.perf_counter()

    def add(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        self.loss = self.loss + loss.detach().double() * len(labels)
        self.correct = self.correct + (logits.argmax(1) == labels).sum()
        self.images += len(labels)

    def waited(self, batches: Batches) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches; the time that they take to come is added to ``data_seconds``."""
        iterator = iter(batches)
        while True:
            start = time.perf_counter()
            batch = next(iterator, None)
            self.data_seconds += time.perf_counter() - start
            if batch is None:
                return
            yield batch

    def wait(self) -> None:
        """Wait for the device, so that the time until now is that of the steps that were added."""
        self.loss = float(self.loss)

    def pause(self, seconds: float) -> None:
        """Do not count the last ``seconds`` (a checkpoint was written)."""
        self._start += seconds

    def result(self) -> Result:
        loss, correct = float(self.loss) / self.images, int(self.correct) / self.images
        seconds = self._seconds + time.perf_counter() - self._start
        return Result(loss, correct, self.images, seconds, self.data_seconds)

    def state(self) -> dict[str, float]:
        """For a checkpoint in the middle; exact, since the loss is summed in float64."""
        return {
            "loss": float(self.loss),
            "correct": int(self.correct),
            "images": self.images,
            "seconds": self._seconds + time.perf_counter() - self._start,
            "data_seconds": self.data_seconds,
        }

    @classmethod
    def restored(cls, state: dict[str, float]) -> Sums:
        sums = cls()
        sums.loss, sums.correct = float(state["loss"]), int(state["correct"])
        sums.images = int(state["images"])
        sums._seconds, sums.data_seconds = float(state["seconds"]), float(state["data_seconds"])
        return sums


def _forward(
    model: nn.Module, images: Tensor, labels: Tensor, amp: bool, label_smoothing: float = 0.0
) -> tuple[Tensor, Tensor]:
    with torch.autocast(images.device.type, torch.bfloat16, enabled=amp):
        logits = model(images)
        return F.cross_entropy(logits, labels, label_smoothing=label_smoothing), logits


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    images: Tensor,
    labels: Tensor,
    *,
    lr: float,
    amp: bool = False,
    label_smoothing: float = 0.0,
    accumulate: int = 1,
) -> tuple[Tensor, Tensor]:
    """One step of gradient descent on the mean cross-entropy.

    Args:
        images: (N, C, H, W); labels: int64, (N,).
        lr: learning rate of this step, for all groups of parameters.
        amp: forward under bfloat16 autocast.
        label_smoothing: epsilon of the targets (1 - epsilon) onehot + epsilon / classes (Szegedy et al.
            2016).
        accumulate: the images go through forward and backward in this many parts of nearly equal size, whose
            gradients are added: those of the mean over all images. Memory is that of a part. A BatchNorm
            normalises each part by its own statistics, as on as many GPUs, and updates its running statistics
            once a part; a net without BatchNorm computes what it does with ``accumulate=1``, up to rounding.

    Returns:
        The loss (0-dim) and the logits (N, classes), both before the step and without a graph.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr
    if accumulate == 1:
        loss, logits = _forward(model, images, labels, amp, label_smoothing)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return loss.detach(), logits.detach()

    optimizer.zero_grad(set_to_none=True)
    losses, outputs = [], []
    for part, targets in zip(images.tensor_split(accumulate), labels.tensor_split(accumulate)):
        if len(targets) == 0:  # fewer images than parts: the last batch of an epoch
            continue
        loss, logits = _forward(model, part, targets, amp, label_smoothing)
        weighted = loss * (len(targets) / len(labels))
        weighted.backward()
        losses.append(weighted.detach())
        outputs.append(logits.detach())
    optimizer.step()
    return torch.stack(losses).sum(), torch.cat(outputs)


def train_epoch(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Batches,
    schedule: Callable[[int], float],
    first_step: int,
    sums: Sums,
    *,
    amp: bool = False,
    label_smoothing: float = 0.0,
    accumulate: int = 1,
    after_step: Callable[[int, Tensor], None] | None = None,
) -> int:
    """Train on ``batches``; ``schedule(first_step + i)`` is the learning rate of batch i.

    Args:
        sums: what the batches are added to.
        after_step: called after each step with the number of images in ``sums`` and the loss (0-dim tensor).

    Returns:
        The number of steps.
    """
    model.train()
    steps = 0
    for images, labels in sums.waited(batches):
        loss, logits = train_step(
            model,
            optimizer,
            images,
            labels,
            lr=schedule(first_step + steps),
            amp=amp,
            label_smoothing=label_smoothing,
            accumulate=accumulate,
        )
        sums.add(loss, logits, labels)
        steps += 1
        if after_step is not None:
            after_step(sums.images, loss)
    return steps


@torch.no_grad()
def evaluate(model: nn.Module, batches: Batches, *, amp: bool = False) -> Result:
    """Loss (without label smoothing) and accuracy in eval mode; the model's mode is as before afterwards."""
    training = model.training
    model.eval()
    sums = Sums()
    try:
        for images, labels in sums.waited(batches):
            loss, logits = _forward(model, images, labels, amp)
            sums.add(loss, logits, labels)
    finally:
        model.train(training)
    return sums.result()
