"""The report of a reproduction: Markdown for people, CSV for programs, pictures of the curves."""

from __future__ import annotations

import csv
import importlib.util
import io
import itertools
import os
import statistics
from collections.abc import Sequence

from ..checkpoint import write_atomically
from ..curves import Curve, draw_curves
from ..recipes import RECIPES
from .plan import VARIANTS, Plan, Task
from .runner import Outcome, read_outcome
from .tables import Row

__all__ = ["CSV", "REPORT", "write_report"]

REPORT, CSV = "report.md", "report.csv"
_COLUMNS = (
    "row",
    "table",
    "net",
    "paper_error",
    "paper_remark",
    "variant",
    "seed",
    "error",
    "failure",
    "epochs",
    "iterations",
    "training_seconds",
    "parameters",
    "machine",
    "run",
)
_COLORS = [f"C{index}" for index in range(10)] + ["black", "gold", "navy", "lime", "teal", "peru"]

Outcomes = dict[tuple[str, str, int], Outcome]  # (row, variant, seed) -> what came of it


def write_report(directory: str, plan: Plan, command: str) -> None:
    """Write report.md, report.csv and a picture per table from what has been trained so far.

    Args:
        command: that makes the report again, for the reader.

    Raises:
        UserError: a file cannot be read or written.
    """
    tasks = plan.tasks()
    outcomes: Outcomes = {}
    for task in tasks:
        outcome = read_outcome(directory, task)
        if outcome is not None:
            outcomes[task.row.name, task.variant, task.seed] = outcome
    write_atomically(os.path.join(directory, CSV), _csv(tasks, outcomes))
    pictures = _draw(directory, plan, outcomes)
    text = _markdown(plan, tasks, outcomes, pictures, command)
    write_atomically(os.path.join(directory, REPORT), text.encode())


def _csv(tasks: Sequence[Task], outcomes: Outcomes) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, _COLUMNS, lineterminator="\n")
    writer.writeheader()
    for task in tasks:
        outcome = outcomes.get((task.row.name, task.variant, task.seed))
        if outcome is None:
            continue
        row = task.row
        writer.writerow(
            {
                "row": row.name,
                "table": row.table,
                "net": row.model,
                "paper_error": row.error,
                "paper_remark": row.remark,
                "variant": task.variant,
                "seed": task.seed,
                "error": outcome.error,
                "failure": outcome.failure,
                "epochs": outcome.epochs,
                "iterations": outcome.iterations,
                "training_seconds": outcome.seconds,
                "parameters": outcome.parameters,
                "machine": " | ".join(outcome.machines),
                "run": task.name,
            }
        )
    return text.getvalue().encode()


def _markdown(
    plan: Plan, tasks: Sequence[Task], outcomes: Outcomes, pictures: Sequence[str], command: str
) -> str:
    rows = plan.chosen()
    done = sum(not outcome.failure for outcome in outcomes.values())
    lines = ["# CIFAR-10: rows of the papers' tables, trained here", "", f"    {command}", ""]
    if done < len(tasks):
        lines += [f"**Not complete: {done} of {len(tasks)} trainings are done.**", ""]
    lines += [*_notes(plan, rows, outcomes), ""]
    header = ["row", "net", "paper", *plan.variants, "epochs"]
    header += [f"training, {variant}" for variant in plan.variants]
    lines += [_line(header), _line(["---"] * 3 + ["---:"] * (len(header) - 3))]
    for row in rows:
        of = {v: [outcomes.get((row.name, v, seed)) for seed in plan.seeds] for v in plan.variants}
        cells = [row.name, _title(plan, row), row.paper]
        cells += [_errors(of[variant]) for variant in plan.variants]
        cells.append(_epochs([outcome for found in of.values() for outcome in found]))
        cells += [_time(of[variant]) for variant in plan.variants]
        lines.append(_line(cells))
    lines += [
        "",
        "Test error in % after the last epoch, mean +- standard deviation over the seeds (their number). "
        "Training: the time of one run without tests, mean over the seeds.",
    ]
    failures = [(key, outcome) for key, outcome in outcomes.items() if outcome.failure]
    if failures:
        lines += ["", "## Failed", ""]
        lines += [
            f"* {row}, {variant}, seed {seed}: {outcome.failure}"
            for (row, variant, seed), outcome in failures
        ]
    for picture in pictures:
        lines += ["", f"![curves of {picture.removeprefix('curves-').removesuffix('.png')}]({picture})"]
    if not pictures and done and importlib.util.find_spec("matplotlib") is None:
        lines += ["", "The curves are not drawn: that needs the package matplotlib."]
    return "\n".join(lines) + "\n"


