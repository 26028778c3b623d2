"""Nets by name, built out of the units of :mod:`resnet_fused.nn`."""

from .preact_resnet_cifar import PreActResNetCifar
from .registry import create_model, list_models

__all__ = ["PreActResNetCifar", "create_model", "list_models"]
