"""The picture of a comparison: what reaches which depth, drawn from its tables."""

from __future__ import annotations

import io
import math
from typing import Any

from ..training.curves import pyplot
from ..training.lazy import require
from .propagation_tables import Table

__all__ = ["draw"]

_COLUMNS = (
    "signal: rms of $x_l$",
    r"gradient: $\|\partial E/\partial x_l\|$",
    r"direct term / $\|\partial E/\partial x_L\|$, L: end of stage",
)
_DOTS_PER_INCH = 80


def draw(title: str, tables: dict[str, Table]) -> bytes:
    """A PNG image: a row of three diagrams for each step at which was measured, and the training losses.

    Left the rms of x_l over l, in the middle the norm of dE/dx_l, right the norm of the direct term of
    equations 5 and 8 over that of dE/dx_L; dashed, where it is another, the mean of the coefficient by the
    shortcuts alone, without f.

    Raises:
        UserError: matplotlib is missing.
    """
    plt = pyplot("drawing pictures")
    cases = list(dict.fromkeys(row["case"] for row in tables["units"]))
    steps = sorted({row["step"] for row in tables["units"]})
    trained = bool(tables["losses"])
    colors = {case: f"C{index}" for index, case in enumerate(cases)}
    rows = len(steps) + trained
    figure = plt.figure(figsize=(13, 0.9 + 2.7 * rows), layout="constrained")
    try:
        grid = figure.add_gridspec(rows, 3)
        handles = {}
        for at, step in enumerate(steps):
            axes = [figure.add_subplot(grid[at, column]) for column in range(3)]
            for case in cases:
                units = [row for row in tables["units"] if (row["case"], row["step"]) == (case, step)]
                if units:
                    handles[case] = _lines(axes, units, colors[case])
            for axis, name in zip(axes, _COLUMNS):
                axis.set(yscale="log", xlabel="unit l")
                axis.set_title(f"{name}, {f'step {step}' if step else 'initialisation'}", fontsize=10)
                axis.grid(alpha=0.3)
        if trained:
            axis = figure.add_subplot(grid[rows - 1, :])
            for case in cases:
                losses = [row for row in tables["losses"] if row["case"] == case]
                axis.plot(
                    [row["step"] for row in losses], [row["loss"] for row in losses], color=colors[case]
                )
            axis.set(xlabel="training step", ylabel="training loss (logarithmic)")
            _cut_off(axis, [row["loss"] for row in tables["losses"]])
            axis.grid(alpha=0.3)
        figure.suptitle(title)
        handles["dashed: coefficient by the shortcuts alone"] = plt.Line2D(
            [], [], color="gray", ls="--", lw=1
        )
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4)
        image = io.BytesIO()
        figure.savefig(image, format="png", dpi=_DOTS_PER_INCH, metadata={"Software": None})
        return _with_palette(image)
    finally:
        plt.close(figure)


def _lines(axes: list[Any], units: Table, color: str) -> Any:
    """The three curves of one net at one step; returns the handle for the legend."""
    depth = [row["unit"] for row in units]
    (handle,) = axes[0].plot(depth, [row["signal_rms"] for row in units], color=color)
    axes[1].plot(depth, [row["gradient_norm"] for row in units], color=color)
    for stage in sorted({row["stage"] for row in units} - {None}):
        members = [row for row in units if row["stage"] == stage]
        at = [row["unit"] for row in members]
        axes[2].plot(at, [_positive(row["direct_ratio"]) for row in members], color=color)
        if any(row["coefficient_mean"] is not None for row in members):
            axes[2].plot(
                at,
                [_positive(row["coefficient_mean"]) for row in members],
                color=color,
                linestyle="--",
                linewidth=1,
            )
    return handle


def _cut_off(axis: Any, losses: list[float]) -> None:
    """Leave out of sight what a diverging net's loss rises to: it would flatten all others."""
    finite = [loss for loss in losses if 0 < loss < math.inf]
    if finite:
        axis.set(yscale="log", ylim=(0.95 * min(finite), 1.05 * min(max(finite), 4 * finite[0])))


def _with_palette(image: io.BytesIO) -> bytes:
    """The same PNG in 128 colours: a third of the bytes."""
    image.seek(0)
    smaller = io.BytesIO()
    with require("PIL.Image", "pillow", "drawing pictures").open(image) as full:
        full.convert("RGB").quantize(128).save(smaller, format="png", optimize=True)
    return smaller.getvalue()


def _positive(value: float | None) -> float | None:
    """What a logarithmic axis can show."""
    return value if value is not None and value > 0 else float("nan")
