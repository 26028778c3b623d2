"""Whether a node may write over what it has saved: at its last use, and if nobody else can read it."""

from sys import getrefcount

import torch
from torch import Tensor
from torch.compiler import is_compiling

_give_fresh: set[type] = set()


def gives_fresh_output(function: type) -> type:
    """Decorator of an autograd.Function whose first output is in memory of its own, which the node does not save."""
    _give_fresh.add(function._backward_cls)
    return function


def is_fresh(x: Tensor) -> bool:
    """Whether x came out of such a function, as it is. Other memory may have owners that PyTorch does not count
    (a NumPy array, say)."""
    return type(x.grad_fn) in _give_fresh and x.output_nr == 0


def may_be_owned() -> bool:
    """Whether a node that saves now alone decides how long: the user's hooks for saved tensors, as of activation
    checkpoints, may keep what they are given."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is None


def is_now() -> bool:
    """Whether the backward that runs now is the last: the graph is neither kept nor made again."""
    return not (
        torch._C._autograd._get_current_graph_task_keep_graph() or torch.is_grad_enabled() or is_compiling()
    )


def _references(tensor: Tensor) -> tuple[int, ...]:
    """To the Python object, to the tensor, to its storage's Python object, to the storage; and one in the place of
    other processes, which torch.multiprocessing has let read it."""
    storage = tensor.untyped_storage()
    return (
        tensor.device.type == "cpu" and storage.is_shared(),  # of CUDA's memory it says so always
        getrefcount(tensor),
        tensor._use_count(),
        getrefcount(storage),
        torch._C._storage_Use_Count(storage._cdata),
    )


def _references_of_variable(variable: Tensor) -> tuple[int, ...]:
    return max(map(_references, [variable]))


def _in_variable() -> tuple[int, ...]:
    variable = torch.empty(1)
    return _references_of_variable(variable)


# What is counted beyond those that matter differs from version to version of Python, so it is measured.
_IN_LIST = max(map(_references, [torch.empty(1)]))
_IN_VARIABLE = _in_variable()


def is_only_reference(variable: Tensor) -> bool:
    """Whether the caller's variable is all that refers to its tensor, and the tensor all that refers to its
    memory: no other graph, view, array or frame."""
    # Not by _references_of_variable: one call more is one reference more.
    return all(map(int.__le__, max(map(_references, [variable])), _IN_VARIABLE))


def are_only_references(tensors: list[Tensor]) -> bool:
    """The same of a list that a variable holds."""
    return all([all(map(int.__le__, found, _IN_LIST)) for found in map(_references, tensors)])
