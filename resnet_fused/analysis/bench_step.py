"""``resnet-fused bench step``: a training step or an inference, eager, compiled and fused, against the bare
convolutions alone.

overhead = time of a step / time of its bare convolutions is the number that this project is about: 1 means
that BatchNorm, ReLU and addition cost nothing. The fused net is verified against a float64 run before
anything is timed.
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from ..training.errors import UserError
from ..training.options import OneLineParser, at_least
from . import step_accuracy, step_report
from .bare_convolutions import BareConvolutions
from .benchmark_net import BATCH_SIZE, BenchmarkNet
from .contenders import COMPILED, CONTENDERS, DTYPES, Contender
from .first_step import FirstStep, measure_first_step, told_error
from .measure import Timing, environment, interleave
from .modes import Run, start
from .result_file import check_writable
from .step_accuracy import Accuracy
from .step_memory import StepMemory, measure_memory

__all__ = ["main"]

_MODELS = ("preact_resnet20_cifar", "preact_resnet29_cifar", "preact_resnet164_cifar")
_WARMUP_ROUNDS = 2
_CELL_SECONDS = 25.0  # of timing per net and dtype, unless --rounds is given
_ROUNDS = (7, 30)     # the least and the most of them then
_COMPILE_SECONDS = 1800.0  # a net of 1001 layers takes 1050


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark.

    Returns:
        0; 1 if the fused net's numbers are wrong (nothing is timed then); 2 for a bad argument.
    """
    try:
        return _run(_parse(argv))
    except UserError as error:
        _say("")
        print(f"resnet-fused bench step: error: {error}", file=sys.stderr)
        return 2


def _parse(argv: Sequence[str] | None):
    parser = OneLineParser(
        prog="resnet-fused bench step", allow_abbrev=False,
        description="Time a training step, or an inference, of pre-activation nets on the CPU: plain in both "
                    "memory formats, fused, and the bare convolutions, side by side in one run. Verifies the "
                    "fused net first. The optimizer of all is SGD with momentum, fused=True.")
    parser.add_argument("--models", nargs="+", default=_MODELS, metavar="NAME[@SIZE][/BATCH]",
                        help="nets of resnet_fused, timm:NAME or torchvision:NAME, with the height and width "
                             "of the images (default: 32; 64 for other packages' nets) and the batch size; "
                             f"default: {' '.join(_MODELS)}")
    parser.add_argument("-b", "--batch-size", type=at_least(int, 1), default=BATCH_SIZE,
                        help="where a net does not say; default: %(default)s")
    parser.add_argument("--inference", dest="mode", action="store_const", const="inference", default="train",
                        help="time a forward in eval mode under torch.inference_mode() instead")
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=list(DTYPES),
                        help="bf16 is autocast; default: both")
    parser.add_argument("--rounds", type=at_least(int, 1),
                        help="samples of each contender; default: what fits into "
                             f"{_CELL_SECONDS:.0f} s per net and dtype, {_ROUNDS[0]} to {_ROUNDS[1]}")
    parser.add_argument("--threads", nargs="+", type=at_least(int, 1), metavar="N",
                        help="everything for each of these numbers; default: as PyTorch chooses")
    parser.add_argument("--compile", action="store_true",
                        help="time torch.compile of the plain net too (slow to start)")
    parser.add_argument("--compile-timeout", type=at_least(float, 1), default=_COMPILE_SECONDS, metavar="S",
                        help="seconds after which a first step of a compiled net counts as failed; default: "
                             "%(default).0f")
    parser.add_argument("--no-first-step", dest="first_step", action="store_false",
                        help="leave out the first step in a fresh process")
    parser.add_argument("--no-memory", dest="memory", action="store_false",
                        help="leave out the measurement of memory")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything that was measured")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="append a line per contender")
    parser.add_argument("--markdown", action="store_true", help="print the table of the README at the end")
    arguments = parser.parse_args(argv)
    nets = [BenchmarkNet.parse(text, arguments.batch_size) for text in arguments.models]
    arguments.nets = list(dict.fromkeys(nets))
    arguments.dtypes = [name for name in DTYPES if name in arguments.dtypes]
    arguments.threads = list(dict.fromkeys(arguments.threads or [torch.get_num_threads()]))
    for path in filter(None, (arguments.json, arguments.csv)):
        check_writable(path)
    if arguments.csv is not None and (problem := step_report.csv_header_error(arguments.csv)):
        raise UserError(problem)
    for net in arguments.nets:
        net.check()
    return arguments


def _run(arguments) -> int:
    machine = environment() | {"threads": arguments.threads}
    print(f"{machine['cpu']}, {machine['cores']} cores, {machine['simd']}, PyTorch {machine['torch']}, "
          f"resnet_fused {machine['version']} {machine['commit']}".rstrip())
    cells: list[step_report.Cell] = []
    for threads in arguments.threads:
        torch.set_num_threads(threads)
        for net in arguments.nets:
            if not _measure_net(net, arguments, threads, machine, cells):
                return 1
    if arguments.markdown:
        for threads in arguments.threads:
            of_these = [cell for cell in cells if cell.threads == threads]
            print(f"\n{step_report.markdown(of_these, machine, arguments.batch_size)}")
    return 0


