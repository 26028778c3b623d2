"""The shortcut of a residual unit, h(x) in x_{l+1} = f(h(x_l) + F(x_l)).

Where the number of channels or the resolution changes, options A, B and C of He, Zhang, Ren and Sun, "Deep
Residual Learning for Image Recognition" (CVPR 2016, arXiv:1512.03385, section 3.3). What is done to the
shortcut everywhere is the subject of section 3 of their "Identity Mappings in Deep Residual Networks" (ECCV
2016, arXiv:1603.05027, figure 2 and table 1).
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["PROJECTIONS", "SHORTCUTS", "ZeroPaddedIdentity", "shortcut_settings"]

#: What changes the dimensions: zero-padded strided identity, a 1x1 convolution there, a 1x1 convolution
#: everywhere.
PROJECTIONS = ("A", "B", "C")

#: Kind of shortcut -> its options and their defaults: the best of the paper's table 1.
SHORTCUTS: dict[str, dict[str, Any]] = {
    "identity": {},
    "constant_scaling": {"shortcut_scale": 0.5, "residual_scale": 0.5},
    "exclusive_gating": {"gate_bias": -6.0, "gate_std": None, "gate_input": "x"},
    "shortcut_only_gating": {"gate_bias": -6.0, "gate_std": None, "gate_input": "x"},
    "conv": {},
    "dropout": {"p": 0.5},
    "none": {},  # a plain net, without shortcuts
}


class ZeroPaddedIdentity(nn.Module):
    """Option A: every ``stride``-th pixel of x, and zeros for the channels that x does not have.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output, not fewer; the zeros come last.
        stride: distance of the pixels that are kept.

    Shape:
        - Input: (N, in_channels, H, W), any memory format
        - Output: (N, out_channels, ceil(H / stride), ceil(W / stride))

    Raises:
        ValueError: fewer channels out than in, which padding cannot do.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__()
        if out_channels < in_channels:
            raise ValueError(
                f"projection 'A' pads with zeros, so it cannot reduce {in_channels} channels to "
                f"{out_channels}: use 'B'"
            )
        self.stride, self.zeros = stride, out_channels - in_channels

    def forward(self, x: Tensor) -> Tensor:
        if self.stride != 1:
            # x[:, :, ::2, ::2], exactly; but dense, in x's memory format.
            x = F.avg_pool2d(x, 1, self.stride)
        return F.pad(x, (0, 0, 0, 0, 0, self.zeros)) if self.zeros else x

    def extra_repr(self) -> str:
        return f"stride={self.stride}, zeros={self.zeros}"


def shortcut_settings(shortcut: str, options: dict[str, Any] | None = None) -> dict[str, Any]:
    """The options of a kind of shortcut, those given and the defaults of the others.

    Raises:
        ValueError: an unknown kind or option, or a value out of range.
    """
    if shortcut not in SHORTCUTS:
        raise ValueError(f"shortcut should be one of {', '.join(map(repr, SHORTCUTS))}, but got {shortcut!r}")
    known = SHORTCUTS[shortcut]
    for name in options or {}:
        if name not in known:
            has = f"its options are {', '.join(known)}" if known else "it has no options"
            raise ValueError(f"shortcut {shortcut!r} has no option {name!r}: {has}")
    settings = {**known, **(options or {})}
    for name, value in settings.items():
        if name == "gate_input":
            if value not in ("x", "preactivation"):
                raise ValueError(f"gate_input should be 'x' or 'preactivation', but got {value!r}")
        elif name == "gate_std" and value is None:
            continue
        elif isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise ValueError(f"{name} should be a finite number, but got {value!r}")
        elif name == "gate_std" and value < 0:
            raise ValueError(f"gate_std should not be negative, but got {value}")
        elif name == "p" and not 0 <= value < 1:
            raise ValueError(f"p, the share that dropout sets to zero, should be in [0, 1), but got {value}")
    return settings
