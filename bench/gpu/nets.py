"""The nets that are measured, fused and plain, and the convolutions in them."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from resnet_fused.models import create_model
from resnet_fused.nn import reference, units


class StagedNet(nn.Module):
    """Stem, stages of pre-activation units, BN -> ReLU, pooling, linear layer.

    Args:
        stem: (channels, kernel, stride) of the first convolution; a 3x3 max-pool of stride 2 follows a stem
            of stride 2 (He et al. 2016, "Deep Residual Learning", section 3.3).
        block: "basic" or "bottleneck".
        widths, blocks: of the 3x3 convolutions of each stage, and its number of units. Stages after the first
            halve the image.
    """

    def __init__(self, stem: tuple[int, int, int], block: str, widths: Sequence[int], blocks: Sequence[int],
                 classes: int, fused: bool, device=None) -> None:
        super().__init__()
        self.fused = fused
        source = units if fused else reference
        unit = {"basic": source.PreActBasicBlock, "bottleneck": source.PreActBottleneck}[block]
        channels, kernel, stride = stem
        self.conv1 = nn.Conv2d(3, channels, kernel, stride, kernel // 2, bias=False, device=device)
        self.pool = nn.MaxPool2d(3, 2, 1) if stride > 1 else nn.Identity()
        self.stages = nn.ModuleList()
        for stage, (width, count) in enumerate(zip(widths, blocks, strict=True)):
            members = []
            for index in range(count):
                members.append(unit(channels, width, stride=2 if stage and not index else 1, device=device))
                channels = width * unit.expansion
            self.stages.append(source.PreActStage(*members))
        self.bn = nn.BatchNorm2d(channels, device=device)
        self.fc = nn.Linear(channels, classes, device=device)

    def forward(self, x: Tensor) -> Tensor:
        if not self.fused:
            x = self.pool(self.conv1(x))
            for stage in self.stages:
                x = stage(x)
        else:
            x_stats = None
            if isinstance(self.pool, nn.Identity):
                x, x_stats = units.convolution_with_stats(self.conv1, x, self.stages[0])
            else:
                x = self.pool(self.conv1(x))
            x = units.run_in_turn(self.stages, x, x_stats)[0]
        x = F.relu(self.bn(x))
        return self.fc(F.avg_pool2d(x, x.shape[2:]).flatten(1))


@dataclass(frozen=True)
class Net:
    """A net with the batch that it is measured at."""

    name: str
    batch: int
    size: int
    classes: int
    staged: tuple | None = None  # arguments of StagedNet; None: a net of resnet_fused.models

    def build(self, fused: bool, device=None) -> nn.Module:
        if self.staged is None:
            return create_model(self.name, self.classes, fused=fused, device=device)
        return StagedNet(*self.staged, self.classes, fused, device)

    def batch_of_images(self, device) -> tuple[Tensor, Tensor]:
        """Normal images, channels_last, and labels; the same ones every time."""
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(self.batch, 3, self.size, self.size, generator=generator)
        labels = torch.randint(self.classes, (self.batch,), generator=generator)
        return images.to(device, memory_format=torch.channels_last), labels.to(device)


NETS = {
    net.name: net
    for net in (
        Net("preact_resnet164_cifar", 128, 32, 10),
        # Zagoruyko & Komodakis 2016, "Wide Residual Networks".
        Net("wrn28_10", 128, 32, 10, ((16, 3, 1), "basic", (160, 320, 640), (4, 4, 4))),
        Net("resnetv2_50", 256, 224, 1000,
            ((64, 7, 2), "bottleneck", (64, 128, 256, 512), (3, 4, 6, 3))),
        Net("preact_resnet1001_cifar", 128, 32, 10),
    )
}  # fmt: skip


@dataclass(frozen=True)
class Layer:
    """One convolution of a net.

    ``preact``: BatchNorm and ReLU come before it; ``residual``: it is the last of a unit and adds the
    shortcut; ``image``: it reads the images, of which nobody asks for the gradient.
    """

    input: tuple[int, int, int, int]
    weight: tuple[int, int, int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    preact: bool
    residual: bool
    image: bool

    @property
    def output(self) -> tuple[int, int, int, int]:
        n, _, *size = self.input
        sizes = zip(size, self.weight[2:], self.stride, self.padding, strict=True)
        return (n, self.weight[0], *((e + 2 * p - k) // s + 1 for e, k, s, p in sizes))

    @property
    def geometry(self) -> tuple:
        """stride, padding, dilation, groups, as the primitives take them."""
        return self.stride, self.padding, (1, 1), 1

    @property
    def pointwise(self) -> bool:
        return self.weight[2:] == (1, 1) and self.stride == (1, 1) and self.padding == (0, 0)

    @property
    def flops(self) -> int:
        """Of the forward, the input gradient or the weight gradient: they take the same number."""
        n, k, p, q = self.output
        return 2 * n * k * p * q * self.weight[1] * self.weight[2] * self.weight[3]

    def __str__(self) -> str:
        x, w = ("x".join(map(str, t)) for t in (self.input, self.weight))
        return f"{x} {w} s{self.stride[0]}" + (" +residual" if self.residual else "")


@functools.cache
def layers_of(net: Net) -> Counter[Layer]:
    """The convolutions of a training step, and how often each occurs. Nothing is computed: it runs on
    "meta"."""
    model = net.build(fused=False, device="meta").train()
    found: Counter[Layer] = Counter()
    last = set()
    for module in model.modules():
        if isinstance(module, (reference.PreActBasicBlock, reference.PreActBottleneck)):
            last.add([child for name, child in module.named_children() if name.startswith("conv")][-1])

    def record(conv: nn.Conv2d, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        stem = conv is model.conv1
        found[Layer(tuple(inputs[0].shape), tuple(conv.weight.shape), conv.stride, conv.padding, not stem,
                    conv in last, stem)] += 1  # fmt: skip

    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(record)
    model(torch.empty(net.batch, 3, net.size, net.size, device="meta"))
    return found
