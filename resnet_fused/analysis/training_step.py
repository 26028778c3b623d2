"""The training step that is measured, and its contenders."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..models import create_model

__all__ = ["COMPILED", "CONTENDERS", "DTYPES", "Contender", "TrainingStep", "contender_by_key",
           "synthetic_batch"]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}  # bf16: under autocast, with fp32 parameters
_IMAGE = (3, 32, 32)
_CLASSES = 10


@dataclass(frozen=True)
class Contender:
    """One way to run the same net."""

    key: str
    title: str
    fused: bool
    memory_format: torch.memory_format  # of the images and of the parameters
    compiled: bool = False


CONTENDERS = (
    Contender("eager_nchw", "eager NCHW", False, torch.contiguous_format),
    Contender("eager_channels_last", "eager channels_last", False, torch.channels_last),
    Contender("fused", "fused", True, torch.channels_last),
)
COMPILED = (
    Contender("compiled_nchw", "torch.compile NCHW", False, torch.contiguous_format, compiled=True),
    Contender("compiled_channels_last", "torch.compile ch. last", False, torch.channels_last, compiled=True),
)


def contender_by_key(key: str) -> Contender:
    return next(contender for contender in (*CONTENDERS, *COMPILED) if contender.key == key)


def synthetic_batch(batch_size: int) -> tuple[Tensor, Tensor]:
    """Normal images [N, 3, 32, 32] and labels [N], the same ones every time."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch_size, *_IMAGE, generator=generator)
    return images, torch.randint(_CLASSES, (batch_size,), generator=generator)


class TrainingStep:
    """A contender, ready to run: calling it does forward, cross-entropy loss, backward, an update by SGD with
    momentum, and ``zero_grad(set_to_none=True)``.

    Args: contender: which. model: name of the net. images, labels: the batch; the images are brought into the
        contender's memory format here, once. autocast: to bfloat16. state: the parameters and buffers to
        start from (default: those of seed 0, the same for all contenders).
    """

    def __init__(self, contender: Contender, model: str, images: Tensor, labels: Tensor, autocast: bool,
                 state: dict[str, Tensor] | None = None) -> None:
        torch.manual_seed(0)
        self.model: nn.Module = create_model(model, num_classes=_CLASSES, fused=contender.fused)
        if state is not None:
            self.model.load_state_dict(state)
        self.model.to(memory_format=contender.memory_format).train()
        self.images = images.contiguous(memory_format=contender.memory_format)
        self.labels = labels
        self.autocast = autocast
        # The same batch over and over: a small rate keeps the net, and so the numbers that it computes with,
        # ordinary.
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-3, momentum=0.9)
        self._run = torch.compile(self.model) if contender.compiled else self.model

    def with_batch(self, images: Tensor, labels: Tensor) -> TrainingStep:
        """The same net and optimizer on another batch, in the memory format of this one."""
        other = copy.copy(self)
        other.images, other.labels = images, labels
        return other

    def losses(self) -> Tensor:
        """Forward: the loss of every image, [N]."""
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            return F.cross_entropy(self._run(self.images), self.labels, reduction="none")

    def forward(self) -> Tensor:
        """Forward: the loss."""
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            return F.cross_entropy(self._run(self.images), self.labels)

    def __call__(self) -> None:
        self.forward().backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
