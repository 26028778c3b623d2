"""Initial parameters of the nets, as in the authors' code (He et al. 2015, "Delving Deep into
Rectifiers")."""

from __future__ import annotations

import math

from torch import nn

from ..nn.reference import ResidualUnit

__all__ = ["initialize"]


def initialize(net: nn.Module) -> None:
    """Draw all parameters anew, in the order of the modules.

    Convolutions N(0, sqrt(2 / (k k n_out))), norms 1 and 0, linear layers PyTorch's weights and a bias of 0,
    gates of shortcuts the bias (and standard deviation) of their options.
    """
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels
            nn.init.normal_(module.weight, 0.0, math.sqrt(2.0 / fan_out))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, (nn.BatchNorm2d, nn.Linear)):
            module.reset_parameters()
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
    for module in net.modules():
        if isinstance(module, ResidualUnit):
            module.reset_gate()
