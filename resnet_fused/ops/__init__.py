"""The differentiable operators, written once out of primitives for all backends: schema, fake kernel,
autograd, autocast and public function, one file each."""

from .arguments import BatchNormArgs, ConvArgs
from .conv2d import conv2d, conv2d_stats
from .max_pool2d import max_pool2d
from .preact import preact
from .preact_conv2d import preact_conv2d
from .residual_add import residual_add
from .residual_units import residual_unit, residual_units
from .unit_node import UnitArgs

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
