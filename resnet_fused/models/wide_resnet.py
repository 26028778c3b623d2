"""Wide ResNets (Zagoruyko and Komodakis, "Wide Residual Networks", BMVC 2016, arXiv:1605.07146)."""

from __future__ import annotations

from typing import Any

from .preact_stages import PreActStages

__all__ = ["WideResNetCifar", "wide_blocks", "wide_widths"]

_STEM = 16


def wide_blocks(depth: int) -> int:
    """Units n in each of the three stages: depth = 6n + 4, the projections counted."""
    blocks, rest = divmod(depth - 4, 6)
    if rest or blocks < 1:
        raise ValueError(f"depth of a Wide ResNet should be 6n + 4 with n >= 1, but got {depth}")
    return blocks


def wide_widths(width: int) -> tuple[int, int, int]:
    """Channels of the three stages."""
    if width < 1:
        raise ValueError(f"width of a Wide ResNet should be at least 1, but got {width}")
    return 16 * width, 32 * width, 64 * width


class WideResNetCifar(PreActStages):
    """WRN-depth-width: pre-activation units of two 3x3 convolutions, ``width`` times as many channels.

    Without dropout; with it, see ``create_model("wrn28_10_cifar", dropout=0.3)``. Children, initialisation
    and the other arguments are those of :class:`PreActResNetCifar`; where channels change, the shortcut is a
    1x1 convolution of the pre-activation, as in the authors' code.

    Args:
        depth: 6n + 4.
        width: the widening factor k.
    """

    def __init__(
        self,
        depth: int,
        width: int,
        *,
        num_classes: int = 10,
        in_channels: int = 3,
        fused: bool = True,
        unit_options: dict[str, Any] | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(
            _STEM,
            wide_widths(width),
            wide_blocks(depth),
            "basic",
            num_classes=num_classes,
            in_channels=in_channels,
            fused=fused,
            unit_options=unit_options,
            device=device,
            dtype=dtype,
        )
