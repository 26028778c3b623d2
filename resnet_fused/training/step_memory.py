"""Memory of a training step of a net, measured in a process of its own.

That process is started with RESNET_FUSED_CPU_POOL_MB=0: our CPU kernels then take their outputs from
PyTorch's allocator, where they are counted like all other tensors, and not from the pool that they use
otherwise.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..models import create_model
from .memory import peak_activation_bytes, peak_allocated_bytes, saved_activation_bytes
from .own_process import json_from_process

__all__ = ["StepMemory", "step_memory"]


class StepMemory(NamedTuple):
    """Bytes that autograd holds between forward and backward, and the most allocated during the two."""

    saved: int
    peak: int


def step_memory(model: str, *, fused: bool, input_size: Sequence[int], device: str = "cpu") -> StepMemory:
    """Memory of forward and backward, without parameters, their gradients and the batch.

    In float32 and channels_last.

    Args:
        model: a name that ``create_model`` knows.
        input_size: (N, C, H, W) of the batch.

    Raises:
        UserError: the process came to no good end.
    """
    request = {
        "model": model,
        "fused": fused,
        "input_size": list(input_size),
        "device": str(device),
        "threads": torch.get_num_threads(),
    }
    measured = json_from_process(
        __name__,
        [json.dumps(request)],
        failure=f"the memory of a step of {model} could not be measured",
        RESNET_FUSED_CPU_POOL_MB="0",
    )
    return StepMemory(*measured)


def _measure(model: str, fused: bool, input_size: list[int], device: str, threads: int) -> StepMemory:
    torch.set_num_threads(threads)
    net = create_model(model, fused=fused, in_channels=input_size[1]).to(
        device, memory_format=torch.channels_last
    )
    images = torch.randn(input_size, device=device).contiguous(memory_format=torch.channels_last)
    labels = torch.zeros(len(images), dtype=torch.int64, device=device)

    def forward() -> Tensor:
        return F.cross_entropy(net(images), labels)

    def step() -> None:
        forward().backward()

    step()  # on CUDA the gradients stay, so that they are there before counting begins
    on_cpu = torch.device(device).type == "cpu"
    return StepMemory(
        saved_activation_bytes(forward, net, (images, labels)),
        peak_activation_bytes(step, net.parameters()) if on_cpu else peak_allocated_bytes(step, device),
    )


if __name__ == "__main__":
    print(json.dumps(_measure(**json.loads(sys.argv[1]))))
