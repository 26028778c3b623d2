"""A torch.fx graph of one unit of a user's model, for the arguments and the state that it is called with.

Layers (torch.nn's own, and whatever has hooks or holds neither norm nor convolution) are nodes of the graph;
the user's own modules are traced through. What Python decided on the way is guarded (:mod:`.guards`).
"""

from __future__ import annotations

import operator
import threading
import types
from collections.abc import Callable, Iterable
from typing import Any
from unittest import mock

import torch
import torch.utils.checkpoint
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from ..nn.units import calls_forward_alone, plain_forward
from .classes import is_fused, original_class
from .guards import Attributes, Untraceable, random_state, refuse_side_effects
from .leaves import is_norm

__all__ = ["IN_PLACE", "Trace", "default_signature", "signature_of", "trace"]

#: Asked of PyTorch by library code, without tensors; part of every signature where they matter.
_QUESTIONS = ("is_grad_enabled", "is_autocast_enabled", "is_inference_mode_enabled", "has_torch_function")
_lock = threading.RLock()  # fx patches nn.Module while it traces


# --- the arguments of a call ---


def _describe(value: Any, tensors: list[Tensor]) -> Any:
    if isinstance(value, Tensor):
        tensors.append(value)
        return ("tensor", value.requires_grad)
    if type(value) in (list, tuple):
        return (type(value).__name__, *(_describe(v, tensors) for v in value))
    if type(value) is dict:
        return ("dict", *((k, _describe(v, tensors)) for k, v in value.items()))
    if value is None or isinstance(value, (bool, int, float, str)):
        return ("constant", type(value), value)
    raise Untraceable(f"an argument of type {type(value).__name__}")


def _rebuild(description: Any, leaf: Callable[[bool], Any]) -> Any:
    kind, *rest = description
    if kind == "tensor":
        return leaf(rest[0])
    if kind == "constant":
        return rest[1]
    if kind == "dict":
        return {k: _rebuild(d, leaf) for k, d in rest}
    return (list if kind == "list" else tuple)(_rebuild(d, leaf) for d in rest)


def signature_of(args: tuple, kwargs: dict) -> tuple[tuple, list[Tensor]]:
    """A hashable description of a call, and the tensors in it, in order."""
    tensors: list[Tensor] = []
    return (_describe(args, tensors), _describe(kwargs, tensors), _modes()), tensors


def _modes() -> tuple[bool, ...]:
    """What a forward can ask PyTorch about its surroundings."""
    return torch.is_grad_enabled(), torch._C._is_any_autocast_enabled(), torch.is_inference_mode_enabled()


def default_signature(module: nn.Module, several: bool = False) -> tuple:
    """The call that is assumed until there is one: a tensor for every argument without a default.

    Args:
        several: the first argument is a list of two tensors instead.
    """
    forward = plain_forward(module)
    while hasattr(forward, "__wrapped__"):
        forward = forward.__wrapped__
    code = getattr(forward, "__code__", None)
    if code is None:
        raise Untraceable("its forward is not a Python function")
    required = code.co_argcount - 1 - len(forward.__defaults__ or ())
    tensors = [("tensor", True)] * max(required, 1)
    if several:
        tensors[0] = ("list", ("tensor", True), ("tensor", True))
    return ("tuple", *tensors), ("dict",), _modes()


# --- tracing ---


class _Proxy(fx.Proxy):
    """A proxy that knows ``x += y`` from ``x = x + y``, as fx's own does not: the former changes x."""


def _in_place(name: str) -> Callable:
    function = getattr(operator, name)
    return lambda self, other: self.tracer.create_proxy("call_function", function, (self, other), {})


IN_PLACE = tuple(
    f"i{name}"
    for name in ("add", "sub", "mul", "truediv", "floordiv", "pow", "mod", "matmul", "and", "or", "xor",
                 "lshift", "rshift")
)  # fmt: skip
for _name in IN_PLACE:
    setattr(_Proxy, f"__{_name}__", _in_place(f"__{_name}__"))


class _TensorProxy(_Proxy):
    """A proxy of what is known to be a tensor: isinstance says so too."""

    _is_param = False

    @property
    def __class__(self):
        return Tensor

    @property
    def requires_grad(self) -> bool:
        known = self.node.meta.get("requires_grad")
        if known is None:
            raise Untraceable("control flow depends on requires_grad")
        return known


def _holds_proxy(value: Any) -> bool:
    if isinstance(value, fx.Proxy):
        return True
    if isinstance(value, dict):
        return any(map(_holds_proxy, value.values()))
    return isinstance(value, (list, tuple, set)) and any(map(_holds_proxy, value))


