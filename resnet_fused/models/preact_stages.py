"""What pre-activation nets for small images have in common whose units hand their statistics on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..nn import reference, units
from .initialization import initialize

__all__ = ["PreActStages"]


class PreActStages(nn.Module):
    """A 3x3 convolution, three stages of pre-activation units, BN -> ReLU, global average pool, linear layer.

    Children: ``conv1``, ``layer1``, ``layer2``, ``layer3`` (stages of units), ``bn``, ``fc``. The keys of the
    ``state_dict`` and the initial parameters after one seed are the same for both values of ``fused``.

    Args:
        stem: channels of the first convolution.
        widths: channels of the units' 3x3 convolutions in each stage.
        blocks: units in each stage.
        block: "basic" or "bottleneck".
        num_classes, in_channels, fused, unit_options, device, dtype: see :class:`PreActResNetCifar`.
    """

    def __init__(
        self,
        stem: int,
        widths: Sequence[int],
        blocks: int,
        block: str,
        *,
        num_classes: int,
        in_channels: int,
        fused: bool,
        unit_options: dict[str, Any] | None,
        device: Any,
        dtype: Any,
    ) -> None:
        super().__init__()
        self.fused = fused
        factory = {"device": device, "dtype": dtype}
        source = units if fused else reference
        unit = source.PreActBasicBlock if block == "basic" else source.PreActBottleneck
        options = {**(unit_options or {}), **factory}

        self.conv1 = nn.Conv2d(in_channels, stem, 3, padding=1, bias=False, **factory)
        channels = stem
        for stage, width in enumerate(widths, start=1):
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

    @property
    def hands_on_statistics(self) -> bool:
        """For ``fuse``: with fused units, this net's forward is no sequence of layers to look into."""
        return self.fused

    def reset_parameters(self) -> None:
        """Draw the parameters anew, in the order of the modules."""
        initialize(self)

    def residual_units(self) -> list[tuple[str, nn.Module]]:
        """Name and module of every residual unit, in the order in which they run."""
        return [
            (f"layer{stage}.{index}", unit)
            for stage in (1, 2, 3)
            for index, unit in self.get_submodule(f"layer{stage}").named_children()
        ]

    def forward(self, x: Tensor) -> Tensor:
        if self.fused and x.dim() == 4 and not units.is_transformed():
            x = self._fused_stages(x)
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
        return units.pooled_norm_with_stats(self.bn, x, x_stats, self.negative_slope)
