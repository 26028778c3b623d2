"""Training curves as a picture."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from .errors import UserError
from .lazy import require

__all__ = ["CURVES", "Curve", "draw_curves", "pyplot"]

CURVES = "curves.png"
_IN_THE_PICTURE = 6  # curves whose legend has room in it


@dataclass(frozen=True)
class Curve:
    """The log of a run (rows of ``log.COLUMNS``; ``steps``: of ``log.STEP_COLUMNS``) and how to show it.

    ``color`` is any of matplotlib's; runs of one net can share one, and ``dashed`` tell them apart.
    """

    label: str
    history: Sequence[dict[str, Any]]
    color: str | None = None
    dashed: bool = False
    steps: Sequence[Sequence[float]] = ()


def pyplot(purpose: str) -> ModuleType:
    """matplotlib.pyplot, drawing to files.

    Raises:
        UserError: matplotlib is missing; the message says that ``purpose`` needs it.
    """
    require("matplotlib", "matplotlib", purpose).use("Agg")
    return require("matplotlib.pyplot", "matplotlib", purpose)


def draw_curves(path: str, curves: Sequence[Curve], title: str, *, reference: float | None = None) -> None:
    """Training loss (left, logarithmic) and test error in % (right) over the iterations, as a PNG file.

    The loss is that of single steps where a run has logged them, else the mean of each epoch.
    The axis counts epochs if a row does not tell its iteration (logs of earlier versions). Where a run has an
    average of its weights, its error is drawn too, thinner.

    Args:
        reference: an error in % to mark, for example that of a paper.

    Raises:
        UserError: matplotlib is missing, or the file cannot be written.
    """
    plt = pyplot("drawing curves")
    unit = "iteration" if all("iteration" in row for curve in curves for row in curve.history) else "epoch"
    outside = len(curves) > _IN_THE_PICTURE
    figure, (left, right) = plt.subplots(1, 2, figsize=(16 if outside else 12, 4.5), layout="constrained")
    for curve in curves:
        if not curve.history:
            continue
        x = [row[unit] for row in curve.history]
        style = {"color": curve.color, "linestyle": "--" if curve.dashed else "-", "linewidth": 1.4}
        if len(x) == 1:
            style["marker"] = "."
        if curve.steps and unit == "iteration":
            left.plot(
                *zip(*((step, loss) for step, _, loss in curve.steps), strict=True),
                **{**style, "linewidth": 0.8},
            )
        else:
            left.plot(x, [row["train_loss"] for row in curve.history], **style)
        right.plot(x, [100 * (1 - row["test_accuracy"]) for row in curve.history], label=curve.label, **style)
        averaged = [row.get("ema_test_accuracy") for row in curve.history]
        if all(value is not None for value in averaged):
            thin = {**style, "linewidth": 0.7}
            right.plot(x, [100 * (1 - v) for v in averaged], label=f"{curve.label}, averaged weights", **thin)
    if reference is not None:
        right.axhline(reference, color="black", linewidth=0.7, linestyle=":")
    left.set(xlabel=unit, ylabel="training loss", yscale="log")
    right.set(xlabel=unit, ylabel="test error, %", ylim=(0, None))
    for axes in (left, right):
        axes.grid(alpha=0.3)
    if outside:
        figure.legend(*right.get_legend_handles_labels(), fontsize="small", loc="outside right upper")
    else:
        right.legend(fontsize="small")
    figure.suptitle(title)
    try:
        figure.savefig(path, dpi=120)
    except OSError as error:
        where = os.path.dirname(path) or "."
        raise UserError(f"cannot write {path}: {error.strerror or error}; make room in {where}") from error
    finally:
        plt.close(figure)
