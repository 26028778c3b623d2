"""Nets by name."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from .densenet import DenseNet, dense_layers
from .preact_resnet_cifar import PreActResNetCifar, blocks_per_stage
from .resnet import ResNet
from .wide_resnet import WideResNetCifar, wide_blocks, wide_widths

__all__ = ["create_model", "list_models"]

Builder = Callable[..., nn.Module]

_CIFAR_DEPTHS = {20: "basic", 29: "bottleneck", 32: "basic", 44: "basic", 56: "basic", 110: "basic",
                 164: "bottleneck", 1001: "bottleneck", 1202: "basic"}  # fmt: skip
_IMAGENET_BLOCKS = {
    18: ("basic", (2, 2, 2, 2)),
    34: ("basic", (3, 4, 6, 3)),
    50: ("bottleneck", (3, 4, 6, 3)),
    101: ("bottleneck", (3, 4, 23, 3)),
    152: ("bottleneck", (3, 8, 36, 3)),
    200: ("bottleneck", (3, 24, 36, 3)),
}
_DENSENET_LAYERS = {121: (6, 12, 24, 16), 169: (6, 12, 32, 32), 201: (6, 12, 48, 32)}

#: Options of ResNet that ask for more than the fused units of rf.nn compute whole.
_SHAPING = {
    "order": "full_preactivation",
    "shortcut": "identity",
    "projection": "B",
    "first_activation": "residual",
    "stride_in": "1x1",
    "dropout": 0.0,
}


def _projection(given: dict[str, Any], default: str) -> dict[str, Any]:
    """The projection: that of the name, unless another one, or a shortcut that is one, was asked for."""
    if given.get("shortcut") == "conv":
        default = "C"
    return {"projection": default, **given}


def _is_native(options: dict[str, Any]) -> bool:
    """Whether the units of rf.nn, which hand statistics on, are the ones asked for."""
    return not options.get("shortcut_options") and all(
        options.get(name, value) == value for name, value in _SHAPING.items()
    )


def _without(options: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in options.items() if k not in _SHAPING and k != "shortcut_options"}


def _resnet_cifar(depth: int) -> Builder:
    block = _CIFAR_DEPTHS[depth]

    def build(**options):
        # The papers: A for basic units (2015, section 4.2), B for bottlenecks (2016, appendix).
        options = _projection(options, "A" if block == "basic" else "B")
        return ResNet([blocks_per_stage(depth, block)] * 3, (16, 32, 64), block, **options)

    return build


def _preact_resnet_cifar(depth: int) -> Builder:
    block = _CIFAR_DEPTHS[depth]

    def build(**options):
        options = _projection({"order": "full_preactivation", **options}, "B")
        if options["order"] == "full_preactivation":
            options = {"first_activation": "residual", **options}
        if _is_native(options):
            return PreActResNetCifar(depth, block, **_without(options))
        return ResNet([blocks_per_stage(depth, block)] * 3, (16, 32, 64), block, **options)

    return build


def _plain_cifar(depth: int) -> Builder:
    def build(**options):
        for name in ("shortcut", "shortcut_options", "projection"):
            if options.get(name) not in (None, "none", {}):
                raise ValueError(
                    f"a plain net has no shortcuts, so it takes no {name}: use 'resnet{depth}_cifar'"
                )
            options.pop(name, None)
        blocks = [blocks_per_stage(depth, "basic")] * 3
        return ResNet(blocks, (16, 32, 64), "basic", shortcut="none", **options)

    return build


def _wide_cifar(depth: int, width: int) -> Builder:
    def build(**options):
        options = _projection({"order": "full_preactivation", **options}, "B")
        if options["order"] == "full_preactivation":
            options = {"first_activation": "residual", **options}
        if _is_native(options):
            return WideResNetCifar(depth, width, **_without(options))
        return ResNet([wide_blocks(depth)] * 3, wide_widths(width), "basic", **options)

    return build


def _imagenet(depth: int, order: str) -> Builder:
    block, blocks = _IMAGENET_BLOCKS[depth]

    def build(**options):
        options = _projection({"order": order, "stride_in": "3x3", **options}, "B")
        return ResNet(blocks, (64, 128, 256, 512), block, stem="imagenet", stem_channels=64, **options)

    return build


def _densenet_cifar(depth: int, growth: int) -> Builder:
    return lambda **options: DenseNet([dense_layers(depth)] * 3, growth, stem="cifar", **options)


def _densenet(depth: int) -> Builder:
    return lambda **options: DenseNet(_DENSENET_LAYERS[depth], 32, stem="imagenet", **options)


def _models() -> dict[str, tuple[int, Builder, type[nn.Module]]]:
    """Name -> classes of its data set, constructor, the class whose arguments are its options."""
    models: dict[str, tuple[int, Builder, type[nn.Module]]] = {}
    for depth in _CIFAR_DEPTHS:
        models[f"resnet{depth}_cifar"] = (10, _resnet_cifar(depth), ResNet)
    for depth in _CIFAR_DEPTHS:
        models[f"preact_resnet{depth}_cifar"] = (10, _preact_resnet_cifar(depth), ResNet)
    for depth in (20, 32, 44, 56):
        models[f"plain{depth}_cifar"] = (10, _plain_cifar(depth), ResNet)
    for depth, width in ((16, 4), (28, 10), (40, 4)):
        models[f"wrn{depth}_{width}_cifar"] = (10, _wide_cifar(depth, width), ResNet)
    for depth, growth in ((100, 12), (250, 24)):
        models[f"densenet_bc{depth}_{growth}_cifar"] = (10, _densenet_cifar(depth, growth), DenseNet)
    for depth in _IMAGENET_BLOCKS:
        models[f"resnet{depth}"] = (1000, _imagenet(depth, "original"), ResNet)
    for depth in _IMAGENET_BLOCKS:
        models[f"preact_resnet{depth}"] = (1000, _imagenet(depth, "full_preactivation"), ResNet)
    for depth in _DENSENET_LAYERS:
        models[f"densenet{depth}"] = (1000, _densenet(depth), DenseNet)
    return models


_MODELS = _models()
#: What the name decides, not the caller.
_DECIDED = {"self", "blocks", "widths", "block", "stem", "stem_channels", "layers", "growth"}
_COMMON = {"num_classes", "in_channels", "fused"}


def list_models() -> list[str]:
    """Names that :func:`create_model` knows: CIFAR before ImageNet, by family and depth."""
    return list(_MODELS)


def _nearest(name: str) -> list[str]:
    """Names that may have been meant, best first; the ending is easily forgotten."""
    scores: dict[str, float] = {}
    for asked in (name, f"{name}_cifar"):
        for known in difflib.get_close_matches(asked, list_models(), n=3, cutoff=0.5):
            ratio = difflib.SequenceMatcher(None, asked, known).ratio()
            scores[known] = max(ratio, scores.get(known, 0.0))
    likely = sorted(scores, key=scores.get, reverse=True)
    return [known for known in likely if difflib.SequenceMatcher(None, name, known).ratio() >= 0.5][:3]


def create_model(
    name: str, num_classes: int | None = None, fused: bool = True, in_channels: int = 3, **options: Any
) -> nn.Module:
    """A net by its name, with fresh parameters.

    Args:
        name: one of :func:`list_models`. For 32x32 images: ``resnet{depth}_cifar`` (2015),
            ``preact_resnet{depth}_cifar`` (2016), with basic units for depths 20, 32, 44, 56, 110 and 1202
            and bottlenecks for 29, 164 and 1001, ``plain{depth}_cifar``, ``wrn{depth}_{width}_cifar``,
            ``densenet_bc{depth}_{growth}_cifar``. For ImageNet: ``resnet{depth}``, ``preact_resnet{depth}``,
            ``densenet{depth}``.
        num_classes: outputs; by default those of the data set, 10 or 1000.
        fused: fused operators wherever they apply; False builds the same net of plain ``nn.Module`` units,
            with the same ``state_dict`` keys and, after the same seed, the same parameters.
        in_channels: channels of the images.
        options: ``device``, ``dtype``; for ResNets ``shortcut``, ``shortcut_options``, ``order``,
            ``projection``, ``first_activation``, ``stride_in``, ``dropout``, ``unit_options`` (see
            :class:`resnet_fused.models.ResNet` and :class:`resnet_fused.reference.ResidualUnit`); for
            DenseNets ``dropout``, ``unit_options``. The defaults are what the net's paper did.

    Raises:
        ValueError: an unknown name (the message has the nearest ones), an unknown option, or a combination of
            options without meaning.
    """
    if name not in _MODELS:
        close = _nearest(name)
        known = (
            f"Did you mean {' or '.join(close)}?" if close else f"Known models: {', '.join(list_models())}"
        )
        raise ValueError(f"Unknown model {name!r}. {known}")
    classes, build, kind = _MODELS[name]
    known = [o for o in inspect.signature(kind.__init__).parameters if o not in _DECIDED | _COMMON]
    for option in options:
        if option not in known:
            raise ValueError(f"{name} has no option {option!r}: its options are {', '.join(known)}")
    return build(
        num_classes=classes if num_classes is None else num_classes,
        in_channels=in_channels,
        fused=fused,
        **options,
    )
