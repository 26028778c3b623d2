"""Recipes: the settings with which papers train, by name. A recipe is a set of defaults, nothing more."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from typing import Any

from .errors import UserError

__all__ = ["RECIPES", "Recipe", "describe_recipes", "recipe_settings"]


@dataclass(frozen=True)
class Recipe:
    """Fields of ``TrainOptions`` with their values, where they are from, and what to know of them."""

    source: str
    settings: dict[str, Any]
    notes: str


_HE = {
    "batch_size": 128,
    "lr": 0.1,
    "momentum": 0.9,
    "nesterov": False,
    "weight_decay": 1e-4,
    "schedule": "step",
    "gamma": 0.1,
}

RECIPES = {
    "he2016": Recipe(
        "He et al. 2016, Identity Mappings in Deep Residual Networks, appendix; He et al. 2015, section 4.2",
        {
            **_HE,
            "iterations": 64_000,
            "milestone_iterations": [32_000, 48_000],
            "warmup_iterations": 400,
            "warmup_lr": 0.01,
        },
        "Momentum as the paper writes it, 0.9 and no word of Nesterov (the experiments were done in Caffe, "
        "whose SGD is the classical one); the authors' Torch code has Nesterov: add --nesterov for that. "
        "Weight decay on all parameters, norms and biases included. The paper's batch lay on two GPUs, 64 "
        "images each, so its BatchNorms saw 64: --accumulate 2 does the same.",
    ),
    "he2016-batch64": Recipe(
        "KaimingHe/resnet-1k-layers, its README's command, with the schedule of fb.resnet.torch (table 4, "
        "dagger)",
        {
            **_HE,
            "batch_size": 64,
            "nesterov": True,
            "epochs": 200,
            "milestones": [80, 121],
        },
        "What gave 4.62 % with ResNet-1001. Nothing but the batch is scaled: the learning rate stays 0.1, "
        "the length is told in epochs (200; drops after 80 and 121), so twice the steps an epoch. Nesterov, "
        "and no warm-up, as in that code.",
    ),
    "wrn": Recipe(
        "Zagoruyko and Komodakis 2016, Wide Residual Networks, section 3, implementation details",
        {
            "batch_size": 128,
            "lr": 0.1,
            "momentum": 0.9,
            "nesterov": True,
            "weight_decay": 5e-4,
            "epochs": 200,
            "schedule": "step",
            "milestones": [60, 120, 160],
            "gamma": 0.2,
        },
        "Dropout is the net's: --model-option dropout=0.3.",
    ),
    "imagenet": Recipe(
        "torchvision's references/classification (lr 0.1 for 256 images, 90 epochs), with label smoothing "
        "(Szegedy et al. 2016), a cosine (Loshchilov and Hutter 2017) and an average of the weights",
        {
            "model": "preact_resnet50",
            "batch_size": 256,
            "lr": 0.1,
            "momentum": 0.9,
            "nesterov": True,
            "weight_decay": 1e-4,
            "epochs": 90,
            "schedule": "cosine",
            "warmup": 5.0,
            "label_smoothing": 0.1,
            "ema": 0.9999,
            "channels_last": True,
        },
        "For a directory with train/ and val/, one directory per class. Random resized crops and mirroring "
        "of torchvision; tested on the centre crop after resizing. For another batch scale --lr with it.",
    ),
}


def recipe_settings(name: str) -> dict[str, Any]:
    """The settings of a recipe.

    Raises:
        UserError: an unknown name.
    """
    if name not in RECIPES:
        raise UserError(f"unknown recipe {name!r}: expected one of {', '.join(RECIPES)}")
    return dict(RECIPES[name].settings)


def describe_recipes() -> str:
    """All recipes, as text: what ``--recipe list`` prints."""
    lines = []
    for name, recipe in RECIPES.items():
        options = " ".join(_option(field, value) for field, value in recipe.settings.items())
        lines += [name]
        for text in (recipe.source, options, recipe.notes):
            lines += textwrap.wrap(text, 100, initial_indent="    ", subsequent_indent="    ",
                                   break_long_words=False, break_on_hyphens=False)  # fmt: skip
    return "\n".join(lines)


def _option(field: str, value: Any) -> str:
    flag = "--" + field.replace("_", "-")
    if isinstance(value, bool):
        return flag if value else flag.replace("--", "--no-", 1)
    return f"{flag} {' '.join(map(str, value)) if isinstance(value, list) else value}"
