"""residual_units: residual units in turn, in as few autograd nodes as memory allows.

In a deep net of small images, what Python, autograd and the dispatcher do for each unit takes as long as its
kernels. Where one C++ backend runs all of it, they do it once for up to 16 units with identity shortcuts
(half of those in turn at most), and as little as possible for each of the others (unit_node.py).
What comes out is what the units give by themselves, to the bit; wherever something has to see the units one
by one (torch.compile, functorch, a dispatch that is recorded, a backend that runs only some of the
primitives), they are called one by one.
"""

from collections.abc import Sequence

from torch import Tensor

from .arguments import BatchNormArgs, ConvArgs
from .residual_unit import residual_unit_by_dispatcher
from .unit_node import UnitArgs
from .unit_node import run_in_one_node as _one_node

#: Units in one node at most. A node's saved tensors are freed, and its gradients handed to
#: DistributedDataParallel, only when all of it is done. For the same reason one part in SHARE of the units in
#: turn is the most (two units in a node cost a net of nine 4 % of peak memory), and a projecting unit has a
#: node of its own: its input is larger than what is saved for the units behind it.
MOST = 16
SHARE = 2


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
    rows = _rows(units)
    for own, following in zip(rows, [*rows[1:], None], strict=True):
        wanted = return_stats if following is None else following[0].uses_batch_statistics()
        x, x_stats = _one_node(own, x, x_stats, wanted) or _one_by_one(own, x, x_stats, wanted)
    return (x, x_stats) if return_stats else x


def _rows(units: list[UnitArgs]) -> list[list[UnitArgs]]:
    """The units of each node."""
    rows: list[list[UnitArgs]] = []
    for unit in units:
        if rows and unit.shortcut is None and rows[-1][0].shortcut is None:
            rows[-1].append(unit)
        else:
            rows.append([unit])
    cut = []
    for row in rows:
        nodes = -(-len(row) // max(1, min(MOST, len(row) // SHARE)))
        cut += [row[len(row) * i // nodes : len(row) * (i + 1) // nodes] for i in range(nodes)]
    return cut


def _one_by_one(units: Sequence[UnitArgs], x: Tensor, x_stats: Tensor | None, return_stats: bool):
    for unit, following in zip(units, [*units[1:], None]):
        wanted = return_stats if following is None else following.uses_batch_statistics()
        out = residual_unit_by_dispatcher(
            x, unit.norms, unit.convs, shortcut=unit.shortcut, negative_slope=unit.negative_slope,
            x_stats=x_stats, return_stats=wanted,
        )  # fmt: skip
        x, x_stats = out if wanted else (out, None)
    return x, x_stats
