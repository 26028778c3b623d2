"""``resnet-fused train``."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence

from .curves import CURVES, Curve, draw_curves, pyplot
from .nets import told_options
from .options import TrainOptions
from .recipes import describe_recipes
from .run import train
from .train_arguments import parse_train

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Train as ``argv`` says, and draw the curves."""
    given, paths = parse_train(argv)
    if given.get("recipe") == "list":
        print(describe_recipes())
        return 0
    if paths.curves:
        pyplot("--curves")  # what is missing is told before the training
    run = train(given, output=paths.output, resume=paths.resume, overwrite=paths.overwrite)
    if paths.curves is None and importlib.util.find_spec("matplotlib") is None:
        print("curves are not drawn: that needs the package matplotlib: pip install matplotlib")
    elif paths.curves is not False:
        path = os.path.join(run.directory, CURVES)
        draw_curves(path, [Curve(run.options.model, run.history, steps=run.steps)], _title(run.options))
        print(f"curves: {path}")
    return 0


def _title(options: TrainOptions) -> str:
    told = [options.model, *told_options(options.model_options)]
    told += ["fused" if options.fused else "plain", f"batch {options.batch_size}", f"seed {options.seed}"]
    return ", ".join([*told, *([options.recipe] if options.recipe else [])])
