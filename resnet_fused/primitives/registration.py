"""How an operator gets into the dispatcher: its schema is defined once, here are the ways to attach kernels to it."""

from collections.abc import Callable

import torch

NAMESPACE = "resnet_fused"

#: Holds every registration of this package; registrations live as long as it does.
LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")

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
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def without_autocast(device_type: str):
    """A context in which autocast leaves the operators called inside alone."""
    return torch._C._ExcludeDispatchKeyGuard(_AUTOCAST[device_type])


def autocast_kernel(op: torch._ops.OpOverload, make: Callable[[str], Callable]) -> None:
    """Attach ``make(device_type)`` to op's autocast keys."""
    for device_type in _AUTOCAST:
        LIBRARY.impl(op._schema.name.partition("::")[2], make(device_type), f"Autocast{device_type.upper()}")


def autograd_kernel(op: torch._ops.OpOverload, kernel: Callable) -> None:
    """Attach kernel to op's autograd key."""
    LIBRARY.impl(op._schema.name.partition("::")[2], kernel, "Autograd")


def differentiable(op: torch._ops.OpOverload, apply: Callable) -> None:
    """Give op a derivative: ``apply`` (an autograd.Function's, with op's own arguments) runs where a gradient is needed."""

    def kernel(*args):
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
            return apply(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)

    autograd_kernel(op, kernel)


def keep_dtypes(op: torch._ops.OpOverload) -> None:
    """Under autocast, run op on its arguments as they are, and everything inside it too."""

    def make(device_type: str) -> Callable:
        def kernel(*args):
            with without_autocast(device_type):
                return op(*args)

        return kernel

    autocast_kernel(op, make)


class _NotDifferentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx, op, *args):
        ctx.name = op.name()
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)

    @staticmethod
    def backward(ctx, *grads):
        raise RuntimeError(
            f"{ctx.name} is a primitive and has no derivative; the differentiable operators are "
            "resnet_fused::preact_conv2d, resnet_fused::residual_add and resnet_fused::residual_unit"
        )


def define_primitive(schema: str, kernel: Callable, fake: Callable) -> torch._ops.OpOverload:
    """:func:`define` for a primitive: not differentiable (backward through it raises), and left alone by autocast."""
    op = define(schema, kernel, fake)
    differentiable(op, lambda *args: _NotDifferentiable.apply(op, *args))
    keep_dtypes(op)
    return op
