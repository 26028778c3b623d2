"""Fused BatchNorm -> ReLU -> convolution and residual addition for pre-activation ResNets in PyTorch."""

from . import functional, models, nn
from .fusion import UnitParts, explain, fuse, register_unit, unfuse, verify
from .nn import reference
from .primitives.dispatch import record_dispatch, use_backend
from .version import __version__

__all__ = [
    "UnitParts",
    "__version__",
    "explain",
    "functional",
    "fuse",
    "models",
    "nn",
    "record_dispatch",
    "reference",
    "register_unit",
    "unfuse",
    "use_backend",
    "verify",
]
