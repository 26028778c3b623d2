"""A labelled image data set, as 8-bit tensors in memory."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

__all__ = ["ImageDataset"]


@dataclass(frozen=True)
class ImageDataset:
    """Images and labels of the train and the test split.

    Attributes:
        name: "digits", "cifar10" or "cifar100".
        train_images, test_images: uint8, (N, H, W, C): rows of a channels_last batch lie together.
        train_labels, test_labels: int64, (N,).
        classes: number of classes.
        horizontal_flip: whether a mirrored image keeps its label.
        lossy: whether these are JPEG-encoded copies of images that were published without loss.
    """

    name: str
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    classes: int
    horizontal_flip: bool
    lossy: bool = False

    @classmethod
    def from_numpy(
        cls,
        name: str,
        train: tuple[np.ndarray, np.ndarray],
        test: tuple[np.ndarray, np.ndarray],
        classes: int,
        horizontal_flip: bool,
        lossy: bool = False,
    ) -> ImageDataset:
        """From (uint8 images of shape (N, H, W, C), integer labels) of both splits."""

        def tensors(split: tuple[np.ndarray, np.ndarray]) -> tuple[Tensor, Tensor]:
            images, labels = split
            return (
                torch.from_numpy(np.ascontiguousarray(images, dtype=np.uint8)),
                torch.from_numpy(np.ascontiguousarray(labels, dtype=np.int64)),
            )

        return cls(name, *tensors(train), *tensors(test), classes, horizontal_flip, lossy)

    @property
    def channels(self) -> int:
        return self.train_images.shape[3]

    def statistics(self) -> tuple[list[float], list[float]]:
        """Mean and standard deviation of each channel of the train split, in units of the full scale (255).

        Exact: sums of integers, from the histogram of each channel.
        """
        mean, std = [], []
        values = np.arange(256, dtype=np.float64) / 255
        images = self.train_images.numpy()
        for channel in range(self.channels):
            counts = np.bincount(images[..., channel].reshape(-1), minlength=256)
            m = float((counts * values).sum() / counts.sum())
            variance = float((counts * (values - m) ** 2).sum() / counts.sum())
            mean.append(m)
            std.append(variance**0.5 or 1.0)  # a channel without contrast is only shifted
        return mean, std

    def fingerprint(self) -> str:
        """SHA-256 of all images and labels: tells whether a resumed run reads the data that it began with."""
        digest = hashlib.sha256()
        for part in (self.train_images, self.train_labels, self.test_images, self.test_labels):
            digest.update(repr(tuple(part.shape)).encode())
            digest.update(part.numpy())
        return digest.hexdigest()
