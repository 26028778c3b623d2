"""The handwritten digits that scikit-learn ships (1,797 images of 8x8 pixels, 10 classes)."""

from __future__ import annotations

import numpy as np

from ..lazy import require
from .images import ImageDataset

__all__ = ["load_digits"]

_SIDE = 32
_TEST_IMAGES = 360


def load_digits() -> ImageDataset:
    """1,437 train and 360 test images, one channel, enlarged to 32x32 with bilinear interpolation.

    The split is fixed: a permutation drawn once from NumPy's legacy generator, whose stream never changes.
    Source: Alpaydin and Kaynak, "Optical Recognition of Handwritten Digits", UCI, 1998 (its test part).
    """
    digits = require("sklearn.datasets", "scikit-learn", "--data digits").load_digits()
    small = digits.images.astype(np.float64)  # 0..16
    large = np.rint(_enlarge(small, _SIDE) * (255 / 16)).astype(np.uint8)[..., None]
    order = np.random.RandomState(0).permutation(len(large))
    test, train = order[:_TEST_IMAGES], order[_TEST_IMAGES:]
    labels = digits.target
    return ImageDataset.from_numpy(
        "digits",
        (large[train], labels[train]),
        (large[test], labels[test]),
        classes=10,
        horizontal_flip=False,
    )


def _enlarge(images: np.ndarray, side: int) -> np.ndarray:
    """Bilinear interpolation of (N, h, w) to (N, side, side), pixel centres aligned as in image libraries."""

    def weights(size: int) -> np.ndarray:
        position = np.clip((np.arange(side) + 0.5) * size / side - 0.5, 0, size - 1)
        low = np.minimum(position.astype(int), size - 2)
        matrix = np.zeros((side, size))
        matrix[np.arange(side), low] = 1 - (position - low)
        matrix[np.arange(side), low + 1] = position - low
        return matrix

    return weights(images.shape[1]) @ images @ weights(images.shape[2]).T
