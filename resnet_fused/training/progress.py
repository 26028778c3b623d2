"""The progress bar: shown on a terminal, silent elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor

from .lazy import require

__all__ = ["epoch_bar"]

_LOSS_EVERY = 20  # steps; reading the loss waits for the device


@contextmanager
def epoch_bar(title: str, images: int, done: int = 0) -> Iterator[Callable[[int, Tensor], None]]:
    """A bar over the images of an epoch, with images/s and loss; yields what to call after each step.

    ``done`` images were done before, by the process whose checkpoint is continued.
    """
    tqdm = require("tqdm", "tqdm", "the progress bar").tqdm
    with tqdm(
        total=images, initial=done, desc=title, unit="images", leave=False, disable=None, dynamic_ncols=True
    ) as bar:
        steps = 0

        def after_step(images_done: int, loss: Tensor) -> None:
            nonlocal steps
            if bar.disable:
                return
            if steps % _LOSS_EVERY == 0:
                bar.set_postfix(loss=f"{float(loss):.4f}", refresh=False)
            steps += 1
            bar.update(images_done - bar.n)

        yield after_step
