"""Fused modules (:mod:`.units`, :mod:`.dense`, :mod:`.max_pool`) and plain ones (:mod:`.reference`)."""

from . import reference
from .dense import DenseBlock, DenseLayer, DenseTransition
from .max_pool import MaxPool2d
from .units import PreActBasicBlock, PreActBottleneck, PreActConv2d, PreActStage, ResidualAdd

__all__ = [
    "DenseBlock",
    "DenseLayer",
    "DenseTransition",
    "MaxPool2d",
    "PreActBasicBlock",
    "PreActBottleneck",
    "PreActConv2d",
    "PreActStage",
    "ResidualAdd",
    "reference",
]
