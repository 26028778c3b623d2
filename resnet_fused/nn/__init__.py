"""Fused modules (:mod:`.units`) and their plain twins (:mod:`.reference`)."""

from . import reference
from .units import PreActBasicBlock, PreActBottleneck, PreActConv2d, PreActStage, ResidualAdd

__all__ = ["PreActBasicBlock", "PreActBottleneck", "PreActConv2d", "PreActStage", "ResidualAdd", "reference"]
