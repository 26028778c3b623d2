"""``fuse`` and ``unfuse``: a user's model, in place."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Literal

import torch
from torch import nn

from .analysis import analyze
from .classes import CONVOLUTION, POOL, ROWS, is_fused, restore_all
from .convolutions import exchange_convolutions
from .pools import exchange_pools
from .rows import exchange_sequentials
from .unit import convert, restore, state_of

__all__ = ["fuse", "unfuse"]

_STRIDES = "_resnet_fused_strides"


def fuse(
    model: nn.Module,
    *,
    memory_format: torch.memory_format | Literal["auto"] | None = "auto",
    filter_fn: Callable[[str, nn.Module], bool] | None = None,
    strict: bool = False,
) -> nn.Module:
    """Let the pre-activation units of a model run fused, in place.

    BatchNorm -> (Leaky)ReLU -> Conv2d is found in the dataflow of the modules' own ``forward``, whatever the
    attributes are called, and so are residual additions and projections of the pre-activation. Modules,
    parameters, buffers, names, hooks, training flags and references of an optimizer stay what they are; a
    unit's class becomes a subclass of itself, and so does that of an ``nn.Sequential`` in which units follow
    one another, which then share autograd nodes, of an ``nn.MaxPool2d``, which then keeps one byte per
    output for backward, and of an ``nn.Conv2d`` outside of units (a stem, a classifier), which this package's
    kernels then run on the CPU. What cannot be shown to be equal is left alone
    (:func:`explain` says why). A unit reads its parameters and settings when it is called; where its layers
    have been changed (hooks, other classes, other attributes) it is looked at anew. Under torch.compile,
    torch.export, torch.jit.trace, torch.func and forward-mode AD the original forward runs.

    Args:
        model: any module.
        memory_format: format that 4-D parameters are brought to; None leaves them. ``"auto"``: channels_last,
            but on a machine without a GPU only as far as activations follow from it: weights of units after
            the first convolution stay as they are, since the CPU's kernels read and write either format as
            fast, and PyTorch's fused optimizers are faster in NCHW.
        filter_fn: ``filter_fn(name, module) -> bool``: False leaves this unit, this max pool, or this
            convolution outside of units, alone.
        strict: raise if a norm, an activation and a convolution that follow one another are left alone.

    Returns:
        model.

    Raises:
        TypeError: model is not a module, or memory_format is none of these.
        RuntimeError: with ``strict``; the message has every reason, and the model is unchanged.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model should be a torch.nn.Module, but got {type(model).__name__}")
    if not (memory_format is None or memory_format == "auto" or isinstance(memory_format, torch.memory_format)):
        raise TypeError("fuse(): memory_format should be a torch.memory_format, 'auto' or None, "
                        f"but got {memory_format!r}")
    found = analyze(model, filter_fn)
    refused = [norm for norm in found.refused() if norm.reason != "excluded by filter_fn"]
    if strict and refused:
        lines = [f"  {norm.name}: {norm.reason}" for norm in refused]
        raise RuntimeError("\n".join([f"fuse(strict=True): {len(refused)} norms were left alone", *lines]))
    restore_all(model, ROWS, POOL, CONVOLUTION)
    for module in model.modules():
        if is_fused(module) and module not in found.units:
            restore(module)
    for module in found.units:
        convert(module)
        state_of(module).link = found.links.get(module)
    exchange_sequentials(model)
    if found.units:  # a model with nothing else to fuse stays as it is
        exchange_pools(model, filter_fn)
        exchange_convolutions(model, found, filter_fn)
    if memory_format is not None:
        strides = model.__dict__.setdefault(_STRIDES, {})
        before = {name: value.stride() for name, value in _tensors(model) if value.dim() == 4}
        _bring_to(model, memory_format, found.units)
        for name, value in _tensors(model):
            if name in before and value.stride() != before[name]:
                strides.setdefault(name, before[name])
    return model


def _bring_to(model: nn.Module, memory_format: torch.memory_format | str, units: Iterable[nn.Module]) -> None:
    """What fuse() says of memory_format."""
    left: set[nn.Module] = set()
    if memory_format == "auto":
        memory_format = torch.channels_last
        if not torch.cuda.is_available():
            convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
            left = {module for unit in units for module in unit.modules()}.intersection(convolutions[1:])
    for module in model.modules():
        if module not in left:
            module._apply(
                lambda value: value.to(memory_format=memory_format) if value.dim() == 4 else value, recurse=False
            )


def unfuse(model: nn.Module) -> nn.Module:
    """Undo :func:`fuse`: the original classes, and the memory format that the parameters had.

    Returns:
        model, in place; its ``state_dict`` is that of a model that has never been fused, byte for byte.
    """
    restore_all(model, ROWS, POOL, CONVOLUTION)
    for module in model.modules():
        if is_fused(module):
            restore(module)
        strides = module.__dict__.pop(_STRIDES, {})
        for name, value in _tensors(module):
            if name in strides and value.stride() != strides[name]:
                data = torch.empty_strided(
                    value.shape, strides[name], dtype=value.dtype, device=value.device
                )
                value.data = data.copy_(value.detach())
    return model


def _tensors(model: nn.Module):
    yield from model.named_parameters()
    yield from model.named_buffers()
