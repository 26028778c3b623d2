"""``resnet-fused demo``: one net, trained with plain and with fused units, side by side."""

from __future__ import annotations

import itertools
import os
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from ..models import create_model
from .batches import Normalization, augmented_batches, epoch_generator, plain_batches
from .curves import pyplot
from .datasets import load_dataset
from .errors import UserError
from .lazy import require
from .loop import Result, evaluate, train_step
from .options import OneLineParser, add_runtime_arguments, at_least, use_device
from .schedules import make_schedule
from .step_memory import StepMemory, step_memory

__all__ = ["main"]

_COMPARED_STEPS = 50
_WARMUP_EPOCHS = 5
_MiB = 2**20


@dataclass
class _Contender:
    """A net, and what was measured of it.

    "plain" and "fused" are trained to the end. "control" is plain too, and trained for the steps that are
    compared
    on the same batches with their images in reverse order: what rounding alone does to the losses.
    """

    title: str
    model: nn.Module
    optimizer: torch.optim.Optimizer
    losses: list[float] = field(default_factory=list)  # of every step
    step_ms: list[float] = field(default_factory=list)  # of every step after the first epoch
    tests: list[Result] = field(default_factory=list)  # after every epoch
    memory: StepMemory = StepMemory(0, 0)


def main(argv: Sequence[str] | None = None) -> int:
    """Train both, print the table, write the plot."""
    parser = OneLineParser(
        prog="resnet-fused demo",
        allow_abbrev=False,
        description="Train a pre-activation ResNet on "
        "scikit-learn's digits (32x32, channels_last) twice: with plain nn.Module units and with fused "
        "units, from the same weights and on the same batches.",
    )
    parser.add_argument("--model", default="preact_resnet20_cifar", help="default: %(default)s")
    parser.add_argument("--epochs", type=at_least(int, 2), default=12, help="default: %(default)s")
    parser.add_argument("-b", "--batch-size", type=at_least(int, 2), default=64, help="default: %(default)s")
    parser.add_argument(
        "--lr", type=at_least(float, 0), default=0.05, help="highest one; default: %(default)s"
    )
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument(
        "--output",
        metavar="FILE",
        default="resnet_fused_demo.png",
        help="the plot; default: %(default)s in the current directory",
    )
    add_runtime_arguments(parser)
    arguments = parser.parse_args(argv)
    device = use_device(getattr(arguments, "device", None), getattr(arguments, "threads", None))
    plt = pyplot("the plot of the demo")
    tqdm = require("tqdm", "tqdm", "the progress bar").tqdm

    dataset = load_dataset("digits")
    normalization = Normalization(*dataset.statistics())
    train = dataset.train_images.to(device), dataset.train_labels.to(device)
    test = dataset.test_images.to(device), dataset.test_labels.to(device)
    batch_size = min(arguments.batch_size, len(train[0]))
    steps = -(-len(train[0]) // batch_size)
    # A slow start: rounding alone makes two runs of a ReLU net part, the sooner the larger the steps.
    warmup = min(_WARMUP_EPOCHS, arguments.epochs // 2) * steps
    schedule = make_schedule("cosine", arguments.lr, arguments.epochs * steps, warmup_steps=warmup)

    plain, fused, control = (
        _contender(title, arguments, dataset.channels, dataset.classes, device)
        for title in ("plain", "fused", "control")
    )
    size = (batch_size, dataset.channels, *train[0].shape[1:3])
    for one in (plain, fused):
        one.memory = step_memory(arguments.model, fused=one is fused, input_size=size, device=device)

    compared = min(_COMPARED_STEPS, arguments.epochs * steps)
    total = 2 * arguments.epochs * steps + compared
    seconds = 0.1 if sys.stderr.isatty() else 10.0  # between two lines where they do not overwrite each other
    with tqdm(total=total, unit="step", mininterval=seconds, dynamic_ncols=True) as bar:

        def run_epoch(one: _Contender, epoch: int, limit: int = steps) -> None:
            bar.set_description(f"epoch {epoch + 1}/{arguments.epochs} {one.title}")
            one.model.train()
            batches = augmented_batches(
                *train,
                batch_size,
                normalization,
                epoch_generator(arguments.seed, epoch),
                horizontal_flip=False,
            )
            for step, (images, labels) in enumerate(itertools.islice(batches, limit), epoch * steps):
                if one is control:
                    images, labels = images.flip(0), labels.flip(0)
                start = time.perf_counter()
                loss, _ = train_step(one.model, one.optimizer, images, labels, lr=schedule(step))
                one.losses.append(float(loss))  # waits for the device
                if epoch > 0 and len(labels) == batch_size:
                    one.step_ms.append(1e3 * (time.perf_counter() - start))
                bar.update()

        for epoch in range(-(-compared // steps)):
            run_epoch(control, epoch, compared - epoch * steps)
        for epoch in range(arguments.epochs):
            # In turn and in changing order, so that whatever else the machine does meets both.
            for one in (plain, fused) if epoch % 2 == 0 else (fused, plain):
                run_epoch(one, epoch)
                one.tests.append(evaluate(one.model, plain_batches(*test, batch_size, normalization)))
            bar.set_postfix(
                {one.title: f"{100 * one.tests[-1].accuracy:.1f}%" for one in (plain, fused)}, refresh=False
            )

    print(_table(plain, fused, control, arguments, device))
    path = os.path.abspath(arguments.output)
    _plot(plt, path, plain, fused, steps, arguments.model)
    print(f"curves: {path}")
    return 0


def _contender(title: str, arguments, channels: int, classes: int, device: torch.device) -> _Contender:
    torch.manual_seed(arguments.seed)
    try:
        model = create_model(
            arguments.model, num_classes=classes, in_channels=channels, fused=title == "fused"
        )
    except ValueError as error:
        raise UserError(str(error)) from error
    model.to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=arguments.lr, momentum=0.9, nesterov=True, weight_decay=1e-4
    )
    return _Contender(title, model, optimizer)


def _table(plain: _Contender, fused: _Contender, control: _Contender, arguments, device: torch.device) -> str:
    ms = [statistics.median(one.step_ms) for one in (plain, fused)]
    differences = [
        max(abs(a - b) / abs(a) for a, b in zip(plain.losses, other.losses[:_COMPARED_STEPS]))
        for other in (fused, control)
    ]
    last = [one.tests[-1] for one in (plain, fused)]
    mean_loss = [
        statistics.fmean(one.losses[-len(one.losses) // arguments.epochs :]) for one in (plain, fused)
    ]
    rows = [
        ("", "plain", "fused", "fused / plain"),
        ("train loss, mean of the last epoch", *(f"{value:.4f}" for value in mean_loss), ""),
        ("test loss", *(f"{result.loss:.4f}" for result in last), ""),
        ("test accuracy", *(f"{100 * result.accuracy:.2f}%" for result in last), ""),
        ("ms per training step, median", *_ratio(ms)),
        ("peak memory of a step, MiB", *_ratio([one.memory.peak / _MiB for one in (plain, fused)])),
        ("  held for the backward, MiB", *_ratio([one.memory.saved / _MiB for one in (plain, fused)])),
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))])
        for row in rows
    ]
    lines.insert(1, "-" * len(lines[0]))
    return "\n".join(
        [
            "",
            f"{arguments.model}, digits 32x32, batch {arguments.batch_size}, {arguments.epochs} epochs, "
            f"float32, channels_last, {device.type}"
            + (f" ({torch.get_num_threads()} threads)" if device.type == "cpu" else ""),
            "",
            *lines,
            "",
            f"largest relative difference of the losses in the first {len(control.losses)} steps: "
            f"{differences[0]:.1e}",
            f"(plain units on the same batches in reverse order, which differs in rounding alone: "
            f"{differences[1]:.1e})",
            "memory: the tensors of forward and backward; not parameters, their gradients and the batch",
            f"fused is {ms[0] / ms[1]:.2f} x as fast as plain",
        ]
    )


def _ratio(pair: Sequence[float]) -> tuple[str, str, str]:
    """Cells of plain, fused, and fused / plain."""
    plain, fused = pair
    return f"{plain:.1f}", f"{fused:.1f}", f"{fused / plain:.2f}"


def _plot(plt, path: str, plain: _Contender, fused: _Contender, steps: int, title: str) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for one, style in (
        (plain, {"color": "tab:gray", "linewidth": 3, "alpha": 0.6}),
        (fused, {"color": "tab:red"}),
    ):
        left.plot(range(1, len(one.losses) + 1), one.losses, label=one.title, **style)
        right.plot(
            range(1, len(one.tests) + 1),
            [100 * result.accuracy for result in one.tests],
            label=one.title,
            **style,
        )
    left.set(xlabel="step", ylabel="training loss", yscale="log")
    right.set(xlabel=f"epoch ({steps} steps)", ylabel="test accuracy, %")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.suptitle(f"{title} on scikit-learn's digits: plain and fused units")
    try:
        figure.savefig(path, dpi=120)
    except OSError as error:
        raise UserError(
            f"cannot write the plot {path}: {error.strerror or error}; choose another --output"
        ) from error
    finally:
        plt.close(figure)
