"""Pre-activation ResNets for 32x32 images (He et al. 2016, "Identity Mappings in Deep Residual Networks",
section 4)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..nn import reference, units
from ..primitives.layout import acc_dtype

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


class PreActResNetCifar(nn.Module):
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
        super().__init__()
        blocks = blocks_per_stage(depth, block)
        self.fused = fused
        factory = {"device": device, "dtype": dtype}
        source = units if fused else reference
        unit = source.PreActBasicBlock if block == "basic" else source.PreActBottleneck
        options = {**(unit_options or {}), **factory}

        self.conv1 = nn.Conv2d(in_channels, _STEM, 3, padding=1, bias=False, **factory)
        channels = _STEM
        for stage, width in enumerate(_WIDTHS, start=1):
            members = []
            for index in range(blocks):
                members.append(unit(channels, width, stride=2 if stage > 1 and index == 0 else 1, **options))
                channels = width * unit.expansion
            self.add_module(f"layer{stage}", source.PreActStage(*members))
        norm = {
            key: value
            for key, value in options.items()
            if key in ("eps", "momentum", "affine", "track_running_stats", "device", "dtype")
        }
        self.bn = nn.BatchNorm2d(channels, **norm)
        self.negative_slope = options.get("negative_slope", 0.0)
        self.fc = nn.Linear(channels, num_classes, **factory)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the parameters anew, in the order of the modules."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels
                nn.init.normal_(module.weight, 0.0, math.sqrt(2.0 / fan_out))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, (nn.BatchNorm2d, nn.Linear)):
                module.reset_parameters()
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.fused:
            x = self._fused_stages(x)
            # A mean whose gradient is scaled before it is spread over the pixels, where pooling's fills two images.
            pixels = x.shape[2] * x.shape[3]
            x = (x.sum((2, 3), dtype=acc_dtype(x.dtype)) / pixels).to(x.dtype)
        else:
            x = self.layer3(self.layer2(self.layer1(self.conv1(x))))
            x = reference.activation(self.bn(x), self.negative_slope)
            x = F.avg_pool2d(x, x.shape[2:]).flatten(1)  # its gradient keeps channels_last; mean()'s does not
        return self.fc(x)

    def _fused_stages(self, x: Tensor) -> Tensor:
        stages = (self.layer1, self.layer2, self.layer3)
        # Once here, so that no unit has to copy; twice, since one channel has either layout.
        x = x.contiguous(memory_format=torch.channels_last)
        x, x_stats = units.convolution_with_stats(self.conv1, x, self.layer1)
        x = x.contiguous(memory_format=torch.channels_last)
        wanted = units.is_fusable(self.bn) and units.uses_batch_statistics(self.bn)
        x, x_stats = units.run_in_turn(stages, x, x_stats, return_stats=wanted)
        return units.norm_with_stats(self.bn, x, x_stats, self.negative_slope)
