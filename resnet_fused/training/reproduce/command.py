"""The command line of ``resnet-fused reproduce``."""

from __future__ import annotations

import argparse
import functools
import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ..datasets import ImageDataset, load_dataset
from ..errors import UserError
from ..nets import try_model
from ..options import OneLineParser, add_runtime_arguments, at_least, use_device
from .plan import VARIANTS, Plan, load_plan, save_plan
from .report import CSV, REPORT, write_report
from .runner import run_all
from .tables import choose_rows, describe_rows

__all__ = ["main"]

_TABLES = ("cifar10",)
_MACHINE = ("data", "allow_unverified", "device", "threads", "checkpoint_every")


def main(argv: Sequence[str] | None = None) -> int:
    """Train the rows that ``argv`` chooses, or go on with them, and write the report.

    Returns:
        0, or 1 if a training failed.
    """
    arguments = _parser().parse_args(argv)
    given = {name: value for name, value in vars(arguments).items() if name not in ("list", "output")}
    chosen = choose_rows(given["rows"]) if "rows" in given else None
    if arguments.list:
        print(describe_rows(chosen) if chosen else describe_rows())
        return 0
    directory = arguments.output
    if directory is None:
        raise UserError("--output is needed: the directory of the trainings and of the report")
    machine = {name: given.pop(name) for name in _MACHINE if name in given}
    if chosen is not None:
        given["rows"] = [row.name for row in chosen]
    plan = _plan(directory, given)
    _refuse_unknown_nets(plan)
    device = use_device(machine.get("device"), machine.get("threads"))
    save_plan(directory, plan)

    @functools.cache
    def dataset() -> ImageDataset:
        nonlocal plan
        if "data" not in machine:
            raise UserError("--data is needed: the directory that holds CIFAR-10")
        images = load_dataset(machine["data"], allow_unverified=machine.get("allow_unverified", False))
        plan = _with_data(plan, images, machine["data"], directory)
        return images

    def report() -> None:
        write_report(directory, plan, _command(plan))

    try:
        failed = run_all(plan, directory, machine, dataset, device, report)
    except KeyboardInterrupt:
        report()
        raise KeyboardInterrupt(
            f"{os.path.join(directory, REPORT)} has what is done; continue with: "
            f"resnet-fused reproduce --output {directory} --data {machine.get('data', 'DIR')}"
        ) from None
    report()
    print(f"{os.path.join(directory, REPORT)}, {CSV} and the curves are written", flush=True)
    if failed:
        print(f"{len(failed)} of the trainings failed; the same command tries them again", flush=True)
    return 1 if failed else 0


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog="resnet-fused reproduce",
        description="Train rows of the tables of He et al. 2015 and 2016 with plain and fused units, and "
        "write a report: the paper's error and ours. Interrupted, it continues where it was: with the same "
        "command, or with --output and --data alone.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    what = parser.add_argument_group("what")
    what.add_argument("--table", choices=_TABLES, help="the tables of this data set (default: cifar10)")
    what.add_argument(
        "--rows",
        nargs="+",
        metavar="NAME",
        help="names of rows or of tables, or shell patterns of them, for example resnet20 'shortcut-*' "
        "2016-table2; all",
    )
    what.add_argument(
        "--list", action="store_true", default=False, help="show the rows and the papers' errors"
    )
    what.add_argument("--seeds", nargs="+", type=int, metavar="N", help="seeds of each row (default: 0)")
    what.add_argument(
        "--variants", nargs="+", choices=VARIANTS, help="units to train with (default: plain fused)"
    )
    length = parser.add_argument_group("how long, and how")
    length.add_argument(
        "--epochs",
        type=at_least(int, 1),
        help="instead of the recipe's length; the schedule shortens with it",
    )
    length.add_argument("--iterations", type=at_least(int, 1), help="the same, in steps")
    length.add_argument(
        "--depth", type=at_least(int, 1), metavar="N", help="nets of N layers, not of the rows' own number"
    )
    length.add_argument("--amp", action=argparse.BooleanOptionalAction, help="bfloat16 autocast")
    length.add_argument(
        "--channels-last",
        action=argparse.BooleanOptionalAction,
        help="parameters and images in channels_last (default: yes)",
    )
    length.add_argument(
        "--accumulate", type=at_least(int, 1), metavar="N", help="as for train; 2 is as on the papers' GPUs"
    )
    length.add_argument("--log-every", type=at_least(int, 0), metavar="N", help="as for train")
    files = parser.add_argument_group("files")
    files.add_argument("--data", metavar="DIR", help="CIFAR-10, as for train")
    files.add_argument(
        "--allow-unverified", action="store_true", help="read CIFAR files that differ from the published ones"
    )
    files.add_argument(
        "--output", metavar="DIR", default=None, help="directory of the trainings and of the report"
    )
    files.add_argument(
        "--checkpoint-every",
        type=at_least(int, 0),
        metavar="N",
        help="write checkpoints every N iterations too, not only after each epoch",
    )
    add_runtime_arguments(parser)
    return parser


def _plan(directory: str, given: dict[str, Any]) -> Plan:
    """The plan in ``directory`` with what is given, or a new one."""
    if "epochs" in given and "iterations" in given:
        raise UserError("--epochs and --iterations exclude each other: give one")
    known = load_plan(directory)
    if known is not None:
        return known.extended(given, directory)
    if "rows" not in given:
        raise UserError("--rows is needed: which rows to train (--list shows them; all: every one)")
    values: dict[str, Any] = {"table": _TABLES[0], "seeds": [0], "variants": list(VARIANTS), **given}
    for name in ("seeds", "variants"):
        values[name] = list(dict.fromkeys(values[name]))
    return Plan(**values)


def _refuse_unknown_nets(plan: Plan) -> None:
    """Find out before the first training whether this version has the nets of all rows that were chosen."""
    for row in plan.chosen():
        for variant in plan.variants:
            try:
                try_model(row.model, row.options, variant == "fused")
            except UserError as error:
                raise UserError(
                    f"this version of resnet-fused cannot build the net of row {row.name}: {error}"
                ) from error


def _with_data(plan: Plan, dataset: ImageDataset, data: str, directory: str) -> Plan:
    """The plan, tied to these images."""
    if dataset.name != plan.table:
        raise UserError(f"{data} is {dataset.name}: the tables are of {plan.table}, give that with --data")
    fingerprint = dataset.fingerprint()
    if plan.fingerprint not in (None, fingerprint):
        raise UserError(
            f"{data} has other images than those with which the reproduction in {directory} began: give the "
            f"same with --data"
        )
    plan = replace(plan, fingerprint=fingerprint, lossy=dataset.lossy)
    save_plan(directory, plan)
    return plan


def _command(plan: Plan) -> str:
    """A command that trains and reports the same, without paths of this machine."""
    told = ["resnet-fused reproduce --table", plan.table, "--rows", *plan.rows]
    told += ["--seeds", *map(str, plan.seeds), "--variants", *plan.variants]
    for name in ("epochs", "iterations", "depth"):
        value = getattr(plan, name)
        told += [] if value is None else [f"--{name}", str(value)]
    told += ["--amp"] if plan.amp else []
    told += [] if plan.channels_last else ["--no-channels-last"]
    told += ["--accumulate", str(plan.accumulate)] if plan.accumulate > 1 else []
    told += ["--log-every", str(plan.log_every)] if plan.log_every else []
    return " ".join([*told, "--data DIR --output DIR"])
