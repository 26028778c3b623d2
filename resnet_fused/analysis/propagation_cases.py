"""Nets that are compared: which, and what is measured of each while it trains."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..models import create_model
from ..training.batches import Normalization, augmented_batches, epoch_generator, plain_batches
from ..training.datasets import ImageDataset
from ..training.errors import UserError
from ..training.loop import train_step
from .observed_units import residual_units
from .propagation import Propagation, measure_propagation

__all__ = ["PAPER", "Case", "Comparison", "Measured", "Training", "make_cases", "measure_case", "try_case"]

#: Section 3 of the paper: all of these on ResNet-110 with original units.
SIX_SHORTCUTS = (
    "identity",
    "constant_scaling",
    "exclusive_gating",
    "shortcut_only_gating",
    "conv",
    "dropout",
)
FIVE_ORDERS = (
    "original",
    "bn_after_addition",
    "relu_before_addition",
    "relu_only_preactivation",
    "full_preactivation",
)


@dataclass(frozen=True)
class Case:
    """One net of a comparison.

    Attributes:
        label: what tells it from the others.
        model: name, for ``create_model``.
        order, shortcut: None for what the name says.
        shortcut_options: see :class:`resnet_fused.reference.ResidualUnit`.
    """

    label: str
    model: str
    order: str | None = None
    shortcut: str | None = None
    shortcut_options: dict[str, float | str] = field(default_factory=dict)

    def build(self, classes: int, channels: int, seed: int) -> nn.Module:
        """The plain net.

        Raises:
            UserError: no such net, or not one of residual units.
        """
        options = {"order": self.order, "shortcut": self.shortcut, "shortcut_options": self.shortcut_options}
        options = {name: value for name, value in options.items() if value}
        torch.manual_seed(seed)
        try:
            net = create_model(self.model, num_classes=classes, in_channels=channels, fused=False, **options)
            residual_units(net)
        except ValueError as error:
            raise UserError(str(error)) from error
        except TypeError as error:
            raise UserError(f"{self.model} cannot be analysed: {error}") from error
        return net


@dataclass(frozen=True)
class Training:
    """What is done to each net.

    SGD with momentum 0.9, Nesterov's, weight decay 1e-4, a constant learning rate; the same batches,
    augmented, for all.

    Attributes:
        steps: before which steps is measured; 0 is the initialisation. The largest ends the training.
        batch_size: images of a step, and of a measurement (the first of the test images, for all nets and
            steps).
        lr: the paper's is 0.01 for the first 400 steps of ResNet-110, its warm-up.
        seed: of the initial weights, the batches, and what dropout draws.
        dtypes: in which is measured; training is in float32.
    """

    steps: tuple[int, ...] = (0, 50)
    batch_size: int = 32
    lr: float = 0.01
    seed: int = 0
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float64)


@dataclass(frozen=True)
class Comparison:
    """Nets side by side: a picture.

    Attributes:
        name: stem of its files' names; "" for files without one.
        title: of the picture; "" for the names of its nets.
    """

    name: str
    title: str
    cases: tuple[Case, ...]
    training: Training


@dataclass
class Measured:
    """One net's measurements.

    Attributes:
        snapshots: (step, what was measured then), of each dtype.
        losses: of each training step; where training diverged, the last is not finite and snapshots end
            before it.
    """

    case: Case
    snapshots: list[tuple[int, Propagation]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)


def make_cases(
    models: Sequence[str],
    shortcuts: Sequence[tuple[str, dict[str, float | str]]] | None,
    orders: Sequence[str] | None,
) -> tuple[Case, ...]:
    """Every model with every shortcut and order; a label tells what differs."""
    cases = []
    for model in models:
        for shortcut, options in shortcuts or [(None, {})]:
            for order in orders or [None]:
                told = ", ".join(
                    f"{name}={value:g}" if isinstance(value, float) else f"{name}={value}"
                    for name, value in options.items()
                )
                parts = [model] * (len(models) > 1)
                parts += [f"{shortcut} ({told})" if told else str(shortcut)] * (len(shortcuts or ()) > 1)
                parts += [str(order)] * (len(orders or ()) > 1)
                cases.append(Case(", ".join(parts) or model, model, order, shortcut, options))
    return tuple(cases)


def try_case(case: Case) -> None:
    """Raise the UserError that building it will raise, before time is spent; nothing is computed."""
    with torch.device("meta"):
        case.build(2, 3, 0)


def measure_case(
    case: Case, training: Training, data: ImageDataset, device: torch.device, say: Callable[[str], None]
) -> Measured:
    """Train a net and measure it before the steps that ``training`` names.

    Args:
        say: is told what is being done.

    Raises:
        UserError: the data has too few images, or images too small for the net.
    """
    net = case.build(data.classes, data.channels, training.seed)
    net.to(device, memory_format=torch.channels_last).train()
    normalization = Normalization(*data.statistics())
    for split in (data.train_images, data.test_images):
        if len(split) < training.batch_size:
            raise UserError(
                f"a batch of {training.batch_size} images is more than the {len(split)} of {data.name}"
            )
    count = training.batch_size
    probe = next(
        plain_batches(
            data.test_images[:count].to(device), data.test_labels[:count].to(device), count, normalization
        )
    )
    optimizer = torch.optim.SGD(
        net.parameters(), lr=training.lr, momentum=0.9, nesterov=True, weight_decay=1e-4
    )
    batches = _full_batches(data, training, normalization, device)
    measured = Measured(case)
    torch.manual_seed(training.seed)
    for step in range(max(training.steps) + 1):
        if step in training.steps:
            for dtype in training.dtypes:
                say(f"{case.label}: measuring before step {step}, {str(dtype).removeprefix('torch.')}")
                measured.snapshots.append((step, _measure(net, probe, dtype, training.seed, case)))
        if step == max(training.steps):
            break
        say(f"{case.label}: step {step + 1} of {max(training.steps)}")
        loss, _ = train_step(net, optimizer, *next(batches), lr=training.lr)
        measured.losses.append(float(loss))
        if not math.isfinite(measured.losses[-1]):
            break
    return measured


def _measure(
    net: nn.Module, probe: tuple[Tensor, Tensor], dtype: torch.dtype, seed: int, case: Case
) -> Propagation:
    images, labels = probe
    if dtype != torch.float32:
        net, images = copy.deepcopy(net).to(dtype), images.to(dtype)
    try:
        return measure_propagation(net, images, labels, seed=seed)
    except ValueError as error:  # BatchNorm of one value per channel, for example
        raise UserError(f"{case.label} cannot be measured on these images: {error}") from error


def _full_batches(
    data: ImageDataset, training: Training, normalization: Normalization, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    images, labels = data.train_images.to(device), data.train_labels.to(device)
    epoch = 0
    while True:
        generator = epoch_generator(training.seed, epoch)
        for batch in augmented_batches(
            images,
            labels,
            training.batch_size,
            normalization,
            generator,
            horizontal_flip=data.horizontal_flip,
        ):
            if len(batch[1]) == training.batch_size:
                yield batch
        epoch += 1


def _paper() -> tuple[Comparison, ...]:
    plain = [(kind, {}) for kind in SIX_SHORTCUTS]
    # Small batches: minutes on two cores. The norms see a batch of 16 at 8x8 as 1,024 values of each channel.
    medium, deep = Training(steps=(0, 40), batch_size=16), Training(steps=(0, 10), batch_size=8)
    return (
        Comparison(
            "resnet110-shortcuts",
            "ResNet-110, original units: six shortcuts",
            make_cases(["resnet110_cifar"], plain, None),
            medium,
        ),
        Comparison(
            "resnet110-orders",
            "ResNet-110, identity shortcuts: five activation orders",
            make_cases(["resnet110_cifar"], None, FIVE_ORDERS),
            medium,
        ),
        Comparison(
            "resnet1001-orders",
            "ResNet-1001: original and full pre-activation units",
            make_cases(["resnet1001_cifar"], None, ["original", "full_preactivation"]),
            deep,
        ),
    )


#: The comparisons of docs/propagation.md.
PAPER = _paper()
