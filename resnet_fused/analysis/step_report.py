"""What ``resnet-fused bench step`` has found, as a table, as Markdown, as JSON and as CSV."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from . import result_file
from .benchmark_net import BATCH_SIZE, BenchmarkNet
from .measure import Timing
from .step_accuracy import Accuracy
from .step_memory import StepMemory

__all__ = ["BARE", "CSV_COLUMNS", "Cell", "Row", "append_csv", "csv_header_error", "markdown", "table",
           "write_json"]

BARE = "bare_convolutions"
_MEASURES = ("saved", "peak", "resident")  # of memory
_MB = 1e6

CSV_COLUMNS = ("date", "model", "pixels", "batch_size", "mode", "dtype", "contender", "p20_ms", "p50_ms",
               "p80_ms", "rounds", "speedup", "overhead", "saved_mb", "peak_mb", "resident_mb",
               "first_step_s", "failure", "verified_batch_size", "optimizer", "cpu", "cores", "threads",
               "simd", "torch", "version", "commit")
_STEPS = {"train": "training step (forward, loss, backward, SGD with momentum, fused=True)",
          "inference": "forward in eval mode under torch.inference_mode()"}
_SAMPLE = "each sample the second of two in a row"
_OPTIMIZER = {"train": "SGD, momentum 0.9, fused=True", "inference": None}


@dataclass
class Row:
    """One contender, or the bare convolutions.

    Attributes:
        timing: None if it failed.
        first_step: seconds, in a fresh process.
        failure: why it failed, in one line.
    """

    key: str
    title: str
    timing: Timing | None
    memory: StepMemory | None = None
    first_step: float | None = None
    failure: str | None = None


@dataclass
class Cell:
    """One net in one dtype with one number of threads."""

    net: BenchmarkNet
    mode: str  # "train" or "inference"
    dtype: str
    threads: int
    rounds: int
    accuracy: Accuracy
    rows: list[Row]
    convolutions: list[dict] = field(default_factory=list)

    def row(self, key: str) -> Row | None:
        return next((row for row in self.rows if row.key == key), None)

    def best(self, *kinds: str) -> Row | None:
        """The fastest contender of these kinds ("eager", "compiled"), by the medians."""
        timed = [row for row in self.rows if row.timing is not None and row.key.startswith(kinds)]
        return min(timed, key=lambda row: row.timing.p50, default=None)

    def speedup(self, row: Row) -> float | None:
        """Over the fastest of all plain nets, eager and compiled, by the medians."""
        return self.best("eager", "compiled").timing.p50 / row.timing.p50 if row.timing else None

    def overhead(self, row: Row) -> float | None:
        """Time of the step / time of its bare convolutions, by the medians."""
        return row.timing.p50 / self.row(BARE).timing.p50 if row.timing else None

    def memory_ratio(self, row: Row, measure: str) -> float | None:
        """Memory of ``row`` / the smaller of the eager nets'."""
        eager = [other for other in self.rows if other.key.startswith("eager")]
        others = [getattr(other.memory, measure, None) for other in eager]
        own = getattr(row.memory, measure, None)
        return own / min(others) if own is not None and all(others) else None


def _megabytes(row: Row, measure: str) -> float | None:
    value = getattr(row.memory, measure, None)
    return None if value is None else value / _MB


def _number(value: float | None, digits: int = 1) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def table(cell: Cell) -> str:
    """A table of at most 110 columns, failures apart."""
    def line(title: str, times: Sequence[str], memory: Sequence[float | None], digits: int = 1) -> str:
        cells = [f"{text:>8}" for text in times] + [f"{_number(value, digits):>9}" for value in memory]
        return " ".join([f"{title:22}", *cells]).rstrip()

    times = ("ms p50", "p20", "p80", "speedup", "overhead", "first s")
    header = " ".join([" " * 22, *(f"{name:>8}" for name in times),
                       *(f"{name:>9}" for name in ("saved MB", "peak MB", "RSS MB"))])
    net, verified = cell.net, ""
    if (size := net.verify_batch_size) != net.batch_size:
        verified = f" (a batch of {size}, and {net.batch_size // size} copies of it in one)"
    lines = [f"{net.name}, {'inference, ' if cell.mode == 'inference' else ''}{cell.dtype}, batch "
             f"{net.batch_size}, {net.size}x{net.size}, {_counted(cell.threads, 'thread')}, "
             f"{_counted(cell.rounds, 'round')}",
             f"{cell.accuracy}{verified}", header, "-" * len(header)]
    for row in cell.rows:
        if row.timing is None:
            lines.append(f"{row.title:22} failed: {row.failure}")
            continue
        ms = [_number(1e3 * value, 2) for value in (row.timing.p50, row.timing.p20, row.timing.p80)]
        lines.append(line(row.title, [*ms, _number(cell.speedup(row), 2), _number(cell.overhead(row), 2),
                                      _number(row.first_step, 2)],
                          [_megabytes(row, measure) for measure in _MEASURES]))
    fused = cell.row("fused")
    lines.append(line("fused / best plain net", [_number(1 / cell.speedup(fused), 2), "", "", "", "", ""],
                      [cell.memory_ratio(fused, measure) for measure in _MEASURES], 2))
    return "\n".join(lines)


def _short(value: float | None) -> str:
    """With two significant digits at least, and no more decimals than tell something."""
    if value is None:
        return "-"
    return f"{value:.{2 if value < 1 else 1 if value < 100 else 0}f}"


