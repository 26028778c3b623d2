"""How the elementwise kernels split an activation: rows are pixels, columns are channels.

A program has a block of channels, whose parameters it reads once, and `steps` tiles of neighbouring pixels.
Without a reduction a program has one tile; with one, programs are few enough that a single further launch
merges their partial results.
"""

from typing import NamedTuple

import torch

from . import configs
from .geometry import ceil_div, channel_unit, next_power_of_two
from .launch import Target
from .reduction import ONE_STEP


class Tiling(NamedTuple):
    """Of an activation [pixels, channels]."""

    grid: tuple[int, int]  # programs along pixels and along channels
    steps: int
    rows_per_program: int
    scalars: tuple[int, int, int]  # pixels, steps, c_units
    constants: tuple  # C_UNIT, WIDE, BLOCK_M, BLOCK_C
    options: dict[str, int]

    @property
    def groups(self) -> int:
        """How many partial results a reduction has."""
        return self.grid[0]


def tiling(on: Target, primitive: str, dtype: torch.dtype, shape, reduces: bool) -> Tiling:
    """The tiling of an activation of shape [N, C, H, W], not empty."""
    n, channels, h, w = shape
    pixels = n * h * w
    if pixels >= 2**31 - 2**24:
        raise RuntimeError(f"{primitive} on triton counts pixels in 32 bits, but there are {pixels}")
    kind = "32bit" if dtype is torch.float32 else "16bit"
    config = configs.select(on, primitive, kind, "elementwise", rows=pixels, columns=channels, depth=1)
    columns = min(config.columns, next_power_of_two(channels))
    rows = config.rows * config.columns // columns
    tiles, tiles_c = ceil_div(pixels, rows), ceil_div(channels, columns)
    steps = 1
    if reduces:
        programs = max(1, min(ONE_STEP, config.programs * on.multiprocessors // tiles_c))
        steps = ceil_div(tiles, programs)
    unit = channel_unit(channels)
    wide = pixels * channels >= 2**31 - 2**24  # with a margin for tiles that hang over the end
    return Tiling(
        (ceil_div(tiles, steps), tiles_c),
        steps,
        steps * rows,
        (pixels, steps, channels // unit),
        (unit, wide, rows, columns),
        config.options,
    )
