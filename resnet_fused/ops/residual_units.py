"""residual_units: residual units in turn, in few autograd nodes.

What Python, autograd and the dispatcher do for each unit takes a good part of a step in a net of small images, most
of it to bring their code and data back into the caches that the kernels have emptied. Where one C++ backend runs all
of it, it is done once for up to 16 units (unit_node.py).
What comes out is what the units give by themselves, to the bit; wherever something has to see the units one
by one (torch.compile, functorch, a dispatch that is recorded, a backend that runs only some of the
primitives), they are called one by one.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.compiler import is_compiling

from . import last_use
from .arguments import BatchNormArgs, ConvArgs
from .residual_unit import residual_unit_by_dispatcher
from .unit_node import UnitArgs
from .unit_node import run_in_one_node as _one_node

#: Units in one node at most, and bytes of their parameters if they are several: a node hands its gradients on (to
#: DistributedDataParallel, whose buckets hold 25 MiB, or to hooks) only when all of it is done. What it has saved it frees
#: unit by unit.
MOST = 16
MOST_BYTES = 16 << 20


def residual_unit(
    x: Tensor,
    norms: Sequence[BatchNormArgs],
    convs: Sequence[ConvArgs],
    *,
    shortcut: ConvArgs | None = None,
    negative_slope: float = 0.0,
    x_stats: Tensor | None = None,
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """A pre-activation residual unit: ``s + conv_n(act(bn_n(... conv_1(act(bn_1(x))))))``.

    Args:
        x: [N, C, H, W]; float32, float64, bfloat16 or float16; channels_last is the fast layout.
        norms, convs: the BatchNorms and the convolutions in order, as many of one as of the other: 2 in a
            basic unit, 3 in a bottleneck. 'same' padding needs odd kernels here.
        shortcut: None: s = x, and the convolutions must keep x's size. Else s = conv(act(bn_1(x))), a
            projection of the unit's first pre-activation: padding 0, dilation 1, groups 1.
        negative_slope: 0 is ReLU, more is LeakyReLU.
        x_stats: mean and M2 of exactly this x, [2, C], as the unit before returned them.
        return_stats: return the statistics of the output too, for the next unit.

    Returns:
        out [N, K, P, Q], channels_last if x or a weight is, else contiguous; or (out, its statistics, [2, K]
        in float32, float64 for float64).

    Raises:
        ValueError, RuntimeError: as nn.BatchNorm2d, nn.Conv2d and the addition do for the same arguments.
    """
    units = [UnitArgs(norms, convs, shortcut, negative_slope)]
    return residual_units(x, units, x_stats=x_stats, return_stats=return_stats)


def residual_units(
    x: Tensor, units: Sequence[UnitArgs], *, x_stats: Tensor | None = None, return_stats: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """Pre-activation residual units, each with the output of the one before.

    Args:
        x, x_stats, return_stats: as for :func:`~resnet_fused.functional.residual_unit`.
        units: at least one; the statistics of what one returns are handed to the next.

    Returns:
        What the last unit returns: out, or (out, its statistics).

    Raises:
        ValueError, RuntimeError: as residual_unit does. Units before the one that raises may have updated
            their running statistics.
    """
    units = list(units)
    if not units:
        raise ValueError("residual_units: expected at least one unit")
    first = _first_with_gradient(units, x)
    x, x_stats = _in_turn(_rows(units[:first]) + _rows(units[first:]), x, x_stats, return_stats)
    return (x, x_stats) if return_stats else x


def _first_with_gradient(units: list[UnitArgs], x: Tensor) -> int:
    """How many units have no gradient, as in a net whose first stages are frozen: a node would save their tensors too."""
    if torch.is_grad_enabled() and not x.requires_grad:
        for index, unit in enumerate(units):
            layers = (*unit.norms, *unit.convs, *([] if unit.shortcut is None else [unit.shortcut]))
            if torch._C._any_requires_grad(*[t for layer in layers for t in (layer.weight, layer.bias)]):
                return index
    return 0


def _bytes_of_parameters(unit: UnitArgs) -> int:
    convs = unit.convs if unit.shortcut is None else [*unit.convs, unit.shortcut]
    return sum([conv.weight.nbytes for conv in convs])  # a BatchNorm's do not count beside them


def _rows(units: list[UnitArgs]) -> list[list[UnitArgs]]:
    """The units of each node: as few nodes as may be, of as equal a number of units as may be. Hooks for saved tensors
    (that offload them, say) would get back all of a node's at once: those of one unit."""
    if len(units) < 2 or is_compiling() or not last_use.may_be_owned():
        return [[unit] for unit in units]
    sizes = [_bytes_of_parameters(unit) for unit in units]
    length = -(-len(units) // -(-len(units) // MOST))
    rows: list[list[UnitArgs]] = []
    total = 0
    for unit, size in zip(units, sizes, strict=True):
        row = rows[-1] if rows else []
        if 0 < len(row) < length and total + size <= MOST_BYTES and _are_alike(unit, row[0]):
            row.append(unit)
            total += size
        else:
            rows.append([unit])
            total = size
    return rows


def _are_alike(a: UnitArgs, b: UnitArgs) -> bool:
    """What the units of a node have in common."""
    return a.negative_slope == b.negative_slope and a.uses_batch_statistics() == b.uses_batch_statistics()


def _in_turn(
    rows: Sequence[Sequence[UnitArgs]], x: Tensor, x_stats: Tensor | None, return_stats: bool
) -> tuple[Tensor, Tensor | None]:
    for row, following in zip(rows, [*rows[1:], None], strict=True):
        wanted = return_stats if following is None else following[0].uses_batch_statistics()
        x, x_stats = _row(row, x, x_stats, wanted)
    return x, x_stats


def _row(
    units: Sequence[UnitArgs], x: Tensor, x_stats: Tensor | None, return_stats: bool
) -> tuple[Tensor, Tensor | None]:
    """In one node; where that cannot be, in one for each unit, or by the dispatcher."""
    found = _one_node(units, x, x_stats, return_stats)
    if found is not None:
        return found
    if len(units) > 1:
        return _in_turn([[unit] for unit in units], x, x_stats, return_stats)
    (unit,) = units
    out = residual_unit_by_dispatcher(
        x, unit.norms, unit.convs, shortcut=unit.shortcut, negative_slope=unit.negative_slope,
        x_stats=x_stats, return_stats=return_stats,
    )  # fmt: skip
    return out if return_stats else (out, None)
