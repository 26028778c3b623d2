"""The primitives in Triton, for CUDA tensors: one file per primitive, with its ``@triton.jit`` kernels and
its launcher.

Importing this package imports no Triton; its modules do. :func:`unavailable` says whether they can be
imported here, and ``support.declines`` which convolutions they leave to the unfused path.

Shared by all files: ``launch.py`` (prepared launches), ``configs.py`` (tile configurations),
    ``activation.py`` (prologue and mask), ``reduction.py`` (partial results merged in a fixed order),
    ``geometry.py`` (a convolution's shape).

Conventions of the kernels: activations are dense channels_last, so that a pixel is a row of channels;
    arithmetic is float32; integers are not specialised (``do_not_specialize``), and a channel count arrives
    as ``units`` and a constexpr unit whose product it is, so that the compiler knows which powers of two
    divide it; no float atomics: partial results go to a buffer that a second kernel adds up in a fixed order.
"""

import importlib.util


def unavailable() -> str | None:
    """Why the Triton kernels cannot be imported here, or None."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    return None
