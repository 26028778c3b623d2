"""The net that a run or a checkpoint describes, and the options of nets on the command line."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from ..models import create_model
from .errors import UserError

__all__ = ["build_model", "load_weights", "parse_model_options", "told_options", "try_model"]

#: What the commands themselves pass to ``create_model``.
_RESERVED = ("name", "num_classes", "in_channels", "fused", "device", "dtype")
_WORDS = {"true": True, "false": False, "none": None}


def parse_model_options(given: Iterable[str]) -> dict[str, Any]:
    """``["shortcut=conv", "dropout=0.3"]`` -> ``{"shortcut": "conv", "dropout": 0.3}``.

    A value is an integer or a number if it reads as one, True, False or None for true, false and none, else a
    string. ``shortcut_options.gate_bias=-6`` is an entry of the dictionary ``shortcut_options``.

    Raises:
        UserError: no NAME=VALUE, a name twice, or a name that another option of the command sets.
    """
    options: dict[str, Any] = {}
    for text in given:
        name, equals, value = text.partition("=")
        name = name.strip().replace("-", "_")
        path = name.split(".")
        if not equals or len(path) > 2 or not all(part.isidentifier() for part in path):
            raise UserError(
                f"--model-option should be NAME=VALUE, for example shortcut=conv, but got {text!r}"
            )
        if name in _RESERVED:
            raise UserError(f"--model-option {name} is set by the command itself: leave it out")
        target = options
        if len(path) == 2:
            target = options.setdefault(path[0], {})
        if not isinstance(target, dict) or path[-1] in target:
            raise UserError(f"--model-option {name} is given twice")
        target[path[-1]] = _value(value.strip())
    return options


def told_options(options: dict[str, Any]) -> list[str]:
    """The inverse of :func:`parse_model_options`."""
    told = []
    for name, value in options.items():
        inner = value.items() if isinstance(value, dict) else ()
        told += [f"{name}.{key}={part}" for key, part in inner] or [f"{name}={value}"]
    return told


def _value(text: str) -> Any:
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


def build_model(
    description: dict[str, Any], fused: bool, channels_last: bool, device: torch.device
) -> nn.Module:
    """The net that a run or a checkpoint describes.

    Args:
        description: ``name``, ``num_classes``, ``in_channels`` and, where there are any, ``options``.

    Raises:
        UserError: an unknown name, or an option that this net does not have or not with this value.
    """
    options = description.get("options") or {}
    try:
        model = create_model(
            description["name"],
            num_classes=description["num_classes"],
            in_channels=description["in_channels"],
            fused=fused,
            **options,
        )
    except (ValueError, TypeError) as error:
        if not options and isinstance(error, TypeError):
            raise
        told = f" (--model-option {' '.join(told_options(options))})" if options else ""
        raise UserError(f"{error}{told}") from error
    return model.to(device, memory_format=torch.channels_last if channels_last else torch.preserve_format)


def try_model(name: str, options: dict[str, Any], fused: bool) -> None:
    """Build the net without its memory, to find out before anything else whether there is such a net.

    Raises:
        UserError: as :func:`build_model`.
    """
    with torch.device("meta"):
        description = {"name": name, "num_classes": 2, "in_channels": 3, "options": options}
        build_model(description, fused, False, torch.device("meta"))


def load_weights(model: nn.Module, state: dict[str, Any], path: str) -> None:
    """Load the weights of a checkpoint.

    Raises:
        UserError: they are not those of this net.
    """
    try:
        model.load_state_dict(state["state_dict"])
    except (RuntimeError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} does not hold the weights of {state['model'].get('name')}: {str(error).splitlines()[0]}"
        ) from error
