"""Measurements of propagation as CSV files, and as lines to read."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from ..training.errors import UserError
from .propagation import StagePropagation, UnitPropagation
from .propagation_cases import Comparison, Measured

__all__ = ["FILES", "Table", "read_tables", "summary", "tables", "to_csv"]

Table = list[dict[str, Any]]

_CASE = ("case", "model", "order", "shortcut", "shortcut_options")
_COLUMNS = {
    "units": (*_CASE, "step", "dtype", *(f.name for f in fields(UnitPropagation))),
    "stages": (*_CASE, "step", "dtype", "loss", *(f.name for f in fields(StagePropagation)), "exact"),
    "losses": (*_CASE, "step", "loss"),
}
#: Tables of a comparison: a row for each unit, for each stage, for each training step.
FILES = tuple(_COLUMNS)
_TEXT = {*_CASE, "dtype", "name", "first", "last", "exact"}
_WHOLE = {"step", "unit", "stage", "channels", "height", "width", "begin", "end"}


def tables(measured: Iterable[Measured]) -> dict[str, Table]:
    """The rows of every table, by its name in :data:`FILES`.

    Units are told of the first dtype alone, stages of all.
    """
    found: dict[str, Table] = {name: [] for name in FILES}
    for one in measured:
        options = " ".join(f"{key}={value}" for key, value in one.case.shortcut_options.items())
        case = dict(
            zip(_CASE, (one.case.label, one.case.model, one.case.order, one.case.shortcut, options or None))
        )
        for step, seen in one.snapshots:
            at = {**case, "step": step, "dtype": str(seen.dtype).removeprefix("torch.")}
            if seen.dtype == one.snapshots[0][1].dtype:
                found["units"] += [{**at, **vars(unit)} for unit in seen.units]
            found["stages"] += [
                {
                    **at,
                    "loss": seen.loss,
                    **vars(stage),
                    "exact": {None: None, True: "yes", False: "no"}[stage.exact],
                }
                for stage in seen.stages
            ]
        found["losses"] += [{**case, "step": step, "loss": loss} for step, loss in enumerate(one.losses)]
    return found


def to_csv(name: str, table: Table) -> bytes:
    """UTF-8; numbers with 9 digits, an empty field for None."""
    text = io.StringIO()
    writer = csv.DictWriter(text, _COLUMNS[name], lineterminator="\n")
    writer.writeheader()
    for row in table:
        writer.writerow({k: f"{v:.9g}" if isinstance(v, float) else v for k, v in row.items()})
    return text.getvalue().encode()


def read_tables(directory: Path, prefix: str) -> dict[str, Table]:
    """What :func:`to_csv` wrote.

    Raises:
        UserError: a file is missing, or is none of these tables.
    """
    found = {}
    for name in FILES:
        path = directory / f"{prefix}{name}.csv"
        try:
            with path.open(newline="", encoding="utf-8") as file:
                reader = csv.DictReader(file)
                if tuple(reader.fieldnames or ()) != _COLUMNS[name]:
                    raise UserError(f"{path} has other columns than this version writes: measure again")
                found[name] = [{key: _value(key, text) for key, text in row.items()} for row in reader]
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror or error}") from error
        except (ValueError, TypeError) as error:
            raise UserError(f"{path} is damaged ({error}): measure again") from error
    return found


def _value(key: str, text: str) -> Any:
    if text == "":
        return None
    return text if key in _TEXT else int(text) if key in _WHOLE else float(text)


def summary(comparison: Comparison, found: dict[str, Table]) -> str:
    """The equations in the longest stage, the deepest of those, and the gradients: a line for each net and
    step.

    Deviations from equation 4 (7) are relative, and "exact" if nothing but rounding; "product" is prod k,
    "coefficient" what was measured in its place, "direct" and "rest" are the norms of the two terms of the
    gradient, all at the first unit of the stage. "first/last": the norm of dE/dx of the net's first unit over
    that of its last output.
    """
    dtypes = list(dict.fromkeys(row["dtype"] for row in found["stages"]))
    header = (
        "net",
        "step",
        "loss",
        *(f"dev. {name}" for name in dtypes),
        "product",
        "coefficient",
        "direct",
        "rest",
        "first/last",
    )
    lines: list[Sequence[str]] = [header]
    for case, step in dict.fromkeys((row["case"], row["step"]) for row in found["units"]):
        stages = [row for row in found["stages"] if (row["case"], row["step"]) == (case, step)]
        units = [row for row in found["units"] if (row["case"], row["step"]) == (case, step)]
        if not stages:
            continue
        longest = max(stages, key=lambda row: (row["end"] - row["begin"], row["stage"]))
        of_dtype = {row["dtype"]: row for row in stages if row["stage"] == longest["stage"]}
        start = units[longest["begin"]]
        lines.append(
            (
                case,
                str(step),
                _number(longest["loss"]),
                *(_deviation(of_dtype[name]) for name in dtypes),
                _number(start["product_mean"]),
                _number(start["coefficient_mean"]),
                _number(start["direct_norm"]),
                _number(start["rest_norm"]),
                _number(_over(units[0]["gradient_norm"], units[-1]["gradient_norm"])),
            )
        )
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    told = [
        "  ".join(
            [line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:]))]
        )
        for line in lines
    ]
    told.insert(1, "-" * len(told[0]))
    return "\n".join([*([comparison.title, ""] if comparison.title else []), *told])


def _deviation(row: dict[str, Any]) -> str:
    return f"{_number(row['deviation'])}{' exact' if row['exact'] == 'yes' else ''}"


def _over(a: float | None, b: float | None) -> float | None:
    return a / b if a is not None and b else None


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"
