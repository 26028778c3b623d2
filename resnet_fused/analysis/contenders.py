"""The contenders: ways to run the same net."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .benchmark_net import BenchmarkNet

__all__ = [
    "COMPILED", "CONTENDERS", "DTYPES", "Contender", "build_contender", "contender_by_key", "forward_of"
]

# torch.compile orders the nodes of a graph by recursion: a net of 1001 layers needs more than Python's default.
_COMPILE_RECURSION = 50_000

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}  # bf16: under autocast, with fp32 parameters


@dataclass(frozen=True)
class Contender:
    """One way to run the same net."""

    key: str
    title: str
    fused: bool
    memory_format: torch.memory_format  # of the images
    parameters: torch.memory_format  # preserve_format: as the net makes them, or fuse()
    compiled: bool = False


_NCHW, _NHWC = torch.contiguous_format, torch.channels_last
CONTENDERS = (
    Contender("eager_nchw", "eager NCHW", False, _NCHW, _NCHW),
    Contender("eager_channels_last", "eager channels_last", False, _NHWC, _NHWC),
    Contender("eager_channels_last_images", "eager ch. last images", False, _NHWC, _NCHW),
    Contender("fused", "fused", True, _NHWC, torch.preserve_format),
)
COMPILED = (
    Contender("compiled_nchw", "torch.compile NCHW", False, _NCHW, _NCHW, compiled=True),
    Contender("compiled_channels_last", "torch.compile ch. last", False, _NHWC, _NHWC, compiled=True),
)


def contender_by_key(key: str) -> Contender:
    return next(contender for contender in (*CONTENDERS, *COMPILED) if contender.key == key)


def build_contender(contender: Contender, net: BenchmarkNet,
                    state: Mapping[str, Tensor] | None = None) -> nn.Module:
    """The net, in train mode, its parameters in the memory format of the contender; not compiled yet.

    Args: state: the parameters and buffers to start from (default: those of seed 0, the same for all).
    """
    model = net.build(contender.fused)
    if state is not None:
        model.load_state_dict(state)
    return model.to(memory_format=contender.parameters)


def forward_of(contender: Contender, model: nn.Module) -> Callable[[Tensor], Tensor]:
    """What runs the model (of :func:`build_contender`): itself, or what torch.compile makes of it."""
    if not contender.compiled:
        return model
    sys.setrecursionlimit(max(sys.getrecursionlimit(), _COMPILE_RECURSION))
    return torch.compile(model)
