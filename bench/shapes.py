"""The layers that are timed: of the pre-activation ResNets 20 and 164 at batch 64, 32x32 images."""

from __future__ import annotations

from dataclasses import dataclass

BATCH = 64


@dataclass(frozen=True)
class Conv:
    """One convolution, padded by half of its kernel; ``residual``: the last of its unit adds the shortcut."""

    channels: int
    out_channels: int
    kernel: int
    size: int  # height and width of the input
    stride: int = 1
    residual: bool = False

    def __str__(self) -> str:
        kernel = f"{self.kernel}x{self.kernel}" + (f"s{self.stride}" if self.stride > 1 else "")
        return f"{kernel}-{self.channels}to{self.out_channels}-{self.size}x{self.size}"

    @property
    def input(self) -> tuple[int, int, int, int]:
        return BATCH, self.channels, self.size, self.size

    @property
    def output(self) -> tuple[int, int, int, int]:
        size = (self.size - 1) // self.stride + 1
        return BATCH, self.out_channels, size, size

    @property
    def weight(self) -> tuple[int, int, int, int]:
        return self.out_channels, self.channels, self.kernel, self.kernel

    @property
    def geometry(self) -> tuple:
        """stride, padding, dilation, groups, as the primitives take them."""
        return (self.stride,) * 2, (self.kernel // 2,) * 2, (1, 1), 1

    @property
    def flops(self) -> int:
        """Of the forward, the input gradient or the weight gradient: they take the same number."""
        n, k, p, q = self.output
        return 2 * n * k * p * q * self.channels * self.kernel**2


CONVOLUTIONS = [
    Conv(16, 16, 3, 32, residual=True),
    Conv(16, 32, 3, 32, stride=2),
    Conv(64, 64, 3, 8, residual=True),
    Conv(64, 16, 1, 32),
    Conv(16, 64, 1, 32, residual=True),
    Conv(256, 64, 1, 8),
]

#: Of the elementwise primitives: N, C, H, W.
ACTIVATIONS = [(BATCH, 16, 32, 32), (BATCH, 64, 32, 32), (BATCH, 256, 8, 8)]


@dataclass(frozen=True)
class Unit:
    """A residual unit; ``channels`` of its input, ``width`` of its 3x3 convolutions."""

    block: str  # "basic" or "bottleneck"
    channels: int
    width: int
    size: int
    stride: int = 1

    def __str__(self) -> str:
        stride = f"s{self.stride}" if self.stride > 1 else ""
        return f"{self.block}{stride}-{self.channels}-{self.width}-{self.size}x{self.size}"

    @property
    def input(self) -> tuple[int, int, int, int]:
        return BATCH, self.channels, self.size, self.size


UNITS = [
    Unit("basic", 16, 16, 32),
    Unit("basic", 16, 32, 32, stride=2),
    Unit("basic", 64, 64, 8),
    Unit("bottleneck", 64, 16, 32),
    Unit("bottleneck", 64, 32, 32, stride=2),
    Unit("bottleneck", 256, 64, 8),
]


def shape_id(shape: object) -> str:
    return "x".join(map(str, shape)) if isinstance(shape, tuple) else str(shape)
