"""Which backend runs a primitive: the only place that chooses.

A backend provides a primitive or declines a case, with a reason. What it declines is served by the unfused
path (for the convolutions: elementwise kernel + the framework's own), and at last by the reference, which
takes everything.
"""

import os
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from resnet_fused import cuda_kernels, extension

BACKENDS = ("auto", "reference", "cpu", "cuda", "triton", "unfused")

_CPU_DTYPES = (torch.float32, torch.float64, torch.bfloat16)


class ConvGeometry(NamedTuple):
    """The shape of one convolution: x is [N, C, H, W], the weight [K, C/groups, R, S]."""

    input: tuple[int, int, int, int]
    weight: tuple[int, int, int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int


class Choice(NamedTuple):
    backend: str
    reason: str


class DispatchRecord(NamedTuple):
    """One primitive that ran: where, why there, and the shape of its first tensor."""

    primitive: str
    backend: str
    reason: str
    shape: tuple[int, ...]


_implementations: dict[str, dict[str, Callable]] = {}
_backend = "auto"
# (primitive, dtype, device, geometry...) -> (function, choice). Replaced as a whole by use_backend.
_selected: dict[tuple, tuple[Callable, Choice]] = {}
_logs: list[list[DispatchRecord]] = []


def register(primitive: str, *, reference: Callable, unfused: Callable | None = None) -> None:
    """Make a primitive's implementations known. C++ ones are found by name in
    torch.ops.resnet_fused_cpu and torch.ops.resnet_fused_cuda."""
    implementations = {"reference": reference}
    if unfused is not None:
        implementations["unfused"] = unfused
    if extension.cpu_available() and hasattr(torch.ops.resnet_fused_cpu, primitive):
        implementations["cpu"] = getattr(torch.ops.resnet_fused_cpu, primitive).default
    if (cuda := cuda_kernels.implementation(primitive, unfused)) is not None:
        implementations["cuda"] = cuda
    _implementations[primitive] = implementations


def unavailable(backend: str) -> str | None:
    """Why a known backend cannot be used here, or None."""
    if backend == "cpu" and not extension.cpu_available():
        return extension.failures.get("cpu", "its library was not loaded")
    if backend == "cuda":
        return cuda_kernels.unavailable()
    if backend == "triton":
        return f"this version of resnet_fused has no {backend} kernels"
    return None


class use_backend:
    """Choose the backend of every primitive, from now on or, as a context manager, for a block.

    Args:
        name: ``"auto"`` (the default: the best that is there, by primitive, device, dtype and shape),
            ``"reference"`` (plain PyTorch, for comparison), ``"cpu"`` (the C++ kernels wherever they do not
            decline), ``"unfused"`` (elementwise kernels + the framework's convolutions), ``"cuda"`` or
            ``"triton"``.

    Raises:
        ValueError: an unknown name.
        RuntimeError: a known backend that is not available here.

    The choice holds for the whole process, not for one thread: backward runs in threads of its own. The
    environment variable RESNET_FUSED_BACKEND gives the first choice.
    """

    def __init__(self, name: str):
        if name not in BACKENDS:
            raise ValueError(f"unknown backend {name!r}, expected one of {', '.join(BACKENDS)}")
        why = unavailable(name)
        if why is not None:
            raise RuntimeError(f"backend {name!r} is not available: {why}")
        self._previous = _backend
        self._set(name)

    @staticmethod
    def _set(name: str) -> None:
        global _backend, _selected
        _backend, _selected = name, {}

    def __enter__(self) -> "use_backend":
        return self

    def __exit__(self, *exc) -> None:
        self._set(self._previous)


def current_backend() -> str:
    """The name that use_backend last set."""
    return _backend


class record_dispatch:
    """``with record_dispatch() as log:`` fills the list ``log`` with a :class:`DispatchRecord` for every
    primitive that runs inside, in order, backward included."""

    def __enter__(self) -> list[DispatchRecord]:
        self._log: list[DispatchRecord] = []
        _logs.append(self._log)
        return self._log

    def __exit__(self, *exc) -> None:
        _logs[:] = [log for log in _logs if log is not self._log]


def prefer_unfused(primitive: str, dtype: torch.dtype, geometry: ConvGeometry) -> bool:
    """Whether the unfused path was measured to be faster than the fused CPU kernel at this shape."""
    return False


def _cpu_declines(primitive: str, dtype: torch.dtype, geometry: ConvGeometry | None) -> str | None:
    if "cpu" not in _implementations[primitive]:
        return f"the library does not have it ({extension.failures.get('cpu', 'not built')})"
    if dtype not in _CPU_DTYPES:
        return f"the cpu kernels do not take {dtype}"
    if geometry is not None and geometry.groups != 1:
        return f"the cpu kernels do not take groups={geometry.groups}"
    return None


def _cuda_declines(primitive: str, dtype: torch.dtype, geometry: ConvGeometry | None) -> str | None:
    if "cuda" not in _implementations[primitive]:
        return f"no cuda kernels ({cuda_kernels.unavailable() or 'the library does not have this one'})"
    why = cuda_kernels.declines(primitive, dtype, geometry)
    if why is None and _backend == "auto" and geometry is not None:
        if not cuda_kernels.expected_faster(primitive, dtype, geometry):
            why = "the unfused path is expected to be faster at this shape (by a model; nothing is measured)"
    return why


def choose(
    primitive: str, device_type: str, dtype: torch.dtype, geometry: ConvGeometry | None = None
) -> Choice:
    """The backend that would run a primitive, and why. Pure: nothing runs, nothing is kept.

    Args:
        primitive: a name in DESIGN section 3, such as ``"preact_conv_forward"``.
        geometry: for the three convolution primitives.
    """
    implementations = _implementations[primitive]
    if _backend == "reference":
        return Choice("reference", "use_backend('reference')")
    if _backend == "cpu" and device_type != "cpu":
        raise RuntimeError(f"backend 'cpu' was asked for, but the tensors are on {device_type}")
    if _backend == "cuda" and device_type != "cuda":
        raise RuntimeError(f"backend 'cuda' was asked for, but the tensors are on {device_type}")
    if _backend == "unfused" and "unfused" in implementations:
        return Choice("unfused", "use_backend('unfused')")
    if device_type == "cuda":
        why = _cuda_declines(primitive, dtype, geometry)
        if why is None:
            return Choice("cuda", "cuda kernel")
    elif device_type != "cpu":
        why = f"no kernels for {device_type}"
    else:
        why = _cpu_declines(primitive, dtype, geometry)
        if (
            why is None
            and _backend == "auto"
            and geometry is not None
            and prefer_unfused(primitive, dtype, geometry)
        ):
            why = "the unfused path was measured to be faster at this shape"
        if why is None:
            return Choice("cpu", "cpu kernel")
    return Choice("unfused" if "unfused" in implementations else "reference", why)


def _resolve(key: tuple, x: Tensor, geometry: ConvGeometry | None) -> tuple[Callable, Choice]:
    choice = choose(key[0], x.device.type, x.dtype, geometry)
    entry = _selected[key] = (_implementations[key[0]][choice.backend], choice)
    return entry


def _record(primitive: str, choice: Choice, x: Tensor) -> None:
    for log in _logs:
        log.append(DispatchRecord(primitive, choice.backend, choice.reason, tuple(x.shape)))


def select(primitive: str, x: Tensor) -> Callable:
    """The implementation of an elementwise, statistics or finalize primitive for tensors like x."""
    key = (primitive, x.dtype, x.device)
    entry = _selected.get(key) or _resolve(key, x, None)
    if _logs:
        _record(primitive, entry[1], x)
    return entry[0]


def select_reference(primitive: str, x: Tensor, reason: str) -> Callable:
    """The reference, for a case that every backend declines for the given reason."""
    if _logs:
        _record(primitive, Choice("reference", reason), x)
    return _implementations[primitive]["reference"]


def select_convolution(
    primitive: str, x: Tensor, weight: Tensor, stride, padding, dilation, groups: int
) -> Callable:
    """The implementation of a convolution primitive for this shape."""
    key = (primitive, x.dtype, x.device, x.shape, weight.shape, *stride, *padding, *dilation, groups)
    entry = _selected.get(key)
    if entry is None:
        geometry = ConvGeometry(
            tuple(x.shape), tuple(weight.shape), tuple(stride), tuple(padding), tuple(dilation), groups
        )
        entry = _resolve(key, x, geometry)
    if _logs:
        _record(primitive, entry[1], x)
    return entry[0]


if "RESNET_FUSED_BACKEND" in os.environ:
    use_backend(os.environ["RESNET_FUSED_BACKEND"])
