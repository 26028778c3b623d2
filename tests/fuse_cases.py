"""Units as users write them, each after its described dataflow, and what to compare of two models."""

import copy

import torch
import torch.nn.functional as F
from torch import nn


class CifarBlock(nn.Module):
    """As in pytorch-cifar: functional relu, a shortcut that exists only where it projects, ``out +=``."""

    def __init__(self, channels, out, stride=1):
        super().__init__()
        self.bn1, self.bn2 = nn.BatchNorm2d(channels), nn.BatchNorm2d(out)
        self.conv1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        if stride != 1 or channels != out:
            self.shortcut = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False))

    def forward(self, x):
        out = F.relu(self.bn1(x))
        shortcut = self.shortcut(out) if hasattr(self, "shortcut") else x
        out = self.conv1(out)
        out = self.conv2(F.relu(self.bn2(out)))
        out += shortcut
        return out


class SEBlock(CifarBlock):
    """The same with squeeze-and-excitation before the addition."""

    def __init__(self, channels, out, stride=1):
        super().__init__(channels, out, stride)
        self.fc1, self.fc2 = nn.Conv2d(out, 4, 1), nn.Conv2d(4, out, 1)

    def forward(self, x):
        out = F.relu(self.bn1(x))
        shortcut = self.shortcut(out) if hasattr(self, "shortcut") else x
        out = self.conv2(F.relu(self.bn2(self.conv1(out))))
        w = F.avg_pool2d(out, out.size(2))
        w = torch.sigmoid(self.fc2(F.relu(self.fc1(w))))
        out = out * w
        out += shortcut
        return out


class CifarBottleneck(nn.Module):
    def __init__(self, channels, out, stride=1):
        super().__init__()
        mid = out // 2
        self.bn1, self.bn2, self.bn3 = nn.BatchNorm2d(channels), nn.BatchNorm2d(mid), nn.BatchNorm2d(mid)
        self.conv1 = nn.Conv2d(channels, mid, 1, bias=False)
        self.conv2 = nn.Conv2d(mid, mid, 3, stride, 1, bias=False)
        self.conv3 = nn.Conv2d(mid, out, 1, bias=False)
        if stride != 1 or channels != out:
            self.shortcut = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False))

    def forward(self, x):
        out = F.relu(self.bn1(x))
        shortcut = self.shortcut(out) if hasattr(self, "shortcut") else x
        out = self.conv1(out)
        out = self.conv2(F.relu(self.bn2(out)))
        out = self.conv3(F.relu(self.bn3(out)))
        out += shortcut
        return out


class WideBlock(nn.Module):
    """As in WideResNet-pytorch: shares bn1-relu1 only where channels change; dropout before conv2."""

    def __init__(self, channels, out, stride=1, drop=0.0, act=None):
        super().__init__()
        self.bn1, self.bn2 = nn.BatchNorm2d(channels), nn.BatchNorm2d(out)
        self.relu1, self.relu2 = (act or nn.ReLU(inplace=True)), (act or nn.ReLU(inplace=True))
        self.conv1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.droprate, self.equalInOut = drop, channels == out
        self.convShortcut = None if channels == out else nn.Conv2d(channels, out, 1, stride, bias=False)

    def forward(self, x):
        if not self.equalInOut:
            x = self.relu1(self.bn1(x))
        else:
            out = self.relu1(self.bn1(x))
        out = self.relu2(self.bn2(self.conv1(out if self.equalInOut else x)))
        if self.droprate > 0:
            out = F.dropout(out, p=self.droprate, training=self.training)
        out = self.conv2(out)
        return torch.add(x if self.equalInOut else self.convShortcut(x), out)


class DiscardingBlock(nn.Module):
    """As a WRN of FixMatch: LeakyReLU, momentum 0.001; what bn1 gives is discarded where channels change
    and the block does not activate before the residual, yet its statistics go on."""

    def __init__(self, channels, out, stride=1):
        super().__init__()
        self.bn1, self.bn2 = nn.BatchNorm2d(channels, momentum=0.001), nn.BatchNorm2d(out, momentum=0.001)
        self.relu1 = nn.LeakyReLU(0.1, inplace=True)
        self.relu2 = nn.LeakyReLU(0.1, inplace=True)
        self.conv1 = nn.Conv2d(channels, out, 3, stride, 1)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1)
        self.equal = channels == out
        self.project = None if self.equal else nn.Conv2d(channels, out, 1, stride)

    def forward(self, x):
        out = self.relu1(self.bn1(x))
        out = self.relu2(self.bn2(self.conv1(out if self.equal else x)))
        out = self.conv2(out)
        return torch.add(x if self.equal else self.project(x), out)