def markdown(cells: Sequence[Cell], environment: dict, batch_size: int = BATCH_SIZE) -> str:
    """The table of the README, of cells with one mode and number of threads.

    Args: batch_size: which goes without saying in the table; others are in the name of the net.
    """
    with_compiled = any(row.key.startswith("compiled") for cell in cells for row in cell.rows)
    header = ["net, dtype", "eager", *(["compiled"] if with_compiled else []), "fused", "speed-up", "bare",
              "overhead", "first step, s", "saved MB", "peak MB", "RSS MB"]
    lines = ["| " + " | ".join(header) + " |", "|---|" + "---:|" * (len(header) - 1)]
    for cell in cells:
        fused, eager, compiled = cell.row("fused"), cell.best("eager"), cell.best("compiled")

        def ms(row: Row | None) -> str:
            if row is None:
                return "failed"
            layout = "" if row.key == "fused" else " NCHW" if row.key.endswith("nchw") else " NHWC"
            layout = " mixed" if row.key.endswith("images") else layout
            return _short(1e3 * row.timing.p50) + layout

        label = cell.net.label(batch_size).replace("_cifar", "").removeprefix("timm:")
        values = [f"{label}, {cell.dtype}", ms(eager), *([ms(compiled)] if with_compiled else []),
                  f"**{ms(fused)}**", f"{cell.speedup(fused):.2f}", _short(1e3 * cell.row(BARE).timing.p50),
                  _number(cell.overhead(fused), 2)]
        firsts = [eager, *([compiled] if with_compiled else []), fused]
        values.append(" / ".join(_short(row and row.first_step) for row in firsts))
        for measure in _MEASURES:
            own, ratio = _megabytes(fused, measure), cell.memory_ratio(fused, measure)
            values.append("-" if not ratio else f"{_short(own / ratio)} → {_short(own)} ({ratio:.2f})")
        lines.append("| " + " | ".join(values) + " |")
    commit = f" {environment['commit']}" if environment["commit"] else ""
    bare = "forward and both gradients" if cells[0].mode == "train" else "forward"
    return "\n".join([
        *lines, "",
        f"Median ms of a {_STEPS[cells[0].mode]}, batch {batch_size} and 32x32 (timm, torchvision: 64x64) "
        f"unless the name says net@pixels/batch; {_SAMPLE}. {environment['cpu']}, threads: {cells[0].threads}, "
        f"{environment['simd']}, PyTorch {environment['torch']}, resnet_fused "
        f"{environment['version']}{commit}, {environment['date'][:10]}. Eager, compiled: the fastest of NCHW, "
        "channels_last (NHWC) and, eager, NHWC images with NCHW parameters (mixed). Speed-up: over the "
        "fastest of them all. Bare: the convolutions alone "
        f"({bare}). Overhead: step / bare. First step: in a fresh process with empty caches, in the order "
        "of the columns. Memory: better eager → fused; saved for the backward, peak of all tensors, growth "
        "of the process."])


def write_json(path: Path, cells: Iterable[Cell], environment: dict) -> None:
    """Everything, quantiles in ms and memory in bytes; replaces the file as a whole."""
    found = []
    for cell in cells:
        rows = []
        for row in cell.rows:
            quantiles = asdict(row.timing) if row.timing else {}
            rows.append({"contender": row.key,
                         "ms": {name: 1e3 * value for name, value in quantiles.items()} or None,
                         "speedup": cell.speedup(row), "overhead": cell.overhead(row),
                         "memory_bytes": None if row.memory is None else asdict(row.memory),
                         "first_step_s": row.first_step, "failure": row.failure})
        found.append({**_description(cell), "rounds": cell.rounds, "sample": _SAMPLE,
                      "accuracy": asdict(cell.accuracy), "contenders": rows,
                      "convolutions": cell.convolutions})
    result_file.write_json(path, {"environment": environment, "cells": found})


def _description(cell: Cell) -> dict:
    net = cell.net
    return {"model": net.name, "pixels": net.size, "batch_size": net.batch_size, "mode": cell.mode,
            "dtype": cell.dtype, "threads": cell.threads, "verified_batch_size": net.verify_batch_size,
            "optimizer": _OPTIMIZER[cell.mode]}


def csv_header_error(path: Path) -> str | None:
    """Why rows cannot be appended to ``path``, or None."""
    if not path.exists() or path.stat().st_size == 0:
        return None
    with path.open(newline="") as file:
        header = next(csv.reader(file), [])
    if tuple(header) == CSV_COLUMNS:
        return None
    return f"{path} has other columns than this version writes; choose another file"


def append_csv(path: Path, cell: Cell, environment: dict) -> None:
    """One line per contender; the header where the file is new."""
    new = not path.exists() or path.stat().st_size == 0
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, CSV_COLUMNS, lineterminator="\n")
        if new:
            writer.writeheader()
        for row in cell.rows:
            values = {**environment, **_description(cell), "contender": row.key, "rounds": cell.rounds,
                      "speedup": cell.speedup(row), "overhead": cell.overhead(row),
                      "first_step_s": row.first_step, "failure": row.failure}
            if row.timing is not None:
                values |= {f"{name}_ms": 1e3 * value for name, value in asdict(row.timing).items()}
            values |= {f"{measure}_mb": _megabytes(row, measure) for measure in _MEASURES}
            writer.writerow({name: f"{value:.5g}" if isinstance(value, float) else value
                             for name, value in values.items()})
