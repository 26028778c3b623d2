"""Loads the operator libraries and the module ``_C``; the one place that knows what was built.

Loading happens once, when this module is imported. A library that does not load never breaks the import: the
reference backend needs none of them. The reason is kept in :data:`failures`, warned about once, and told by
``resnet-fused doctor``.
"""

import importlib
import warnings
from pathlib import Path

import torch

LIBRARY_DIRECTORY = Path(__file__).resolve().parent / "lib"

#: What did not load (``"_C"``, ``"cpu"`` or ``"cuda"``) and why. Empty when all that was built is there.
failures: dict[str, str] = {}

_loaded: set[str] = set()
_module = None


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _load_module():
    try:
        return importlib.import_module("resnet_fused._C")
    except ImportError as error:
        failures["_C"] = _first_line(error)
        return None


def _load_library(name: str) -> None:
    path = LIBRARY_DIRECTORY / f"libresnet_fused_{name}.so"
    try:
        torch.ops.load_library(str(path))
        _loaded.add(name)
    except OSError as error:
        # torch hides the dynamic linker's message behind one of its own.
        failures[name] = _first_line(error.__cause__ or error) if path.exists() else f"{path} was not built"


def _load() -> None:
    global _module
    _module = _load_module()
    _load_library("cpu")
    if (LIBRARY_DIRECTORY / "libresnet_fused_cuda.so").exists():
        if torch.version.cuda is None:
            # Not worth a warning: this torch has no CUDA tensors. The doctor tells it.
            failures["cuda"] = f"it was built for CUDA, and torch {torch.__version__} is built without"
        else:
            _load_library("cuda")
    told = [f"{name}: {reason}" for name, reason in failures.items() if name != "cuda" or torch.version.cuda]
    if told:
        warnings.warn(
            f"resnet_fused did not load all of its compiled parts ({'; '.join(told)}). What they offer is served "
            "by the reference backend, slower. `resnet-fused doctor` tells how to mend it.",
            RuntimeWarning,
            stacklevel=2,
        )


def cpu_available() -> bool:
    """Whether the operators of ``torch.ops.resnet_fused_cpu`` are there."""
    return "cpu" in _loaded


def cuda_available() -> bool:
    """Whether the operators of ``torch.ops.resnet_fused_cuda`` are there and torch sees a CUDA device."""
    return "cuda" in _loaded and torch.cuda.is_available()


def cuda_loaded() -> bool:
    """Whether the operators of ``torch.ops.resnet_fused_cuda`` are there, with or without a device."""
    return "cuda" in _loaded


def build_info() -> dict:
    """What was built: ``version``, ``torch`` and ``compiler`` of the build, ``cpu_variants`` (the SIMD levels
    compiled, lowest first), ``cuda`` (the toolkit's version or None), ``cuda_architectures`` and ``cuda_reason``
    (why CUDA was not built). Empty when the module ``_C`` did not load."""
    return _module.build_info() if _module is not None else {}


def cpu_levels() -> tuple[str, ...]:
    """The compiled SIMD levels that this CPU can run, lowest first. Empty when ``_C`` did not load."""
    return _module.cpu_levels() if _module is not None else ()


_load()
