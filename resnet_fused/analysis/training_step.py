"""The training step that is measured."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .benchmark_net import BenchmarkNet
from .contenders import Contender, build_contender, forward_of

__all__ = ["TrainingStep", "sgd"]


def sgd(parameters: Iterable[nn.Parameter]) -> torch.optim.SGD:
    """SGD with momentum, the optimizer of every contender: PyTorch's fused one (one kernel for all parameters
    instead of some calls for each), which it has for every floating dtype on the CPU.

    The same batch over and over: a small rate keeps the net, and so the numbers that it computes with,
    ordinary. ``resnet-fused train`` does not take the fused one: its last bits depend on the SIMD level that
    PyTorch runs at (it is equal to the ordinary one under AVX-512, not under AVX2).
    """
    return torch.optim.SGD(parameters, lr=1e-3, momentum=0.9, fused=True)


class TrainingStep:
    """A contender, ready to run: calling it does forward, cross-entropy loss, backward, an update by SGD with
    momentum (:func:`sgd`), and ``zero_grad(set_to_none=True)``.

    Args: contender: which. net: which. images, labels: the batch; the images are brought into the
        contender's memory format here, once. autocast: to bfloat16. state: the parameters and buffers to
        start from (default: those of seed 0, the same for all contenders).
    """

    def __init__(self, contender: Contender, net: BenchmarkNet, images: Tensor, labels: Tensor,
                 autocast: bool, state: Mapping[str, Tensor] | None = None) -> None:
        self.model = build_contender(contender, net, state)
        self.images = images.contiguous(memory_format=contender.memory_format)
        self.labels = labels
        self.autocast = autocast
        self.optimizer = sgd(self.model.parameters())
        self._run = forward_of(contender, self.model)

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

    def forward_backward(self) -> None:
        self.forward().backward()

    def __call__(self) -> None:
        self.forward_backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
