"""DenseNet's layers, blocks and transitions, plain.

Huang, Liu, van der Maaten and Weinberger, "Densely Connected Convolutional Networks" (CVPR 2017,
arXiv:1608.06993): every layer reads the concatenation of all feature maps before it. The names of the
parameters are those of torchvision's DenseNets.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .pre_activation import PreActModule, activation, convolution

__all__ = ["DenseBlock", "DenseLayer", "DenseTransition"]


class DenseLayer(PreActModule):
    """BN -> ReLU -> 1x1 convolution -> BN -> ReLU -> 3x3 convolution: the bottleneck layer, "B" of
    DenseNet-BC.

    Children: ``norm1``, ``conv1`` (to ``4 * growth`` channels), ``norm2``, ``conv2`` (to ``growth``
    channels).

    Args:
        in_channels: channels of the concatenation that it reads.
        growth: the growth rate k, channels of its output.
        dropout: share of the output that is zeroed in training.
        eps, momentum, affine, track_running_stats: as in :class:`torch.nn.BatchNorm2d`.
        negative_slope: slope of the activations below zero; 0 is ReLU.
        bias: whether the convolutions have a bias.

    Shape:
        - Input: (N, in_channels, H, W), any memory format
        - Output: (N, growth, H, W)
    """

    def __init__(
        self,
        in_channels: int,
        growth: int,
        *,
        dropout: float = 0.0,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        negative_slope: float = 0.0,
        bias: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(negative_slope)
        factory = {"device": device, "dtype": dtype}
        norm = (eps, momentum, affine, track_running_stats)
        self.norm1 = nn.BatchNorm2d(in_channels, *norm, **factory)
        self.conv1 = convolution(in_channels, 4 * growth, 1, 1, bias, **factory)
        self.norm2 = nn.BatchNorm2d(4 * growth, *norm, **factory)
        self.conv2 = convolution(4 * growth, growth, 3, 1, bias, **factory)
        self.dropout = nn.Dropout(dropout) if dropout else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(activation(self.norm1(x), self.negative_slope))
        y = self.conv2(activation(self.norm2(y), self.negative_slope))
        return y if self.dropout is None else self.dropout(y)


class DenseBlock(nn.Module):
    """Layers that each read the block's input and the outputs of all layers before, concatenated.

    Children: ``denselayer1``, ``denselayer2``, ...

    Args:
        layers: number of layers.
        in_channels: channels of the input.
        growth: channels that each layer adds.
        options: keyword arguments of every layer.

    Shape:
        - Input: (N, in_channels, H, W), any memory format
        - Output: (N, in_channels + layers * growth, H, W)
    """

    layer: type[DenseLayer] = DenseLayer

    def __init__(self, layers: int, in_channels: int, growth: int, **options: Any) -> None:
        super().__init__()
        for index in range(layers):
            layer = self.layer(in_channels + index * growth, growth, **options)
            self.add_module(f"denselayer{index + 1}", layer)

    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        for layer in self.children():
            features.append(layer(torch.cat(features, 1)))
        return torch.cat(features, 1)


class DenseTransition(PreActModule):
    """BN -> ReLU -> 1x1 convolution -> 2x2 average pool, between two blocks.

    Children: ``norm``, ``conv``.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output ("C" of DenseNet-BC: half of them).
        eps, momentum, affine, track_running_stats, negative_slope, bias: as for :class:`DenseLayer`.

    Shape:
        - Input: (N, in_channels, H, W), any memory format
        - Output: (N, out_channels, H // 2, W // 2)
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        negative_slope: float = 0.0,
        bias: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(negative_slope)
        factory = {"device": device, "dtype": dtype}
        self.norm = nn.BatchNorm2d(in_channels, eps, momentum, affine, track_running_stats, **factory)
        self.conv = convolution(in_channels, out_channels, 1, 1, bias, **factory)

    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(self.conv(activation(self.norm(x), self.negative_slope)), 2)
