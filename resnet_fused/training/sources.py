"""Where a run gets its batches from: images in memory, or a directory of image files."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from .batches import Normalization, augmented_batches, epoch_generator, plain_batches
from .datasets import ImageDataset, load_dataset
from .image_folder import ImageFolderSource, is_image_folder

__all__ = ["BatchSource", "InMemorySource", "open_source"]

Batches = Iterator[tuple[Tensor, Tensor]]


class BatchSource(Protocol):
    """Batches of float32 images (B, C, H, W), channels_last, and int64 labels (B,), on the run's device.

    Attributes:
        name: of the data set.
        classes, channels: of the images.
        train_count, test_count: images in each split.
        normalization: what was applied to the images.
        in_flight: batches that are prepared ahead of the one that is asked for.
    """

    name: str
    classes: int
    channels: int
    train_count: int
    test_count: int
    normalization: Normalization
    in_flight: int

    def fingerprint(self) -> str:
        """Tells whether a resumed run reads the data that it began with."""
        ...

    def train_batches(self, batch_size: int, seed: int, epoch: int, first_batch: int = 0) -> Batches:
        """The augmented batches of an epoch from ``first_batch`` on; they follow from (seed, epoch) alone."""
        ...

    def test_batches(self, batch_size: int) -> Batches:
        """The test images in order, not augmented."""
        ...


class InMemorySource:
    """A data set that lies on the device as 8-bit tensors, and is augmented there."""

    in_flight = 0

    def __init__(
        self, dataset: ImageDataset, device: torch.device, normalization: Normalization | None = None
    ) -> None:
        self._dataset = dataset
        self.name, self.classes, self.channels = dataset.name, dataset.classes, dataset.channels
        self.normalization = normalization or Normalization(*dataset.statistics())
        self._train = dataset.train_images.to(device), dataset.train_labels.to(device)
        self._test = dataset.test_images.to(device), dataset.test_labels.to(device)
        self.train_count, self.test_count = len(self._train[0]), len(self._test[0])

    def fingerprint(self) -> str:
        return self._dataset.fingerprint()

    def train_batches(self, batch_size: int, seed: int, epoch: int, first_batch: int = 0) -> Batches:
        return augmented_batches(
            *self._train,
            batch_size,
            self.normalization,
            epoch_generator(seed, epoch),
            horizontal_flip=self._dataset.horizontal_flip,
            first_batch=first_batch,
        )

    def test_batches(self, batch_size: int) -> Batches:
        return plain_batches(*self._test, batch_size, self.normalization)


def open_source(
    data: str,
    device: torch.device,
    *,
    allow_unverified: bool = False,
    image_size: int = 224,
    workers: int = 4,
    normalization: dict[str, Any] | None = None,
) -> BatchSource:
    """The source of batches that ``data`` names: see ``load_dataset``, or a directory with train/ and val/.

    Args:
        image_size, workers: for directories of images: pixels of a crop, and processes that read.
        normalization: mean and std of a checkpoint; None: those of the data.

    Raises:
        UserError: the data cannot be used; the message says what to do.
    """
    known = None if normalization is None else Normalization(**normalization)
    if is_image_folder(data):
        return ImageFolderSource(data, device, image_size=image_size, workers=workers, normalization=known)
    return InMemorySource(load_dataset(data, allow_unverified=allow_unverified), device, known)
