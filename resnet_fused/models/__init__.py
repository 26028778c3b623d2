"""Nets by name, built out of the units of :mod:`resnet_fused.nn`."""

from .densenet import DenseNet
from .preact_resnet_cifar import PreActResNetCifar
from .registry import create_model, list_models
from .resnet import ResNet
from .wide_resnet import WideResNetCifar

__all__ = ["DenseNet", "PreActResNetCifar", "ResNet", "WideResNetCifar", "create_model", "list_models"]
