"""A pre-activation net of 8 layers, for trainings that take a second."""

from collections.abc import Callable
from typing import Any

import pytest

from torch import nn

from resnet_fused.models import PreActResNetCifar
from resnet_fused.training import nets

TINY = "tiny"


def tiny_create_model(known: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """``known``, a create_model, with a net named "tiny" too."""

    def create_model(name: str, **options: Any) -> nn.Module:
        return PreActResNetCifar(8, "basic", **options) if name == TINY else known(name, **options)

    return create_model


def add_tiny_net(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the commands know a net named "tiny" too."""
    monkeypatch.setattr(nets, "create_model", tiny_create_model(nets.create_model))
