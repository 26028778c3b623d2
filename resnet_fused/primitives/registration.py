"""How an operator gets into PyTorch's dispatcher, and its kernels to it."""

from collections.abc import Callable

import torch
from torch.autograd import forward_ad

NAMESPACE = "resnet_fused"

#: Holds every registration of this package; registrations live as long as it does.
LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")

_kernels: dict[torch._ops.OpOverload, Callable] = {}
_autograd_kernels: dict[torch._ops.OpOverload, Callable] = {}
_autocast_kernels: dict[tuple[torch._ops.OpOverload, str], Callable] = {}

_AUTOCAST = {
    device: torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, f"Autocast{device.upper()}"))
    for device in ("cpu", "cuda")
}


def define(schema: str, kernel: Callable, fake: Callable) -> torch._ops.OpOverload:
    """Define ``resnet_fused::<schema>`` with one kernel for every device, and its fake kernel."""
    name = schema.partition("(")[0]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=LIBRARY)
    op = getattr(getattr(torch.ops, NAMESPACE), name).default
    if not op._schema.is_mutable:  # the dispatcher counts the versions of what an operator changes
        _kernels[op] = kernel
    return op


def is_ordinary(x: torch.Tensor) -> bool:
    """Whether the dispatcher has nothing to do for an operator on x but to pass from autograd to kernel."""
    return type(x) in (torch.Tensor, torch.nn.Parameter) and not (
        x.is_meta or torch._C._len_torch_dispatch_stack() or torch._C._are_functorch_transforms_active()
    )


# Converting twenty arguments for the dispatcher and back takes longer than all of a kernel's own Python,
# twice per operator, and deep nets have a thousand operators. So it is left out where it has nothing to do.


def call(op: torch._ops.OpOverload, *args):
    """op(*args), for the differentiable operators."""
    x = args[0]
    if torch.compiler.is_compiling() or not is_ordinary(x):
        return op(*args)
    device_type = x.device.type
    if torch.is_autocast_enabled(device_type):
        return _autocast_kernels.get((op, device_type), op)(*args)
    return _autograd_kernels[op](*args)


def call_without_autocast(op: torch._ops.OpOverload, device_type: str, *args):
    """op(*args) with autocast leaving alone the operator and all that it calls."""
    with without_autocast(device_type):
        if torch.compiler.is_compiling() or not is_ordinary(args[0]):
            return op(*args)
        return _autograd_kernels[op](*args)


def below_autograd(op: torch._ops.OpOverload, *args):
    """op(*args) without a derivative."""
    with torch._C._AutoDispatchBelowAutograd():
        return _kernels.get(op, op)(*args) if is_ordinary(args[0]) else op(*args)


def call_in_backward(op: torch._ops.OpOverload, *args):
    """op(*args) inside of a backward: with a derivative if the graph is being kept for one (create_graph)."""
    return op(*args) if torch.is_grad_enabled() else below_autograd(op, *args)


def without_autocast(device_type: str):
    """A context in which autocast leaves the operators called inside alone."""
    return torch._C._ExcludeDispatchKeyGuard(_AUTOCAST[device_type])


def autocast_kernel(op: torch._ops.OpOverload, make: Callable[[str], Callable]) -> None:
    """Attach ``make(device_type)`` to op's autocast keys."""
    for device_type in _AUTOCAST:
        kernel = _autocast_kernels[op, device_type] = make(device_type)
        LIBRARY.impl(op._schema.name.partition("::")[2], kernel, f"Autocast{device_type.upper()}")


def differentiable(op: torch._ops.OpOverload, apply: Callable) -> None:
    """Give op a derivative: apply, an autograd.Function's with op's arguments, runs where one is needed."""

    def kernel(*args):
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
            return apply(*args)
        if forward_ad._current_level >= 0:
            return apply(*args)  # raises if an argument has a tangent: there is no formula for it
        return below_autograd(op, *args)

    LIBRARY.impl(op._schema.name.partition("::")[2], kernel, "Autograd")
    _autograd_kernels[op] = kernel


def keep_dtypes(op: torch._ops.OpOverload) -> None:
    """Under autocast, run op on its arguments as they are, and everything inside it too."""

    def make(device_type: str) -> Callable:
        return lambda *args: call_without_autocast(op, device_type, *args)

    autocast_kernel(op, make)


class _NotDifferentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx, op, *args):
        ctx.name = op.name()
        return below_autograd(op, *args)

    @staticmethod
    def backward(ctx, *grads):
        raise RuntimeError(
            f"{ctx.name} is a primitive and has no derivative; the differentiable operators are "
            "resnet_fused::preact_conv2d, resnet_fused::residual_add, resnet_fused::residual_unit and "
            "resnet_fused::max_pool2d"
        )


def define_primitive(schema: str, kernel: Callable, fake: Callable) -> torch._ops.OpOverload:
    """:func:`define` for a primitive: backward through it raises, and autocast leaves it alone."""
    op = define(schema, kernel, fake)
    differentiable(op, lambda *args: _NotDifferentiable.apply(op, *args))
    keep_dtypes(op)
    return op
