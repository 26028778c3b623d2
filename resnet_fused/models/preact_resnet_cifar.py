"""Pre-activation ResNets for 32x32 images (He et al. 2016, "Identity Mappings in Deep Residual Networks",
section 4)."""

from __future__ import annotations

from typing import Any

from .preact_stages import PreActStages

__all__ = ["PreActResNetCifar", "blocks_per_stage"]

_STEM = 16
_WIDTHS = (16, 32, 64)  # of the 3x3 convolutions of the three stages


def blocks_per_stage(depth: int, block: str) -> int:
    """Units n in each of the three stages: depth = 6n + 2 (basic) or 9n + 2 (bottleneck)."""
    if block not in ("basic", "bottleneck"):
        raise ValueError(f"block should be 'basic' or 'bottleneck', but got {block!r}")
    convolutions = {"basic": 2, "bottleneck": 3}[block]
    blocks, rest = divmod(depth - 2, 3 * convolutions)
    if rest or blocks < 1:
        raise ValueError(
            f"depth of a net of {block} units should be {3 * convolutions}n + 2 with n >= 1, but got {depth}"
        )
    return blocks


class PreActResNetCifar(PreActStages):
    """A pre-activation ResNet for small images.

    A 3x3 convolution, three stages of units, BN -> ReLU, global average pool, linear layer. Children:
    ``conv1``, ``layer1``, ``layer2``, ``layer3`` (stages of units), ``bn``, ``fc``. The keys of the
    ``state_dict`` and the initial parameters after one seed are the same for both values of ``fused``.

    Initialisation as in the authors' code: convolutions N(0, sqrt(2 / (k k n_out))), norms 1 and 0, the
    linear layer with PyTorch's weights and a bias of 0.

    Args:
        depth: number of layers with weights: 6n + 2 for basic units, 9n + 2 for bottlenecks.
        block: "basic" (two 3x3 convolutions; widths 16, 32, 64) or "bottleneck" (1x1, 3x3, 1x1; 64, 128,
            256).
        num_classes: outputs.
        in_channels: channels of the images.
        fused: units of :mod:`resnet_fused.nn` instead of those of :mod:`resnet_fused.reference`.
        unit_options: keyword arguments of every unit: eps, momentum, affine, track_running_stats,
            negative_slope, bias.
        device, dtype: of the parameters.

    Shape:
        - Input: (N, in_channels, H, W), any memory format; the fused net computes in channels_last
        - Output: (N, num_classes)
    """

    def __init__(
        self,
        depth: int,
        block: str = "basic",
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
            _WIDTHS,
            blocks_per_stage(depth, block),
            block,
            num_classes=num_classes,
            in_channels=in_channels,
            fused=fused,
            unit_options=unit_options,
            device=device,
            dtype=dtype,
        )
