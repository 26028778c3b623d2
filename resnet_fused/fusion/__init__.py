"""Fused units in models that others have written: :func:`fuse`, :func:`unfuse`, :func:`register_unit`."""

from .adapters import UnitParts, register_unit
from .fuse import fuse, unfuse

__all__ = ["UnitParts", "fuse", "register_unit", "unfuse"]