def _measure_net(net: BenchmarkNet, arguments, threads: int, machine: dict,
                 cells: list[step_report.Cell]) -> bool:
    """Append the net's cells; False if its numbers are wrong."""
    _say(f"{net}: verifying")
    accuracies = step_accuracy.verify(net, arguments.mode, arguments.dtypes)
    for dtype, accuracy in accuracies.items():
        if not accuracy.ok:
            _say("")
            print(f"resnet-fused bench step: {net}, {dtype}: {accuracy}; not timed", file=sys.stderr)
            return False
    for dtype in arguments.dtypes:
        cell = _measure(net, dtype, accuracies[dtype], arguments, threads)
        cells.append(cell)
        _say("")
        print(f"\n{step_report.table(cell)}", flush=True)
        # After every cell: what was measured stays if the next one is interrupted.
        if arguments.csv is not None:
            step_report.append_csv(arguments.csv, cell, machine)
        if arguments.json is not None:
            step_report.write_json(arguments.json, cells, machine)
    return True


def _say(message: str) -> None:
    """Progress, on a terminal only."""
    if sys.stderr.isatty():
        print(f"\r\033[K{message}", end="", file=sys.stderr, flush=True)


@contextlib.contextmanager
def _compile_cache(directory: Path) -> Iterator[None]:
    """torch.compile keeps what it makes in this directory."""
    before = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(directory)
    try:
        yield
    finally:
        if before is None:
            del os.environ["TORCHINDUCTOR_CACHE_DIR"]
        else:
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = before


def _first_steps(net: BenchmarkNet, dtype: str, contenders: Sequence[Contender], arguments, threads: int,
                 caches: Path) -> dict[str, FirstStep]:
    """By the keys of the contenders; what a compiled one has made is left in caches/key."""
    found = {}
    for contender in contenders:
        _say(f"{net}, {dtype}: first step of {contender.title}")
        cache = caches / contender.key
        cache.mkdir()
        found[contender.key] = measure_first_step(
            net, arguments.mode, dtype, contender, threads, str(cache), arguments.memory,
            arguments.compile_timeout if contender.compiled else None)
    return found


def _warmed(contender: Contender, net: BenchmarkNet, dtype: str, mode: str, cache: Path) -> Run | str:
    """A contender that has run twice, or why a compiled one does not run."""
    if not contender.compiled:
        step = start(mode, contender.key, net, dtype)
        step()
        return step
    try:
        with _compile_cache(cache):
            step = start(mode, contender.key, net, dtype)
            step()
            step()
            return step
    except Exception as error:
        return told_error(error)


def _measure(net: BenchmarkNet, dtype: str, accuracy: Accuracy, arguments, threads: int) -> step_report.Cell:
    title, mode = f"{net}, {dtype}", arguments.mode
    memory: dict[str, StepMemory] = {}
    if arguments.memory:
        _say(f"{title}: memory")
        memory = measure_memory(net, mode, dtype, [contender.key for contender in CONTENDERS], threads)

    contenders = (*CONTENDERS, *COMPILED) if arguments.compile else CONTENDERS
    steps: dict[str, Run] = {}
    firsts: dict[str, FirstStep] = {}
    failures: dict[str, str] = {}
    with tempfile.TemporaryDirectory(prefix="resnet-fused-compile-", ignore_cleanup_errors=True) as directory:
        caches = Path(directory)
        if arguments.first_step:
            firsts = _first_steps(net, dtype, contenders, arguments, threads, caches)
            failures = {key: first.failure for key, first in firsts.items() if first.failure}
        _say(f"{title}: warm-up")
        torch.compiler.reset()  # what another net has compiled counts against the limit of recompilations
        for contender in contenders:
            if contender.key not in failures:
                run = _warmed(contender, net, dtype, mode, caches / contender.key)
                (failures if isinstance(run, str) else steps)[contender.key] = run
        bare = BareConvolutions(net.convolutions, DTYPES[dtype], training=mode == "train")
        calls = {**steps, step_report.BARE: bare.run_round}
        begin = time.perf_counter()
        interleave(calls, _WARMUP_ROUNDS, lead_in=steps)
        seconds = (time.perf_counter() - begin) / _WARMUP_ROUNDS
    rounds = arguments.rounds or min(max(int(_CELL_SECONDS / seconds), _ROUNDS[0]), _ROUNDS[1])
    bare.reset()
    # In training a step follows a step of the same net. The bare convolutions see to that themselves.
    samples = interleave(calls, rounds, lambda done: _say(f"{title}: round {done} of {rounds}"), steps)

    rows = []
    for contender in contenders:
        key = contender.key
        first = firsts.get(key, FirstStep())
        rows.append(step_report.Row(key, contender.title, Timing.of(samples[key]) if key in samples else None,
                                    memory.get(key) or first.memory, first.seconds, failures.get(key)))
    rows.append(step_report.Row(step_report.BARE, "bare convolutions", bare.timing()))
    return step_report.Cell(net, mode, dtype, threads, rounds, accuracy, rows, bare.details())
