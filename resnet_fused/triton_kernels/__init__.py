"""The primitives in Triton, for CUDA tensors: one file per primitive, with its ``@triton.jit`` kernels and
its launcher.

Importing this package imports no Triton; its modules do. :func:`unavailable` says whether they can be
imported here, :func:`declines_device` which tensors they take, ``support.declines`` which cases they leave to
the unfused path, and :func:`load` gets a primitive's launcher.

Shared by all files: ``launch.py`` (prepared launches), ``configs.py`` (tile configurations),
    ``activation.py`` (prologue and mask), ``reduction.py`` (statistics, and partial results merged in a fixed
    order), ``geometry.py`` (a convolution's shape), ``elementwise.py`` (tiles of the passes over memory).

Conventions of the kernels: activations are dense channels_last, so that a pixel is a row of channels;
    arithmetic is float32; integers are not specialised (``do_not_specialize``), and a channel count arrives
    as ``units`` and a constexpr unit whose product it is, so that the compiler knows which powers of two
    divide it; no float atomics: partial results go to a buffer that a second kernel adds up in a fixed order.
"""

import importlib
import importlib.util
import os
from collections.abc import Callable

import torch

#: The oldest GPUs whose kernels are compiled in the tests.
_LEAST_CAPABILITY = (8, 0)

#: Why the kernels could not be imported or the driver not be started, once it was tried.
_failure: str | None = None


def unavailable() -> str | None:
    """Why the Triton kernels cannot be used here whatever the device, or None."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    return _failure


def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels (TRITON_INTERPRET=1), which takes CPU tensors too."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def declines_device(device_type: str) -> str | None:
    """Why the kernels do not take tensors of this type of device, here, or None if they do."""
    if interpreted() and device_type in ("cpu", "cuda"):
        return None
    if device_type != "cuda":
        return f"the triton kernels take CUDA tensors (with TRITON_INTERPRET=1 also CPU's), not {device_type}"
    if torch.version.hip is not None:
        return "the triton kernels are for NVIDIA's GPUs"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    capability = torch.cuda.get_device_capability()
    if capability < _LEAST_CAPABILITY:
        least, own = (".".join(map(str, c)) for c in (_LEAST_CAPABILITY, capability))
        return f"the triton kernels need compute capability {least}, this GPU has {own}"
    return None


def load(primitive: str) -> Callable:
    """The launcher of a primitive.

    Raises:
        RuntimeError: Triton or the kernels cannot be imported, or Triton's driver does not start;
            :func:`unavailable` says it from then on.
    """
    global _failure
    doing = "importing its kernels"
    try:
        module = importlib.import_module(f"{__name__}.{primitive}")
        if not interpreted() and torch.cuda.is_available():
            # Else built at the first launch, where nothing can fall back any more: it takes a C compiler.
            doing = "starting its driver"
            importlib.import_module("triton.runtime").driver.active.get_current_target()
    except Exception as error:  # a Triton that is broken or too old fails in many ways
        _failure = f"{doing} failed: {type(error).__name__}: {error}"
        raise RuntimeError(_failure) from error
    return getattr(module, primitive)
