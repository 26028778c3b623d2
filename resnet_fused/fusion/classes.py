"""A module's class exchanged for a generated subclass of it with another ``forward``, and back.

The module itself, its parameters, buffers, hooks and names stay what they are. Copies and pickles are made by
the user's class and are of the generated one again.
"""

from __future__ import annotations

import copyreg
import threading
from collections.abc import Callable
from typing import Any

from torch import nn

__all__ = [
    "CONVOLUTION", "POOL", "ROWS", "UNIT", "exchange", "is_fused", "original_class", "restore",
    "restore_all", "serves",
]  # fmt: skip

UNIT, ROWS = "a fused unit", "a Sequential that runs rows of fused units"
POOL = "a max pool that keeps one byte per output"
CONVOLUTION = "a convolution outside of units"

_forwards: dict[str, Callable] = {}
_classes: dict[tuple[type, str], type] = {}
_lock = threading.RLock()


def serves(kind: str) -> Callable[[Callable], Callable]:
    """Decorates the ``forward`` of the classes of a kind."""

    def register(forward: Callable) -> Callable:
        _forwards[kind] = forward
        return forward

    return register


def _kind(module: nn.Module) -> str | None:
    return getattr(type(module), "_resnet_fused_kind", None)


def is_fused(module: nn.Module) -> bool:
    """Whether a module is a fused unit."""
    return _kind(module) == UNIT


def original_class(module: nn.Module) -> type:
    """The class that the user gave a module."""
    return getattr(type(module), "_original_class", type(module))


def exchange(module: nn.Module, kind: str) -> None:
    """Give a module the generated class of its kind."""
    module.__class__ = _class_of(original_class(module), kind)


def restore(module: nn.Module) -> None:
    """Give a module the user's class again."""
    module.__class__ = original_class(module)


def restore_all(model: nn.Module, *kinds: str) -> None:
    """Give every module of these kinds in a model the user's class again."""
    for module in model.modules():
        if _kind(module) in kinds:
            restore(module)


def _make(kind: str, cls: type, *args: Any) -> nn.Module:
    """For copy and pickle."""
    module = copyreg.__newobj__(cls, *args)
    module.__class__ = _class_of(cls, kind)
    return module


def _reduce_ex(self: nn.Module, protocol: int) -> tuple:
    function, args, *rest = super(type(self), self).__reduce_ex__(protocol)
    if function is not copyreg.__newobj__:
        raise TypeError(
            f"a fused {original_class(self).__name__} cannot be copied, since its class has its own way of "
            "being copied: call resnet_fused.unfuse(model) first"
        )
    return _make, (_kind(self), original_class(self), *args[1:]), *rest


def _class_of(cls: type, kind: str) -> type:
    with _lock:
        if (cls, kind) not in _classes:
            body = {
                "forward": _forwards[kind],
                "_plain_forward": cls.forward,
                "_original_class": cls,
                "_resnet_fused_kind": kind,
                "__reduce_ex__": _reduce_ex,
                "__module__": cls.__module__,
                "__qualname__": cls.__qualname__,
                "__doc__": cls.__doc__,
            }
            _classes[cls, kind] = type(cls)(cls.__name__, (cls,), body)
        return _classes[cls, kind]
