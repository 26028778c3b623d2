"""Plain ``nn.Module`` units, written as a textbook would, public as ``resnet_fused.reference``.

They define what the fused modules of :mod:`resnet_fused.nn` compute, and the names of their parameters; the
units that have no fused twin of their own are fused by :func:`resnet_fused.fuse`.
"""

from .dense import DenseBlock, DenseLayer, DenseTransition
from .pre_activation import (
    PreActBasicBlock,
    PreActBottleneck,
    PreActConv2d,
    PreActStage,
    ResidualAdd,
    activation,
    convolution,
)
from .residual_unit import ORDERS, ResidualUnit
from .shortcuts import PROJECTIONS, SHORTCUTS, ZeroPaddedIdentity

__all__ = [
    "ORDERS",
    "PROJECTIONS",
    "SHORTCUTS",
    "DenseBlock",
    "DenseLayer",
    "DenseTransition",
    "PreActBasicBlock",
    "PreActBottleneck",
    "PreActConv2d",
    "PreActStage",
    "ResidualAdd",
    "ResidualUnit",
    "ZeroPaddedIdentity",
    "activation",
    "convolution",
]
