"""A residual unit of any activation order and any shortcut, as plain ``nn.Module``, public in
``resnet_fused.reference``.

x_{l+1} = f(h(x_l) + F(x_l)) (equations 1 and 2 of He, Zhang, Ren and Sun, "Identity Mappings in Deep Residual
Networks", ECCV 2016, arXiv:1603.05027). Section 3 and figure 2 of that paper vary h, section 4 and figure 4
the order of norms, activations and addition. :func:`resnet_fused.fuse` finds in it what fused operators
compute.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .pre_activation import activation, convolution
from .shortcuts import PROJECTIONS, ZeroPaddedIdentity, shortcut_settings

__all__ = ["ORDERS", "PREACTIVATION_ORDERS", "ResidualUnit"]

#: Figure 4, a to e.
ORDERS = (
    "original",
    "bn_after_addition",
    "relu_before_addition",
    "relu_only_preactivation",
    "full_preactivation",
)
#: The orders whose units activate their input; f is the identity.
PREACTIVATION_ORDERS = ORDERS[3:]


def one_of(name: str, value: Any, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name} should be one of {', '.join(map(repr, known))}, but got {value!r}")


class ResidualUnit(nn.Module):
    """A residual unit of two 3x3 convolutions ("basic") or of a 1x1, a 3x3 and a 1x1 ("bottleneck").

    ====================================  ==========================================================
    order (paper: figure 4)               what runs, for two convolutions
    ====================================  ==========================================================
    "original" (a)                        conv bn relu conv bn, addition, relu
    "bn_after_addition" (b)               conv bn relu conv, addition, bn relu
    "relu_before_addition" (c)            conv bn relu conv bn relu, addition
    "relu_only_preactivation" (d)         relu conv bn relu conv bn, addition
    "full_preactivation" (e)              bn relu conv bn relu conv, addition
    ====================================  ==========================================================

    ====================================  ==========================================================
    shortcut (paper: figure 2, table 1)   h and F at the addition; s is x, or x projected
    ====================================  ==========================================================
    "identity" (a)                        s + F
    "constant_scaling" (b)                ``shortcut_scale`` s + ``residual_scale`` F
    "exclusive_gating" (c)                (1 - g) s + g F, with g = sigmoid(W_g x + b_g), a 1x1 convolution
    "shortcut_only_gating" (d)            (1 - g) s + F
    "conv" (e)                            a 1x1 convolution of x, in every unit, + F
    "dropout" (f)                         dropout(s) + F, elementwise, scaled by 1 / (1 - p) as PyTorch's
    "none"                                F alone: a plain net
    ====================================  ==========================================================

    Children: ``conv1``, ``bn1``, ``conv2``, ``bn2`` (``conv3``, ``bn3``) in the order in which they run;
    where dimensions change, or in every unit, ``downsample`` (a 1x1 convolution and a norm, or no norm for
    "bn_after_addition", whose norm follows the addition), as in torchvision's ResNets; with full
    pre-activation ``shortcut``, a 1x1 convolution alone, as in :class:`PreActBasicBlock`; ``gate``, the 1x1
    convolution of g.

    Args:
        in_channels: channels of the input.
        channels: channels of the 3x3 convolutions; a bottleneck gives ``4 * channels``.
        stride: stride of the unit.
        block: "basic" or "bottleneck".
        order, shortcut: see above.
        shortcut_options: options of this kind of shortcut. ``shortcut_scale`` and ``residual_scale`` (0.5,
            0.5); ``gate_bias`` (initial b_g, -6: the paper searched 0 to -10), ``gate_std`` (standard
            deviation of the initial W_g; None: as other convolutions), ``gate_input`` ("x"; or
            "preactivation", what conv1 reads); ``p`` (0.5, the share of the shortcut that dropout zeroes).
        projection: where the dimensions change, "A": zero-padded strided identity; "B": 1x1 convolution. "C":
            a 1x1 convolution in every unit, which is what ``shortcut="conv"`` is.
        preactivation: of the orders (d) and (e). "residual": x is activated for F alone; a 1x1 projection
            reads the activation, as in the authors' code. "shared": the shortcut starts from the activation
            too, the paper's rule for a net's first unit. "none": x comes activated, conv1 reads it as it is.
        stride_in: which convolution of a bottleneck has the stride: "1x1" (the first; the papers) or "3x3"
            (torchvision).
        dropout: share of the values zeroed before the last convolution (Wide ResNets).
        eps, momentum, affine, track_running_stats: as in :class:`torch.nn.BatchNorm2d`, for each of the
            norms.
        negative_slope: slope of the activations below zero; 0 is ReLU.
        bias: whether the convolutions of F and the projections have a bias.

    Shape:
        - Input: (N, in_channels, H, W), any memory format
        - Output: (N, out_channels, ceil(H / stride), ceil(W / stride))

    Raises:
        ValueError: unknown names, or a combination without meaning.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        stride: int = 1,
        *,
        block: str = "basic",
        order: str = "original",
        shortcut: str = "identity",
        shortcut_options: dict[str, Any] | None = None,
        projection: str = "B",
        preactivation: str = "residual",
        stride_in: str = "1x1",
        dropout: float = 0.0,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        negative_slope: float = 0.0,
        bias: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        one_of("block", block, ("basic", "bottleneck"))
        one_of("order", order, ORDERS)
        one_of("projection", projection, PROJECTIONS)
        one_of("preactivation", preactivation, ("residual", "shared", "none"))
        one_of("stride_in", stride_in, ("1x1", "3x3"))
        self.settings = shortcut_settings(shortcut, shortcut_options)
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout should be in [0, 1), but got {dropout}")
        if projection == "C" and shortcut not in ("identity", "conv"):
            raise ValueError(
                f"projection 'C' puts a 1x1 convolution on every shortcut, which leaves {shortcut!r} nothing "
                "to act on: use 'A' or 'B'"
            )
        if shortcut == "conv" and projection == "A":
            raise ValueError(
                "shortcut 'conv' puts a 1x1 convolution on every shortcut (projection 'C'), so projection "
                "'A' has no place"
            )
        activates = order in PREACTIVATION_ORDERS
        if preactivation != "residual" and not activates:
            raise ValueError(f"the units of order {order!r} do not activate their input (preactivation)")
        if self.settings.get("gate_input") == "preactivation" and not activates:
            raise ValueError(f"gate_input='preactivation': units of order {order!r} have none, use 'x'")

        self.block, self.order, self.shortcut_kind, self.preactivation = block, order, shortcut, preactivation
        self.negative_slope = negative_slope
        factory = {"device": device, "dtype": dtype}
        norm_options = (eps, momentum, affine, track_running_stats)

        def norm(width: int) -> nn.BatchNorm2d:
            return nn.BatchNorm2d(width, *norm_options, **factory)

        if block == "basic":
            out_channels = channels
            geometry = [(in_channels, channels, 3, stride), (channels, channels, 3, 1)]
        else:
            out_channels = 4 * channels
            strides = (stride, 1) if stride_in == "1x1" else (1, stride)
            geometry = [
                (in_channels, channels, 1, strides[0]),
                (channels, channels, 3, strides[1]),
                (channels, out_channels, 1, 1),
            ]
        self.convolutions = len(geometry)
        full = order == "full_preactivation"
        for i, (before, after, kernel, step) in enumerate(geometry, start=1):
            if full and not (i == 1 and preactivation == "none"):
                self.add_module(f"bn{i}", norm(before))
            self.add_module(f"conv{i}", convolution(before, after, kernel, step, bias, **factory))
            if not full:
                self.add_module(f"bn{i}", norm(after))
        self.dropout = nn.Dropout(dropout) if dropout else None

        changes = stride != 1 or in_channels != out_channels
        base: nn.Module | None = None
        self.projects = False
        if shortcut == "none":
            pass
        elif changes and projection == "A":
            base = ZeroPaddedIdentity(in_channels, out_channels, stride)
        elif changes or projection == "C" or shortcut == "conv":
            self.projects = True
            base = convolution(in_channels, out_channels, 1, stride, bias, **factory)
            if not full:
                layers = [base] if order == "bn_after_addition" else [base, norm(out_channels)]
                base = nn.Sequential(*layers)
        self.add_module("shortcut" if full else "downsample", base)
        if "gate_bias" in self.settings:
            self.gate = nn.Conv2d(in_channels, out_channels, 1, stride, **factory)
            self.reset_gate()
        if shortcut == "dropout":
            self.shortcut_dropout = nn.Dropout(self.settings["p"])

    def reset_gate(self) -> None:
        """Draw W_g anew where ``gate_std`` gives its size, and set b_g."""
        if "gate_bias" in self.settings:
            if self.settings["gate_std"] is not None:
                nn.init.normal_(self.gate.weight, 0.0, self.settings["gate_std"])
            nn.init.constant_(self.gate.bias, self.settings["gate_bias"])

    def activate(self, x: Tensor) -> Tensor:
        return activation(x, self.negative_slope)

    def preactivate(self, x: Tensor) -> Tensor:
        """What conv1 reads."""
        if self.order not in PREACTIVATION_ORDERS or self.preactivation == "none":
            return x
        return self.activate(self.bn1(x) if self.order == "full_preactivation" else x)

    def residual_branch(self, a: Tensor) -> Tensor:
        """F, from what conv1 reads to the addition."""
        y = a
        for i in range(1, self.convolutions + 1):
            first, last = i == 1, i == self.convolutions
            norm, conv = getattr(self, f"bn{i}", None), getattr(self, f"conv{i}")
            if self.order == "full_preactivation" and not first:
                y = self.activate(norm(y))
            if last and self.dropout is not None:
                y = self.dropout(y)
            y = conv(y)
            if self.order == "full_preactivation" or (last and self.order == "bn_after_addition"):
                continue
            y = norm(y)
            if not last or self.order == "relu_before_addition":
                y = self.activate(y)
        return y

    def branches(self, x: Tensor) -> tuple[Tensor | None, Tensor]:
        """h and F; no h in a plain net."""
        a = self.preactivate(x)
        y = self.residual_branch(a)
        if self.shortcut_kind == "none":
            return None, y
        h = a if self.projects or self.preactivation == "shared" else x
        base = self.shortcut if self.order == "full_preactivation" else self.downsample
        if base is not None:
            h = base(h)
        if self.shortcut_kind == "constant_scaling":
            return h * self.settings["shortcut_scale"], y * self.settings["residual_scale"]
        if self.shortcut_kind == "dropout":
            return self.shortcut_dropout(h), y
        if "gate_bias" in self.settings:
            g = torch.sigmoid(self.gate(a if self.settings["gate_input"] == "preactivation" else x))
            return (1 - g) * h, g * y if self.shortcut_kind == "exclusive_gating" else y
        return h, y

    def terms(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(h, F): the shortcut's and the residual branch's term of the addition, scaled or gated.

        ``unit(x) == unit.after_addition(h + F)``. In a plain net h is 0.
        """
        h, y = self.branches(x)
        return torch.zeros_like(y) if h is None else h, y

    def after_addition(self, y: Tensor) -> Tensor:
        """f."""
        if self.order == "bn_after_addition":
            y = getattr(self, f"bn{self.convolutions}")(y)
        return self.activate(y) if self.order in ("original", "bn_after_addition") else y

    def forward(self, x: Tensor) -> Tensor:
        h, y = self.branches(x)
        return self.after_addition(y if h is None else y + h)

    def extra_repr(self) -> str:
        options = "".join(f", {name}={value!r}" for name, value in self.settings.items())
        text = f"block={self.block!r}, order={self.order!r}, shortcut={self.shortcut_kind!r}{options}"
        if self.preactivation != "residual":
            text += f", preactivation={self.preactivation!r}"
        return text + (f", negative_slope={self.negative_slope}" if self.negative_slope else "")
