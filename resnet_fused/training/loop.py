"""One step, one epoch, one evaluation."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["Result", "evaluate", "train_epoch", "train_step"]

Batches = Iterable[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Result:
    """Mean loss (cross-entropy, nats), accuracy (0 to 1) and speed over some images."""

    loss: float
    accuracy: float
    images: int
    seconds: float

    @property
    def images_per_second(self) -> float:
        return self.images / self.seconds if self.seconds else 0.0


class _Sums:
    """Sums over batches, kept on the device: nothing waits for it until the result is asked for."""

    def __init__(self) -> None:
        self.loss: Any = 0.0
        self.correct: Any = 0
        self.images = 0
        self.start = time.perf_counter()

    def add(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        self.loss = self.loss + loss.detach().double() * len(labels)
        self.correct = self.correct + (logits.argmax(1) == labels).sum()
        self.images += len(labels)

    def result(self) -> Result:
        loss, correct = float(self.loss) / self.images, int(self.correct) / self.images
        return Result(loss, correct, self.images, time.perf_counter() - self.start)


def _forward(model: nn.Module, images: Tensor, labels: Tensor, amp: bool) -> tuple[Tensor, Tensor]:
    with torch.autocast(images.device.type, torch.bfloat16, enabled=amp):
        logits = model(images)
        return F.cross_entropy(logits, labels), logits


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    images: Tensor,
    labels: Tensor,
    *,
    lr: float,
    amp: bool = False,
) -> tuple[Tensor, Tensor]:
    """One step of gradient descent on the mean cross-entropy.

    Args:
        images: (N, C, H, W); labels: int64, (N,).
        lr: learning rate of this step, for all groups of parameters.
        amp: forward under bfloat16 autocast.

    Returns:
        The loss (0-dim) and the logits (N, classes), both before the step and without a graph.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr
    loss, logits = _forward(model, images, labels, amp)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    return loss.detach(), logits.detach()


def train_epoch(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Batches,
    schedule: Callable[[int], float],
    first_step: int,
    *,
    amp: bool = False,
    after_step: Callable[[int, Tensor], None] | None = None,
) -> Result:
    """Train on ``batches``; ``schedule(first_step + i)`` is the learning rate of batch i.

    Args:
        after_step: called after each step with the number of images so far and the loss (0-dim tensor).
    """
    model.train()
    sums = _Sums()
    for index, (images, labels) in enumerate(batches):
        loss, logits = train_step(model, optimizer, images, labels, lr=schedule(first_step + index), amp=amp)
        sums.add(loss, logits, labels)
        if after_step is not None:
            after_step(sums.images, loss)
    return sums.result()


@torch.no_grad()
def evaluate(model: nn.Module, batches: Batches, *, amp: bool = False) -> Result:
    """Loss and accuracy in eval mode; the mode of the model is as before afterwards."""
    training = model.training
    model.eval()
    sums = _Sums()
    try:
        for images, labels in batches:
            loss, logits = _forward(model, images, labels, amp)
            sums.add(loss, logits, labels)
    finally:
        model.train(training)
    return sums.result()
