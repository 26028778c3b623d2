"""The nets that ``bench step`` measures: written NAME, NAME@SIZE, NAME/BATCH or NAME@SIZE/BATCH."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from .. import fusion
from ..fusion.classes import is_fused
from ..models import create_model
from ..training.errors import UserError
from .bare_convolutions import Convolution, collect_convolutions
from .user_models import build, image_size

__all__ = ["BATCH_SIZE", "BenchmarkNet"]

BATCH_SIZE = 64
_FORM = re.compile(r"(?P<name>[^@/]+)(@(?P<size>[1-9]\d{0,4}))?(/(?P<batch>[1-9]\d{0,5}))?")
_CLASSES = 10  # of the labels, and of the nets that let one choose
_VERIFY_GFLOP = 40.0  # of one forward; a net of 1001 layers takes about 30 s then, on 2 cores
_VERIFY_LEAST = 4  # images; fewer make poor statistics of a batch


@dataclass(frozen=True)
class BenchmarkNet:
    """A net with the batch that it is measured with, [batch_size, 3, size, size].

    Attributes:
        name: a net of resnet_fused, timm:NAME or torchvision:NAME; the latter are fused by :func:`rf.fuse`.
    """

    name: str
    size: int
    batch_size: int

    @classmethod
    def parse(cls, text: str, batch_size: int = BATCH_SIZE) -> BenchmarkNet:
        """NAME[@SIZE][/BATCH]. Without a size: 32x32, 64x64 for nets of other packages.

        Raises:
            UserError: it is not of this form; one line.
        """
        found = _FORM.fullmatch(text)
        if found is None:
            raise UserError(f"cannot read {text!r}: expected NAME[@SIZE][/BATCH], such as "
                            "timm:resnetv2_50@128/16 or wrn16_4_cifar/64")
        name, size, batch = found["name"], found["size"], found["batch"]
        return cls(name, image_size(name, int(size) if size else None), int(batch) if batch else batch_size)

    def __str__(self) -> str:
        return f"{self.name}@{self.size}/{self.batch_size}"

    def label(self, batch_size: int = BATCH_SIZE) -> str:
        """As it would be written, without what goes without saying."""
        size = "" if self.size == image_size(self.name, None) else f"@{self.size}"
        return self.name + size + ("" if self.batch_size == batch_size else f"/{self.batch_size}")

    def check(self) -> None:
        """Raises:
            UserError: the net is unknown, needs a package that is missing, does not run on such images, or
                has no convolutions or nothing to fuse; one line.
        """
        if not self.convolutions:
            raise UserError(f"{self.name} has no convolutions")
        if ":" in self.name and not any(map(is_fused, self.build(fused=True).modules())):
            raise UserError(f"{self.name} has nothing to fuse: see resnet-fused explain {self.name}")

    def build(self, fused: bool) -> nn.Module:
        """The net with the weights of seed 0, in train mode: fused or not, the same ones."""
        if ":" in self.name:
            model = build(self.name)
            return fusion.fuse(model) if fused else model
        torch.manual_seed(0)
        try:
            return create_model(self.name, num_classes=_CLASSES, fused=fused).train()
        except ValueError as error:
            raise UserError(f"{error} Nets of other packages are written timm:NAME and "
                            "torchvision:NAME") from None

    def batch(self, batch_size: int | None = None) -> tuple[Tensor, Tensor]:
        """Normal images [N, 3, S, S] and labels [N], the same ones every time."""
        count = batch_size or self.batch_size
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(count, 3, self.size, self.size, generator=generator)
        return images, torch.randint(_CLASSES, (count,), generator=generator)

    @cached_property
    def convolutions(self) -> Counter[Convolution]:
        """Those of a step, and how often each occurs."""
        model = self.build(fused=False)
        try:
            return collect_convolutions(model, torch.empty(self.batch_size, 3, self.size, self.size,
                                                           device="meta"))
        except Exception as error:  # of the net's code: whatever it says about images that do not suit it
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            raise UserError(f"{self} cannot be measured: {reason}") from None

    @property
    def verify_batch_size(self) -> int:
        """Images that the net is verified with: the whole batch, halved while a float64 run of it would take
        too long."""
        gflop = sum(conv.flops * count for conv, count in self.convolutions.items()) / 1e9
        size = self.batch_size
        while gflop * size / self.batch_size > _VERIFY_GFLOP and size // 2 >= _VERIFY_LEAST:
            size //= 2
        return size
