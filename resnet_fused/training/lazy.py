"""Optional libraries, imported when they are needed."""

from __future__ import annotations

import importlib
from types import ModuleType

from .errors import UserError

__all__ = ["require"]


def require(module: str, package: str, purpose: str) -> ModuleType:
    """Import ``module``, or say in one line which ``package`` to install for ``purpose``."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(f"{purpose} needs the package {package} ({error}): pip install {package}") from error
