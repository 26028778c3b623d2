"""Nets by name."""

from __future__ import annotations

import difflib
from typing import Any

from torch import nn

from .preact_resnet_cifar import PreActResNetCifar

__all__ = ["create_model", "list_models"]

_DEPTHS = {"basic": (20, 32, 44, 56, 110, 1202), "bottleneck": (29, 164, 1001)}
_MODELS = {
    f"preact_resnet{depth}_cifar": (depth, block) for block, depths in _DEPTHS.items() for depth in depths
}


def list_models() -> list[str]:
    """Names that :func:`create_model` knows, in order of depth."""
    return sorted(_MODELS, key=lambda name: _MODELS[name][0])


def create_model(
    name: str, num_classes: int = 10, fused: bool = True, in_channels: int = 3, **options: Any
) -> nn.Module:
    """A net by its name, with fresh parameters.

    Args:
        name: one of :func:`list_models`: ``preact_resnet{depth}_cifar``, with basic units for depths 20, 32,
            44, 56, 110 and 1202, with bottlenecks for 29, 164 and 1001.
        num_classes: outputs.
        fused: fused units; False builds the same net of plain ``nn.Module`` units, with the same
            ``state_dict`` keys.
        in_channels: channels of the images.
        options: passed to :class:`PreActResNetCifar`: ``unit_options``, ``device``, ``dtype``.

    Raises:
        ValueError: an unknown name; the message lists the nearest ones.
    """
    if name not in _MODELS:
        close = difflib.get_close_matches(name, list_models(), n=3, cutoff=0.5)
        known = (
            f"Did you mean {' or '.join(close)}?" if close else f"Known models: {', '.join(list_models())}"
        )
        raise ValueError(f"Unknown model {name!r}. {known}")
    depth, block = _MODELS[name]
    return PreActResNetCifar(
        depth, block, num_classes=num_classes, in_channels=in_channels, fused=fused, **options
    )
