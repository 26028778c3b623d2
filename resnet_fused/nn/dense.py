"""DenseNet's layers, blocks and transitions, fused: drop-in twins of those in :mod:`.reference.dense`.

The norm of a dense layer reads a concatenation. Its statistics are those of the parts, side by side, and
every part brings its own: the block's input once, each layer's output from the convolution that made it. So
no pass over memory is spent on statistics, where a plain block reads each feature map once per layer behind
it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as nnF

from .. import functional as F
from ..primitives.layout import channels_last
from .reference import dense
from .units import (
    StatsModule,
    UnitOutput,
    batch_norm_args,
    conv_args,
    has_hooks,
    is_fusable,
    uses_batch_statistics,
)

__all__ = ["DenseBlock", "DenseLayer", "DenseTransition"]


def preact_conv2d(
    bn: nn.BatchNorm2d,
    conv: nn.Conv2d,
    x: Tensor,
    negative_slope: float,
    x_stats: Tensor | None,
    return_stats: bool,
) -> UnitOutput:
    """The operator, for a norm and a convolution of a module."""
    norm, args = batch_norm_args(bn), conv_args(conv)
    return F.preact_conv2d(
        x,
        norm.weight,
        norm.bias,
        norm.running_mean,
        norm.running_var,
        args.weight,
        args.bias,
        training=norm.training,
        momentum=norm.momentum,
        eps=norm.eps,
        stride=args.stride,
        padding=args.padding,
        dilation=args.dilation,
        groups=args.groups,
        negative_slope=negative_slope,
        x_stats=x_stats,
        return_stats=return_stats,
    )


class DenseLayer(StatsModule, dense.DenseLayer):
    __doc__ = dense.DenseLayer.__doc__

    def first_norm(self) -> nn.Module:
        return self.norm1

    def forward(self, x: Tensor, x_stats: Tensor | None = None, return_stats: bool = False) -> UnitOutput:
        parts = (self.norm1, self.conv1, self.norm2, self.conv2)
        if not all(map(is_fusable, parts)):
            return self._plain(x, return_stats)
        inner = uses_batch_statistics(self.norm2)
        y = preact_conv2d(self.norm1, self.conv1, x, self.negative_slope, x_stats, inner)
        y, y_stats = y if inner else (y, None)
        drops = self.dropout is not None and (
            has_hooks(self.dropout) or (self.dropout.training and self.dropout.p > 0)
        )
        y = preact_conv2d(self.norm2, self.conv2, y, self.negative_slope, y_stats, return_stats and not drops)
        if drops:
            y = self.dropout(y)
            return (y, None) if return_stats else y
        return y


class DenseBlock(dense.DenseBlock):
    __doc__ = dense.DenseBlock.__doc__
    layer = DenseLayer

    def forward(self, x: Tensor, return_stats: bool = False) -> UnitOutput:
        """The plain block's output; with ``return_stats`` also its statistics, None if a part has none."""
        features, stats = [x], [None]
        layers = list(self.children())
        for index, layer in enumerate(layers):
            joined = torch.cat(features, 1)
            if not isinstance(layer, StatsModule) or has_hooks(layer):
                y, y_stats = layer(joined), None
            elif not layer.wants_stats():
                y, y_stats = layer(joined), None
            else:
                known = self._of_parts(features, stats)
                wanted = return_stats or any(
                    isinstance(later, StatsModule) and later.wants_stats() for later in layers[index + 1 :]
                )
                y = layer(joined, known, return_stats=wanted)
                y, y_stats = y if wanted else (y, None)
            features.append(y)
            stats.append(y_stats)
        joined = torch.cat(features, 1)
        return (joined, self._of_parts(features, stats)) if return_stats else joined

    @staticmethod
    def _of_parts(features: list[Tensor], stats: list[Tensor | None]) -> Tensor | None:
        """The statistics of the concatenation; what is not known yet is computed and kept in ``stats``."""
        if features[0].dim() != 4 or features[0].numel() == 0 or len({f.dtype for f in features}) > 1:
            return None
        for index, (feature, known) in enumerate(zip(features, stats, strict=True)):
            if known is None:
                stats[index] = torch.ops.resnet_fused.channel_stats(channels_last(feature.detach()))
        return torch.cat(stats, 1)


class DenseTransition(StatsModule, dense.DenseTransition):
    __doc__ = dense.DenseTransition.__doc__

    def first_norm(self) -> nn.Module:
        return self.norm

    def forward(self, x: Tensor, x_stats: Tensor | None = None, return_stats: bool = False) -> UnitOutput:
        if not (is_fusable(self.norm) and is_fusable(self.conv)):
            return self._plain(x, return_stats)
        y = nnF.avg_pool2d(preact_conv2d(self.norm, self.conv, x, self.negative_slope, x_stats, False), 2)
        return (y, None) if return_stats else y
