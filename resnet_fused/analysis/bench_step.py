"""``resnet-fused bench step``: a training step, eager and fused, against its bare convolutions alone.

overhead = time of a step / time of its bare convolutions is the number that this project is about: 1 means
that BatchNorm, ReLU and addition cost nothing. The fused net is verified against a float64 run before
anything is timed.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from ..models import create_model, list_models
from ..training.errors import UserError
from ..training.options import OneLineParser, at_least
from . import step_accuracy, step_report
from .bare_convolutions import BareConvolutions, collect_convolutions
from .measure import Timing, environment, interleave
from .step_accuracy import Accuracy
from .step_memory import StepMemory, measure_memory
from .training_step import COMPILED, CONTENDERS, DTYPES, TrainingStep, synthetic_batch

__all__ = ["main"]

_MODELS = ("preact_resnet20_cifar", "preact_resnet29_cifar", "preact_resnet164_cifar")
_WARMUP_ROUNDS = 2
_CELL_SECONDS = 25.0  # of timing per net and dtype, unless --rounds is given
_ROUNDS = (7, 30)     # the least and the most of them then


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark.

    Returns:
        0; 1 if the fused net's numbers are wrong (nothing is timed then); 2 for a bad argument.
    """
    try:
        return _run(_parse(argv))
    except UserError as error:
        print(f"resnet-fused bench step: error: {error}", file=sys.stderr)
        return 2


def _parse(argv: Sequence[str] | None):
    parser = OneLineParser(
        prog="resnet-fused bench step", allow_abbrev=False,
        description="Time a training step of pre-activation ResNets (CPU, 32x32 images): plain in both "
                    "memory formats, fused, and the bare convolutions, side by side in one run. Verifies the "
                    "fused net first.")
    parser.add_argument("--models", nargs="+", default=_MODELS, metavar="NAME",
                        help=f"default: {' '.join(_MODELS)}")
    parser.add_argument("-b", "--batch-size", type=at_least(int, 1), default=64, help="default: %(default)s")
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=list(DTYPES),
                        help="bf16 is autocast; default: both")
    parser.add_argument("--rounds", type=at_least(int, 1),
                        help="samples of each contender; default: what fits into "
                             f"{_CELL_SECONDS:.0f} s per net and dtype, {_ROUNDS[0]} to {_ROUNDS[1]}")
    parser.add_argument("--threads", type=at_least(int, 1), help="default: as PyTorch chooses")
    parser.add_argument("--compile", action="store_true",
                        help="time torch.compile of the plain net too (slow to start)")
    parser.add_argument("--no-memory", dest="memory", action="store_false",
                        help="leave out the measurement of memory")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything that was measured")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="append a line per contender")
    parser.add_argument("--markdown", action="store_true", help="print the table of the README at the end")
    arguments = parser.parse_args(argv)
    arguments.models = list(dict.fromkeys(arguments.models))
    arguments.dtypes = [name for name in DTYPES if name in arguments.dtypes]
    for name in arguments.models:
        if name not in list_models():
            try:
                create_model(name)  # raises, and its message knows the nearest names
            except ValueError as error:
                raise UserError(str(error)) from error
    for path in filter(None, (arguments.json, arguments.csv)):
        if not path.absolute().parent.is_dir():
            raise UserError(f"cannot write {path}: there is no directory {path.parent}")
    if arguments.csv is not None and (problem := step_report.csv_header_error(arguments.csv)):
        raise UserError(problem)
    return arguments


def _run(arguments) -> int:
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    machine = environment()
    print(f"{machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads, {machine['simd']}, "
          f"PyTorch {machine['torch']}, resnet_fused {machine['version']} {machine['commit']}".rstrip())
    cells = []
    for model in arguments.models:
        _say(f"{model}: verifying")
        accuracies = step_accuracy.verify(model, *synthetic_batch(arguments.batch_size), arguments.dtypes)
        for dtype, accuracy in accuracies.items():
            if not accuracy.ok:
                _say("")
                print(f"resnet-fused bench step: {model}, {dtype}: {accuracy}; not timed", file=sys.stderr)
                return 1
        for dtype in arguments.dtypes:
            cell = _measure(model, dtype, accuracies[dtype], arguments)
            cells.append(cell)
            _say("")
            print(f"\n{step_report.table(cell)}", flush=True)
            # After every cell: what was measured stays if the next one is interrupted.
            if arguments.csv is not None:
                step_report.append_csv(arguments.csv, cell, machine)
            if arguments.json is not None:
                step_report.write_json(arguments.json, cells, machine)
    if arguments.markdown:
        print(f"\n{step_report.markdown(cells, machine)}")
    return 0


def _say(message: str) -> None:
    """Progress, on a terminal only."""
    if sys.stderr.isatty():
        print(f"\r\033[K{message}", end="", file=sys.stderr, flush=True)


def _measure(model: str, dtype: str, accuracy: Accuracy, arguments) -> step_report.Cell:
    title = f"{model}, {dtype}"
    memory: dict[str, StepMemory] = {}
    if arguments.memory:
        _say(f"{title}: memory")
        memory = measure_memory(model, dtype, [contender.key for contender in CONTENDERS],
                                arguments.batch_size, torch.get_num_threads())

    _say(f"{title}: warm-up")
    images, labels = synthetic_batch(arguments.batch_size)
    contenders = (*CONTENDERS, *COMPILED) if arguments.compile else CONTENDERS
    steps, first_calls = {}, {}
    for contender in contenders:
        if contender.compiled:
            torch.compiler.reset()  # what another net has compiled counts against the limit of recompilations
        steps[contender.key] = step = TrainingStep(contender, model, images, labels, dtype == "bf16")
        start = time.perf_counter()
        step()
        if contender.compiled:
            first_calls[contender.key] = time.perf_counter() - start
    convolutions = collect_convolutions(create_model(model, fused=False), images)
    bare = BareConvolutions(convolutions, DTYPES[dtype])
    calls = {**steps, step_report.BARE: bare.run_round}

    start = time.perf_counter()
    interleave(calls, _WARMUP_ROUNDS)
    seconds = (time.perf_counter() - start) / _WARMUP_ROUNDS
    rounds = arguments.rounds or min(max(int(_CELL_SECONDS / seconds), _ROUNDS[0]), _ROUNDS[1])
    bare.reset()
    samples = interleave(calls, rounds, lambda done: _say(f"{title}: round {done} of {rounds}"))

    rows = [step_report.Row(contender.key, contender.title, Timing.of(samples[contender.key]),
                            memory.get(contender.key), first_calls.get(contender.key))
            for contender in contenders]
    rows.append(step_report.Row(step_report.BARE, "bare convolutions", bare.timing()))
    return step_report.Cell(model, dtype, arguments.batch_size, rounds, accuracy, rows, bare.details())
