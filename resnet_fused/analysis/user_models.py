"""Nets of other packages by name, for the commands that look at them."""

from __future__ import annotations

import argparse
import difflib

import torch
from torch import nn

from ..models import create_model
from ..training.errors import UserError
from ..training.lazy import require
from ..training.options import at_least

__all__ = ["add_model_arguments", "build", "image_batch", "image_size"]

_HELP = "timm:NAME, torchvision:NAME, or a net of resnet_fused, such as preact_resnet20_cifar"


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """The net and the size of its images."""
    parser.add_argument("model", metavar="MODEL", help=_HELP)
    parser.add_argument(
        "--input-size", type=at_least(int, 1), metavar="S",
        help="height and width of the images (default: 64; 32 for nets of resnet_fused)",
    )  # fmt: skip


def build(name: str) -> nn.Module:
    """A plain net with random weights, in train mode.

    Raises:
        UserError: an unknown name, or a package that is not installed; one line.
    """
    package, colon, inner = name.partition(":")
    if colon and package not in ("timm", "torchvision"):
        raise UserError(f"unknown package {package!r} in {name!r}: expected {_HELP}")
    torch.manual_seed(0)
    if not colon:
        try:
            model = create_model(name, fused=False)
        except ValueError as error:
            others = "Nets of other packages are written timm:NAME and torchvision:NAME"
            raise UserError(f"{error} {others}") from None
    elif package == "timm":
        timm = require("timm", "timm", f"the net {name}")
        if not timm.is_model(inner):
            close = _close(inner, timm.list_models())
            raise UserError(f"timm {timm.__version__} has no model {inner!r}{close}")
        model = timm.create_model(inner)
    else:
        models = require("torchvision", "torchvision", f"the net {name}").models
        if inner not in models.list_models():
            raise UserError(f"torchvision has no model {inner!r}{_close(inner, models.list_models())}")
        model = models.get_model(inner, weights=None)
    return model.train()


def _close(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return f": did you mean {' or '.join(close)}?" if close else ""


def image_batch(name: str, batch_size: int, size: int | None) -> torch.Tensor:
    """Normal images [N, 3, S, S], channels_last, the same ones every time."""
    size = image_size(name, size)
    images = torch.randn(batch_size, 3, size, size, generator=torch.Generator().manual_seed(0))
    return images.contiguous(memory_format=torch.channels_last)


def image_size(name: str, size: int | None) -> int:
    """The size that was asked for, or the usual one of the net's family."""
    return size or (64 if ":" in name else 32)
