"""The public functions: fused twins of compositions of ``torch.nn.functional``."""

from .ops import (
    BatchNormArgs,
    ConvArgs,
    UnitArgs,
    conv2d,
    conv2d_stats,
    max_pool2d,
    preact,
    preact_conv2d,
    residual_add,
    residual_unit,
    residual_units,
)

__all__ = [
    "BatchNormArgs",
    "ConvArgs",
    "UnitArgs",
    "conv2d",
    "conv2d_stats",
    "max_pool2d",
    "preact",
    "preact_conv2d",
    "residual_add",
    "residual_unit",
    "residual_units",
]
