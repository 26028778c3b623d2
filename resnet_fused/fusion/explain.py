"""``explain``: what :func:`fuse` does with a model, and why not more."""

from __future__ import annotations

import copy
import json
import textwrap
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from ..ops.arguments import resolve_padding
from ..primitives import dispatch
from .analysis import Analysis, analyze
from .classes import is_fused, original_class
from .fuse import unfuse

__all__ = ["Explanation", "explain"]

_WIDTH = 80
_PRIMITIVES = ("preact_conv_forward", "preact_conv_dgrad", "preact_conv_wgrad")


class Explanation:
    """What :func:`explain` found; ``str()`` of it fits into 80 columns.

    Attributes:
        units_fused, units_found: units that fuse, and those with at least one candidate.
        convs_fused, convs_found: the same of convolutions that a norm and an activation precede.
        bytes_saved: of activations that the fused units do not keep for backward, for the input given; None
            without one.
    """

    def __init__(self, tree: dict[str, Any]) -> None:
        self._tree = tree
        self.units_fused, self.units_found = tree["units_fused"], tree["units_found"]
        self.convs_fused, self.convs_found = tree["convs_fused"], tree["convs_found"]
        self.bytes_saved = tree["bytes_saved"]

    def as_dict(self) -> dict[str, Any]:
        """The same as nested dicts and lists, ready for JSON."""
        return copy.deepcopy(self._tree)

    def as_json(self) -> str:
        return json.dumps(self._tree, indent=1)

    def __str__(self) -> str:
        tree, lines = self._tree, []
        lines.append(
            f"{tree['model']}: {self.units_fused} of {self.units_found} units fuse, "
            f"{self.convs_fused} of {self.convs_found} convolutions"
        )
        if self.bytes_saved is not None:
            lines.append(
                f"activations not kept for backward: {_size(self.bytes_saved)} at input "
                f"{' x '.join(map(str, tree['input_size']))}"
            )
        for unit in tree["units"]:
            saved = "" if unit["bytes_saved"] is None else f", saves {_size(unit['bytes_saved'])}"
            what = f"fused{saved}" if unit["fused"] else "not fused"
            lines += _wrap(f"{unit['name'] or '(the model)'} ({unit['type']}): {what}", 0)
            for norm in unit["norms"]:
                lines += _wrap(_norm_line(norm, unit["name"]), 2)
        if tree["others"]:
            lines.append("norms with nothing to fuse:")
            for norm in tree["others"]:
                lines += _wrap(f"{norm['name']}: {norm['reason']}", 2)
        return "\n".join(lines)

    __repr__ = __str__


def _wrap(text: str, indent: int) -> list[str]:
    return textwrap.wrap(
        text, _WIDTH, initial_indent=" " * indent, subsequent_indent=" " * (indent + 4),
        break_on_hyphens=False,
    )  # fmt: skip


def _norm_line(norm: dict[str, Any], unit: str) -> str:
    prefix = len(unit) + 1 if unit else 0
    if norm["state"] != "fused":
        return f"{norm['name'][prefix:]}: {norm['reason']}"
    parts: dict[str, list[str]] = {}
    for conv in norm["convs"]:
        parts.setdefault(_how(conv), []).append(conv["name"][prefix:])
    return f"{norm['name'][prefix:]} -> " + "; ".join(
        f"{', '.join(names)} [{how}]" for how, names in parts.items()
    )


def _how(conv: dict[str, Any]) -> str:
    """The operator and the backend of a convolution, by primitive where they differ."""
    backends = conv["backends"]
    if len(set(backends.values())) == 1:
        return f"{conv['operator']}: {next(iter(backends.values()))}"
    listed = " ".join(f"{k.rpartition('_')[2]}={v}" for k, v in backends.items())
    return f"{conv['operator']}: {listed}" if listed else conv["operator"]


def _size(count: int) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


