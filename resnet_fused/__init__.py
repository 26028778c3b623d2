"""Fused BatchNorm -> ReLU -> convolution and residual addition for pre-activation ResNets in PyTorch."""

from . import functional, models, nn
from .nn import reference
from .primitives.dispatch import record_dispatch, use_backend
from .version import __version__

__all__ = ["__version__", "functional", "models", "nn", "record_dispatch", "reference", "use_backend"]
