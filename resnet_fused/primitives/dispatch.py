"""Which backend runs a primitive: the only place that chooses.

A backend provides a primitive or declines a case, with a reason. What it declines is served by the unfused
path (for the convolutions: elementwise kernel + the framework's own), and at last by the reference, which
takes everything.
"""

import os
import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from resnet_fused import cuda_kernels, extension, triton_kernels
from resnet_fused.triton_kernels import support

from . import tuning

BACKENDS = ("auto", "reference", "cpu", "cuda", "triton", "unfused")

#: The backends with kernels of our own, by type of device. The C++ ones first: they launch in less time.
_OWN = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}
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
# (primitive, dtype, device, geometry...) -> (function, choice), and what ops/whole_unit.py keeps. Replaced as a
# whole by use_backend.
_selected: dict[tuple, tuple[Callable, Choice]] = {}
_logs: list[list[DispatchRecord]] = []


def register(primitive: str, *, reference: Callable, unfused: Callable | None = None) -> None:
    """Make a primitive's implementations known. C++ ones are found by name in torch.ops.resnet_fused_cpu and
    torch.ops.resnet_fused_cuda, Triton ones by name in triton_kernels, when the first is needed: importing
    Triton takes a second."""
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
    if backend == "triton":
        on = "cpu" if triton_kernels.interpreted() else "cuda"
        return triton_kernels.unavailable() or triton_kernels.declines_device(on)
    if backend == "cuda":
        return cuda_kernels.unavailable()
    return None


class use_backend:
    """Choose the backend of every primitive, from now on or, as a context manager, for a block.

    Args:
        name: ``"auto"`` (the default: the best that is there, by primitive, device, dtype and shape),
            ``"reference"`` (plain PyTorch, for comparison), ``"cpu"`` (the C++ kernels wherever they do not
            decline), ``"triton"`` (the Triton kernels wherever they do not decline: CUDA tensors, or with
            TRITON_INTERPRET=1 any), ``"unfused"`` (elementwise kernels + the framework's convolutions) or
            ``"cuda"``.

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


def forget() -> None:
    """Choose anew for every shape: what was measured has changed."""
    use_backend._set(_backend)


def implementation(primitive: str, backend: str) -> Callable | None:
    """A backend's own implementation of a primitive, past every choice; None if it has none."""
    return _implementations[primitive].get(backend)


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


def prefer_unfused(
    primitive: str, device_type: str, dtype: torch.dtype, geometry: ConvGeometry
) -> bool | None:
    """Whether the unfused path was measured to be faster than the fused kernel at this shape (``tuning``); None: it
    was not measured."""
    return tuning.prefers_unfused(primitive, dtype, geometry) if device_type == "cuda" else False


def _cpu_declines(primitive: str, dtype: torch.dtype, geometry: ConvGeometry | None) -> str | None:
    if "cpu" not in _implementations[primitive]:
        if extension.cpu_available():
            return "there is no cpu kernel of it"
        return f"the library does not have it ({extension.failures.get('cpu', 'not built')})"
    if dtype not in _CPU_DTYPES:
        return f"the cpu kernels do not take {dtype}"
    if geometry is not None and geometry.groups != 1:
        return f"the cpu kernels do not take groups={geometry.groups}"
    if primitive == "preact_conv_backward_1x1" and (geometry.stride, geometry.padding, geometry.weight[2:]) != (
        (1, 1),
        (0, 0),
        (1, 1),
    ):
        return "the cpu kernel takes 1x1 convolutions with stride 1 and padding 0"
    return None


def _cuda_declines(primitive: str, dtype: torch.dtype, geometry: ConvGeometry | None) -> str | None:
    if "cuda" not in _implementations[primitive]:
        return f"no cuda kernels ({cuda_kernels.unavailable() or 'the library does not have this one'})"
    return cuda_kernels.declines(primitive, dtype, geometry)


def _declines(
    backend: str, primitive: str, device_type: str, dtype: torch.dtype, geometry: ConvGeometry | None
) -> str | None:
    """Why a backend with kernels of our own leaves this case to others, or None."""
    if backend == "cpu":
        return _cpu_declines(primitive, dtype, geometry)
    if backend == "cuda":
        return _cuda_declines(primitive, dtype, geometry)
    return (
        triton_kernels.unavailable()
        or triton_kernels.declines_device(device_type)
        or support.declines(primitive, dtype, geometry)
    )


def _slower(
    backend: str, primitive: str, device_type: str, dtype: torch.dtype, geometry: ConvGeometry | None
) -> str | None:
    """Why "auto" passes by a backend that does not decline, or None."""
    if geometry is None:
        return None
    measured = None if backend == "cuda" else prefer_unfused(primitive, device_type, dtype, geometry)
    if measured:
        return "the unfused path was measured to be faster at this shape"
    if measured is None and not cuda_kernels.expected_faster(primitive, dtype, geometry, backend):
        return f"the {backend} kernel is expected to be slower at this shape (by a model; nothing is measured)"
    return None


