"""What a reproduction is to do: kept in its directory, so that it can be continued without being told "
"again."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, fields
from typing import Any

from ..checkpoint import write_atomically
from ..errors import UserError
from ..nets import told_options
from ..recipes import recipe_settings
from .tables import CIFAR10, Row, at_depth, choose_rows

__all__ = ["PLAN", "VARIANTS", "Plan", "Task", "load_plan", "save_plan"]

PLAN = "plan.json"
VARIANTS = ("plain", "fused")
_FORMAT = 1
#: What can be added to later; runs that are there stay.
_LISTS = ("rows", "seeds", "variants")


@dataclass(frozen=True)
class Task:
    """One training: a row, plain or fused, with a seed. ``name`` is its directory's."""

    row: Row
    variant: str
    seed: int
    name: str
    given: dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """What to train and for how long.

    Attributes:
        rows: names of the rows, in the order of the tables; ``seeds``; ``variants``: of :data:`VARIANTS`.
        epochs, iterations: length of each training, at most one of them; None: that of its recipe. The
            schedule is shortened with it.
        depth: number of layers instead of the rows' own.
        amp, channels_last, accumulate, log_every: settings of all trainings.
        fingerprint, lossy: of the data, once it has been read.
    """

    table: str
    rows: list[str]
    seeds: list[int]
    variants: list[str]
    epochs: int | None = None
    iterations: int | None = None
    depth: int | None = None
    amp: bool = False
    channels_last: bool = True
    accumulate: int = 1
    log_every: int = 0
    fingerprint: str | None = None
    lossy: bool = False

    def chosen(self) -> list[Row]:
        """The rows, at the depth that is wanted."""
        return [at_depth(row, self.depth) for row in CIFAR10 if row.name in self.rows]

    def tasks(self) -> list[Task]:
        """All trainings, one seed of everything after the other. Rows with the same net share theirs."""
        return [
            self._task(row, variant, seed)
            for seed in self.seeds
            for row in self.chosen()
            for variant in self.variants
        ]

    def _task(self, row: Row, variant: str, seed: int) -> Task:
        settings = {**recipe_settings(row.recipe), **row.settings}
        told = [row.model, *told_options(row.options), row.recipe]
        told += [f"{name}={value}" for name, value in row.settings.items()]
        name = "-".join([*told, variant, f"seed{seed}"]).replace("/", "_").replace("=", "_")
        given = {
            **self.shortened(settings),
            "model": row.model,
            "model_options": row.options,
            "fused": variant == "fused",
            "seed": seed,
            "amp": self.amp,
            "channels_last": self.channels_last,
            "accumulate": self.accumulate,
            "log_every": self.log_every,
        }
        return Task(row, variant, seed, name, given)

    def shortened(self, settings: dict[str, Any]) -> dict[str, Any]:
        """The settings of a recipe for the length of this plan: drops and warm-up stay at the same "
        "fractions."""
        if self.epochs is None and self.iterations is None:
            return settings
        kept = dict(settings)
        unit = "iterations" if "iterations" in kept else "epochs"
        length = kept.pop(unit)
        steps = [kept.pop(name) for name in ("milestone_iterations", "milestones") if name in kept][0]
        fractions = [step / length for step in steps]
        warmup = kept.pop("warmup_iterations", kept.pop("warmup", 0)) / length
        if self.iterations is not None:
            return {
                **kept,
                "iterations": self.iterations,
                "milestone_iterations": [round(f * self.iterations) for f in fractions],
                "warmup_iterations": round(warmup * self.iterations),
            }
        milestones = [f * self.epochs for f in fractions]
        return {**kept, "epochs": self.epochs, "milestones": milestones, "warmup": warmup * self.epochs}

    def extended(self, given: dict[str, Any], directory: str) -> Plan:
        """This plan, with further rows, seeds and variants.

        Raises:
            UserError: another setting is given, and differs: the runs would not be comparable.
        """
        values = asdict(self)
        for name, value in given.items():
            if name in _LISTS:
                values[name] = values[name] + [item for item in value if item not in values[name]]
            elif value != values[name]:
                raise UserError(
                    f"--{name.replace('_', '-')} {value} differs from the {values[name]} of the "
                    f"reproduction in {directory}: leave it out, or choose another --output"
                )
        return Plan(**values)


def load_plan(directory: str) -> Plan | None:
    """The plan in ``directory``; None if there is none.

    Raises:
        UserError: it cannot be read.
    """
    path = os.path.join(directory, PLAN)
    try:
        with open(path, encoding="utf-8") as file:
            values = json.load(file)
        if values.pop("format") != _FORMAT:
            raise ValueError("written by another version")
        plan = Plan(**values)
        choose_rows(plan.rows)
        return plan
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, UserError) as error:
        raise UserError(
            f"{path} is not the plan of a reproduction ({error}): choose another --output"
        ) from error


def save_plan(directory: str, plan: Plan) -> None:
    """Write the plan, whole or not at all; makes the directory."""
    try:
        os.makedirs(directory, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot write to {directory}: {error.strerror or error}; choose another --output"
        ) from error
    values = {"format": _FORMAT, **{f.name: getattr(plan, f.name) for f in fields(plan)}}
    write_atomically(os.path.join(directory, PLAN), (json.dumps(values, indent=1) + "\n").encode())
