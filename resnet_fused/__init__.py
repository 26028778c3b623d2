"""Fused BatchNorm -> ReLU -> convolution and residual addition for pre-activation ResNets in PyTorch."""

from . import functional, models, nn
from .fusion import UnitParts, fuse, register_unit, unfuse
from .nn import reference
from .primitives.dispatch import record_dispatch, use_backend
from .version import __version__

__all__ = [
    "UnitParts",
    "__version__",
    "functional",
    "fuse",
    "models",
    "nn",
    "record_dispatch",
    "reference",
    "register_unit",
    "unfuse",
    "use_backend",
]