class SequentialResidual(nn.Module):
    """As weiaicunzai's: the residual in a Sequential, biases, a shortcut that reads the raw x."""

    def __init__(self, channels, out, stride=1):
        super().__init__()
        self.residual = nn.Sequential(
            nn.BatchNorm2d(channels), nn.ReLU(inplace=True), nn.Conv2d(channels, out, 3, stride, 1),
            nn.BatchNorm2d(out), nn.ReLU(inplace=True), nn.Conv2d(out, out, 3, 1, 1),
        )  # fmt: skip
        self.shortcut = nn.Sequential()
        if stride != 1 or channels != out:
            self.shortcut = nn.Sequential(nn.Conv2d(channels, out, 1, stride))

    def forward(self, x):
        return self.residual(x) + self.shortcut(x)


class KerasUnit(nn.Module):
    """As Keras's ResNetV2: eps 1.001e-5, biases, the stride in conv2, a max-pooled raw shortcut."""

    def __init__(self, channels, out, stride=1):
        super().__init__()
        mid = out // 2
        self.n0, self.n1, self.n2 = (nn.BatchNorm2d(c, eps=1.001e-5) for c in (channels, mid, mid))
        self.c1, self.c3 = nn.Conv2d(channels, mid, 1, bias=False), nn.Conv2d(mid, out, 1)
        self.c2 = nn.Conv2d(mid, mid, 3, stride, 1, bias=False)
        self.stride = stride
        self.project = nn.Conv2d(channels, out, 1, stride) if channels != out else None

    def forward(self, x):
        pre = F.relu(self.n0(x))
        if self.project is not None:
            shortcut = self.project(pre)
        else:
            shortcut = F.max_pool2d(x, 1, self.stride) if self.stride > 1 else x
        y = F.relu(self.n1(self.c1(pre)))
        y = F.relu(self.n2(self.c2(y)))
        return shortcut + self.c3(y)


class PostActivation(nn.Module):
    """conv-bn-relu-conv-bn, the addition in place, relu."""

    def __init__(self, channels, out, stride=1):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn1, self.bn2, self.relu = nn.BatchNorm2d(out), nn.BatchNorm2d(out), nn.ReLU(inplace=True)
        self.down = None
        if stride != 1 or channels != out:
            self.down = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x):
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        identity = x if self.down is None else self.down(x)
        out += identity
        return self.relu(out)


def bn_relu_conv(channels, out, stride=1):
    return nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU(), nn.Conv2d(channels, out, 3, stride, 1))


def wide_dropout(channels, out, stride=1):
    return WideBlock(channels, out, stride, drop=0.4)


#: name -> (constructor(channels, out, stride), fused convolutions of an equal unit, of a projecting one)
UNITS = {
    "cifar": (CifarBlock, 2, 3),
    "cifar-bottleneck": (CifarBottleneck, 3, 4),
    "cifar-se": (SEBlock, 2, 3),
    "wide": (WideBlock, 2, 3),
    "wide-dropout": (wide_dropout, 1, 2),
    "fixmatch": (DiscardingBlock, 2, 1),
    "weiaicunzai": (SequentialResidual, 2, 2),
    "keras": (KerasUnit, 3, 4),
    "post-activation": (PostActivation, 1, 1),
    "sequential": (bn_relu_conv, 1, 1),
}


def net(unit):
    """Four of a kind: equal, projecting with a stride, and two equal ones.

    Not with less than 8 channels: oneDNN's kernel for AVX2 (jit_avx2_1x1_convolution_bwd_weights, in PyTorch 2.13
    and 2.15) writes past the weight gradient of a plain 1x1 convolution with 2 to 7 and stride 2 in channels_last.
    """
    return nn.Sequential(unit(10, 10), unit(10, 8, 2), unit(8, 8), unit(8, 8))


def randomize(model):
    """Parameters and running statistics off their initial values."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, value in [*model.named_parameters(), *model.named_buffers()]:
            if value.is_floating_point():
                noise = torch.randn(value.shape, generator=generator).to(value)
                value.add_(noise.abs() if name.endswith("running_var") else noise, alpha=0.2)
    return model


def step(model, x, autocast=False):
    """Everything that one forward and backward computes, by name."""
    torch.manual_seed(1)
    model.zero_grad()
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = model(x)
    cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    y.backward(cotangent.to(y.dtype))
    results = {"output": y.detach(), "gradient of the input": x.grad}
    results |= {f"gradient of {n}": p.grad for n, p in model.named_parameters() if p.grad is not None}
    return results | {n: b.clone() for n, b in model.named_buffers()}


def assert_same(fused, plain, x, rtol=1e-9):
    """In float64 two ways to compute the same differ by rounding alone: relative to the norm of each.

    A bias in front of a norm has gradient 0, of which rounding leaves sums of 1e-13: 1e-10 is let pass.
    """
    mine, theirs = step(fused, x), step(plain, x)
    assert mine.keys() == theirs.keys()
    for name, expected in theirs.items():
        assert mine[name].dtype == expected.dtype and mine[name].shape == expected.shape, name
        error, scale = (mine[name] - expected).double().norm(), expected.double().norm()
        assert error <= rtol * scale + 1e-10, f"{name}: relative error {error / scale:.1e}"


def pair_of(model):
    """(fused copy, the model itself), float64."""
    model = randomize(model).double()
    import resnet_fused as rf

    return rf.fuse(copy.deepcopy(model), memory_format=None), model
