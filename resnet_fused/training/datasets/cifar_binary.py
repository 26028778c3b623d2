"""CIFAR's binary version: records of label bytes and 3,072 pixel bytes (red, green, blue plane of 32x32)."""

from __future__ import annotations

import numpy as np

from ..errors import UserError
from .folder import Folder

__all__ = ["CIFAR100_FILES", "CIFAR10_FILES", "load_cifar10", "load_cifar100", "planes_to_images"]

CIFAR10_FILES = (*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin")
CIFAR100_FILES = ("train.bin", "test.bin")
_PIXELS = 3 * 32 * 32
_Split = tuple[np.ndarray, np.ndarray]


def load_cifar10(folder: Folder, allow_unverified: bool) -> tuple[str, _Split, _Split]:
    batches = [_records(folder, name, 1, 10_000, allow_unverified) for name in CIFAR10_FILES]
    images, labels = (np.concatenate(parts) for parts in zip(*batches[:-1]))
    return "cifar10", (images, labels), batches[-1]


def load_cifar100(folder: Folder, allow_unverified: bool) -> tuple[str, _Split, _Split]:
    train = _records(folder, "train.bin", 2, 50_000, allow_unverified)
    return "cifar100", train, _records(folder, "test.bin", 2, 10_000, allow_unverified)


def _records(folder: Folder, name: str, label_bytes: int, published: int, allow_unverified: bool) -> _Split:
    """Images and the last of each record's labels (of CIFAR-100's two, the fine one)."""
    content = folder.read(name)
    size = label_bytes + _PIXELS
    if len(content) % size:
        raise UserError(
            f"{folder.describe(name)} has {len(content)} bytes, which is not a multiple of the {size} bytes "
            f"of a record: it is truncated or not CIFAR's binary version; download it again"
        )
    if len(content) != published * size and not allow_unverified:
        raise UserError(
            f"{folder.describe(name)} has {len(content) // size} images, the published file has {published}: "
            f"download it again, or pass --allow-unverified to use it as it is"
        )
    records = np.frombuffer(content, dtype=np.uint8).reshape(-1, size)
    return planes_to_images(records[:, label_bytes:]), records[:, label_bytes - 1].astype(np.int64)


def planes_to_images(rows: np.ndarray) -> np.ndarray:
    """Rows of 3,072 bytes, colour plane after colour plane, to images of shape (N, 32, 32, 3)."""
    return np.ascontiguousarray(rows.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
