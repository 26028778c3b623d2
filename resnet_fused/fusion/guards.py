"""What a trace of a module's forward took for granted, and whether it still holds.

torch.fx runs a forward once, in Python: what it read from attributes is baked into the graph, what it wrote
is lost. So the attributes and globals that can decide about the graph are noted before the trace; if any of
them was changed by it, the forward has side effects and is refused; if any differs at a later call, the
forward is traced anew.
"""

from __future__ import annotations

import dis
import random
import sys
import types
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

__all__ = ["Attributes", "Untraceable", "random_state", "refuse_side_effects"]

_INTERNAL = frozenset(nn.Module().__dict__) - {"training"} | {"_resnet_fused", "_resnet_fused_strides"}
_SIMPLE = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)
_CONTAINERS = (list, tuple, dict, set)
_PRINTS = frozenset({"print", "input", "open", "breakpoint"})
_WRITES = frozenset({"STORE_ATTR", "DELETE_ATTR", "STORE_GLOBAL", "DELETE_GLOBAL"})


class Untraceable(Exception):
    """A forward that cannot be shown to do the same as a graph. The message says why."""


def _content(value: Any) -> Any:
    if isinstance(value, dict):
        return list(value.items())
    return list(value) if isinstance(value, _CONTAINERS) else None


def _same(a: Any, b: Any) -> bool:
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    if isinstance(a, _SIMPLE):
        return a == b
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(_same, a, b))
    return False


def _globals_read(forward: Callable) -> dict[str, Any]:
    """The simple and container values among the globals and closure variables that a forward names."""
    while hasattr(forward, "__wrapped__"):
        forward = forward.__wrapped__
    code, found = forward.__code__, {}
    for name in code.co_names:
        if name in forward.__globals__:
            found[name] = forward.__globals__[name]
    for name, cell in zip(code.co_freevars, forward.__closure__ or (), strict=False):
        try:
            found[name] = cell.cell_contents
        except ValueError:  # not assigned yet
            continue
    return {k: v for k, v in found.items() if isinstance(v, (*_SIMPLE, *_CONTAINERS))}


class Attributes:
    """The state of some modules that their Python code can read, and of the globals that it names."""

    def __init__(self, modules: Iterable[nn.Module], forward_of: Callable[[nn.Module], Callable]) -> None:
        self._modules = [
            (m, {k: v for k, v in m.__dict__.items() if k not in _INTERNAL}, dict(m._modules))
            for m in modules
        ]
        self._contents = [
            (k, v, _content(v)) for _, attributes, _ in self._modules for k, v in attributes.items()
            if isinstance(v, _CONTAINERS)
        ]  # fmt: skip
        self._globals = []
        for m, _, _ in self._modules:
            forward = forward_of(m)
            if isinstance(forward, types.FunctionType):
                for name, value in _globals_read(forward).items():
                    self._globals.append((name, forward, value))
                    if isinstance(value, _CONTAINERS):
                        self._contents.append((name, value, _content(value)))

    def changed(self) -> str | None:
        """The name of something that differs from what it was, or None."""
        for module, attributes, children in self._modules:
            if module._modules.keys() != children.keys():
                return "the submodules"
            for name, child in children.items():
                if module._modules[name] is not child:
                    return name
            now = module.__dict__
            for name, value in attributes.items():
                if name not in now or not _same(now[name], value):
                    return name
            for name in now:
                if name not in _INTERNAL and name not in attributes:
                    return name
        for name, value, content in self._contents:
            present = _content(value)
            if len(present) != len(content) or not all(map(_same, present, content)):
                return name
        for name, forward, value in self._globals:
            present = _globals_read(forward)
            if name not in present or not _same(present[name], value):
                return name
        return None

    def restore(self) -> None:
        """Undo what :meth:`changed` found in attributes, lists and dicts."""
        for module, attributes, _ in self._modules:
            for name in [k for k in module.__dict__ if k not in _INTERNAL and k not in attributes]:
                del module.__dict__[name]
            module.__dict__.update(attributes)
        for _, value, content in self._contents:
            if isinstance(value, list):
                value[:] = content
            elif isinstance(value, (dict, set)):
                value.clear()
                value.update(content)


def refuse_side_effects(forward: Callable, owner: str) -> None:
    """Raise Untraceable if a forward's own code assigns to attributes or globals, or prints."""
    while hasattr(forward, "__wrapped__"):
        forward = forward.__wrapped__
    code = getattr(forward, "__code__", None)
    if code is None:
        raise Untraceable(f"the forward of {owner} is not a Python function")
    for instruction in dis.get_instructions(code):
        if instruction.opname in _WRITES:
            raise Untraceable(f"the forward of {owner} assigns to {instruction.argval!r}")
        if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME") and instruction.argval in _PRINTS:
            raise Untraceable(f"the forward of {owner} calls {instruction.argval}()")


def random_state() -> tuple:
    """The state of Python's and NumPy's generators: a forward that draws from them is not a graph."""
    numpy = sys.modules.get("numpy")
    state = () if numpy is None else numpy.random.get_state()
    return random.getstate(), *((state[0], state[1].tobytes(), state[2]) if state else ())
