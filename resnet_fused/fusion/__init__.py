"""Fused units in models that others have written: ``fuse``, ``unfuse``, ``explain``, ``verify``."""

from .adapters import UnitParts, register_unit
from .explain import Explanation, explain
from .fuse import fuse, unfuse
from .verify import Verification, verify

__all__ = ["Explanation", "UnitParts", "Verification", "explain", "fuse", "register_unit", "unfuse", "verify"]
