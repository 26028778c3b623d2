"""ResNets of any unit: original and pre-activation, every shortcut and activation order, for small images and
for ImageNet.

He, Zhang, Ren and Sun, "Deep Residual Learning for Image Recognition" (CVPR 2016, arXiv:1512.03385) and
"Identity Mappings in Deep Residual Networks" (ECCV 2016, arXiv:1603.05027).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from .. import functional as fused_functions
from ..fusion import fuse
from ..fusion.unit import captured
from ..nn import reference, units
from ..nn.reference.residual_unit import PREACTIVATION_ORDERS, ResidualUnit, one_of
from .initialization import initialize

__all__ = ["ResNet"]

_NORM_OPTIONS = ("eps", "momentum", "affine", "track_running_stats")


class ResNet(nn.Module):
    """Convolution, stages of :class:`resnet_fused.reference.ResidualUnit`, global average pool, linear layer.

    Children: ``conv1``, ``bn1`` (the stem's norm, where the order has one), ``layer1``, ``layer2``, ...
    (stages of units), ``bn`` (the last norm, with full pre-activation), ``fc``. With original units and the
    ImageNet stem the keys of the ``state_dict`` are those of torchvision's ResNets.

    The first and the last unit (appendix of the 2016 paper): a pre-activation net activates right after its
    first convolution, before the two paths split, and once more after the last addition.

    Args:
        blocks: units in each stage.
        widths: channels of the units' 3x3 convolutions in each stage.
        block: "basic" or "bottleneck".
        stem: "cifar" (a 3x3 convolution) or "imagenet" (7x7 with stride 2, BN, ReLU, 3x3 max pool with stride
            2).
        stem_channels: channels of the first convolution.
        num_classes: outputs.
        in_channels: channels of the images.
        fused: let :func:`resnet_fused.fuse` put fused operators wherever they apply.
        order, shortcut, shortcut_options, projection, stride_in, dropout: see ResidualUnit.
        first_activation: of pre-activation orders with the CIFAR stem. "before_split": the paper's rule;
            "residual": the first unit is like the others. The ImageNet stem always activates before the
            split.
        unit_options: further keyword arguments of every unit: eps, momentum, affine, track_running_stats,
            negative_slope, bias.
        device, dtype: of the parameters.

    Shape:
        - Input: (N, in_channels, H, W), any memory format; the fused net computes in channels_last
        - Output: (N, num_classes)

    Raises:
        ValueError: unknown names, or a combination without meaning.
    """

    def __init__(
        self,
        blocks: Sequence[int],
        widths: Sequence[int],
        block: str = "basic",
        *,
        stem: str = "cifar",
        stem_channels: int = 16,
        num_classes: int = 10,
        in_channels: int = 3,
        fused: bool = True,
        order: str = "original",
        shortcut: str = "identity",
        shortcut_options: dict[str, Any] | None = None,
        projection: str = "A",
        stride_in: str = "1x1",
        dropout: float = 0.0,
        first_activation: str | None = None,
        unit_options: dict[str, Any] | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        if len(blocks) != len(widths):
            raise ValueError(
                f"blocks and widths should be of one length, but got {len(blocks)} and {len(widths)}"
            )
        one_of("stem", stem, ("cifar", "imagenet"))
        activates = order in PREACTIVATION_ORDERS
        if first_activation is not None:
            one_of("first_activation", first_activation, ("before_split", "residual"))
            if not activates:
                raise ValueError(
                    f"first_activation is an option of pre-activation orders, and {order!r} is none"
                )
            if stem == "imagenet" and first_activation == "residual":
                raise ValueError(
                    "the ImageNet stem activates before its max pool: first_activation is 'before_split'"
                )
        first = "residual"
        if activates and first_activation != "residual":
            first = "none" if stem == "imagenet" else "shared"

        self.fused, self.stem, self.order = fused, stem, order
        factory = {"device": device, "dtype": dtype}
        options = {**(unit_options or {}), **factory}
        self.negative_slope = options.get("negative_slope", 0.0)
        norm = {key: options[key] for key in _NORM_OPTIONS if key in options} | factory
        kernel = 7 if stem == "imagenet" else 3
        stride = 2 if stem == "imagenet" else 1
        self.conv1 = nn.Conv2d(
            in_channels, stem_channels, kernel, stride, padding=kernel // 2, bias=False, **factory
        )
        if stem == "imagenet" or order != "full_preactivation":
            self.bn1 = nn.BatchNorm2d(stem_channels, **norm)
        channels = stem_channels
        self.stages = len(blocks)
        for stage, (count, width) in enumerate(zip(blocks, widths, strict=True), start=1):
            members = []
            for index in range(count):
                unit = ResidualUnit(
                    channels,
                    width,
                    2 if stage > 1 and index == 0 else 1,
                    block=block,
                    order=order,
                    shortcut=shortcut,
                    shortcut_options=shortcut_options,
                    projection=projection,
                    preactivation=first if stage == 1 and index == 0 else "residual",
                    stride_in=stride_in,
                    dropout=dropout,
                    **options,
                )
                channels = width * (4 if block == "bottleneck" else 1)
                members.append(unit)
            self.add_module(f"layer{stage}", nn.Sequential(*members))
        if order == "full_preactivation":
            self.bn = nn.BatchNorm2d(channels, **norm)
        self.fc = nn.Linear(channels, num_classes, **factory)
        self.reset_parameters()
        if fused:
            fuse(self, memory_format=None)

    def reset_parameters(self) -> None:
        """Draw the parameters anew, in the order of the modules."""
        initialize(self)

    def residual_units(self) -> list[tuple[str, nn.Module]]:
        """Name and module of every residual unit, in the order in which they run."""
        return [
            (f"layer{stage}.{index}", unit)
            for stage in range(1, self.stages + 1)
            for index, unit in self.get_submodule(f"layer{stage}").named_children()
        ]

    def activate(self, x: Tensor) -> Tensor:
        return reference.activation(x, self.negative_slope)

    def forward(self, x: Tensor) -> Tensor:
        # fx traces this with a stand-in for x, which has no number of dimensions to ask for.
        unbatched = not isinstance(x, fx.Proxy) and x.dim() != 4
        if self.fused and not unbatched and not units.is_transformed():
            x = x.contiguous(memory_format=torch.channels_last)
        x = self.conv1(x)
        if self.stem == "imagenet":
            # As with the units: what PyTorch looks at itself is the plain net.
            pool = fused_functions.max_pool2d if self.fused and not captured() else F.max_pool2d
            x = pool(self.activate(self.bn1(x)), 3, stride=2, padding=1)
        elif self.order == "relu_only_preactivation":
            x = self.bn1(x)  # the first unit activates it
        elif self.order != "full_preactivation":
            x = self.activate(self.bn1(x))
        for stage in range(1, self.stages + 1):
            x = getattr(self, f"layer{stage}")(x)
        if self.fused and self.order == "full_preactivation" and not captured():
            return self.fc(units.pooled_norm_with_stats(self.bn, x, None, self.negative_slope))
        if self.order in PREACTIVATION_ORDERS:
            x = self.activate(self.bn(x) if self.order == "full_preactivation" else x)
        x = F.avg_pool2d(x, x.shape[2:]).flatten(1)  # its gradient keeps channels_last; mean()'s does not
        return self.fc(x)