def _title(plan: Plan, row: Row) -> str:
    """The paper's words, and what was trained in its place."""
    return row.title if plan.depth is None else f"{row.title}; here {row.model}"


def _notes(plan: Plan, rows: Sequence[Row], outcomes: Outcomes) -> list[str]:
    notes = []
    for recipe in dict.fromkeys(row.recipe for row in rows):
        length = plan.shortened(dict(RECIPES[recipe].settings))
        told = (
            f"{length['iterations']} iterations"
            if "iterations" in length
            else f"{length['epochs']} epoch{'' if length['epochs'] == 1 else 's'}"
        )
        note = f"* Recipe `{recipe}` ({RECIPES[recipe].source}), {told}"
        if plan.epochs is not None or plan.iterations is not None:
            note += " instead of its own length; drops and warm-up at the same fractions of it"
        notes.append(note + ".")
    if any(row.settings for row in rows):
        notes.append("* Nets of the 2015 paper up to 56 layers have no warm-up, as there.")
    if plan.depth is not None:
        notes.append(
            f"* Nets of {plan.depth} layers; the paper's errors are of its own, deeper or shallower, nets."
        )
    how = [f"seeds {', '.join(map(str, plan.seeds))}", "bfloat16 autocast" if plan.amp else "float32"]
    how += ["channels_last"] if plan.channels_last else []
    how += [f"gradients accumulated over {plan.accumulate} parts"] if plan.accumulate > 1 else []
    notes.append(f"* {', '.join(how)}.")
    if plan.lossy:
        notes.append(
            "* The images are JPEG-encoded copies of CIFAR-10, whose originals are lossless: error rates can "
            "differ slightly from the published ones for that reason alone."
        )
    machines = dict.fromkeys(machine for outcome in outcomes.values() for machine in outcome.machines)
    return notes + [f"* Trained on: {machine}." for machine in machines]


def _errors(found: Sequence[Outcome | None]) -> str:
    errors = [outcome.error for outcome in found if outcome is not None and outcome.error is not None]
    failed = sum(outcome is not None and bool(outcome.failure) for outcome in found)
    cell = "-"
    if len(errors) == 1:
        cell = f"{errors[0]:.2f} (1)"
    elif errors:
        cell = f"{statistics.fmean(errors):.2f} +- {statistics.stdev(errors):.2f} ({len(errors)})"
    return cell if not failed else f"{cell if errors else ''} {failed} failed".strip()


def _epochs(found: Sequence[Outcome | None]) -> str:
    epochs = sorted(
        {round(outcome.epochs, 2) for outcome in found if outcome is not None and not outcome.failure}
    )
    return (
        "-" if not epochs else " to ".join(f"{value:g}" for value in dict.fromkeys((epochs[0], epochs[-1])))
    )


def _time(found: Sequence[Outcome | None]) -> str:
    seconds = [outcome.seconds for outcome in found if outcome is not None and not outcome.failure]
    if not seconds:
        return "-"
    mean = statistics.fmean(seconds)
    return (
        f"{mean:.0f} s" if mean < 600 else f"{mean / 60:.0f} min" if mean < 36_000 else f"{mean / 3600:.1f} h"
    )


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _draw(directory: str, plan: Plan, outcomes: Outcomes) -> list[str]:
    """A picture per table: a colour per row, dashed where plain; further seeds in the same style."""
    if importlib.util.find_spec("matplotlib") is None:
        return []
    pictures = []
    for table in dict.fromkeys(row.table for row in plan.chosen()):
        rows = [row for row in plan.chosen() if row.table == table]
        curves = []
        for index, row in enumerate(rows):
            for variant, seed in itertools.product(plan.variants, plan.seeds):
                outcome = outcomes.get((row.name, variant, seed))
                if outcome is not None and outcome.history:
                    label = f"{_title(plan, row)}, {variant}"
                    if any(curve.label == label for curve in curves):
                        label = "_nolegend_"  # of a further seed
                    color, dashed = _COLORS[index % len(_COLORS)], variant == VARIANTS[0]
                    curves.append(Curve(label, outcome.history, color, dashed, outcome.steps))
        if curves:
            pictures.append(f"curves-{table}.png")
            paper = rows[0].error if len(rows) == 1 and plan.depth is None else None
            draw_curves(os.path.join(directory, pictures[-1]), curves, f"CIFAR-10, {table}", reference=paper)
    return pictures
