"""Memory of a training step, measured in ways that check each other."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile

__all__ = ["peak_activation_bytes", "peak_allocated_bytes", "saved_activation_bytes"]


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

    return _peak(_allocations(step))


def peak_activation_bytes(step: Callable[[], object], parameters: Iterable[Tensor]) -> int:
    """:func:`peak_allocated_bytes` on the CPU without the gradients of ``parameters``: activations, their
    gradients and temporaries.

    ``step()`` is forward and backward. It begins without gradients, as after ``zero_grad(set_to_none=True)``:
    those that it leaves behind are then the very tensors that backward made, and are left out from the moment
    at which they were allocated.
    """
    parameters = list(parameters)
    for parameter in parameters:
        parameter.grad = None
    allocations = _allocations(step)
    left = {p.grad.untyped_storage().data_ptr() for p in parameters if p.grad is not None}
    last = {address: index for index, (address, size) in enumerate(allocations) if size > 0}
    gradients = {last[address] for address in left if address in last}
    return _peak(allocation for index, allocation in enumerate(allocations) if index not in gradients)


def _allocations(step: Callable[[], object]) -> list[tuple[int, int]]:
    """(address, bytes) of all that ``step()`` allocated and, negative, freed on the CPU, in order."""
    os.environ.setdefault(
        "KINETO_LOG_LEVEL", "6"
    )  # read at the first use; PyTorch's profiler prints to stderr otherwise
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        step()
    found, events = [], list(recorded.profiler.kineto_results.experimental_event_tree())
    while events:
        event = events.pop()
        events += event.children
        if event.tag == _EventType.Allocation:
            found.append((event.start_time_ns, event.extra_fields.ptr, event.extra_fields.alloc_size))
    found.sort(key=lambda allocation: allocation[0])
    return [(address, size) for _, address, size in found]


def _peak(allocations: Iterable[tuple[int, int]]) -> int:
    current = peak = 0
    for _, size in allocations:
        current += size
        peak = max(peak, current)
    return peak
