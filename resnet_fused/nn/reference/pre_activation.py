"""Plain ``nn.Module`` twins of the fused pre-activation units.

The units are those of He, Zhang, Ren and Sun, "Identity Mappings in Deep Residual Networks" (ECCV 2016,
arXiv:1603.05027): ``x_{l+1} = x_l + F(x_l)`` where ``F`` is two or three times BatchNorm -> ReLU ->
convolution (figure 4e, "full pre-activation"). Where the number of channels or the resolution changes, the
shortcut is a 1x1 convolution that reads the first pre-activation of the unit, as in the authors' code.

They define what the fused units of :mod:`resnet_fused.nn` compute, and the names of their parameters.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["PreActBasicBlock", "PreActBottleneck", "PreActConv2d", "PreActStage", "ResidualAdd"]


def activation(x: Tensor, negative_slope: float = 0.0) -> Tensor:
    """ReLU, or LeakyReLU where ``negative_slope`` is not zero."""
    return F.relu(x) if negative_slope == 0.0 else F.leaky_relu(x, negative_slope)


def convolution(
    in_channels: int, out_channels: int, kernel_size: int, stride: int, bias: bool, **factory: Any
) -> nn.Conv2d:
    """A convolution that keeps the resolution at stride 1 (padding is half of an odd ``kernel_size``)."""
    return nn.Conv2d(
        in_channels, out_channels, kernel_size, stride, padding=kernel_size // 2, bias=bias, **factory
    )


class PreActModule(nn.Module):
    """What the pre-activation modules have in common: the slope of their activation."""

    def __init__(self, negative_slope: float) -> None:
        super().__init__()
        self.negative_slope = negative_slope

    def extra_repr(self) -> str:
        return f"negative_slope={self.negative_slope}" if self.negative_slope else ""


class PreActConv2d(PreActModule):
    """BatchNorm -> ReLU -> convolution.

    Children: ``bn`` (:class:`torch.nn.BatchNorm2d`) and ``conv`` (:class:`torch.nn.Conv2d`).

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups: as in
            :class:`torch.nn.Conv2d`.
        bias: whether the convolution has a bias (default: no, as in the nets of the paper).
        eps, momentum, affine, track_running_stats: as in :class:`torch.nn.BatchNorm2d`.
        negative_slope: slope of the activation below zero; 0 is ReLU.

    Shape:
        - Input: (N, in_channels, H, W), any memory format
        - Output: (N, out_channels, H_out, W_out), as :class:`torch.nn.Conv2d`
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = False,
        *,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        negative_slope: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(negative_slope)
        factory = {"device": device, "dtype": dtype}
        self.bn = nn.BatchNorm2d(in_channels, eps, momentum, affine, track_running_stats, **factory)
        self.conv = nn.Conv2d(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, **factory
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(activation(self.bn(x), self.negative_slope))


class PreActBasicBlock(PreActModule):
    """Residual unit of two 3x3 pre-activation convolutions (paper: figure 4e; the unit of ResNet-110).

    Children: ``bn1``, ``conv1`` (3x3, with the stride), ``bn2``, ``conv2`` (3x3), and ``shortcut``: a 1x1
        convolution of
    the first pre-activation, with the stride, where the number of channels or the resolution changes, else
    None.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        stride: stride of ``conv1`` and of ``shortcut``.
        eps, momentum, affine, track_running_stats: as in :class:`torch.nn.BatchNorm2d`, for each of the
            norms.
        negative_slope: slope of the activations below zero; 0 is ReLU.
        bias: whether the convolutions have a bias.

    Shape:
        - Input: (N, in_channels, H, W), any memory format
        - Output: (N, out_channels, ceil(H / stride), ceil(W / stride))
    """

    expansion = 1

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int = 1,
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
        norm = (eps, momentum, affine, track_running_stats)
        self.bn1 = nn.BatchNorm2d(in_channels, *norm, **factory)
        self.conv1 = convolution(in_channels, out_channels, 3, stride, bias, **factory)
        self.bn2 = nn.BatchNorm2d(out_channels, *norm, **factory)
        self.conv2 = convolution(out_channels, out_channels, 3, 1, bias, **factory)
        self.shortcut = None
        if stride != 1 or in_channels != out_channels:
            self.shortcut = convolution(in_channels, out_channels, 1, stride, bias, **factory)

    def terms(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(h, F), the shortcut's and the residual branch's term: ``unit(x) == h + F``."""
        a = activation(self.bn1(x), self.negative_slope)
        h = x if self.shortcut is None else self.shortcut(a)
        y = self.conv1(a)
        y = self.conv2(activation(self.bn2(y), self.negative_slope))
        return h, y

    def after_addition(self, y: Tensor) -> Tensor:
        """f in x_{l+1} = f(h + F): the identity."""
        return y

    def forward(self, x: Tensor) -> Tensor:
        h, y = self.terms(x)
        return y + h


class PreActBottleneck(PreActModule):
    """Residual unit of a 1x1, a 3x3 and a 1x1 pre-activation convolution (the unit of ResNet-164).

    Children: ``bn1``, ``conv1`` (1x1, with the stride, as in the authors' code), ``bn2``, ``conv2`` (3x3),
        ``bn3``,
    ``conv3`` (1x1), and ``shortcut``: a 1x1 convolution of the first pre-activation, with the stride, where
    the number of channels or the resolution changes, else None.

    Args:
        in_channels: channels of the input.
        channels: channels of the 3x3 convolution; the output has ``channels * expansion``.
        stride: stride of ``conv1`` and of ``shortcut``.
        expansion: output channels per channel of the 3x3 convolution.
        eps, momentum, affine, track_running_stats: as in :class:`torch.nn.BatchNorm2d`, for each of the
            norms.
        negative_slope: slope of the activations below zero; 0 is ReLU.
        bias: whether the convolutions have a bias.

    Shape:
        - Input: (N, in_channels, H, W), any memory format
        - Output: (N, channels * expansion, ceil(H / stride), ceil(W / stride))
    """

    expansion = 4

    def __init__(
        self,
        in_channels: int,
        channels: int,
        stride: int = 1,
        expansion: int = 4,
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
        norm = (eps, momentum, affine, track_running_stats)
        out_channels = channels * expansion
        self.bn1 = nn.BatchNorm2d(in_channels, *norm, **factory)
        self.conv1 = convolution(in_channels, channels, 1, stride, bias, **factory)
        self.bn2 = nn.BatchNorm2d(channels, *norm, **factory)
        self.conv2 = convolution(channels, channels, 3, 1, bias, **factory)
        self.bn3 = nn.BatchNorm2d(channels, *norm, **factory)
        self.conv3 = convolution(channels, out_channels, 1, 1, bias, **factory)
        self.shortcut = None
        if stride != 1 or in_channels != out_channels:
            self.shortcut = convolution(in_channels, out_channels, 1, stride, bias, **factory)

    def terms(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(h, F), the shortcut's and the residual branch's term: ``unit(x) == h + F``."""
        a = activation(self.bn1(x), self.negative_slope)
        h = x if self.shortcut is None else self.shortcut(a)
        y = self.conv1(a)
        y = self.conv2(activation(self.bn2(y), self.negative_slope))
        y = self.conv3(activation(self.bn3(y), self.negative_slope))
        return h, y

    def after_addition(self, y: Tensor) -> Tensor:
        """f in x_{l+1} = f(h + F): the identity."""
        return y

    def forward(self, x: Tensor) -> Tensor:
        h, y = self.terms(x)
        return y + h


class PreActStage(nn.Sequential):
    """Residual units that run one after another: the part of a net that works at one resolution.

    Args:
        units: the residual units, as in :class:`torch.nn.Sequential`.
    """


class ResidualAdd(nn.Module):
    """The addition of a residual unit: ``act(x + alpha * gate * y)``.

    Args:
        alpha: constant factor of the residual branch (1 in the paper; Inception-ResNet uses 0.1 to 0.3).
        negative_slope: None for no activation after the addition (pre-activation nets), 0 for ReLU (the
            original ResNet), other values for LeakyReLU.

    Shape:
        - x, y: (N, C, H, W), any memory format
        - gate (optional): (N, C) or (N, 1), the factor of each channel or image, e.g. squeeze-and-excitation
          or stochastic depth
        - Output: (N, C, H, W)
    """

    def __init__(self, alpha: float = 1.0, negative_slope: float | None = None) -> None:
        super().__init__()
        self.alpha = alpha
        self.negative_slope = negative_slope

    def forward(self, x: Tensor, y: Tensor, gate: Tensor | None = None) -> Tensor:
        if gate is not None:
            y = y * gate[:, :, None, None].to(y.dtype)
        y = x + (y if self.alpha == 1.0 else self.alpha * y)
        return y if self.negative_slope is None else activation(y, self.negative_slope)

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}, negative_slope={self.negative_slope}"