def explain(
    model: nn.Module,
    input_size: int | Sequence[int] | None = None,
    *,
    filter_fn: Callable[[str, nn.Module], bool] | None = None,
) -> Explanation:
    """Tell which units of a model :func:`fuse` fuses, why not the others, and what runs then.

    Args:
        model: plain or fused; it is not changed.
        input_size: (N, C, H, W); or (C, H, W) or a number S for one image [3, S, S]. With it, a copy of the
            model computes shapes: each convolution's backend per primitive, and the bytes of activation that
            backward no longer needs.
        filter_fn: as for :func:`fuse`.

    Raises:
        ValueError: an input_size of another form.
        Exception: whatever the model raises for such an input.
    """
    found = analyze(model, filter_fn)
    size = None if input_size is None else _full_size(input_size)
    shapes = {} if size is None else _shapes(model, size, found)
    parameter = next(model.parameters(), None)
    device = "cpu" if parameter is None else parameter.device.type
    dtype = torch.float32 if parameter is None else parameter.dtype
    units_fused, units_found = found.unit_counts()
    fused = sum(len(n.convs) for n in found.norms.values() if n.state == "fused")
    left = sum(max(len(n.convs), 1) for n in found.refused())
    units, others = _grouped(model, found, shapes, device, dtype)
    saved = [unit["bytes_saved"] for unit in units if unit["bytes_saved"] is not None]
    return Explanation({
        "model": type(model).__name__,
        "units_fused": units_fused,
        "units_found": units_found,
        "convs_fused": fused,
        "convs_found": fused + left,
        "input_size": None if size is None else list(size),
        "bytes_saved": None if size is None else sum(saved),
        "units": units,
        "others": others,
    })  # fmt: skip


def _full_size(size: int | Sequence[int]) -> tuple[int, ...]:
    full = (1, 3, size, size) if isinstance(size, int) else tuple(size)
    full = (1, *full) if len(full) == 3 else full
    if len(full) != 4 or not all(isinstance(s, int) and s > 0 for s in full):
        raise ValueError(f"input_size should be S, (C, H, W) or (N, C, H, W), all positive, but got {size}")
    return full


def _shapes(model: nn.Module, size: tuple[int, ...], found: Analysis) -> dict[str, tuple[int, ...]]:
    """Name of a convolution -> the shape of its input, from a copy of the model without data."""
    clone = unfuse(copy.deepcopy(model)).to("meta").eval()
    shapes: dict[str, tuple[int, ...]] = {}
    for module in clone.modules():
        module._forward_hooks.clear()  # the caller's; those before forward may compute weights
    for name, module in clone.named_modules():
        if isinstance(module, nn.Conv2d):

            def hook(_, args, name=name):
                shapes[name] = tuple(args[0].shape)

            module.register_forward_pre_hook(hook)
    parameter = next(model.parameters(), None)
    dtype = torch.float32 if parameter is None else parameter.dtype
    with torch.no_grad():
        clone(torch.empty(size, dtype=dtype, device="meta"))
    return shapes


def _grouped(model, found: Analysis, shapes, device, dtype) -> tuple[list[dict], list[dict]]:
    """Norms by unit, in the model's order, and those with nothing to fuse."""
    modules = dict(model.named_modules())
    names = {found.names[unit] for unit in found.units}
    units: dict[str, dict] = {}
    others = []
    for norm, status in found.norms.items():
        if status.state == "idle":
            others.append({"name": status.name, "reason": status.reason})
            continue
        owner = status.name.rpartition(".")[0]
        inside = [n for n in names if not n or status.name.startswith(n + ".")]
        owner = max(inside, key=len) if inside else owner
        unit = units.setdefault(owner, {
            "name": owner, "type": original_class(modules[owner]).__name__, "fused": owner in names,
            "is_fused_now": is_fused(modules[owner]), "bytes_saved": 0 if shapes else None, "norms": [],
        })  # fmt: skip
        convs = [_conv(modules[c], c, found, shapes, device, dtype) for c in status.convs]
        unit["norms"].append({
            "name": status.name, "type": type(norm).__name__, "state": status.state,
            "reason": status.reason, "convs": convs,
        })  # fmt: skip
        if status.state == "fused" and shapes and status.convs[0] in shapes:
            # Plain PyTorch keeps the norm's input and the activation; fused units keep the former alone.
            unit["bytes_saved"] += torch.Size(shapes[status.convs[0]]).numel() * dtype.itemsize
    return list(units.values()), others


def _conv(conv: nn.Conv2d, name: str, found: Analysis, shapes, device: str, dtype) -> dict[str, Any]:
    backends = {}
    shape = shapes.get(name)
    if shape is not None and conv in found.operators:
        padding, _ = resolve_padding(conv.padding, conv.weight, conv.stride, conv.dilation)
        geometry = dispatch.ConvGeometry(
            shape, tuple(conv.weight.shape), conv.stride, padding, conv.dilation, conv.groups
        )
        for primitive in _PRIMITIVES:
            backends[primitive] = dispatch.choose(primitive, device, dtype, geometry).backend
    return {
        "name": name,
        "operator": found.operators.get(conv, ""),
        "input": None if shape is None else list(shape),
        "backends": backends,
    }
