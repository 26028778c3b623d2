"""What ``resnet-fused bench step`` has found, as a table, as Markdown, as JSON and as CSV."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from .measure import Timing
from .step_accuracy import Accuracy
from .step_memory import StepMemory

__all__ = ["BARE", "CSV_COLUMNS", "Cell", "Row", "append_csv", "csv_header_error", "markdown", "table",
           "write_json"]

BARE = "bare_convolutions"
_MEASURES = ("saved", "peak", "resident")  # of memory
_MB = 1e6

CSV_COLUMNS = ("date", "model", "dtype", "batch_size", "contender", "p20_ms", "p50_ms", "p80_ms", "rounds",
               "speedup", "overhead", "saved_mb", "peak_mb", "resident_mb", "first_call_s",
               "cpu", "cores", "threads", "simd", "torch", "version", "commit")


@dataclass
class Row:
    """One contender, or the bare convolutions."""

    key: str
    title: str
    timing: Timing
    memory: StepMemory | None = None
    first_call: float | None = None  # seconds; of a compiled net


@dataclass
class Cell:
    """One net in one dtype."""

    model: str
    dtype: str
    batch_size: int
    rounds: int
    accuracy: Accuracy
    rows: list[Row]
    convolutions: list[dict] = field(default_factory=list)

    def row(self, key: str) -> Row | None:
        return next((row for row in self.rows if row.key == key), None)

    def _eager(self) -> list[Row]:
        return [row for row in self.rows if row.key.startswith("eager")]

    def speedup(self, row: Row) -> float:
        """Over the faster of the eager nets, by the medians."""
        return min(eager.timing.p50 for eager in self._eager()) / row.timing.p50

    def overhead(self, row: Row) -> float:
        """Time of the step / time of its bare convolutions, by the medians."""
        return row.timing.p50 / self.row(BARE).timing.p50

    def memory_ratio(self, row: Row, measure: str) -> float | None:
        """Memory of ``row`` / the smaller of the eager nets'."""
        others = [getattr(eager.memory, measure, None) for eager in self._eager()]
        own = getattr(row.memory, measure, None)
        return own / min(others) if own is not None and all(others) else None


def _megabytes(row: Row, measure: str) -> float | None:
    value = getattr(row.memory, measure, None)
    return None if value is None else value / _MB


def _number(value: float | None, digits: int = 1) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def table(cell: Cell) -> str:
    """A table of at most 100 columns."""
    def line(title: str, times: Sequence[str], memory: Sequence[float | None], digits: int = 1) -> str:
        cells = [f"{text:>8}" for text in times] + [f"{_number(value, digits):>9}" for value in memory]
        return " ".join([f"{title:22}", *cells]).rstrip()

    times = ("ms p50", "p20", "p80", "speedup", "overhead")
    header = " ".join([" " * 22, *(f"{name:>8}" for name in times),
                       *(f"{name:>9}" for name in ("saved MB", "peak MB", "RSS MB"))])
    lines = [f"{cell.model}, {cell.dtype}, batch {cell.batch_size}, 32x32, {cell.rounds} rounds",
             str(cell.accuracy), header, "-" * len(header)]
    for row in cell.rows:
        ms = [_number(1e3 * value, 2) for value in (row.timing.p50, row.timing.p20, row.timing.p80)]
        lines.append(line(row.title, [*ms, _number(cell.speedup(row), 2), _number(cell.overhead(row), 2)],
                          [_megabytes(row, measure) for measure in _MEASURES]))
    fused = cell.row("fused")
    lines.append(line("fused / better eager", [_number(1 / cell.speedup(fused), 2), "", "", "", ""],
                      [cell.memory_ratio(fused, measure) for measure in _MEASURES], 2))
    lines += [f"{row.title}: first call {row.first_call:.1f} s" for row in cell.rows if row.first_call]
    return "\n".join(lines)


def markdown(cells: Sequence[Cell], environment: dict) -> str:
    """The table of the README."""
    def compiled(cell: Cell) -> list[Row]:
        return [row for row in cell.rows if row.first_call]

    with_compiled = any(compiled(cell) for cell in cells)
    header = ["net, dtype", "eager NCHW", "eager channels_last",
              *(["torch.compile, best (first call)"] if with_compiled else []),
              "fused", "speed-up", "bare convolutions", "overhead", "saved MB", "peak MB", "RSS MB"]
    lines = ["| " + " | ".join(header) + " |", "|---|" + "---:|" * (len(header) - 1)]
    for cell in cells:
        ms = {row.key: 1e3 * row.timing.p50 for row in cell.rows}
        fused = cell.row("fused")
        values = [f"{cell.model.removesuffix('_cifar')}, {cell.dtype}",
                  _number(ms["eager_nchw"]), _number(ms["eager_channels_last"])]
        if with_compiled:
            best = min(compiled(cell), key=lambda row: row.timing.p50)
            values.append(f"{ms[best.key]:.1f} ({best.first_call:.0f} s)")
        values += [f"**{ms['fused']:.1f}**", f"{cell.speedup(fused):.2f} x", _number(ms[BARE]),
                   _number(cell.overhead(fused), 2)]
        for measure in _MEASURES:
            own, ratio = _megabytes(fused, measure), cell.memory_ratio(fused, measure)
            values.append("-" if ratio is None else f"{own / ratio:.0f} → {own:.0f} ({ratio:.2f} x)")
        lines.append("| " + " | ".join(values) + " |")
    commit = f" {environment['commit']}" if environment["commit"] else ""
    return "\n".join([
        *lines, "",
        "Median ms of a training step (forward, loss, backward, SGD with momentum), batch "
        f"{cells[0].batch_size}, 32x32. {environment['cpu']}, {environment['threads']} threads, "
        f"{environment['simd']}, PyTorch {environment['torch']}, resnet_fused "
        f"{environment['version']}{commit}, {environment['date'][:10]}. "
        "Speed-up: over the faster eager net. Overhead: step / bare convolutions. Memory: better eager → "
        "fused; saved for the backward, peak of all tensors, growth of the process."])


def write_json(path: Path, cells: Iterable[Cell], environment: dict) -> None:
    """Everything, quantiles in ms and memory in bytes; replaces the file as a whole."""
    found = []
    for cell in cells:
        rows = []
        for row in cell.rows:
            rows.append({"contender": row.key,
                         "ms": {name: 1e3 * value for name, value in asdict(row.timing).items()},
                         "speedup": cell.speedup(row), "overhead": cell.overhead(row),
                         "memory_bytes": None if row.memory is None else asdict(row.memory),
                         "first_call_s": row.first_call})
        found.append({"model": cell.model, "dtype": cell.dtype, "batch_size": cell.batch_size,
                      "rounds": cell.rounds, "accuracy": asdict(cell.accuracy), "contenders": rows,
                      "convolutions": cell.convolutions})
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(json.dumps({"environment": environment, "cells": found}, indent=1) + "\n")
    temporary.replace(path)


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
            values = {**environment, "model": cell.model, "dtype": cell.dtype, "batch_size": cell.batch_size,
                      "contender": row.key, "rounds": cell.rounds, "speedup": cell.speedup(row),
                      "overhead": cell.overhead(row), "first_call_s": row.first_call}
            values |= {f"{name}_ms": 1e3 * value for name, value in asdict(row.timing).items()}
            values |= {f"{measure}_mb": _megabytes(row, measure) for measure in _MEASURES}
            writer.writerow({name: f"{value:.5g}" if isinstance(value, float) else value
                             for name, value in values.items()})
