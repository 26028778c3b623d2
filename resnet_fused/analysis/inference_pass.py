"""The inference that is measured."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from .benchmark_net import BenchmarkNet
from .contenders import CONTENDERS, Contender, build_contender, forward_of

__all__ = ["InferencePass", "calibrated_state"]

_CALIBRATION_IMAGES = 8


def calibrated_state(net: BenchmarkNet) -> dict[str, Tensor]:
    """The state of seed 0 with running statistics of a batch, as a trained net has them.

    With those of a fresh net, mean 0 and variance 1, no norm would normalise, and what a deep residual net
    computes would grow with every unit until it overflows.
    """
    model = build_contender(CONTENDERS[0], net)
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.momentum = 1.0  # the running statistics are then those of the one batch
    with torch.no_grad():
        model(net.batch(_CALIBRATION_IMAGES)[0])
    return model.state_dict()


class InferencePass:
    """A contender in eval mode, ready to run: calling it does a forward under ``torch.inference_mode()``.

    Args: as of :class:`TrainingStep`; state: by default :func:`calibrated_state`.
    """

    def __init__(self, contender: Contender, net: BenchmarkNet, images: Tensor, labels: Tensor,
                 autocast: bool, state: Mapping[str, Tensor] | None = None) -> None:
        self.model = build_contender(contender, net, calibrated_state(net) if state is None else state).eval()
        self.images = images.contiguous(memory_format=contender.memory_format)
        self.labels = labels
        self.autocast = autocast
        self._run = forward_of(contender, self.model)

    def with_batch(self, images: Tensor, labels: Tensor) -> InferencePass:
        """The same net on another batch, in the memory format of this one."""
        other = copy.copy(self)
        other.images, other.labels = images, labels
        return other

    def __call__(self) -> Tensor:
        """The logits, [N, classes]."""
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            return self._run(self.images)
