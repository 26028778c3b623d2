"""Trains what a plan has, run after run; what is done stays done, what fails does not stop the rest."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from ..checkpoint import write_atomically
from ..datasets import ImageDataset
from ..errors import UserError
from ..machine import describe_machine
from ..run import CHECKPOINT, train
from .plan import Plan, Task

__all__ = ["RUNS", "Outcome", "read_outcome", "run_all"]

RUNS, RESULT = "runs", "result.json"


@dataclass
class Outcome:
    """What came of a training.

    Attributes:
        error: test error in % after the last epoch; None if it failed, and then ``failure`` says why.
        seconds: of training, without tests and checkpoints.
        machines: that trained it, in words; more than one if it was continued on another.
        history, steps: the log, and the losses of single steps (``--log-every``).
        parameters: of the net.
    """

    error: float | None = None
    failure: str = ""
    epochs: float = 0.0
    iterations: int = 0
    seconds: float = 0.0
    parameters: int = 0
    machines: list[str] = field(default_factory=list)
    history: list[dict[str, Any]] = field(default_factory=list)
    steps: list[list[float]] = field(default_factory=list)


def read_outcome(directory: str, task: Task) -> Outcome | None:
    """The result of a training that has ended, well or not; None if it has not."""
    try:
        with open(os.path.join(directory, RUNS, task.name, RESULT), encoding="utf-8") as file:
            return Outcome(**json.load(file))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        path = os.path.join(directory, RUNS, task.name, RESULT)
        raise UserError(
            f"{path} cannot be read ({error}): remove it, and the run is finished from its checkpoint"
        ) from error


def run_all(
    plan: Plan,
    directory: str,
    machine: dict[str, Any],
    dataset: Callable[[], ImageDataset],
    device: torch.device,
    after_each: Callable[[], None],
) -> list[Task]:
    """Train every task of the plan that has no result, or a failure, from its last checkpoint on.

    Args:
        machine: settings of the machine: data, device, threads, checkpoint_every.
        dataset: reads the data, when the first training needs it.
        after_each: called after each training.

    Returns:
        The tasks that have failed.

    Raises:
        KeyboardInterrupt: the user's; everything before is kept.
    """
    tasks = list({task.name: task for task in plan.tasks()}.values())
    failed = []
    for number, task in enumerate(tasks, start=1):
        title = (
            f"[{number}/{len(tasks)}] {task.row.name} ({task.row.model}), {task.variant}, seed {task.seed}"
        )
        known = read_outcome(directory, task)
        if known is not None and not known.failure:
            print(f"{title}: done, error {known.error:.2f}%", flush=True)
            continue
        print(f"{title}", flush=True)
        outcome = _run(task, os.path.join(directory, RUNS, task.name), machine, dataset(), device)
        if outcome.failure:
            failed.append(task)
            print(f"{title}: failed: {outcome.failure}", flush=True)
        after_each()
    return failed


def _run(
    task: Task, output: str, machine: dict[str, Any], dataset: ImageDataset, device: torch.device
) -> Outcome:
    os.makedirs(output, exist_ok=True)
    machines = _note_machine(output, describe_machine(device))
    begun = os.path.exists(os.path.join(output, CHECKPOINT))
    start = time.perf_counter()
    try:
        run = train(
            {**task.given, **machine}, output=output, resume=output if begun else None, dataset=dataset
        )
    except KeyboardInterrupt:
        raise
    except Exception as error:  # an out-of-memory, a full disk, a bug in one net: the other rows go on
        name = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
        reason = f"{name}{(str(error).splitlines() or [''])[0]}"
        outcome = Outcome(failure=reason, seconds=time.perf_counter() - start, machines=machines)
    else:
        last = run.history[-1]
        outcome = Outcome(
            error=100 * (1 - last["test_accuracy"]),
            epochs=run.step / run.steps_per_epoch,
            iterations=run.step,
            seconds=sum(row["seconds"] for row in run.history),
            parameters=sum(parameter.numel() for parameter in run.model.parameters()),
            machines=machines,
            history=run.history,
            steps=run.steps,
        )
    write_atomically(os.path.join(output, RESULT), (json.dumps(asdict(outcome), indent=1) + "\n").encode())
    return outcome


def _note_machine(output: str, machine: str) -> list[str]:
    """The machines that have worked on this run, this one included; kept while it is not finished."""
    path = os.path.join(output, "machines.txt")
    known = []
    if os.path.exists(path):
        with open(path, encoding="utf-8") as file:
            known = file.read().splitlines()
    machines = list(dict.fromkeys([*known, machine]))
    write_atomically(path, ("\n".join(machines) + "\n").encode())
    return machines
