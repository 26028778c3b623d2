"""Results as files that are written whole after every row, so that a run that is cut short can go on."""

from __future__ import annotations

import csv
import json
import os
import re
from pathlib import Path

import torch

from resnet_fused.analysis.measure import environment

DIRECTORY = Path(__file__).resolve().parents[1] / "results"

#: What a row must have been measured with to be kept by a run that goes on.
_SAME = ("gpu", "torch", "triton", "version", "commit")


def describe(device: str) -> dict:
    """The machine, the versions and the commit."""
    found = environment()
    try:
        import triton

        found["triton"] = triton.__version__
    except ImportError:
        found["triton"] = "none"
    found["gpu"] = torch.cuda.get_device_name() if device == "cuda" else "none"
    found["cuda"] = torch.version.cuda or "none"
    return found


class Part:
    """The result file of one part.

    Args:
        name: of the part.
        machine: as :func:`describe` gives it.
        force: start over even if there are results.
    """

    def __init__(self, name: str, machine: dict, directory: Path = DIRECTORY, force: bool = False) -> None:
        slug = re.sub(r"[^a-z0-9]+", "-", (machine["gpu"] if machine["gpu"] != "none" else "cpu").lower())
        self.path = directory / f"gpu-{name}-{slug}.json"
        self.data = {"part": name, "complete": False, "environment": machine, "rows": []}
        if not force and (old := self._old()) is not None:
            self.data = old

    def _old(self) -> dict | None:
        """What is there and was measured with the same device, versions and commit."""
        try:
            old = json.loads(self.path.read_text())
            same = all(old["environment"][k] == self.data["environment"][k] for k in _SAME)
            return old if same and isinstance(old["rows"], list) else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    @property
    def complete(self) -> bool:
        return self.data["complete"]

    @property
    def rows(self) -> list[dict]:
        return self.data["rows"]

    def has(self, name: str) -> bool:
        return any(row["name"] == name for row in self.rows)

    def add(self, row: dict) -> None:
        """Append a row, which has a ``name``, and write the file."""
        self.rows.append(row)
        self.write()

    def finish(self) -> None:
        self.data["complete"] = True
        self.write()

    def write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        _replace(self.path, json.dumps(self.data, indent=1) + "\n")
        if self.rows:
            self._write_csv()

    def _write_csv(self) -> None:
        columns = list(dict.fromkeys(key for row in self.rows for key in row if key != "log"))
        where = ("gpu", "torch", "triton", "version", "commit", "date")
        path = self.path.with_suffix(".csv")
        temporary = path.with_name(path.name + ".tmp")
        with open(temporary, "w", newline="") as file:
            writer = csv.DictWriter(file, [*columns, *where], extrasaction="ignore")
            writer.writeheader()
            for row in self.rows:
                writer.writerow({**row, **{k: self.data["environment"][k] for k in where}})
        os.replace(temporary, path)


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)
