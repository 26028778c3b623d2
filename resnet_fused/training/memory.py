"""Memory of a training step, measured in two ways that check each other."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

__all__ = ["peak_allocated_bytes", "saved_activation_bytes"]


def saved_activation_bytes(
    forward: Callable[[], Tensor], model: nn.Module, resident: Iterable[Tensor] = ()
) -> int:
    """Bytes that autograd holds between the forward and the backward of ``forward()``.

    Counted are the storages of all tensors that the graph saves, each once however many nodes or views share
    it, and in its full size. Parameters and buffers of ``model`` are not counted: they exist anyhow. Only
    what goes through autograd's own ``save_for_backward`` is seen; :func:`peak_allocated_bytes` sees
    everything.

    Args:
        forward: returns the loss, or any tensor with a graph.
        model: whose parameters and buffers to leave out.
        resident: more tensors to leave out, for example the batch.
    """
    known = {
        tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers(), *resident)
    }
    saved: dict[int, torch.UntypedStorage] = {}  # holds the storages, so that no address is used twice

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            saved.setdefault(storage.data_ptr(), storage)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return sum(storage.nbytes() for storage in saved.values())


def peak_allocated_bytes(step: Callable[[], object], device: torch.device | str = "cpu") -> int:
    """Highest number of bytes allocated during ``step()``, above those allocated before it.

    Counted is what passes PyTorch's allocator of the device: every tensor, also the temporary ones. Scratch
    memory that a library keeps for itself (oneDNN's, a thread's stack) is not, nor is the pool of our CPU
    kernels: start the process with RESNET_FUSED_CPU_POOL_MB=0 to count their outputs. On the CPU the
    allocations are those that ``torch.profiler`` records.
    """
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before

    os.environ.setdefault(
        "KINETO_LOG_LEVEL", "6"
    )  # read at the first use; PyTorch's profiler prints to stderr otherwise
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        step()
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    current = peak = 0
    for event in events:
        current += event.nbytes()
        peak = max(peak, current)
    return peak