class _NothingConcrete(TorchFunctionMode):
    """Refuses torch functions of anything but the inputs: random numbers, say, would be baked in."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", str(function))
        if not (_holds_proxy(args) or _holds_proxy(kwargs)) and name not in _QUESTIONS and name != "__get__":
            raise Untraceable(f"torch.{name} is called on values that do not come from the input")
        return function(*args, **(kwargs or {}))


class _Tracer(fx.Tracer):
    proxy_buffer_attributes = True

    def __init__(self, root: nn.Module, signature: tuple, leaves: frozenset[nn.Module]) -> None:
        super().__init__()
        self._thread = threading.get_ident()
        self._signature, self._leaves = signature, leaves
        self._interesting: dict[nn.Module, bool] = {}
        self.absorbed: dict[nn.Module, str] = {root: ""}
        if original_class(root) is not type(root):
            self.traced_func_name = "_plain_forward"

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if (
            m in self._leaves
            or is_fused(m)
            or not calls_forward_alone(m)
            or isinstance(m, (nn.Conv2d, torch.jit.ScriptModule))
            or is_norm(m)
            or not self._is_interesting(m)
        ):
            return True
        kind = original_class(m)
        if kind.__module__.startswith(("torch.nn", "torch.ao")) and kind is not nn.Sequential:
            return True
        self.absorbed.setdefault(m, module_qualified_name)
        refuse_side_effects(plain_forward(m), kind.__name__)
        return False

    def _is_interesting(self, m: nn.Module) -> bool:
        if m not in self._interesting:
            self._interesting[m] = any(isinstance(c, nn.Conv2d) or is_norm(c) for c in m.modules())
        return self._interesting[m]

    def call_module(self, m, forward, args, kwargs):
        if threading.get_ident() != self._thread:  # another thread at its own work
            return forward(*args, **kwargs)
        if m not in self.submodule_paths:
            raise Untraceable(f"it calls a {type(m).__name__} that is not one of its submodules")
        return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr, attr_val, parameter_proxy_cache):
        if threading.get_ident() != self._thread:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        if node.op in ("placeholder", "call_module", "get_attr"):
            return _TensorProxy(node, self)
        return _Proxy(node, self)

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, fx.Proxy):
            return a.node
        if isinstance(a, Tensor) and not isinstance(a, nn.Parameter) and a not in self.tensor_attrs:
            if not any(a is b for b in self.root.buffers()):
                raise Untraceable("it uses a tensor that is not its own")
        if isinstance(a, types.FunctionType):
            return a
        return super().create_arg(a)

    def create_args_for_root(self, root_fn, is_module, concrete_args=None):
        count = 0

        def placeholder(requires_grad: bool) -> fx.Proxy:
            nonlocal count
            proxy = self.create_proxy("placeholder", f"input_{count}", (), {})
            proxy.node.meta["requires_grad"] = requires_grad
            count += 1
            return proxy

        args, kwargs, _ = self._signature
        args, kwargs = _rebuild(args, placeholder), _rebuild(kwargs, placeholder)

        def call(*all_args):
            with _NothingConcrete(), mock.patch.object(torch.utils.checkpoint, "checkpoint", checkpoint):
                return root_fn(*all_args, **kwargs)

        original = torch.utils.checkpoint.checkpoint

        def checkpoint(function, *args, **kwargs):
            """A checkpointed part stays as it is: a node that calls the user's function."""
            if not _holds_proxy(args):
                return original(function, *args, **kwargs)
            if not isinstance(function, types.FunctionType):
                raise Untraceable("it checkpoints something that is not a function")
            if any(_holds_proxy(cell.cell_contents) for cell in function.__closure__ or ()):
                raise Untraceable("it checkpoints a function that holds intermediate results")
            return self.create_proxy("call_function", original, (function, *args), kwargs)

        return call, [self.root, *args]


class Trace:
    """A graph, and what it was made for.

    Attributes:
        graph: the fx graph; one placeholder for each tensor of the call.
        modules: qualified name -> submodule, for its call_module nodes.
        absorbed: the modules that were traced through, by name; the root is "".
    """

    def __init__(self, root: nn.Module, signature: tuple, leaves: Iterable[nn.Module] = ()) -> None:
        self.signature = signature
        self.modules = dict(root.named_modules())
        tracer = _Tracer(root, signature, frozenset(leaves))
        refuse_side_effects(plain_forward(root), type(root).__name__)
        before = Attributes(root.modules(), plain_forward)
        drawn = random_state()
        try:
            with torch.random.fork_rng(devices=[]):
                self.graph = tracer.trace(root)
        finally:
            changed = before.changed()
            before.restore()
        if changed is not None:
            raise Untraceable(f"its forward changes {changed}")
        if random_state() != drawn:
            raise Untraceable("its forward draws random numbers in Python")
        self.absorbed = {name: module for module, name in tracer.absorbed.items()}
        self._attributes = Attributes(self.absorbed.values(), plain_forward)

    def changed(self) -> str | None:
        """What of the code's surroundings is no longer as it was traced, or None."""
        return self._attributes.changed()


def trace(root: nn.Module, signature: tuple, leaves: Iterable[nn.Module] = ()) -> Trace:
    """Trace ``root`` for a call of the given signature; ``leaves`` are further modules to keep as nodes.

    Raises:
        Untraceable: with the reason.
    """
    with _lock:
        try:
            return Trace(root, signature, leaves)
        except Untraceable:
            raise
        except Exception as error:  # whatever a user's forward does with a proxy
            line = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise Untraceable(f"torch.fx cannot trace its forward ({line[:120]})") from error
