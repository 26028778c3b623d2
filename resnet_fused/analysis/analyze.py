"""``resnet-fused analyze``: how signals and gradients propagate through nets of residual units."""

from __future__ import annotations

import dataclasses
import errno
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from ..nn.reference import ORDERS, SHORTCUTS
from ..training.checkpoint import write_atomically
from ..training.datasets import load_dataset
from ..training.errors import UserError
from ..training.interrupt import interrupt_later
from ..training.options import OneLineParser, add_runtime_arguments, at_least, use_device
from . import propagation_picture
from .propagation_cases import PAPER, Comparison, Measured, Training, make_cases, measure_case, try_case
from .propagation_tables import FILES, read_tables, summary, tables, to_csv

__all__ = ["main"]

_PICTURE = "propagation.png"
_DTYPES = {"float32": torch.float32, "float64": torch.float64}


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, write the tables, draw the pictures.

    Returns:
        0.

    Raises:
        UserError: an option, the data or the directory cannot be used, or there is no matplotlib (the tables
            are written then).
        KeyboardInterrupt: its message tells what has been written.
    """
    arguments = _parse(argv)
    output = Path(arguments.output)
    comparisons = _comparisons(arguments)
    if arguments.redraw:
        for comparison in comparisons:
            _write_picture(output, comparison)
        return 0
    for comparison in comparisons:
        for case in comparison.cases:
            try_case(case)
    paths = [path for comparison in comparisons for path in _paths(output, comparison)]
    existing = [path for path in paths if path.exists()]
    if existing and not arguments.overwrite:
        raise UserError(f"{existing[0]} exists: replace it with --overwrite, or choose another --output")
    device = use_device(getattr(arguments, "device", None), getattr(arguments, "threads", None))
    data = load_dataset(arguments.data, allow_unverified=arguments.allow_unverified)
    try:
        output.mkdir(parents=True, exist_ok=True)
        if not os.access(output, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise UserError(
            f"cannot write to {output}: {error.strerror or error}; choose another --output"
        ) from error

    written: list[str] = []
    not_drawn: UserError | None = None
    for comparison in comparisons:
        try:
            measured = [
                measure_case(case, comparison.training, data, device, _say) for case in comparison.cases
            ]
        except KeyboardInterrupt:
            done = f"{', '.join(written)} complete" if written else "nothing was written"
            raise KeyboardInterrupt(f"stopped while measuring; {done}") from None
        finally:
            _say("")
        found = tables(measured)
        print(summary(comparison, found), flush=True)
        _warn(measured)
        with interrupt_later():  # one comparison's files belong together
            for name in FILES:
                write_atomically(str(output / f"{_prefix(comparison)}{name}.csv"), to_csv(name, found[name]))
            written.append(comparison.name)
            try:
                if arguments.pictures:
                    _write_picture(output, comparison)
            except UserError as error:
                not_drawn = error  # what is still to be measured is not lost for the want of a picture
        print(
            f"\n{', '.join(str(path) for path in _paths(output, comparison) if path.exists())}\n", flush=True
        )
    if not_drawn is not None:
        raise UserError(
            f"{not_drawn}. The CSV files are in {output}: --redraw draws from them, --no-pictures draws none"
        ) from not_drawn
    return 0


def _write_picture(output: Path, comparison: Comparison) -> None:
    """From the CSV files, so that they hold everything that it shows."""
    found = read_tables(output, _prefix(comparison))
    title = comparison.title or ", ".join(dict.fromkeys(row["model"] for row in found["units"]))
    write_atomically(str(output / f"{_prefix(comparison)}{_PICTURE}"), propagation_picture.draw(title, found))


def _warn(measured: Sequence[Measured]) -> None:
    for one in measured:
        if one.losses and not math.isfinite(one.losses[-1]):
            print(
                f"{one.case.label}: training diverged at step {len(one.losses) - 1} (loss {one.losses[-1]})"
            )


def _prefix(comparison: Comparison) -> str:
    return f"{comparison.name}-" if comparison.name else ""


def _paths(output: Path, comparison: Comparison) -> list[Path]:
    return [
        output / f"{_prefix(comparison)}{name}" for name in (*(f"{file}.csv" for file in FILES), _PICTURE)
    ]


def _say(message: str) -> None:
    """Progress, on a terminal only."""
    if sys.stderr.isatty():
        print(f"\r\033[K{message}", end="", file=sys.stderr, flush=True)


def _shortcut(text: str) -> tuple[str, dict[str, float | str]]:
    """``kind`` or ``kind:option=value,option=value``."""
    kind, _, rest = text.partition(":")
    if kind not in SHORTCUTS:
        raise UserError(f"unknown shortcut {kind!r}: expected one of {', '.join(SHORTCUTS)}")
    options: dict[str, float | str] = {}
    for part in filter(None, rest.split(",")):
        name, equals, value = part.partition("=")
        if not equals:
            raise UserError(f"--shortcuts {text}: options are written {kind}:NAME=VALUE,NAME=VALUE")
        try:
            options[name] = float(value)
        except ValueError:
            options[name] = value
    return kind, options


def _parse(argv: Sequence[str] | None):
    default = Training()
    parser = OneLineParser(
        prog="resnet-fused analyze",
        allow_abbrev=False,
        description="Measure what equations 4 to 9 of He et al. 2016, Identity Mappings in Deep Residual "
        "Networks, say of signals and gradients, by depth, at initialisation and during training, for nets "
        "side by side. Plain nets: the fused ones compute the same. Writes units.csv, stages.csv, losses.csv "
        f"and {_PICTURE}.",
    )
    nets = parser.add_argument_group("nets: every model with every shortcut and order")
    nets.add_argument("--model", nargs="+", metavar="NAME", help="ResNets (default: resnet110_cifar)")
    nets.add_argument(
        "--shortcuts",
        nargs="+",
        metavar="KIND",
        type=str,
        help=f"of {', '.join(SHORTCUTS)}; with options: exclusive_gating:gate_bias=-3 (default: the net's)",
    )
    nets.add_argument(
        "--orders",
        nargs="+",
        choices=ORDERS,
        metavar="ORDER",
        help=f"of {', '.join(ORDERS)} (default: the net's)",
    )
    nets.add_argument(
        "--paper",
        action="store_true",
        help="the comparisons of docs/propagation.md instead: "
        + "; ".join(comparison.title for comparison in PAPER),
    )
    training = parser.add_argument_group("training")
    training.add_argument(
        "--steps",
        nargs="+",
        type=at_least(int, 0),
        metavar="N",
        help="before which training steps to measure; 0 is the initialisation (default: "
        f"{' '.join(map(str, default.steps))}; with --paper, its own)",
    )
    training.add_argument(
        "-b",
        "--batch-size",
        type=at_least(int, 2),
        metavar="N",
        help=f"images of a step and of a measurement (default: {default.batch_size}; with --paper, its own)",
    )
    training.add_argument(
        "--lr",
        type=at_least(float, 0),
        help=f"learning rate, constant (default: {default.lr}, the paper's warm-up)",
    )
    training.add_argument(
        "--data",
        metavar="WHERE",
        default="digits",
        help="digits, or where CIFAR-10 or CIFAR-100 is (default: %(default)s)",
    )
    training.add_argument(
        "--allow-unverified", action="store_true", help="read CIFAR files that differ from the published ones"
    )
    training.add_argument("--seed", type=int, help=f"default: {default.seed}")
    training.add_argument(
        "--dtypes",
        nargs="+",
        choices=list(_DTYPES),
        metavar="DTYPE",
        help="in which to measure (default: float32 float64); units.csv and the picture show the first",
    )
    files = parser.add_argument_group("files")
    files.add_argument(
        "--output", metavar="DIR", default="propagation", help="directory (default: %(default)s)"
    )
    files.add_argument("--overwrite", action="store_true", help="replace what is there")
    files.add_argument(
        "--no-pictures", dest="pictures", action="store_false", help="CSV alone, without matplotlib"
    )
    files.add_argument(
        "--redraw", action="store_true", help="draw from the CSV files in --output, measuring nothing"
    )
    add_runtime_arguments(parser)
    arguments = parser.parse_args(argv)
    if arguments.paper and (arguments.model or arguments.shortcuts or arguments.orders):
        raise UserError("--paper chooses the nets itself: leave out --model, --shortcuts and --orders")
    return arguments


def _comparisons(arguments) -> tuple[Comparison, ...]:
    given = {name: getattr(arguments, name) for name in ("batch_size", "lr", "seed")}
    given |= {
        "steps": arguments.steps and tuple(sorted(set(arguments.steps))),
        "dtypes": arguments.dtypes and tuple(_DTYPES[name] for name in dict.fromkeys(arguments.dtypes)),
    }
    given = {name: value for name, value in given.items() if value is not None}
    if arguments.paper:
        return tuple(
            dataclasses.replace(one, training=dataclasses.replace(one.training, **given)) for one in PAPER
        )
    models = list(dict.fromkeys(arguments.model or ["resnet110_cifar"]))
    shortcuts = [_shortcut(text) for text in dict.fromkeys(arguments.shortcuts or ())]
    cases = make_cases(models, shortcuts, list(dict.fromkeys(arguments.orders or ())))
    return (Comparison("", "", cases, Training(**given)),)
