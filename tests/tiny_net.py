"""A pre-activation net of 8 layers, for trainings that take a second."""

from typing import Any

import pytest

from resnet_fused.models import PreActResNetCifar
from resnet_fused.training import nets

TINY = "tiny"


def add_tiny_net(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the commands know a net named "tiny" too."""
    known = nets.create_model

    def create_model(name: str, **options: Any):
        return PreActResNetCifar(8, "basic", **options) if name == TINY else known(name, **options)

    monkeypatch.setattr(nets, "create_model", create_model)
