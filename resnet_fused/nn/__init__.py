"""Fused modules (:mod:`.units`, :mod:`.dense`) and plain ones (:mod:`.reference`)."""

from . import reference
from .dense import DenseBlock, DenseLayer, DenseTransition
from .units import PreActBasicBlock, PreActBottleneck, PreActConv2d, PreActStage, ResidualAdd

__all__ = [
    "DenseBlock",
    "DenseLayer",
    "DenseTransition",
    "PreActBasicBlock",
    "PreActBottleneck",
    "PreActConv2d",
    "PreActStage",
    "ResidualAdd",
    "reference",
]