def choose(
    primitive: str, device_type: str, dtype: torch.dtype, geometry: ConvGeometry | None = None
) -> Choice:
    """The backend that would run a primitive, and why. Pure: nothing runs, nothing is kept.

    Args:
        primitive: a name in DESIGN section 3, such as ``"preact_conv_forward"``.
        geometry: for the convolution primitives.
    """
    implementations = _implementations[primitive]
    if _backend == "reference":
        return Choice("reference", "use_backend('reference')")
    if _backend == "cpu" and device_type != "cpu":
        raise RuntimeError(f"backend 'cpu' was asked for, but the tensors are on {device_type}")
    if _backend == "cuda" and device_type != "cuda":
        raise RuntimeError(f"backend 'cuda' was asked for, but the tensors are on {device_type}")
    if _backend == "triton" and (why := triton_kernels.declines_device(device_type)) is not None:
        raise RuntimeError(f"backend 'triton' was asked for, but {why}")
    if _backend == "unfused" and "unfused" in implementations:
        return Choice("unfused", "use_backend('unfused')")
    asked = _backend in ("cuda", "triton")
    reasons = []
    for own in (_backend,) if asked else _OWN.get(device_type, ()):
        why = _declines(own, primitive, device_type, dtype, geometry)
        if why is None and _backend == "auto":
            why = _slower(own, primitive, device_type, dtype, geometry)
        if why is None:
            return Choice(own, f"{own} kernel" + "".join(f"; {reason}" for reason in reasons))
        if asked or own != "cuda" or own in implementations:  # a library that was not built is no reason
            reasons.append(why)
    why = "; ".join(reasons) or f"no kernels for {device_type}"
    return Choice("unfused" if "unfused" in implementations else "reference", why)


def _resolve(key: tuple, x: Tensor, geometry: ConvGeometry | None) -> tuple[Callable, Choice]:
    primitive = key[0]
    choice = choose(primitive, x.device.type, x.dtype, geometry)
    implementations = _implementations[primitive]
    if choice.backend == "triton" and "triton" not in implementations:
        try:
            implementations["triton"] = triton_kernels.load(primitive)
        except RuntimeError as error:
            if _backend == "triton":
                raise
            warnings.warn(
                f"resnet_fused serves CUDA tensors without its Triton kernels, slower: {error}",
                RuntimeWarning,
                stacklevel=2,
            )
            choice = choose(primitive, x.device.type, x.dtype, geometry)
        else:
            tuning.attach()
    entry = _selected[key] = (implementations[choice.backend], choice)
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


def _of_convolution(primitive, x, weight, stride, padding, dilation, groups) -> tuple[Callable, Choice]:
    key = (primitive, x.dtype, x.device, x.shape, weight.shape, *stride, *padding, *dilation, groups)
    entry = _selected.get(key)
    if entry is None:
        geometry = ConvGeometry(
            tuple(x.shape), tuple(weight.shape), tuple(stride), tuple(padding), tuple(dilation), groups
        )
        entry = _resolve(key, x, geometry)
    return entry


def select_convolution(
    primitive: str, x: Tensor, weight: Tensor, stride, padding, dilation, groups: int
) -> Callable:
    """The implementation of a convolution primitive for this shape."""
    entry = _of_convolution(primitive, x, weight, stride, padding, dilation, groups)
    if _logs:
        _record(primitive, entry[1], x)
    return entry[0]


def select_several(primitive: str, name: str, x: Tensor) -> Callable | None:
    """The operator ``name`` of the C++ backend that runs an elementwise primitive for tensors like x, which does the
    work of several; None if another backend runs it, if it has none, or if every primitive is recorded."""
    if _logs:
        return None
    key = (name, primitive, x.dtype, x.device)
    entry = _selected.get(key)
    if entry is None:
        choice = choose(primitive, x.device.type, x.dtype)
        entry = _selected[key] = (own_operator(choice.backend, name), choice)
    return entry[0]


def own_operator(backend: str, name: str) -> Callable | None:
    """An operator of a C++ backend that is no primitive by itself, or None."""
    if backend not in ("cpu", "cuda"):
        return None
    operators = getattr(torch.ops, f"resnet_fused_{backend}")
    return getattr(operators, name).default if hasattr(operators, name) else None


def is_recorded() -> bool:
    """Whether a record_dispatch is active, which is told of every primitive."""
    return bool(_logs)


def kept(key: tuple):
    """What :func:`keep` was given for key since the backend was last chosen, or None."""
    return _selected.get(key)


def keep(key: tuple, value: tuple) -> tuple:
    """Keep what was concluded from :func:`choose`, until another backend is chosen."""
    _selected[key] = value
    return value


def all_kept(prefix: str) -> list[tuple]:
    """All that :func:`keep` was given for keys that begin with a name that begins so."""
    return [value for key, value in _selected.items() if key[0].startswith(prefix)]


def has_own(primitive: str, device_type: str) -> bool:
    """Whether a backend with kernels of our own could run the primitive on this type of device."""
    return device_type != "cpu" or _backend == "triton" or "cpu" in _implementations[primitive]


def has_kernel(primitive: str, x: Tensor, weight: Tensor, stride, padding, dilation, groups: int) -> bool:
    """Whether a kernel of our own would run a convolution primitive at this shape."""
    if not has_own(primitive, x.device.type):
        return False
    choice = _of_convolution(primitive, x, weight, stride, padding, dilation, groups)[1]
    return choice.backend not in ("reference", "unfused")


if "RESNET_FUSED_BACKEND" in os.environ:
    use_backend(os.environ["RESNET_FUSED_BACKEND"])
