"""DenseNet-BC (Huang, Liu, van der Maaten and Weinberger, "Densely Connected Convolutional Networks", CVPR
2017, arXiv:1608.06993)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import functional as fused_functions
from ..nn import dense, reference, units
from .initialization import initialize

__all__ = ["DenseNet", "dense_layers"]

_NORM_OPTIONS = ("eps", "momentum", "affine", "track_running_stats")


def dense_layers(depth: int) -> int:
    """Layers n in each of the three blocks: depth = 6n + 4."""
    layers, rest = divmod(depth - 4, 6)
    if rest or layers < 1:
        raise ValueError(f"depth of a DenseNet-BC should be 6n + 4 with n >= 1, but got {depth}")
    return layers


class DenseNet(nn.Module):
    """Convolution, dense blocks with transitions that halve channels and resolution, BN -> ReLU, average
    pool, linear.

    Children: ``features`` (``conv0``, with the ImageNet stem ``norm0``, ``denseblock1``, ``transition1``,
    ..., the last norm) and ``classifier``: the keys of the ``state_dict`` are those of torchvision's
    DenseNets.

    Args:
        layers: layers of each block.
        growth: the growth rate k.
        stem: "cifar" (a 3x3 convolution) or "imagenet" (7x7 with stride 2, BN, ReLU, 3x3 max pool with stride
            2); either gives 2k channels.
        num_classes: outputs.
        in_channels: channels of the images.
        fused: layers of :mod:`resnet_fused.nn` that share the statistics of what they read.
        dropout: share of each layer's output that is zeroed (the paper: 0.2 without data augmentation).
        unit_options: keyword arguments of every layer and transition: eps, momentum, affine,
            track_running_stats, negative_slope, bias.
        device, dtype: of the parameters.

    Shape:
        - Input: (N, in_channels, H, W), any memory format; the fused net computes in channels_last
        - Output: (N, num_classes)
    """

    def __init__(
        self,
        layers: Sequence[int],
        growth: int,
        *,
        stem: str = "cifar",
        num_classes: int = 10,
        in_channels: int = 3,
        fused: bool = True,
        dropout: float = 0.0,
        unit_options: dict[str, Any] | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        if stem not in ("cifar", "imagenet"):
            raise ValueError(f"stem should be 'cifar' or 'imagenet', but got {stem!r}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout should be in [0, 1), but got {dropout}")
        self.fused = fused
        self.stem = stem
        source = dense if fused else reference
        factory = {"device": device, "dtype": dtype}
        options = {**(unit_options or {}), **factory}
        norm = {key: options[key] for key in _NORM_OPTIONS if key in options} | factory
        self.negative_slope = options.get("negative_slope", 0.0)
        channels = 2 * growth
        kernel, stride = (7, 2) if stem == "imagenet" else (3, 1)
        self.features = nn.Module()
        self.features.conv0 = nn.Conv2d(
            in_channels, channels, kernel, stride, padding=kernel // 2, bias=False, **factory
        )
        if stem == "imagenet":
            self.features.norm0 = nn.BatchNorm2d(channels, **norm)
        self.blocks = len(layers)
        for index, count in enumerate(layers, start=1):
            block = source.DenseBlock(count, channels, growth, dropout=dropout, **options)
            self.features.add_module(f"denseblock{index}", block)
            channels += count * growth
            if index < self.blocks:
                transition = source.DenseTransition(channels, channels // 2, **options)
                self.features.add_module(f"transition{index}", transition)
                channels //= 2
        self.last_norm = f"norm{self.blocks + 1}"
        self.features.add_module(self.last_norm, nn.BatchNorm2d(channels, **norm))
        self.classifier = nn.Linear(channels, num_classes, **factory)
        self.reset_parameters()

    @property
    def hands_on_statistics(self) -> bool:
        """For ``fuse``: with fused units, this net's forward is no sequence of layers to look into."""
        return self.fused

    def reset_parameters(self) -> None:
        """Draw the parameters anew, in the order of the modules."""
        initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        features = self.features
        fused = self.fused and x.dim() == 4 and not units.is_transformed()
        if fused:
            x = x.contiguous(memory_format=torch.channels_last)
        x = features.conv0(x)
        if self.stem == "imagenet":
            x = reference.activation(features.norm0(x), self.negative_slope)
            pool = fused_functions.max_pool2d if fused else F.max_pool2d
            x = pool(x, 3, stride=2, padding=1)
        x_stats = None
        for index in range(1, self.blocks + 1):
            block = getattr(features, f"denseblock{index}")
            after = getattr(features, f"transition{index}" if index < self.blocks else self.last_norm)
            x, x_stats = self._through_block(block, x, after)
            if index < self.blocks:
                x = after(x) if x_stats is None else after(x, x_stats)
        norm = getattr(features, self.last_norm)
        if fused:
            return self.classifier(units.pooled_norm_with_stats(norm, x, x_stats, self.negative_slope))
        x = reference.activation(norm(x), self.negative_slope)
        x = F.avg_pool2d(x, x.shape[2:]).flatten(1)  # its gradient keeps channels_last; mean()'s does not
        return self.classifier(x)

    def _through_block(self, block: nn.Module, x: Tensor, after: nn.Module) -> tuple[Tensor, Tensor | None]:
        """A block's output, and its statistics if ``after``, a transition or the last norm, will use them."""
        if isinstance(after, units.StatsModule):
            wanted = after.wants_stats()
        else:
            wanted = isinstance(after, nn.BatchNorm2d) and units.is_fusable(after)
            wanted = wanted and units.uses_batch_statistics(after)
        if not wanted or not isinstance(block, dense.DenseBlock) or units.has_hooks(block):
            return block(x), None
        return block(x, return_stats=True)
