"""The log of a run: a row per epoch and, if wanted, a row per some steps, as CSV and for TensorBoard."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Sequence
from typing import Any

from .checkpoint import write_atomically
from .lazy import require

__all__ = ["COLUMNS", "LOG", "STEPS", "STEP_COLUMNS", "TensorBoard", "write_logs"]

LOG, STEPS = "log.csv", "steps.csv"
#: ``seconds`` are those of training alone, ``data_seconds`` of them in which it waited for its batches;
#: ``loader_images_per_second`` is how fast these came without training, at the start of the process. The last
#: two are of the averaged weights (``--ema``).
COLUMNS = (
    "epoch",
    "lr",
    "train_loss",
    "train_accuracy",
    "test_loss",
    "test_accuracy",
    "seconds",
    "images_per_second",
    "iteration",
    "data_seconds",
    "loader_images_per_second",
    "ema_test_loss",
    "ema_test_accuracy",
)
STEP_COLUMNS = ("iteration", "lr", "train_loss")


def write_logs(directory: str, history: Sequence[dict[str, Any]], steps: Sequence[Sequence[float]]) -> None:
    """Write log.csv and, where there are rows of steps, steps.csv.

    Made anew from what the checkpoint holds, so that they never disagree with it. What was not measured (a
    column of another version, no average) is empty.
    """
    write_atomically(
        os.path.join(directory, LOG), _csv(COLUMNS, [[row.get(c) for c in COLUMNS] for row in history])
    )
    if steps:
        write_atomically(os.path.join(directory, STEPS), _csv(STEP_COLUMNS, steps))


def _csv(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(rows)
    return text.getvalue().encode()


class TensorBoard:
    """The same numbers for TensorBoard, over the iterations.

    Args:
        directory: of the event files.
        first_iteration: what an interrupted process wrote from there on is hidden.

    Raises:
        UserError: the package tensorboard is missing.
    """

    def __init__(self, directory: str, first_iteration: int) -> None:
        board = require("torch.utils.tensorboard", "tensorboard", "--tensorboard")
        self._writer = board.SummaryWriter(directory, purge_step=first_iteration + 1)

    def add(self, row: dict[str, Any], steps: Sequence[Sequence[float]]) -> None:
        """A row of :data:`COLUMNS`, and the rows of :data:`STEP_COLUMNS` since the last call."""
        for column in COLUMNS:
            if column not in ("epoch", "iteration") and row.get(column) is not None:
                group, _, name = column.partition("_")
                tag = f"{group}/{name}" if group in ("train", "test", "ema") else column
                self._writer.add_scalar(tag, row[column], row["iteration"])
        for iteration, lr, loss in steps:
            self._writer.add_scalar("step/train_loss", loss, int(iteration))
            self._writer.add_scalar("step/lr", lr, int(iteration))
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()
