"""Tile configurations: which one a problem gets. A pure look-up: nothing is compiled or timed here.

The shipped defaults are data, ``default_configs.json``::

    {"sm_90": {"preact_conv_forward": {"16bit": {"tiled": {"64": [[128, 64, 64, 4, 4]]}}}}}

    architecture -> primitive -> precision ("16bit", "tf32", "ieee"; for elementwise kernels "16bit", "32bit")
    -> kind of kernel -> class of columns -> configurations, each [rows, columns, depth, num_warps,
    num_stages, programs, registers]

A primitive that is not listed has the table that is named after its kind of kernel ("elementwise").

*rows* and *columns* are the output tile, *depth* the reduction step; ``programs`` (1 if not given) are those
per multiprocessor of a kernel that loops over tiles, or, for split reductions, how many programs per
multiprocessor the splits should give; ``registers`` (0 if not given: no limit) are the most a thread gets, so
that more blocks fit on a multiprocessor. A class holds problems with up to that many columns (the largest class
the rest), its configurations from the largest tile down: the first one that fills the chip is taken. A depth
beyond the problem's is cut to the next power of two.

A kind ``<kind>-unaligned`` holds the tiles of channel counts whose rows cannot be read 16 bytes at a time:
those go through registers one value at a time, so the tiles are smaller. ``<kind>-more`` holds what only a tuner tries.
The kind ``pointwise``, of 1x1 convolutions by the tiled kernel, holds the classes that differ from ``tiled``'s.

Measured choices come first: :func:`use_measured` takes the function that looks them up (the tuning cache's).
"""

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import triton

from .geometry import ceil_div, next_power_of_two
from .launch import Target

#: The shortest reduction step that the matrix units of every supported chip take.
MIN_DEPTH = 16
#: Whether limits on registers are for this Triton: code of 3.8 and newer spills under every one of the shipped.
LIMITS = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 8)
#: A configuration fills the chip if it gives this share of the multiprocessors a tile.
_FULL = 0.75


class Config(NamedTuple):
    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    programs: int = 1
    registers: int = 0

    @property
    def options(self) -> dict[str, int]:
        """Triton's options for a launch."""
        limit = {"maxnreg": self.registers} if self.registers else {}
        return {"num_warps": self.warps, "num_stages": self.stages, **limit}


class Problem(NamedTuple):
    """What a choice depends on: the key of a measured one."""

    arch: str
    primitive: str
    precision: str
    kind: str
    rows: int
    columns: int
    depth: int
    aligned: bool


@functools.lru_cache(maxsize=1)
def shipped() -> dict:
    """The shipped defaults as in the file, with every configuration that this Triton is for a :class:`Config`."""
    table = json.loads((Path(__file__).parent / "default_configs.json").read_text())
    return {
        arch: {
            primitive: {
                precision: {
                    kind: {
                        int(columns): [c for c in (Config(*row) for row in rows) if LIMITS or not c.registers]
                        for columns, rows in classes.items()
                    }
                    for kind, classes in kinds.items()
                }
                for precision, kinds in precisions.items()
            }
            for primitive, precisions in primitives.items()
        }
        for arch, primitives in table.items()
    }


def architecture(arch: int) -> str:
    """The shipped architecture whose defaults serve a compute capability: the nearest one below."""
    known = sorted(int(name.removeprefix("sm_")) for name in shipped())
    return f"sm_{max((a for a in known if a <= arch), default=known[0])}"


def aligned(precision: str, *channels: int) -> bool:
    """Whether pixels of these channel counts start at multiples of 16 bytes."""
    return not any(n % (8 if precision == "16bit" else 4) for n in channels)


_measured: Callable[[Problem], Config | None] | None = None


def use_measured(look_up: Callable[[Problem], Config | None] | None) -> None:
    """Ask look_up before the shipped defaults; None: not any more. It must be quick and must not measure.
    Plans already made keep their configuration."""
    global _measured
    _measured = look_up


def _of_class(
    more: bool, on: Target, primitive: str, precision: str, kind: str, columns: int, depth: int, aligned: bool
) -> list[Config]:
    tables = shipped()[architecture(on.arch)]
    kinds = tables.get(primitive, tables.get(kind, {})).get(precision, {})
    base = "tiled" if kind == "pointwise" else kind
    classes = {**kinds.get(base, {}), **kinds.get(kind, {})} if aligned else kinds.get(f"{base}-unaligned", {})
    if not classes:
        return []
    group = min((c for c in classes if c >= columns), default=max(classes))
    found = classes[group]
    if more and aligned:
        found = found + kinds.get(f"{kind}-more", {}).get(group, [])
    longest = max(MIN_DEPTH, next_power_of_two(depth))
    found = [c._replace(depth=min(c.depth, longest)) for c in found]
    if kind == "persistent":  # the whole reduction in one step
        found = [c for c in found if c.depth >= depth]
    return list(dict.fromkeys(found))


def candidates(
    on: Target, primitive: str, precision: str, kind: str, *, columns: int, depth: int, aligned: bool = True
) -> list[Config]:
    """What a tuner times: the configurations of a problem's class, from the largest tile down, then those that
    are no defaults."""
    return _of_class(True, on, primitive, precision, kind, columns, depth, aligned)


def select(
    on: Target,
    primitive: str,
    precision: str,
    kind: str,
    *,
    rows: int,
    columns: int,
    depth: int,
    aligned: bool = True,
) -> Config | None:
    """The configuration of a problem, or None if no kernel of this kind suits it.

    Args:
        on: the device.
        kind: of kernel, where a primitive has several.
        rows, columns, depth: the sizes of the matrix product (or of what the kernel tiles).
        aligned: see :func:`aligned`.
    """
    if _measured is not None:
        found = _measured(
            Problem(architecture(on.arch), primitive, precision, kind, rows, columns, depth, aligned)
        )
        if found is not None:
            return found
    found = _of_class(False, on, primitive, precision, kind, columns, depth, aligned)
    for config in found:
        if ceil_div(rows, config.rows) * ceil_div(columns, config.columns) >= _FULL * on.multiprocessors:
            return config
    return found[-1] if found else None
